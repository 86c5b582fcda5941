"""The tokenizer of a model that was trained on recall tasks: text consists of token ids, as decimal numbers."""

import json
from pathlib import Path

from torchlmoe.data.recall.tasks import END
from torchlmoe.data.tokenizer import END_TOKENS, Tokenizer


def symbol_tokenizer(vocab_size: int) -> Tokenizer:
    """Returns a tokenizer that reads the text "17 4" as ids 17 and 4. END is the end token and the unknown token."""
    vocabulary = {END_TOKENS[0] if number == END else str(number): number for number in range(vocab_size)}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": END, "content": END_TOKENS[0], **special}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END_TOKENS[0]},
    }
    return Tokenizer(Path("recall.json"), content=json.dumps(content).encode())

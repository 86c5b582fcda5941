"""The tokenizer of a model that was trained on tasks of recall: their token ids as decimal numbers between spaces."""

import json
from pathlib import Path

from torchlmoe.data.recall.tasks import END
from torchlmoe.data.tokenizer import END_TOKENS, Tokenizer


def symbol_tokenizer(vocab_size: int) -> Tokenizer:
    """A tokenizer whose text "17 4" is the ids 17 and 4; id END is the end token, and stands for an unknown word."""
    vocabulary = {END_TOKENS[0] if number == END else str(number): number for number in range(vocab_size)}
    special = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    content = {
        "version": "1.0",
        "added_tokens": [{"id": END, "content": END_TOKENS[0], **special}],
        "pre_tokenizer": {"type": "WhitespaceSplit"},
        "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": END_TOKENS[0]},
    }
    return Tokenizer(Path("recall.json"), content=json.dumps(content).encode())

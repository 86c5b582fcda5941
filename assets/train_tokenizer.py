"""Trains the embedded tokenizer: byte-level BPE on the embedded training documents, end token at id 0.

python assets/train_tokenizer.py [--vocab-size 4096] [--output assets/tokenizer.json]
"""

import argparse
from pathlib import Path

import pyarrow.parquet as pq
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

ASSETS = Path(__file__).resolve().parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--output", type=Path, default=ASSETS / "tokenizer.json")
    arguments = parser.parse_args()

    tokenizer = Tokenizer(BPE())
    # use_regex: GPT-2's split into words, so that no merge crosses a space or joins letters and digits.
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=arguments.vocab_size,
        special_tokens=["<|endoftext|>"],
        # All 256 bytes, seen in training or not: any text can then be written.
        initial_alphabet=ByteLevel.alphabet(),
    )
    texts = pq.read_table(ASSETS / "embedded" / "train.parquet", columns=["text"])["text"].to_pylist()
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer.save(str(arguments.output))


if __name__ == "__main__":
    main()

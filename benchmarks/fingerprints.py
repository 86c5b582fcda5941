"""By what a generated page knows whether it is of the files as they are."""

import hashlib
import tokenize
from pathlib import Path


def fingerprint(path: Path) -> str:
    """Return a hash of a file's code, without comments, docstrings and spaces."""
    digest, first_of_line = hashlib.sha256(), True
    with tokenize.open(path) as file:
        for token in tokenize.generate_tokens(file.readline):
            if token.type in (tokenize.COMMENT, tokenize.NL) or (token.type == tokenize.STRING and first_of_line):
                continue
            layout = {tokenize.INDENT: ">", tokenize.DEDENT: "<", tokenize.NEWLINE: ";"}
            first_of_line = token.type in layout
            digest.update(layout.get(token.type, token.string).replace(" ", "").encode())
    return digest.hexdigest()[:16]

"""By what a generated page knows whether it is of the files as they are."""

import hashlib
import re
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


def parts_of(path: Path) -> set[Path]:
    """Return a file and the files of its folder that it imports, and that those import."""
    found, new = set(), {path}
    while new:
        found |= new
        names = {name for file in new for name in re.findall(r"^from \.(\w+) import", file.read_text(), re.MULTILINE)}
        new = {path.with_name(f"{name}.py") for name in names} - found
    return found

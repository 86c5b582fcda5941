"""Plain English: phrases that are never right in this repository appear in no file of it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("torchlmoe", "kernels", "benchmarks", "tests", "docs", "scripts", "train_configs")
SUFFIXES = {".py", ".md", ".toml", ".slurm", ".sh", ".svg"}

# Phrase -> what to write. A space also matches a line break with the marks of a comment.
BANNED = {
    r"(goes|going|go|went|gone) on": "continues, resumes",
    r"(hangs|hang|hung) on": "depends on",
    r"(hands|handed|hand|handing) (it |them )?on": "passes on",
    r"(is|are) told (of|by|which|how|what|to|apart)": "receives, knows",
    r"of elsewhere": "from another program",
    r"of (its|their|his|our) own": "its own ..., a separate ...",
    r"and so (many|much) more": "the number itself",
    r"by the way": "nothing: leave it out",
    r"what is (erased|told|given|kept|sent|logged|there)": "a noun",
    r"what there (is|are)": "a noun",
    r"such as there (is|are)": "if any",
    r"those that there are": "those that exist",
    r"where (it|they|one|that) (is|are|does|do) not\b": "if ... not",
    r"wherever": "if, in every place that",
    r"nothing but": "only",
    r"the one that it is": "a noun",
    r"on the way (in|out|back)": "in the forward, in the backward, at the input, at the output",
    r"the way (in|out|back)\b": "the input, the output, the inverse",
    r"back to back": "concatenated",
    r"had better": "should",
    r"has come of": "the result",
    r"no way (back|from)": "cannot",
    r"as of `": "see `...`, the same as `...`",
    r"(?<!there\s)is no (mixer|index|tokenizer|number|record|map|answer)\b": "is not a ...",
    r"(is|are) no more than": "is only",
    r"so-?manieth": "every N-th",
    r"(whoever|whichever)": "the process that, any",
    r"comes? (of|from) whom": "comes from ...",
    r"in silence": "silently, without a message",
    r"of which (a|one) \w+ (meets|sees|takes|has|gets)": "and each token ...",
    r"checked small": "checked on a small scale",
    r"what it (says|is told)": "a noun",
    r"was there (before|already)": "existed",
    r"(begins?|began|begun) anew": "starts again, restarts",
    r"it is trained here is ours": "the training settings are not those of the authors",
    r"(says|said) (for|of|by) whom": "a noun",
    r"by (the )?names that .{0,30} have for them": "by its names in ...",
    r"so many more": "the number itself",
    r"the other way round": "the reverse, swapped",
    r"from then on": "afterwards",
    r"if need be": "if necessary",
    r"where they lie": "without copying them",
    r"can(not)? be had": "is (not) available, can(not) be loaded",
    r"not there yet": "which must not exist",
    r"as they come": "in order",
    r"(has|is) gone before": "no longer exists",
    r"(serves|served) are": "supported are",
}


ANY = "|".join(f"(?:{phrase})" for phrase in BANNED)


def find(phrase: str, text: str) -> list[str]:
    """The places of a phrase, also across a line break and in names such as test_a_run_goes_on."""
    pattern = phrase.replace(" ", r"(?:[\s_]|\n\s*#\s)+")
    return [match.group() for match in re.finditer(rf"(?<![^\W_])(?:{pattern})", text, re.IGNORECASE)]


def test_no_file_has_a_banned_phrase():
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]
    files += [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "CITATION.cff", "Makefile")]
    files += [ROOT / name for name in ("train.py", "pyproject.toml", "mkdocs.yml")]
    found = []
    for path in files:
        if path.exists() and path != Path(__file__):
            text = path.read_text()
            if not find(ANY, text):  # one search for all phrases: nearly every file ends here
                continue
            for phrase, better in BANNED.items():
                for words in find(phrase, text):
                    line = text[: text.index(words)].count("\n") + 1
                    found.append(f"{path.relative_to(ROOT)}:{line}: {' '.join(words.split())!r}; write {better}")
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "text", ["the run goes on", "# it goes\n    # on here", "Goes\non", "def test_a_run_goes_on():"]
)
def test_phrases_are_found_across_lines_and_in_names(text):
    assert find(r"(goes|going) on", text)


def test_parts_of_words_are_not_phrases():
    assert not find(r"(goes|going) on", "forgoes on purpose")

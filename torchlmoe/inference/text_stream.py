"""Texts as they grow, for a terminal: whole characters only, one text after another."""

from collections.abc import Iterable, Iterator, Sequence

from torchlmoe.data.tokenizer import Tokenizer

UNFINISHED = "\ufffd"  # what bytes decode to that are no character, or not yet


class TextStream:
    """A text that is given token by token; what `push` and, at the end, `close` return adds up to the whole.

    A decoder may write a token otherwise after others than alone (a space before it, a byte of a character). So a
    window of the last tokens is decoded: what is new is what it has beyond its text before.
    """

    def __init__(self, tokenizer: Tokenizer, window: int = 64):
        self.tokenizer, self.window = tokenizer, window
        self.ids: list[int] = []  # of the window
        self.shown = ""  # its text so far
        self.in_bytes = False

    def push(self, index: int) -> str:
        """What is new, without a character whose bytes are not all there yet."""
        self.ids.append(index)
        text = self.tokenizer.decode(self.ids)
        # A token without a text of its own, as special ones are, does not end a row of bytes.
        self.in_bytes = self.tokenizer.is_byte(index) or (self.in_bytes and not self.tokenizer.decode([index]))
        if self.in_bytes or text.endswith(UNFINISHED) or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if len(self.ids) >= 2 * self.window:
            kept = self.ids[-self.window :]
            kept_text = self.tokenizer.decode(kept)
            if not self.tokenizer.is_byte(kept[0]) and not kept_text.startswith(UNFINISHED):  # else within a character
                self.ids, self.shown = kept, kept_text
        return new

    def close(self) -> str:
        """What was held back: a character that stayed unfinished, as U+FFFD."""
        return self.tokenizer.decode(self.ids)[len(self.shown) :]


def stream_in_order(
    tokenizer: Tokenizer, prompts: Sequence[Sequence[int]], steps: Iterable[Sequence[int | None]]
) -> Iterator[tuple[int, str]]:
    """Yields (row, new text): each prompt with its continuation, the rows one after another.

    steps: next tokens of all rows, None for ended ones. A row is yielded as it grows, once those before it have ended.
    """
    texts = [TextStream(tokenizer) for _ in prompts]
    waiting = ["".join(map(text.push, prompt)) for text, prompt in zip(texts, prompts, strict=True)]
    row = 0
    yield row, waiting[row]
    waiting[row] = ""
    for step in steps:
        for index, token in enumerate(step):
            if token is not None:
                waiting[index] += texts[index].push(token)
        while step[row] is None and row + 1 < len(prompts):
            yield row, waiting[row] + texts[row].close()
            row += 1
        yield row, waiting[row]
        waiting[row] = ""
    for index in range(row, len(prompts)):
        yield index, waiting[index] + texts[index].close()

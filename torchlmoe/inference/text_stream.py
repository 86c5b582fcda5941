"""Texts as they grow, for a terminal: whole characters only, one text after another."""

from collections.abc import Iterable, Iterator, Sequence

from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.inference.generate import generate_stepwise
from torchlmoe.inference.stop_strings import StopStrings
from torchlmoe.model.decoder import Decoder

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
        # A token without text, such as a special token, does not end a row of bytes.
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


class Row:
    """A prompt and the text that continues it, as the tokens come.

    prompt: its token ids. stop: stop strings, of the continuation alone.

    Attributes: `prompt_text`; `text`, the continuation so far that may be shown; `num_tokens`, of the continuation;
    `finish_reason`: "stop" (a stop string came), "end" (the end token) or "length", once the row is closed.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._stream, self._stop = TextStream(tokenizer), StopStrings(stop)
        self.prompt_text = "".join(map(self._stream.push, prompt))
        self.text, self.num_tokens, self.finish_reason = "", 0, ""

    def push(self, token: int) -> bool:
        """Takes the next token; returns whether it brought a stop string to its end."""
        self.num_tokens += 1
        self.text += self._stop.push(self._stream.push(token))
        return self._stop.found

    def close(self, max_new_tokens: int) -> None:
        """The row has ended: shows what was held back. Does nothing the second time."""
        if self.finish_reason:
            return
        self.text += self._stop.push(self._stream.close()) + self._stop.close()
        self.finish_reason = "stop" if self._stop.found else "length" if self.num_tokens == max_new_tokens else "end"


def continue_rows(
    model: Decoder, rows: Sequence[Row], prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options
) -> Iterator[None]:
    """Generates, and yields after each step; `rows` then have their texts so far. Options: see `generate_stepwise`."""

    def has_ended(row: int, token: int) -> bool:
        return rows[row].push(token)

    steps = generate_stepwise(model, prompts, max_new_tokens=max_new_tokens, has_ended=has_ended, **options)
    for step in steps:
        for row, token in zip(rows, step, strict=True):
            if token is None:
                row.close(max_new_tokens)
        yield
    for row in rows:
        row.close(max_new_tokens)
    yield


def stream_in_order(rows: Sequence[Row], steps: Iterable[object]) -> Iterator[tuple[int, str]]:
    """Yields (row, new text): each prompt with its continuation, the rows one after another.

    steps: see `continue_rows`. A row is yielded as it grows, once those before it have ended.
    """
    row, shown = 0, 0
    yield row, rows[row].prompt_text
    for _ in steps:
        while True:
            text = rows[row].text
            yield row, text[shown:]
            shown = len(text)
            if not rows[row].finish_reason or row + 1 == len(rows):
                break
            row, shown = row + 1, 0
            yield row, rows[row].prompt_text

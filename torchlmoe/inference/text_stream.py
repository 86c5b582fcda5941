"""Streams generated texts to a terminal: only whole characters, one text after another."""

from collections.abc import Iterable, Iterator, Sequence

from torchlmoe.data.tokenizer import Tokenizer
from torchlmoe.inference.generate import generate_stepwise
from torchlmoe.inference.stop_strings import StopStrings
from torchlmoe.model.decoder import Decoder

UNFINISHED = "\ufffd"  # the decoded text of bytes that are not a whole character


class TextStream:
    """Decodes a text token by token. The results of `push` and, at the end, of `close` add up to the whole text.

    The text of a token depends on the tokens before it: a space, or a byte of a character. So a window of the last
    tokens is decoded each time, and the new text is what it has beyond its previous text.
    """

    def __init__(self, tokenizer: Tokenizer, window: int = 64):
        self.tokenizer, self.window = tokenizer, window
        self.ids: list[int] = []  # the window's tokens
        self.shown = ""  # the window's text that was returned
        self.in_bytes = False

    def push(self, index: int) -> str:
        """Take the next token and return the new text, without a character whose bytes are incomplete."""
        self.ids.append(index)
        text = self.tokenizer.decode(self.ids)
        # A token without text, such as a special token, does not end a row of bytes.
        self.in_bytes = self.tokenizer.is_byte(index) or (self.in_bytes and not self.tokenizer.decode([index]))
        if self.in_bytes or text.endswith(UNFINISHED) or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        if len(self.ids) >= 2 * self.window:
            ids = self.ids[-self.window :]
            window_text = self.tokenizer.decode(ids)
            if not self.tokenizer.is_byte(ids[0]) and not window_text.startswith(UNFINISHED):  # not within a character
                self.ids, self.shown = ids, window_text
        return new

    def settle(self) -> str:
        """Return the text that is held back although its last character is complete: more bytes may follow a byte.

        A prompt needs it: what follows is the continuation.
        """
        text = self.tokenizer.decode(self.ids)
        if text.endswith(UNFINISHED) or not text.startswith(self.shown):
            return ""
        new, self.shown = text[len(self.shown) :], text
        return new

    def close(self) -> str:
        """Return the rest of the text: a character that stayed incomplete, as U+FFFD."""
        return self.tokenizer.decode(self.ids)[len(self.shown) :]


class Row:
    """A prompt and the text of its continuation, token by token.

    prompt: token ids. stop: stop strings; they apply to the continuation, not to the prompt.

    Attributes: `prompt_text`; `text`, the part of the continuation that may be shown; `num_tokens`, of the
    continuation; `finish_reason`: "" until the row is closed, then "stop" (a stop string), "end" (the end token) or
    "length".
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Sequence[int], stop: Sequence[str] = ()):
        self._stream, self._stop = TextStream(tokenizer), StopStrings(stop)
        self.prompt_text = "".join(map(self._stream.push, prompt)) + self._stream.settle()
        self.text, self.num_tokens, self.finish_reason = "", 0, ""

    def push(self, token: int) -> bool:
        """Take the next token. Returns whether it completed a stop string."""
        self.num_tokens += 1
        self.text += self._stop.push(self._stream.push(token))
        return self._stop.found

    def close(self, max_new_tokens: int) -> None:
        """End the row, and show the text that was held back. A second call does nothing."""
        if self.finish_reason:
            return
        self.text += self._stop.push(self._stream.close()) + self._stop.close()
        self.finish_reason = "stop" if self._stop.found else "length" if self.num_tokens == max_new_tokens else "end"


def continue_rows(
    model: Decoder, rows: Sequence[Row], prompts: Sequence[Sequence[int]], *, max_new_tokens: int, **options
) -> Iterator[None]:
    """Generates into `rows`, and yields after each step, when they have their new texts.

    prompts: token ids, one per row. options and errors: see `generate_stepwise`.
    """

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
    """Yields (row index, new text): each prompt with its continuation, the rows one after another.

    steps: an iterator such as `continue_rows`. A row is yielded while it grows, once the rows before it have ended.
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

"""Texts as they grow, for a terminal: whole characters only, one text after another."""

from collections.abc import Iterable, Iterator, Sequence

from torchlmoe.data.tokenizer import Tokenizer


class TextStream:
    """A text that is given token by token; what `push` and, at the end, `close` return adds up to the whole."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer, self.push_id = tokenizer, tokenizer.stream()
        self.ids: list[int] = []
        self.num_shown = 0

    def push(self, index: int) -> str:
        """What is new, without a character whose bytes are not all there yet."""
        self.ids.append(index)
        new = self.push_id(index)
        self.num_shown += len(new)
        return new

    def close(self) -> str:
        """What was held back: a character that stayed unfinished, as U+FFFD."""
        return self.tokenizer.decode(self.ids)[self.num_shown :]


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

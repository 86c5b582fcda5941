"""Files of tokens as other programs write them, against a store that was tokenized here."""

import gzip
import struct

import numpy as np
import pytest
from tokenizers import Tokenizer as RawTokenizer
from tokenizers import models, pre_tokenizers, trainers

from torchlmoe.data import store_writer, token_files
from torchlmoe.data.loader import validation_text_bytes
from torchlmoe.data.packing import max_documents, num_rows, row
from torchlmoe.data.prepare import prepare
from torchlmoe.data.tokenizer import load_tokenizer

TEXTS = ["First document.", "Zweites: äöü 日本語.", "x" * 300, "The end of it all.\n", "a"] * 8


@pytest.fixture
def documents(tokenizer):
    return tokenizer.encode_batch(TEXTS)


@pytest.fixture
def native(tokenizer, tmp_path):
    """The same documents, tokenized here."""
    (tmp_path / "text").mkdir()
    for number, text in enumerate(TEXTS):
        (tmp_path / "text" / f"{number:02d}.txt").write_text(text)
    return prepare(str(tmp_path / "text"), "train", tokenizer=tokenizer, cache_dir=tmp_path, validation_fraction=0)


def flat(documents, end, dtype):
    """Documents that end with `end`, or not."""
    return np.array([token for ids in documents for token in [*ids, *end]], dtype=dtype)


def write_index(path, lengths, dtype, *, per_document=1):
    """As Megatron-LM's IndexedDatasetBuilder; documents of several sequences where per_document is more than one."""
    lengths = np.array(lengths, dtype="<i4")
    width = np.dtype(dtype).itemsize
    bounds = np.arange(0, len(lengths) + 1, per_document, dtype="<i8")
    header = struct.pack("<9sQBQQ", b"MMIDIDX\x00\x00", 1, {2: 8, 4: 4}[width], len(lengths), len(bounds))
    pointers = (np.cumsum(lengths, dtype="<i8") - lengths) * width
    path.write_bytes(header + lengths.tobytes() + pointers.astype("<i8").tobytes() + bounds.tobytes())


def nanogpt(folder, documents):
    flat(documents, [0], "<u2").tofile(folder / "train.bin")


def one_file_each(folder, documents):
    for number, ids in enumerate(documents):
        flat([ids], [0], "<u2").tofile(folder / f"part-{number:03d}.npy")


def numpy_with_header(folder, documents):
    np.save(folder / "tokens.npy", flat(documents, [0], "<u4"))


def olmo(folder, documents):
    flat(documents[:9], [0], "<u2").tofile(folder / "a.npy")
    flat(documents[9:], [0], "<u2").tofile(folder / "b.npy")
    stops = np.cumsum([len(ids) + 1 for ids in documents[:9]])
    with gzip.open(folder / "a.csv.gz", "wt") as file:
        file.writelines(f"{a},{b},id,source,1\n" for a, b in zip([0, *stops[:-1]], stops, strict=True))


def megatron(folder, documents):
    flat(documents, [0], "<u2").tofile(folder / "c_text_document.bin")
    write_index(folder / "c_text_document.idx", [len(ids) + 1 for ids in documents], "<u2")


def megatron_without_end_tokens(folder, documents):
    flat(documents, [], "<i4").tofile(folder / "c.bin")
    write_index(folder / "c.idx", [len(ids) for ids in documents], "<i4")


def megatron_by_sentences(folder, documents):
    flat(documents, [], "<u2").tofile(folder / "c.bin")
    halves = [size for ids in documents for size in (len(ids) // 2, len(ids) - len(ids) // 2)]
    write_index(folder / "c.idx", halves, "<u2", per_document=2)


FORMATS = [
    nanogpt,
    one_file_each,
    numpy_with_header,
    olmo,
    megatron,
    megatron_without_end_tokens,
    megatron_by_sentences,
]


@pytest.fixture
def open_files(tokenizer, tmp_path):
    """open_files(write) -> the store of what write(folder, documents) wrote."""

    def open_files(write, documents=None, split="train", **options):
        folder = tmp_path / "tokens"
        folder.mkdir(exist_ok=True)
        write(folder, documents)
        options = {"tokenizer": tokenizer, **options}
        return prepare(str(folder), split, cache_dir=tmp_path / "cache", validation_fraction=0, **options)

    return open_files


@pytest.mark.parametrize("write", FORMATS)
@pytest.mark.parametrize("at_once", [7, 2**24])
def test_the_same_documents_in_any_format(open_files, native, documents, monkeypatch, write, at_once):
    monkeypatch.setattr(token_files, "TOKENS_AT_ONCE", at_once)
    monkeypatch.setattr(store_writer, "TOKENS_HASHED_AT_ONCE", at_once)
    store = open_files(write, documents)
    assert store.index.content == native.index.content
    assert (store.num_tokens, store.num_documents) == (native.num_tokens, native.num_documents)
    assert store.text_bytes == native.text_bytes == sum(len(text.encode()) for text in TEXTS)
    assert store.document_starts.tolist() == native.document_starts.tolist()
    for start in range(0, store.num_tokens, 13):
        for stop in (start, start + 1, start + 40, store.num_tokens + 5):
            assert store.tokens(start, stop).tolist() == native.tokens(start, stop).tolist()
    max_docs = max_documents(store, 32)
    for number in range(num_rows(native, 32)):
        for one, other in zip(row(store, number, 32, max_docs), row(native, number, 32, max_docs), strict=True):
            assert one.tolist() == other.tolist()


@pytest.mark.parametrize("write", FORMATS)
def test_nothing_is_copied(open_files, documents, write):
    store = open_files(write, documents)
    assert not list(store.folder.glob("tokens*"))
    assert {shard.file for shard in store.index.shards} == {
        str(path) for path in (store.folder.parents[1] / "tokens").iterdir() if path.suffix in (".bin", ".npy")
    }


@pytest.mark.parametrize("write", [nanogpt, megatron_without_end_tokens])
@pytest.mark.parametrize("max_tokens", [2, 17, 18, 333])
def test_max_tokens_cuts_exactly(open_files, native, documents, write, max_tokens):
    store = open_files(write, documents, max_tokens=max_tokens)
    assert store.num_tokens == max_tokens
    assert store.tokens(0, 10**6).tolist() == native.tokens(0, max_tokens).tolist()


def test_a_last_document_without_an_end(open_files, native, documents):
    store = open_files(lambda folder, _: flat(documents, [0], "<u2")[:-1].tofile(folder / "train.bin"))
    assert store.index.content == native.index.content

    def no_end_at_all(folder, _):
        np.array([5, 6, 7, 8], dtype="<u2").tofile(folder / "train.bin")

    store = open_files(no_end_at_all)
    assert store.tokens(0, 9).tolist() == [0, 5, 6, 7, 8]
    assert store.num_documents == 1


def test_splits_and_bytes_of_other_tokenizers(open_files, tmp_path):
    """nanoGPT's train.bin and val.bin; a tokenizer whose tokens do not tell the bytes of the text."""
    raw = RawTokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    raw.train_from_iterator(TEXTS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    raw.add_special_tokens(["</s>"])
    raw.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path / "tokenizer.json")

    def write(folder, _):
        for name, texts in (("train", TEXTS), ("val", TEXTS[3:5])):
            flat(tokenizer.encode_batch(texts), [tokenizer.end_id], "<u2").tofile(folder / f"{name}.bin")

    store = open_files(write, split="validation", tokenizer=tokenizer)
    assert [tokenizer.decode(ids) for ids in token_files._documents(store)] == ["The end of it all .", "a"]
    assert validation_text_bytes(store, seq_len=8, batch_size=1) == len(b"The end of it all .") + 1
    assert open_files(write, tokenizer=tokenizer).num_documents == len(TEXTS)


def broken(name, change):
    """A Megatron dataset of which one file is changed."""

    def write(folder, documents):
        megatron(folder, documents)
        path = folder / f"c_text_document.{name}"
        path.write_bytes(change(path.read_bytes()))

    return write


REFUSALS = {
    "c_text_document.idx does not match c_text_document.bin: it counts": broken("bin", lambda content: content[:-2]),
    "it is cut short: it announces": broken("idx", lambda content: content[:-9]),
    "is not an index of Megatron-LM: give the one that": broken("idx", lambda content: b"x" + content[1:]),
    "has version 2 and type 8: version 1 with": broken("idx", lambda content: content[:9] + b"\x02" + content[10:]),
    "it does not place its sequences": broken("idx", lambda c: c[: 34 + 40 * 4] + b"\x01" + c[34 + 40 * 4 + 1 :]),
    "it has documents that do not cover its": broken("idx", lambda content: content[:-8] + bytes(8)),
}


@pytest.mark.parametrize(("sentence", "write"), REFUSALS.items(), ids=range(len(REFUSALS)))
def test_an_index_that_does_not_match_is_refused(open_files, documents, sentence, write):
    with pytest.raises(ValueError, match=sentence):
        open_files(write, documents)


def test_what_is_not_as_it_should_be_is_refused(open_files, documents, tmp_path):
    def lines(text):
        def write(folder, documents):
            flat(documents, [0], "<u2").tofile(folder / "a.npy")
            (folder / "a.csv.gz").write_bytes(gzip.compress(text))

        return write

    def first_without_end(folder, documents):
        flat(documents, [], "<u2").tofile(folder / "a.bin")
        flat(documents, [0], "<u2").tofile(folder / "b.bin")

    def some_without_end(folder, documents):
        flat([documents[0], documents[1] + [0]], [], "<u2").tofile(folder / "c.bin")
        write_index(folder / "c.idx", [len(documents[0]), len(documents[1]) + 1], "<u2")

    for sentence, write in {
        r"a\.csv\.gz does not match a\.npy: it covers 9 consecutive tokens": lines(b"0,4\n4,9\n"),
        r"a\.csv\.gz cannot be read: .* give lines that begin with start,end": lines(b"0;4\n"),
        r"a\.bin does not end with the end token '<\|endoftext\|>' \(0\)": first_without_end,
        "has documents with and without the end token": some_without_end,
        r"has 3 bytes, which is not a multiple of 2 bytes per token: set data\.token_dtype": (
            lambda folder, _: (folder / "a.bin").write_bytes(b"123")
        ),
        "is read as uint16 but looks like uint32": lambda folder, ids: flat(ids, [0], "<u4").tofile(folder / "a.bin"),
        r"holds float64 of shape \(3, 4\): give one row of uint16 or uint32": (
            lambda folder, _: np.save(folder / "a.npy", np.zeros((3, 4)))
        ),
        "holds token 5000, beyond the vocabulary of 4096: give the file": (
            lambda folder, _: np.array([5000, 0], dtype="<u2").tofile(folder / "a.bin")
        ),
    }.items():
        for path in (tmp_path / "tokens").glob("*"):
            path.unlink()
        with pytest.raises(ValueError, match=sentence):
            open_files(write, documents)
    with pytest.raises(ValueError, match=r"holds tokens and no validation files: .* \(val\.bin\)"):
        open_files(nanogpt, documents, split="validation")


def test_a_given_type_counts(open_files, native, documents):
    store = open_files(
        lambda folder, ids: flat(ids, [0], "<u4").tofile(folder / "a.bin"), documents, token_dtype="uint32"
    )
    assert store.index.content == native.index.content


def test_files_that_change_are_another_dataset(open_files, documents, tmp_path):
    before = open_files(nanogpt, documents)
    after = open_files(nanogpt, documents[:-1])
    assert (before.num_documents, after.num_documents) == (len(TEXTS), len(TEXTS) - 1)
    with pytest.raises(ValueError, match=r"train\.bin has .* give the file from which the folder .* was made"):
        before.tokens(0, 5)

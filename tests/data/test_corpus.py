"""Documents of local files in every format, of folders with splits, and of streamed datasets."""

import bz2
import gzip
import itertools
import json
import os
from types import SimpleNamespace

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import HfApi

from torchlmoe.data.corpus import open_corpus

TEXTS = ["one\r\ntwo\u2028three", 'quotes " and \\', "", "日本語 👩‍👧", "five\n"]


def records(texts=TEXTS):
    """Rows with SlimPajama's columns."""
    return [{"text": text, "meta": {"redpajama_set_name": "RedPajamaC4"}} for text in texts]


def write(path, texts=TEXTS):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(records(texts)), path)
        return path
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records(texts)).encode()
    if ".json" in path.suffixes:
        lines = json.dumps(records(texts), indent=1).encode()
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as out:
            out.write(lines)
    else:
        path.write_bytes(lines)
    return path


def read(dataset, split="train", **options):
    return list(open_corpus(str(dataset), split, validation_fraction=0, **options).documents())


FORMATS = ["a.json", "a.jsonl", "a.parquet", "a.jsonl.gz", "a.jsonl.zst", "a.json.gz"]


@pytest.mark.parametrize("name", FORMATS)
def test_tables_in_every_format(tmp_path, name):
    assert read(write(tmp_path / name)) == TEXTS


@pytest.mark.parametrize(("name", "builder"), [("a.json", "json"), ("a.jsonl", "json"), ("a.parquet", "parquet")])
def test_tables_as_the_datasets_library_reads_them(tmp_path, name, builder):
    path = write(tmp_path / name)
    expected = datasets.load_dataset(builder, data_files=str(path), split="train", streaming=True)
    assert read(path) == [row["text"] for row in expected]


def test_text_files_are_a_document_each_byte_for_byte(tmp_path):
    contents = {"b.md": "# Title\r\n\r\nText\n", "a.txt": "no line break", "sub/c.txt": "ünïcödé\n\n"}
    for name, text in contents.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    assert read(tmp_path) == [contents["a.txt"], contents["b.md"], contents["sub/c.txt"]]
    assert read(tmp_path / "b.md") == [contents["b.md"]]


def test_another_text_column(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"content": "x", "id": 3}\n{"content": null, "id": 4}\n\n')
    assert read(path, text_column="content") == ["x", ""]
    with pytest.raises(
        ValueError, match=r"a\.jsonl, line 1 has no column 'text': set data\.text_column .* content or id"
    ):
        read(path)
    with pytest.raises(ValueError, match=r"Column 'id' of .* holds int, not text"):
        read(path, text_column="id")
    with pytest.raises(ValueError, match=r"a\.parquet has no column 'body': .* text or meta"):
        read(write(tmp_path / "a.parquet"), text_column="body")


def test_half_a_surrogate_pair_is_replaced(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "half \\ud83d, whole \\ud83d\\udc67"}\n')
    assert read(tmp_path / "a.jsonl") == ["half ?, whole 👧"]


SPLIT_FOLDERS = {
    "files": (
        ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet"],
        ["validation-00000.parquet"],
        [],
    ),
    "folders": (
        ["train/chunk1/example_train_0.jsonl.zst"],
        ["validation/chunk1/x_holdout.jsonl.zst"],
        ["test/t.jsonl"],
    ),
    "short_names": (["train.jsonl"], ["val.jsonl"], ["test.jsonl", "README.md"]),
    "only_held_out_named": (["a.jsonl", "values.jsonl"], ["dev.jsonl"], ["test_a.jsonl"]),
    "text_beside_tables": (["a.jsonl"], ["validation.parquet"], ["README.md"]),
    "other_files_beside_train": (["train.jsonl"], ["valid_1.jsonl"], ["extra.jsonl", ".git/x.jsonl"]),
    "suffixes_of_any_case": (["A.JSONL", "b.jsonl", "c.Json.GZ"], [], []),
    "titles_are_no_splits": (["Train to Pakistan.txt", "Valley.txt", "a.txt", "trainée.txt", "valérie.txt"], [], []),
}


@pytest.mark.parametrize("names", SPLIT_FOLDERS.values(), ids=SPLIT_FOLDERS)
def test_folders_with_splits(tmp_path, names):
    for name in itertools.chain(*names):
        if name.endswith(".txt"):
            (tmp_path / name).write_text(name)
        else:
            write(tmp_path / name, [name])
    assert read(tmp_path, "train") == names[0]
    assert read(tmp_path, "validation") == names[1]


def test_links_are_followed(tmp_path, caplog):
    """As a hub's cache consists of them; a link to a folder above is no second reading, a broken one is named."""
    (tmp_path / "data").mkdir()
    for name in ("blobs/1", "elsewhere/sub/b.jsonl"):
        write(tmp_path / f"{name}.jsonl" if name == "blobs/1" else tmp_path / name, [name])
    (tmp_path / "data/a.jsonl").symlink_to("../blobs/1.jsonl")
    (tmp_path / "data/linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data/up").symlink_to(tmp_path / "data")
    write(tmp_path / "data/test.jsonl")
    with caplog.at_level("INFO", logger="torchlmoe"):
        assert read(tmp_path / "data") == ["blobs/1", "elsewhere/sub/b.jsonl"]
        read(tmp_path / "data")
    assert [record.message for record in caplog.records] == [
        f"{tmp_path}/data: 2 files to train on, 0 to validate on, 1 left out (test.jsonl)."
    ]
    (tmp_path / "data/gone.jsonl").symlink_to("nowhere.jsonl")
    with pytest.raises(ValueError, match=r"gone\.jsonl is a link to nowhere\.jsonl, which does not exist"):
        read(tmp_path / "data")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(ValueError, match=r"pipe\.jsonl is neither a file nor a folder"):
        read(tmp_path / "pipe.jsonl")


def test_splits_of_another_name(tmp_path):
    for name in ("train/a.jsonl", "train_small/a.jsonl", "check/a.jsonl"):
        write(tmp_path / name, [name])
    assert read(tmp_path, "train", train_split="train_small") == ["train_small/a.jsonl"]
    assert read(tmp_path, "validation", validation_split="check") == ["check/a.jsonl"]


def test_held_out_documents_are_a_separate_part(tmp_path):
    texts = [f"document {i}" for i in range(2000)]
    path = write(tmp_path / "a.jsonl", texts)

    def split(name, fraction):
        return list(open_corpus(str(path), name, validation_fraction=fraction).documents())

    train, validation = split("train", 0.1), split("validation", 0.1)
    assert sorted(train + validation) == sorted(texts)
    assert 150 < len(validation) < 250
    assert set(split("validation", 0.05)) < set(validation)
    assert split("train", 0) == texts
    assert split("validation", 0) == []
    with pytest.raises(ValueError, match=r"validation_fraction = 1 must be at least 0 and less than 1"):
        split("train", 1)


def test_a_separate_validation_dataset(tmp_path):
    train, other = write(tmp_path / "a.jsonl", ["t"] * 300), write(tmp_path / "b.jsonl", ["v"] * 3)
    options = {"validation_dataset": str(other), "validation_fraction": 0.5}
    assert list(open_corpus(str(train), "train", **options).documents()) == ["t"] * 300
    assert list(open_corpus(str(train), "validation", **options).documents()) == ["v"] * 3


def test_missing_and_unreadable(tmp_path):
    for name in ("./nowhere", "/nowhere/at/all", "data/nowhere.jsonl", "~/nowhere/b"):
        with pytest.raises(ValueError, match=f'data.dataset = "{name}" does not exist: give "embedded", a local file'):
            open_corpus(name, "train")
    with pytest.raises(ValueError, match=r'data\.validation_dataset = "\./nowhere" does not exist'):
        open_corpus("embedded", "validation", validation_dataset="./nowhere")
    with pytest.raises(ValueError, match=r"holds no file of a supported kind: give files that end in \.json"):
        open_corpus(str(tmp_path), "train")
    (tmp_path / "a.csv").write_text("text\nx\n")
    with pytest.raises(ValueError, match=r"a\.csv is not a file of a supported kind"):
        open_corpus(str(tmp_path / "a.csv"), "train")
    write(tmp_path / "validation.jsonl")
    with pytest.raises(ValueError, match="holds only validation or test files"):
        open_corpus(str(tmp_path), "train")


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.txt", "a.jsonl.gz"])
def test_broken_files_are_named(tmp_path, name):
    (tmp_path / name).write_bytes(bz2.compress(b"not what the name says"))
    with pytest.raises(ValueError, match=f"{name} cannot be read"):
        read(tmp_path / name)


def test_the_line_is_named(tmp_path):
    lines = ['{"text": "good"}'] * 233
    for last, sentence in {
        '{"text": "a",}': r"a\.jsonl cannot be read: line 234, column 14: ",
        '{"title": "a"}': r"a\.jsonl, line 234 has no column 'text'",
        '{"text": 3, "title": "a"}': r"of .*a\.jsonl, line 234 holds int, not text: set .* to one that does, title\.",
        '"a"': r"a\.jsonl, line 234 holds str, not an object",
    }.items():
        (tmp_path / "a.jsonl").write_text("\n".join([*lines, last]))
        with pytest.raises(ValueError, match=sentence):
            read(tmp_path / "a.jsonl")
    (tmp_path / "a.json").write_text('\n[{"text": "good"},\n {"text": "a",}]')
    with pytest.raises(ValueError, match=r"a\.json cannot be read: line 3, column 15: "):
        read(tmp_path / "a.json")
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines[0].encode())
    assert read(tmp_path / "a.jsonl") == ["good"]
    pq.write_table(pa.table({"text": [b"bytes"], "id": [1], "body": ["x"]}), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"Column 'text' of .*a\.parquet holds binary, not text: .* that does, body\."):
        read(tmp_path / "a.parquet")


def test_identity_follows_the_files(tmp_path):
    path = write(tmp_path / "a.jsonl")

    def identity(split="train", **options):
        return json.dumps(open_corpus(str(path), split, **options).identity)

    first = identity()
    assert first == identity()
    assert len({first, identity("validation"), identity(validation_fraction=0.5), identity(text_column="x")}) == 4
    before = path.stat()
    path.write_text(path.read_text().upper())
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (path.stat().st_size, path.stat().st_mtime_ns) == (before.st_size, before.st_mtime_ns)
    assert identity() != first


def test_streaming_through_the_datasets_library(tmp_path, monkeypatch):
    """A hub id that the library resolves to a folder which it takes for a dataset by itself."""
    write(tmp_path / "train.jsonl", TEXTS)
    write(tmp_path / "validation.jsonl", ["v"])
    for function in ("get_dataset_split_names", "load_dataset"):
        real = getattr(datasets, function)
        monkeypatch.setattr(datasets, function, lambda name, *a, revision, real=real, **k: real(str(tmp_path), *a, **k))
    monkeypatch.setattr(HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha="1234"))
    assert read("owner/name", "train") == TEXTS
    assert read("owner/name", "validation") == ["v"]
    with pytest.raises(ValueError, match=r"owner/name has no column 'body': .* text or meta"):
        read("owner/name", text_column="body")


def test_hub_splits_and_errors(monkeypatch):
    def splits(name, config, revision):
        assert (name, config, revision) == ("owner/name", "en", "1234")
        return ["train", "test"]

    def stream(name, config, split, revision, streaming):
        assert revision == "1234"
        return iter(records())

    monkeypatch.setattr(HfApi, "dataset_info", lambda *a, **k: SimpleNamespace(sha="1234"))
    monkeypatch.setattr(datasets, "get_dataset_split_names", splits)
    monkeypatch.setattr(datasets, "load_dataset", stream)
    parts = [
        list(open_corpus("owner/name", split, dataset_config="en", validation_fraction=0.5).documents())
        for split in ("train", "validation")
    ]
    assert sorted(parts[0] + parts[1]) == sorted(TEXTS)
    assert parts[1]
    with pytest.raises(ValueError, match=r"no split 'learn': set data\.train_split to one of train, test"):
        read("owner/name", dataset_config="en", train_split="learn")

    def unreachable(name, config, revision):
        raise ConnectionError("no route.")

    monkeypatch.setattr(datasets, "get_dataset_split_names", unreachable)
    message = '"owner/name" is not a local path, and the request to the hub failed: no route'
    with pytest.raises(ValueError, match=message):
        read("owner/name")

"""Pieces of a corpus, tokenized by any number of processes and hosts, killed at any time: always the same bytes."""

import json
import logging
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.conftest import PRELOADED
from torchlmoe.data import local_files, tokenizing, writers
from torchlmoe.data import prepare as prepare_module
from torchlmoe.data.corpus import open_corpus
from torchlmoe.data.parts import Parts
from torchlmoe.data.prepare import Effort, prepare
from torchlmoe.data.tokenizer import load_tokenizer

TEXTS = [f"Document {number}. " + "It is a truth universally acknowledged. " * (number % 23) for number in range(600)]


@pytest.fixture
def small_pieces(monkeypatch):
    """A corpus of a few hundred kilobytes becomes a dozen pieces of two shards or so each."""
    monkeypatch.setattr(local_files, "PIECE_BYTES", 12_000)
    monkeypatch.setattr(tokenizing, "CHARACTERS_AT_ONCE", 3_000)
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_SHARD", 6_000)


@pytest.fixture
def dataset(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in TEXTS]
    (folder / "a.jsonl").write_text("".join(lines[:200]))
    (folder / "b.jsonl").write_text("\n" + "\r\n".join(map(str.strip, lines[200:300])))  # and no end of its last line
    pq.write_table(pa.table({"text": TEXTS[300:500]}), folder / "c.parquet", row_group_size=9)
    (folder / "d.json").write_text("".join(lines[500:550]))
    (folder / "e.jsonl").write_text("".join(lines[550:]))
    return str(folder)


@pytest.fixture
def build(dataset, tokenizer, tmp_path):
    def build(place, *, workers=1, writers=1, writer=0, timeout=600, **options):
        effort = Effort(workers, writers, writer, timeout)
        defaults = {"dataset": dataset, "split": "train", "validation_fraction": 0, "tokenizer": tokenizer}
        return prepare(cache_dir=tmp_path / place, effort=effort, **{**defaults, **options})

    return build


def content(store):
    return {path.name: path.read_bytes() for path in store.folder.iterdir()}


def litter(folder):
    return [path for path in folder.iterdir() if path.suffix in (".partial", ".parts")]


def stream(dataset, **options):
    return list(open_corpus(dataset, "train", validation_fraction=0, **options).documents())


@pytest.mark.parametrize("piece_bytes", [100, 1_000, 12_000, 10**6])
def test_pieces_together_are_the_corpus(dataset, monkeypatch, piece_bytes):
    monkeypatch.setattr(local_files, "MOST_PIECES", 10**9)
    monkeypatch.setattr(local_files, "PIECE_BYTES", 10**9)
    assert stream(dataset) == TEXTS
    monkeypatch.setattr(local_files, "PIECE_BYTES", piece_bytes)
    pieces = open_corpus(dataset, "train", validation_fraction=0).read(None).pieces
    assert stream(dataset) == TEXTS
    assert len(pieces) in {100: range(1000, 2000), 1_000: range(50, 200), 12_000: range(8, 20), 10**6: [1]}[piece_bytes]
    assert abs(sum(piece.num_bytes for piece in pieces) - sum(p.stat().st_size for p in _files(dataset))) < len(pieces)


def _files(dataset):
    return sorted(local_files.find_files(local_files.Path(dataset), "train", "validation")["train"])


def test_a_list_in_a_jsonl_is_read_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "PIECE_BYTES", 10)
    (tmp_path / "a.jsonl").write_text("\n" + json.dumps([{"text": text} for text in TEXTS], indent=1))
    assert stream(str(tmp_path / "a.jsonl")) == TEXTS


def test_the_line_is_named_in_any_piece(tmp_path, monkeypatch):
    monkeypatch.setattr(local_files, "PIECE_BYTES", 100)
    lines = [json.dumps({"text": text}) for text in TEXTS[:40]]
    for bad, sentence in {'{"text": "a",}': "line 34, column 14", '{"text": 3}': "line 34 holds int"}.items():
        (tmp_path / "a.jsonl").write_text("\n".join([*lines[:33], bad, *lines[34:]]))
        with pytest.raises(ValueError, match=sentence):
            stream(str(tmp_path / "a.jsonl"))


@pytest.mark.parametrize("max_tokens", [None, 50, 3_000, 20_001, 10**7])
@pytest.mark.parametrize("held_out", [0, 0.3])
def test_any_number_of_writers_makes_the_same(build, small_pieces, tmp_path, max_tokens, held_out):
    options = {"max_tokens": max_tokens, "validation_fraction": held_out}
    one = build("one", **options)
    assert len(one.index.shards) > 20 or max_tokens
    for split in ("train", "validation")[: 2 if held_out else 1]:
        alone = build("one", **options, split=split)
        shared = tmp_path / f"shared_{split}"
        # Hosts in turn: the first ones leave when their share is done, as if they were killed while they wait.
        for writer in (2, 0):
            # The first host may see that its own pieces hold all the tokens that are wanted.
            with pytest.raises(TimeoutError) if writer or not max_tokens else suppress(TimeoutError):
                build_without_waiting(build, shared, writers=3, writer=writer, **options, split=split)
        together = build(shared, writers=3, writer=1, **options, split=split)
        assert content(together) == content(alone)
        assert not litter(shared)
    expected = [text for number, text in enumerate(TEXTS) if not is_held_out(number, held_out)]
    assert one.num_documents == len(expected) or max_tokens
    assert one.text_bytes == sum(len(text.encode()) for text in expected) or max_tokens
    assert one.num_tokens == max_tokens or max_tokens in (None, 10**7)


def is_held_out(number, fraction):
    from torchlmoe.data.corpus import Reading

    return not Reading([], "train", fraction).takes(number)


def build_without_waiting(build, *arguments, **options):
    def give_up(build, until, has, what):
        if not until():
            raise TimeoutError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare_module._Build, "_wait", give_up)
        if options["validation_fraction"]:  # all writers count documents before any continues
            patch.setattr(prepare_module._Build, "_wait", count_for_the_others)
        return build(*arguments, **options)


def count_for_the_others(build, until, has, what):
    for piece in range(len(build.job.reading.pieces)):
        if "counts" in what and build.parts.count(piece) is None:
            tokenizing.count_documents(build.job, piece)
    if not until():
        raise TimeoutError


def test_documents_are_those_of_one_batch(build, small_pieces, tokenizer):
    store = build("a")
    expected = [token for ids in tokenizer.encode_batch(TEXTS) for token in [tokenizer.end_id, *ids]]
    assert store.tokens(0, store.num_tokens).tolist() == expected


def test_processes_make_the_same(build, small_pieces, monkeypatch, caplog):
    """Real processes, which do not see what this test has patched but the pieces: so whole shards."""
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_SHARD", 2**30)
    monkeypatch.setattr("torchlmoe.data.progress.LOG_INTERVAL_SECONDS", 0)
    with caplog.at_level(logging.INFO, logger="torchlmoe"):
        two = build("two", workers=2, validation_fraction=0.3)
    assert "counted the documents of" in caplog.text
    assert "% done, about" in caplog.text
    assert content(two) == content(build("one", validation_fraction=0.3))


def test_errors_of_a_process_reach_the_caller(build, small_pieces, dataset, tmp_path):
    with open(f"{dataset}/e.jsonl", "a") as file:
        file.write('{"text": 3}\n')
    with pytest.raises(ValueError, match=r"e\.jsonl, line 51 holds int, not text"):
        build("bad", workers=2)
    assert not litter(tmp_path / "bad")


def test_a_process_that_is_killed_is_said(build, small_pieces, monkeypatch):
    from torchlmoe.data.workers import _Worker

    real = _Worker.do

    def kill_first(worker, task, report):
        if task.piece == 3:
            worker._process.kill()
        real(worker, task, report)

    monkeypatch.setattr(_Worker, "do", kill_first)
    with pytest.raises(OSError, match=r"ended with exit code -9: .* lower data\.num_workers; finished parts are kept"):
        build("killed", workers=2)
    monkeypatch.setattr(_Worker, "do", real)
    monkeypatch.setattr(tokenizing, "CHARACTERS_PER_SHARD", 2**30)
    assert content(build("killed")) == content(build("whole"))


class Stopped(BaseException):
    """As if the process were killed here."""


def test_it_resumes_from_any_stop(build, small_pieces, tmp_path, monkeypatch):
    """Without processes: between any two of the steps that leave something on disk."""
    expected = content(build("whole", max_tokens=9_000))
    real_finish, real_publish = Parts.finish, prepare_module.publish_store
    steps = 0

    def stop_sometimes():
        nonlocal steps
        steps += 1
        if steps % 2:
            raise Stopped

    def finish(parts, piece, number, writer, facts):
        stop_sometimes()
        real_finish(parts, piece, number, writer, facts)
        stop_sometimes()

    def publish(*arguments, **options):
        stop_sometimes()
        return real_publish(*arguments, **options)

    monkeypatch.setattr(Parts, "finish", finish)
    monkeypatch.setattr(prepare_module, "publish_store", publish)
    tries = 0
    while True:
        tries += 1
        try:
            store = build("stopped", max_tokens=9_000)
        except Stopped:
            continue
        break
    assert tries > 5
    assert content(store) == expected
    assert not litter(tmp_path / "stopped")


def test_what_is_finished_is_not_done_again(build, small_pieces, monkeypatch):
    real = tokenizing._write_shard
    written = []

    def write(job, piece, number, *rest):
        written.append((piece, number))
        if len(written) == 9:
            raise Stopped
        return real(job, piece, number, *rest)

    monkeypatch.setattr(tokenizing, "_write_shard", write)
    with pytest.raises(Stopped):
        build("a")
    build("a")
    assert written[8] == written[9]
    assert len(set(written)) == len(written) - 1


def test_the_leftover_of_a_finished_store_is_removed(build, tmp_path):
    store = build("a")
    left = store.folder.with_name(f"{store.folder.name}.parts")
    left.mkdir()
    build("a")
    assert not left.exists()


def test_a_writer_that_is_none_is_refused(build):
    with pytest.raises(ValueError, match=r"data\.writer = 3 must be less than data\.num_writers = 3"):
        build("a", writers=3, writer=3)


def test_a_writer_that_is_lost_is_named(build, small_pieces, tmp_path, monkeypatch):
    monkeypatch.setattr(writers, "SECONDS_BETWEEN_SIGNS", 0.1)
    monkeypatch.setattr(prepare_module, "SECONDS_BETWEEN_LOOKS", 0.02)
    for what, held_out in (("counts", 0.3), ("shares", 0)):
        place, options = tmp_path / what, dict(writers=4, timeout=1, validation_fraction=held_out)
        with pytest.raises(TimeoutError, match=rf"^The {what} of writers 0, 1, 2 of corpus-train-\w+ are missing, .*"):
            build(place, writer=3, **options)
        (parts,) = place.glob("*.parts")
        with writers.SignOfLife(parts, 0), pytest.raises(TimeoutError) as error:  # 0 is slow, and not to blame
            build(place, writer=2, **options)
        assert re.fullmatch(
            rf"The {what} of writers? 1(, 3)? of corpus-train-\w+ are missing, without a sign of life for "
            r"data\.writer_timeout_seconds = 1: start the command again on all hosts, with a lower data\.num_writers "
            r"\(now 4\) if there are fewer; it continues from what is finished\.",
            str(error.value),
        )
        assert content(build(place, writers=1, validation_fraction=held_out)) == content(
            build("alone", validation_fraction=held_out)
        )
        assert not litter(place)


def test_a_sign_that_changes_in_time_is_a_sign(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(writers.time, "monotonic", lambda: clock[0])
    watch, sign = writers.Watch(tmp_path, 10), tmp_path / "writer-3.alive"
    assert watch.lost([3, 4]) == []
    for clock[0], text, lost in ((9, None, []), (9.5, "1", []), (10, "1", [4]), (19.4, "1", [4]), (19.5, "1", [3, 4])):
        if text is not None:
            sign.write_text(text)
        assert watch.lost([3, 4]) == lost
    sign.write_text("2")  # started again
    assert watch.lost([3, 4]) == [4]


def build_small(dataset, folder, workers):
    local_files.PIECE_BYTES, tokenizing.CHARACTERS_AT_ONCE, tokenizing.CHARACTERS_PER_SHARD = 12_000, 3_000, 6_000
    os.setpgid(0, 0)
    prepare(
        dataset,
        "train",
        tokenizer=load_tokenizer("embedded"),
        cache_dir=folder,
        validation_fraction=0.3,
        effort=Effort(workers),
    )


@pytest.mark.long
@pytest.mark.parametrize("workers", [1, 2])
def test_killed_ten_times_at_random(build, small_pieces, dataset, tmp_path, monkeypatch, workers):
    if workers > 1:  # whose own processes do not know of smaller shards
        monkeypatch.setattr(tokenizing, "CHARACTERS_PER_SHARD", 2**30)
    expected = content(build("whole", validation_fraction=0.3))
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    generator, kills = random.Random(workers), 0
    folder = tmp_path / "killed"
    for seconds in (generator.uniform(0, 3 if workers > 1 else 1) for _ in range(1000)):
        process = context.Process(target=build_small, args=(dataset, str(folder), workers))
        process.start()
        process.join(seconds if kills < 10 else None)
        if process.exitcode is None:
            kills += 1
            os.kill(process.pid, signal.SIGKILL)
            process.join()
            time.sleep(0.2 * generator.random())  # its own processes may live on for a moment
        elif kills < 10:
            shutil.rmtree(folder)  # it was faster: once more
        else:
            break
    assert kills == 10
    assert content(build("killed", validation_fraction=0.3)) == expected
    assert not litter(folder)

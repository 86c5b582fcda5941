"""The order of training rows, validation coverage, reading ahead, and bytes for bits per byte."""

import itertools
import threading

import numpy as np
import pytest
import torch

from torchlmoe.data import loader as loader_module
from torchlmoe.data.loader import TrainLoader, validation_batches, validation_text_bytes
from torchlmoe.data.order import RowOrder, Source
from torchlmoe.data.packing import max_documents, num_rows, row
from torchlmoe.data.shuffle import permuted, place_of
from torchlmoe.layers.cross_entropy import IGNORE_INDEX


@pytest.fixture
def store(make_store):
    return make_store(np.random.default_rng(3).integers(0, 60, 60).tolist(), shard_size=97)[0]


def make_order(*stores, weights=(1,), **options):
    sources = [Source(store, weight, f"s{i}") for i, (store, weight) in enumerate(zip(stores, weights, strict=True))]
    return RowOrder(sources, **{"seq_len": 16, "global_batch_size": 8, "seed": 5, **options})


@pytest.fixture
def make_loader(store):
    loaders = []

    def make(order=None, **options):
        loaders.append(TrainLoader(order or make_order(store), **{"local_batch_size": 2, **options}))
        return loaders[-1]

    yield make
    for loader in loaders:
        loader.close()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 64, 65, 1000, 4096, 5000])
def test_shuffle_is_a_permutation(size):
    out = permuted(np.arange(size), size, (1, 2))
    assert sorted(out.tolist()) == list(range(size))
    assert [place_of(value, size, (1, 2)) for value in out[:50].tolist()] == list(range(min(size, 50)))
    one_by_one = [int(permuted(np.array([i]), size, (1, 2))[0]) for i in range(min(size, 50))]
    assert one_by_one == out[:50].tolist()


def test_shuffle_is_spread_evenly():
    """Every place gets every element about equally often, and pairs of places pairs of them: chi-square."""
    size, num_keys = 10, 5000
    orders = np.stack([permuted(np.arange(size), size, (0, key)) for key in range(num_keys)])
    for values, bins in [(orders[:, i], size) for i in range(size)] + [
        (orders[:, i] * size + orders[:, i + 1], size * size) for i in range(size - 1)
    ]:
        counts = np.bincount(values, minlength=bins)
        possible = counts[[i for i in range(bins) if bins == size or i // size != i % size]]
        expected = num_keys / len(possible)
        chi_square = ((possible - expected) ** 2 / expected).sum()
        freedom = len(possible) - 1
        assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def test_shuffle_of_a_large_range_holds_no_array():
    size = 10**12 + 7
    out = permuted(np.arange(1000), size, (1, 2))
    assert len(set(out.tolist())) == 1000
    assert 0.45 * size < out.mean() < 0.55 * size


def test_each_epoch_has_every_row_once_in_another_order(store):
    order = make_order(store)
    places = list(itertools.chain.from_iterable(order.rows_of_step(step).rows.tolist() for step in range(100)))
    n = order.num_rows[0]
    assert n % order.global_batch_size  # so that epochs end within a step
    epochs = [tuple(places[i : i + n]) for i in range(0, len(places) - n, n)]
    assert len(epochs) > 3
    assert all(sorted(epoch) == list(range(n)) for epoch in epochs)
    assert len(set(epochs)) == len(epochs)
    assert list(range(n)) not in map(list, epochs)
    assert make_order(store, seed=6).rows_of_step(0).rows.tolist() != order.rows_of_step(0).rows.tolist()


def test_the_order_of_one_source_is_that_of_version_0_1(store):
    """A run that was begun with it continues with the same rows."""
    order = make_order(store)
    n = order.num_rows[0]
    expected = [int(permuted(np.array([place % n]), n, (5, place // n))[0]) for place in range(30 * 8)]
    assert np.concatenate([order.rows_of_step(step).rows for step in range(30)]).tolist() == expected


@pytest.mark.parametrize("seq_len", [15, 16])
def test_tokens_of_steps_are_those_with_labels(make_loader, store, seq_len):
    order = make_order(store, seq_len=seq_len)
    loader = make_loader(order)
    assert (store.num_tokens % seq_len > 0) == (seq_len == 15)
    seen = 0
    for step in range(30):
        assert order.tokens_of_steps(step) == seen
        seen += sum((batch["labels"] != IGNORE_INDEX).sum().item() for batch in loader.batches(step))
    assert order.num_rows[0] < 30 * order.global_batch_size


WEIGHTS = (0.6, 0.3, 0.1)


@pytest.fixture
def stores(make_store):
    """Stores of very different sizes: the smallest starts again many times."""
    return [make_store([count % 50 for count in range(n)], seed=n)[0] for n in (90, 40, 9)]


def test_shares_of_a_mixture(stores):
    order = make_order(*stores, weights=WEIGHTS)
    rows = np.concatenate([order.rows_of_step(step).sources for step in range(1000)])
    for source, weight in enumerate(WEIGHTS):
        assert (rows == source).mean() == pytest.approx(weight, rel=0.01)
        # Not at the end alone: at no time is a source more than a few rows from its share.
        assert abs(np.cumsum(rows == source)[7::8] - weight * np.arange(8, 8001, 8)).max() < len(WEIGHTS)
    figures = order.figures(1000)
    assert [figures[f"data/s{source}/share"] for source in range(3)] == pytest.approx(WEIGHTS, rel=0.01)
    tokens = order.tokens_of_sources(1000)
    assert figures["data/s2/epochs"] == tokens[2] / stores[2].num_tokens > 10
    assert make_order(stores[0]).figures(10) == {}


def test_each_source_of_a_mixture_goes_through_its_own_epochs(stores):
    order = make_order(*stores, weights=WEIGHTS)
    steps = [order.rows_of_step(step) for step in range(1000)]
    for source in range(3):
        # A step shuffles its rows, so only where a step ends are all rows of an epoch known to be there.
        counts = [order.rows_of_sources(8 * step)[source] for step in range(1001)]
        assert np.diff(counts).tolist() == [(step.sources == source).sum() for step in steps]
        n = order.num_rows[source]
        rows = np.concatenate([step.rows[step.sources == source] for step in steps])
        assert np.bincount(rows, minlength=n).max() - np.bincount(rows, minlength=n).min() <= 1
        assert len(set(rows[:n].tolist())) > 0.9 * n


@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 8), (4, 2), (4, 1)])
def test_a_mixture_is_the_same_on_any_number_of_ranks(make_loader, stores, world_size, local_batch_size):
    whole = make_order(*stores, weights=WEIGHTS)
    ranks = [
        make_loader(make_order(*stores, weights=WEIGHTS), world_size=world_size, rank=rank, local_batch_size=size)
        for rank, size in enumerate([local_batch_size] * world_size)
    ]
    for step in (0, 30, 31, 7):
        sources, rows = whole.rows_of_step(step)
        expected = [row(stores[s], int(i), 16, whole.max_docs)[0] for s, i in zip(sources, rows, strict=True)]
        microbatches = zip(*(rank.batches(step) for rank in ranks), strict=True)
        batch = torch.cat([microbatch for by_rank in microbatches for microbatch in by_rank])
        assert torch.equal(batch["tokens"], torch.stack(expected))


def test_a_mixture_resumes_anywhere(stores):
    """Whatever was asked before, in steps of any size: the same rows are dealt out up to there."""
    order, other = (make_order(*stores, weights=WEIGHTS) for _ in range(2))
    far = [order.rows_of_step(step) for step in (10**9, 10**9 + 1, 3)]
    again = [other.rows_of_step(step) for step in (3, 10**9 + 1, 10**9)]
    for one, two in zip(far, again[::-1], strict=True):
        assert (one.sources.tolist(), one.rows.tolist()) == (two.sources.tolist(), two.rows.tolist())
    large = make_order(*stores, weights=WEIGHTS, global_batch_size=80)
    for step in range(5):
        small = [order.rows_of_step(10 * step + part) for part in range(10)]
        pairs = [sorted(zip(*map(np.ndarray.tolist, rows), strict=True)) for rows in (*small, large.rows_of_step(step))]
        assert sorted(itertools.chain(*pairs[:-1])) == pairs[-1]


def test_weights_are_shares_of_their_sum(stores):
    one = make_order(*stores, weights=(6, 3, 1)).rows_of_sources(10_000)
    assert one == make_order(*stores, weights=WEIGHTS).rows_of_sources(10_000) == [6000, 3000, 1000]
    order = make_order(*stores, weights=(0, 2, 0))
    assert [source.store for source in order.sources] == [stores[1]]
    assert order.rows_of_step(4).rows.tolist() == make_order(stores[1]).rows_of_step(4).rows.tolist()
    with pytest.raises(ValueError, match=r"data\.mixture has a source with weight = -1: weights are 0 or more\."):
        make_order(*stores, weights=(1, -1, 1))
    with pytest.raises(ValueError, match=r"only sources with weight = 0: give at least one of them a larger weight\."):
        make_order(*stores, weights=(0, 0, 0))


@pytest.mark.parametrize(("world_size", "local_batch_size"), [(1, 8), (1, 1), (2, 4), (2, 1), (4, 2), (8, 1)])
def test_a_step_is_the_same_rows_for_any_number_of_ranks(make_loader, store, world_size, local_batch_size):
    whole = make_order(store)
    ranks = [
        make_loader(world_size=world_size, rank=rank, local_batch_size=local_batch_size) for rank in range(world_size)
    ]
    for step in (0, 7, 8, 3):
        expected = [row(store, int(i), 16, whole.max_docs) for i in whole.rows_of_step(step).rows]
        microbatches = zip(*(rank.batches(step) for rank in ranks), strict=True)
        batch = torch.cat([microbatch for by_rank in microbatches for microbatch in by_rank])
        for name, tensors in zip(("tokens", "labels", "document_bounds"), zip(*expected, strict=True), strict=True):
            assert torch.equal(batch[name], torch.stack(tensors))


def test_microbatch_shapes_and_types(make_loader):
    loader = make_loader()
    batches = loader.batches(0)
    assert len(batches) == loader.num_microbatches == 4
    for batch in batches:
        assert batch.batch_size == torch.Size([2])
        assert (batch["tokens"].dtype, batch["tokens"].shape) == (torch.int64, (2, 16))
        assert (batch["labels"].dtype, batch["labels"].shape) == (torch.int64, (2, 16))
        bounds = batch["document_bounds"]
        assert (bounds.dtype, bounds.shape) == (torch.int32, (2, loader.order.max_docs + 1))
        assert (bounds.diff() >= 0).all()
        assert (bounds[:, 0] == 0).all()
        assert (bounds[:, -1] == 16).all()


@pytest.mark.parametrize("num_prefetch", [0, 1, 3])
def test_any_step_can_be_asked_for(make_loader, num_prefetch):
    loader, fresh = make_loader(num_prefetch=num_prefetch), make_loader(num_prefetch=0)
    for step in (0, 1, 2, 50, 3, 3, 4):
        for got, expected in zip(loader.batches(step), fresh.batches(step), strict=True):
            assert (got == expected).all()


def test_steps_are_read_ahead_in_the_background(make_loader, monkeypatch):
    read = threading.Event()
    make_microbatch = loader_module._microbatch

    def record(places, *rest):
        if threading.current_thread() is not threading.main_thread() and [index for _, index in places] == third:
            read.set()
        return make_microbatch(places, *rest)

    monkeypatch.setattr(loader_module, "_microbatch", record)
    loader = make_loader(num_prefetch=2)
    third = loader.order.rows_of_step(2).rows[-2:].tolist()
    loader.batches(0)
    assert read.wait(timeout=30)


def test_errors_of_the_background_reach_the_caller(make_loader, monkeypatch):
    loader = make_loader()
    loader.batches(0)

    def fail(*arguments):
        raise OSError("the disk is gone")

    monkeypatch.setattr(loader_module, "_microbatch", fail)
    with pytest.raises(OSError, match="the disk is gone"):
        loader.batches(20)


def test_close_ends_the_thread(make_loader):
    before = threading.active_count()
    loader = make_loader()
    loader.batches(0)
    loader.close()
    assert threading.active_count() == before


def test_rows_longer_than_the_data_are_refused(store, stores):
    with pytest.raises(ValueError, match=f"seq_len = 100000 is longer than the training data, {store.num_tokens} tok"):
        make_order(store, seq_len=100_000)
    with pytest.raises(ValueError, match=r"seq_len = 800 is longer than the data of 's2' in data\.mixture, 45 tok"):
        make_order(*stores, weights=WEIGHTS, seq_len=800)


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 1), (1, 4), (3, 2), (4, 7), (64, 2)])
def test_validation_covers_every_row_once(store, world_size, batch_size):
    by_rank = [
        list(validation_batches(store, seq_len=16, batch_size=batch_size, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    assert len({len(batches) for batches in by_rank}) == 1
    rows = torch.cat([batch for together in zip(*by_rank, strict=True) for batch in together])
    n = num_rows(store, 16)
    max_docs = max_documents(store, 16)
    expected = [row(store, i, 16, max_docs) for i in range(n)]
    for name, tensors in zip(("tokens", "labels", "document_bounds"), zip(*expected, strict=True), strict=True):
        assert torch.equal(rows[name][:n], torch.stack(tensors))
    assert (rows["labels"][n:] == IGNORE_INDEX).all()
    assert len(rows) < n + world_size * batch_size


@pytest.mark.parametrize("max_batches", [None, 1, 2, 5, 100])
def test_validation_bytes_are_those_of_the_labels(make_store, max_batches):
    table = np.random.default_rng(4).integers(1, 9, 100).astype(np.uint16)
    table[7] = 0
    store, _ = make_store([50, 3, 80, 0, 21], token_bytes=table)
    options = {"seq_len": 8, "batch_size": 2, "max_batches": max_batches}
    for world_size in (1, 2, 3):  # which does not matter
        counted = 0
        for rank in range(world_size):
            for batch in validation_batches(store, rank=rank, world_size=world_size, **options):
                counted += sum(int(table[x]) for x in batch["labels"].flatten().tolist() if x != IGNORE_INDEX)
        assert validation_text_bytes(store, **options) == counted


def test_part_of_a_validation_split_needs_byte_lengths(make_store):
    store, _ = make_store([50, 3, 80])
    assert validation_text_bytes(store, seq_len=8, batch_size=1) == store.text_bytes
    with pytest.raises(ValueError, match=r"validate on all of the split, .* data\.validation_max_tokens"):
        validation_text_bytes(store, seq_len=8, batch_size=1, max_batches=2)

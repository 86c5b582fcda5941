"""Recurrences whose sequence is split over gloo ranks equal one process: outputs and every gradient."""

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.parallel import parallelize_module

from tests.conftest import run_on_ranks
from torchlmoe.layers.memories import Memories
from torchlmoe.layers.recurrence import ElementwiseRecurrence, LinearRecurrence, OnlineGradient
from torchlmoe.parallel.mesh import start_process_group
from torchlmoe.parallel.sequence import LSMSequenceParallel

LENGTH, HEADS, KEY, VALUE = 48, 4, 5, 6
# Spans of 2, 3 and 4 ranks begin at 24; 16, 32; 12, 24, 36.
ROWS = {
    "one document": [0, 48],
    "straddling": [0, 5, 40, 48],
    "at borders": [0, 12, 16, 24, 36, 48],
    "just off borders": [0, 11, 13, 23, 25, 31, 33, 35, 37, 48],
    "empty ones": [0, 0, 12, 12, 24, 24, 24, 47, 48, 48],
    "not packed": None,
}
PER_TOKEN, PER_HEAD = ("B", "T", HEADS), (HEADS,)
TERMS = {
    "none": {},
    "head": {"log_decay": PER_HEAD},
    "scalar": {"log_decay": PER_TOKEN},
    "channel": {"log_decay": (*PER_TOKEN, KEY)},
    "value": {"value_log_decay": (*PER_TOKEN, VALUE)},
    "both sides": {"log_decay": PER_TOKEN, "value_log_decay": (*PER_TOKEN, VALUE)},
    "bonus": {"bonus": (HEADS, KEY)},
    "channel, bonus": {"log_decay": (*PER_TOKEN, KEY), "bonus": (HEADS, KEY)},
    "delta": {"erase": PER_TOKEN},
    "gated delta": {"log_decay": PER_TOKEN, "erase": PER_TOKEN},
    "channel, delta": {"log_decay": (*PER_TOKEN, KEY), "erase": PER_TOKEN},
    "vector erase": {"log_decay": PER_TOKEN, "erase": (*PER_TOKEN, KEY)},
    "own erase key": {"log_decay": (*PER_TOKEN, KEY), "erase": PER_TOKEN, "erase_key": (*PER_TOKEN, KEY)},
}
ELEMENTWISE = {
    "full": {"log_decay": (*PER_TOKEN, KEY, VALUE)},
    "step": {"log_decay": (HEADS, KEY, VALUE), "step": (*PER_TOKEN, VALUE)},
    "constant": {"log_decay": (HEADS, KEY, VALUE)},
    "complex": {"log_decay": (HEADS, KEY, VALUE)},
}
ONLINE = {
    "plain": {},
    "decay": {"log_decay": PER_TOKEN},
    "momentum": {"log_decay": PER_TOKEN, "log_momentum": PER_TOKEN},
}


def draw(name, shape, rows, generator, dtype):
    shape = [{"B": rows, "T": LENGTH}.get(size, size) for size in shape]
    x = torch.randn(*shape, dtype=torch.float64, generator=generator)
    if name.endswith(("log_decay", "log_momentum")):
        x = F.logsigmoid(2 * x)
    elif name in ("erase", "step", "learning_rate") and len(shape) < 5:
        x = x.sigmoid() if x.shape[-1] != KEY else 0.3 * x
    elif name in ("k", "erase_key"):
        x = F.normalize(x, dim=-1)
    return x.to(dtype)


def cases(dtype):
    """Modules, and their arguments for the whole sequence."""
    generator = torch.Generator().manual_seed(0)
    for row_name, bounds in ROWS.items():
        rows, cu_seqlens = (1, torch.tensor(bounds, dtype=torch.int32)) if bounds else (2, None)
        shared = {"q": ("B", "T", 2, KEY), "k": ("B", "T", 2, KEY), "v": (*PER_TOKEN, VALUE)}
        whole = {"q": (*PER_TOKEN, KEY), "k": (*PER_TOKEN, KEY), "v": (*PER_TOKEN, VALUE)}
        rates = {"learning_rate": PER_TOKEN, "norm_weight": (HEADS, VALUE), "norm_bias": (HEADS, VALUE)}
        kinds = (
            (LinearRecurrence, TERMS, shared),
            (ElementwiseRecurrence, ELEMENTWISE, whole),
            (OnlineGradient, ONLINE, whole | rates),
        )
        for kind, table, base in kinds:
            for name, terms in table.items():
                tensors = {key: draw(key, shape, rows, generator, dtype) for key, shape in (base | terms).items()}
                if name == "complex":
                    for key in ("q", "k", "log_decay"):
                        tensors[key] = torch.complex(
                            tensors[key], torch.randn(tensors[key].shape, dtype=dtype, generator=generator)
                        )
                options = {"cu_seqlens": cu_seqlens}
                if kind is OnlineGradient:
                    documents = rows if cu_seqlens is None else len(cu_seqlens) - 1
                    parts = 3 if "log_momentum" in terms else 2
                    state = 0.3 * torch.randn(HEADS, parts, KEY, VALUE, dtype=dtype, generator=generator)
                    tensors["initial_state"] = state.expand(documents, -1, -1, -1, -1).clone()
                    tensors["initial_state"][:, :, 0] = tensors["initial_state"][:, :, 1]
                    options["mini_batch_size"] = 4
                if name in ("scalar", "gated delta"):
                    options["scale"] = 0.5
                yield (kind.__name__, name, row_name), kind(), tensors, options


def splits(name, x):
    """Whether a term is one for each token."""
    return name in ("q", "k", "v", "learning_rate") or (x.dim() > 2 and x.shape[1] == LENGTH)


def outcome(module, tensors, options, cut=lambda name, x: x):
    """o and the gradients of sum(o * cotangent); what is not split is summed over ranks."""
    leaves = {name: cut(name, x).clone().requires_grad_() for name, x in tensors.items()}
    o, _ = module(**leaves, **options)
    generator = torch.Generator().manual_seed(1)
    whole = torch.randn(*tensors["v"].shape, dtype=torch.float64, generator=generator).to(o.dtype)
    grads = torch.autograd.grad((o * cut("v", whole)).sum(), list(leaves.values()))
    return {"o": o.detach(), **dict(zip(leaves, grads, strict=True))}


def assert_ranks_equal_one(communication, dtype, tolerance, erase_tolerance=None, seen=None):
    start_process_group(torch.device("cpu"))
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    mesh = init_device_mesh("cpu", (ranks,), mesh_dim_names=("cp",))
    length = LENGTH // ranks

    def cut(name, x):
        return x[:, rank * length : (rank + 1) * length] if splits(name, x) else x

    for case, module, tensors, options in cases(dtype):
        expected = outcome(module, tensors, options)
        style = module.sequence_parallel_style(communication, "all_gather")
        found = outcome(parallelize_module(module, mesh, style), tensors, options, cut)
        for name, value in found.items():
            if name == "o" or splits(name, tensors[name]):
                reference = cut("v" if name == "o" else name, expected[name])
            else:
                value = value.contiguous()
                torch.distributed.all_reduce(torch.view_as_real(value) if value.is_complex() else value)
                reference = expected[name]
            scale = max(expected[name].norm(), 1e-3)  # of the whole: a span may have next to nothing
            error = ((value - reference).norm() / scale).item()
            allowed = erase_tolerance if erase_tolerance and "erase" in tensors else tolerance
            assert error <= allowed, (case, name, error, ranks)


def every_case():
    for communication in ("all_gather", "ring"):
        assert_ranks_equal_one(communication, torch.float64, 1e-9)
        assert_ranks_equal_one(communication, torch.float32, 1e-5, 1e-4)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_ranks_equal_one_process(world_size):
    run_on_ranks(world_size, every_case)

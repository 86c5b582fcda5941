"""The bytes and FLOPs in kernels/TRAFFIC.md are those of launches that run, and of the files as they are."""

import json
from collections import Counter
from unittest.mock import patch

import pytest
import torch
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder

from benchmarks import kernel_traffic
from benchmarks.fingerprints import fingerprint
from benchmarks.launch_traffic import BETWEEN, Traffic, counted_launches, machine, traffic_of
from benchmarks.operations import OPERATIONS, Size
from tests.kernels.conftest import INTERPRETED
from torchlmoe.kernels import recurrence_launch

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="counts in Triton's interpreter")
AGAIN = "; kernels have changed since it was written: run python -m benchmarks.kernel_traffic"
TERMS = ("q", "k", "v", "log_decay", "erase", "erase_key", "value_log_decay", "bonus")
# Between them every term, kernel and flag of the recurrence; the others are parts of these.
INSTANCES = ("retention", "RWKV6", "gated fast weights", "Gated DeltaNet", "RWKV7")


def ran(name, args):
    """What launches of an operation move when they run, by kernel, in order: bytes read and written, and FLOPs."""
    found, originals = [], {}

    def counting(method, kind):
        original = originals[method] = getattr(InterpreterBuilder, method)

        def call(self, first, *rest):
            if kind == "FLOPs":
                found[-1][1][kind] += 2 * first.data.size * rest[0].data.shape[-1]
            else:
                mask = rest[0] if kind == "read" else rest[1]
                found[-1][1][kind] += int(mask.data.sum()) * first.get_element_ty().primitive_bitwidth // 8
            return original(self, first, *rest)

        return patch.object(InterpreterBuilder, method, call)

    run = InterpretedFunction.run

    def launch(self, *args, **options):
        found.append((self.__name__.strip("_").removesuffix("_kernel"), Counter(read=0, written=0, FLOPs=0)))
        return run(self, *args, **options)

    definition = torch._library.custom_ops.OPDEFS[name]
    with (
        counting("create_masked_load", "read"),
        counting("create_masked_store", "written"),
        counting("create_dot", "FLOPs"),
        patch.object(InterpretedFunction, "run", launch),
    ):
        results = definition._init_fn(*args)
    return found, results


def on_meta(args):
    return tuple(x.to("meta") if isinstance(x, torch.Tensor) else x for x in args)


def counted(kernels):
    return [
        (name.split(" ")[1], Counter(read=x.read.total(), written=x.written.total(), FLOPs=x.flops))
        for name, x in kernels.items()
        if BETWEEN not in name
    ]


def assert_counts(name, args):
    """Of an operation and its backward. Returns the operation's results."""
    found, results = ran(name, args)
    with machine("interpreter"):
        assert counted(traffic_of(name, on_meta(args))) == found
    return results


def recurrence_args(instance, length, rows=1, heads=2, width=24, dtype=torch.float16):
    size = Size(batch=rows, length=length, heads=heads, key_dim=width, value_dim=72, key_heads=1)
    if instance not in ("Gated DeltaNet",):
        size = Size(**{**vars(size), "key_heads": heads})
    inputs = OPERATIONS[instance].make(size, dtype, "cpu")
    return (*(inputs.get(name) for name in TERMS), 1.0, None, None)


@pytest.mark.parametrize("fills", [1, pytest.param(1000, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "instance", [x if x == "Gated DeltaNet" else pytest.param(x, marks=pytest.mark.long) for x in INSTANCES]
)
def test_linear_recurrence(instance, fills, monkeypatch):
    """Chunks and tiles that are not full."""
    monkeypatch.setattr(recurrence_launch, "FILLS", fills)
    args = recurrence_args(instance, 80)
    o, final = assert_counts("torchlmoe::linear_recurrence_triton", args)
    assert_counts("torchlmoe::linear_recurrence_triton_backward", (o, final, *args))


@pytest.mark.long
def test_long_rows():
    """Of which two short ones are counted."""
    args = recurrence_args("linear attention", 768, heads=1, width=16)
    assert_counts("torchlmoe::linear_recurrence_triton", args)
    x, weight = torch.randn(2, 192, 20), torch.randn(20, 4)
    y = assert_counts("torchlmoe::causal_conv_triton", (x, weight, None, None, None, True))
    assert_counts("torchlmoe::causal_conv_triton_backward", (y, x, weight, None, None, None, True))


def test_few_programs_stand_for_many():
    """Of 80 rows, and of 10 tiles of channels."""
    x, bias = torch.randn(80, 1, 160), torch.randn(160)
    args = (x, bias, None, "logsigmoid", 1.0, [], False)
    assert_counts("torchlmoe::decay_gate_triton", args)
    q, v = torch.randn(1, 17, 1, 2), torch.randn(1, 17, 1, 160)
    terms = (q, q, v, -torch.rand(1, 2, 160), torch.rand_like(v), None, None)
    o, final, starts = assert_counts("torchlmoe::elementwise_recurrence_triton", terms)
    grads = (o, final, *terms, starts)
    assert_counts("torchlmoe::elementwise_recurrence_triton_backward", grads)


def test_other_operations():
    x, weight = torch.randn(20, 40), torch.rand(20, 4)
    token, slot = torch.arange(80) // 4, torch.arange(80).view(20, 4)
    moved = assert_counts("torchlmoe::permute_triton", (x, token, slot))
    assert_counts("torchlmoe::unpermute_triton", (moved, token, slot, weight))
    assert_counts("torchlmoe::unpermute_triton_backward", (x, moved, slot, weight))
    y = assert_counts("torchlmoe::weighted_swiglu_triton", (x, weight[:, 0]))
    assert_counts("torchlmoe::weighted_swiglu_triton_backward", (y, x, weight[:, 0]))
    norm = (x, torch.rand(40), x, 1 / 40, 1e-6, "silu")
    y = assert_counts("torchlmoe::gated_rms_norm_triton", norm)
    assert_counts("torchlmoe::gated_rms_norm_triton_backward", (y, *norm))


def test_between_kernels():
    """torch's passes over memory are counted, views are not."""
    with counted_launches() as kernels:
        x = torch.empty(4, 8, device="meta")
        x.view(8, 4).T.sum(0)
    (traffic,) = kernels.values()
    assert (traffic.read.total(), traffic.written.total()) == (4 * 8 * 4, 8 * 4)


def test_programs_that_differ_are_an_error():
    """Rows of 100 tokens are not whole spans."""
    args = on_meta(recurrence_args("linear attention", 100 + 512, width=16))
    with machine("interpreter"), pytest.raises(AssertionError, match="612 tokens are not whole spans"):
        traffic_of("torchlmoe::linear_recurrence_triton", args)


def test_traffic_adds_up():
    one = Traffic()
    one.read["q"], one.written["o"], one.flops = 3, 4, 5
    two = Traffic()
    two.add(one)
    two.add(one, 2)
    assert (two.bytes, two.flops) == (21, 15)


def test_page_is_of_these_files():
    page = kernel_traffic.PAGE.read_text()
    for path in sorted(kernel_traffic.KERNELS.glob("*.py")):
        assert f"- {path.name}: {fingerprint(path)}" in page, path.name + AGAIN


def test_page_is_counted():
    """Counts one of its rows again."""
    held = json.loads(kernel_traffic.RECORD.read_text())["cases"]
    case, instance = "KDA B1 T4096 H16 D128", "KDA"
    program = kernel_traffic.programs()[case][instance]
    wanted = [row for row in held[case] if row["direction"] == kernel_traffic.FORWARD]
    calls = [call for call in kernel_traffic.recorded(program) if not call.is_backward]
    with machine(kernel_traffic.ARCHITECTURE):
        counted = {call.key: traffic_of(call.name, call.args) for call in calls}
        assert [kernel_traffic.row_of(instance, kernel_traffic.FORWARD, calls, counted)] == wanted
    assert set(held) == set(kernel_traffic.programs())
    assert kernel_traffic.page(held) == kernel_traffic.PAGE.read_text()

"""Breaks the code in known places, one at a time, and names the test that catches each: python -m tests.breaks [--long]

A break that no test catches ends the program with 1. Each runs in a copy of the tree, on the folders of tests given
with it, and stops at the first failure. docs/testing.md has the table.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parent.parent


class Break(NamedTuple):
    what: str
    file: str
    right: str
    wrong: str
    tests: str


BREAKS = [
    Break(
        "wrong sign of the value that the delta rule removes",
        "torchlmoe/ops/chunked.py",
        "n.baddbmm_(erased_keys, start, alpha=-1)",
        "n.baddbmm_(erased_keys, start, alpha=1)",
        "tests/ops",
    ),
    Break(
        "decay of the state left out between chunks",
        "torchlmoe/ops/chunked.py",
        "state = carry(start, whole, plus, following)",
        "state = carry(start, None, plus, following)",
        "tests/ops",
    ),
    Break(
        "scale missing from the gradient of the queries",
        "torchlmoe/ops/chunked_backward.py",
        'grads["q"].mul_(terms.scale)',
        'grads["q"].mul_(1.0)',
        "tests/ops",
    ),
    Break(
        "bonus reads the state after the decay",
        "torchlmoe/ops/reference.py",
        "read_BRKV = before_BRKV + (",
        "read_BRKV = state_BRKV + (",
        "tests/ops tests/mixers",
    ),
    Break(
        "convolution sees the preceding document",
        "torchlmoe/ops/causal_conv.py",
        "x.index_fill_(1, (bounds - shift if forward else bounds + shift - 1) % length, 0)",
        "pass",
        "tests/ops tests/mixers",
    ),
    Break(
        "token shift sees the preceding document",
        "torchlmoe/layers/token_shift.py",
        "return shifted.masked_fill(sequence.positions[..., None] == 0, 0)",
        "return shifted",
        "tests/layers tests/mixers",
    ),
    Break(
        "bounds of the second row moved by one token",
        "torchlmoe/layers/sequence.py",
        "dtype=torch.int32) * length",
        "dtype=torch.int32) * (length + 1)",
        "tests/model tests/mixers",
    ),
    Break(
        "cache kept when a row begins a new document",
        "torchlmoe/layers/sequence.py",
        "begins = self.positions[:, 0] == 0",
        "begins = self.positions[:, 0] < 0",
        "tests/mixers tests/inference",
    ),
    Break(
        "top-k weights not normalized",
        "torchlmoe/routing/router.py",
        "weight_TK = weight_TK / (weight_TK.sum(-1, keepdim=True) + 1e-20)",
        "pass",
        "tests/moe",
    ),
    Break(
        "loss-free bias moves the weights too",
        "torchlmoe/routing/router.py",
        "weight_TK = score_TE.gather(-1, expert_TK)",
        "weight_TK = (score_TE + (0 if self.expert_bias is None else self.expert_bias)).gather(-1, expert_TK)",
        "tests/moe tests/layers",
    ),
    Break(
        "balance loss counted without its share of the step",
        "torchlmoe/routing/balance.py",
        "torch.full_like(losses, ctx.loss_weight)",
        "torch.full_like(losses, 1.0)",
        "tests/moe tests/parallel/test_data_parallel.py",
    ),
    Break(
        "row load of the balance loss not summed over spans",
        "torchlmoe/routing/balance.py",
        'counts = all_reduce(counts, "sum", self.mesh)',
        "pass",
        "tests/parallel/test_context_parallel.py",
    ),
    Break(
        "gradients averaged instead of summed",
        "torchlmoe/parallel/data.py",
        "module.set_gradient_divide_factor(1.0)",
        "pass",
        "tests/parallel/test_data_parallel.py",
    ),
    Break(
        "gradients not summed over the spans of a sequence",
        "torchlmoe/parallel/mesh.py",
        'shard = mesh["dp_shard", "cp"]._flatten("dp_shard_cp")',
        'shard = mesh["dp_shard"]',
        "tests/parallel/test_context_parallel.py",
    ),
    Break(
        "tokens counted once per span",
        "torchlmoe/parallel/ranks.py",
        "figure if is_first else torch.zeros_like(figure)",
        "figure",
        "tests/parallel/test_context_parallel.py",
    ),
    Break(
        "state of a span not moved through the next spans",
        "torchlmoe/styles/recurrence.py",
        "moved = self.advance([x[other] for x in factors_P], incoming)",
        "moved = incoming",
        "tests/parallel/test_sequence_parallel.py",
    ),
    Break(
        "state enters a document that it does not belong to",
        "torchlmoe/styles/recurrence.py",
        "return incoming.masked_fill(~span.continued_P[rank], 0)",
        "return incoming",
        "tests/parallel/test_sequence_parallel.py",
    ),
    Break(
        "kernel ignores the decay between tokens of a chunk",
        "kernels/recurrence_tiles.py",
        'return tl.exp2(tl.where(seen, passed, -float("inf")))',
        "return tl.where(seen, 1.0, 0.0)",
        "tests/kernels/test_linear_recurrence.py",
    ),
    Break(
        "manifest does not compare checksums",
        "torchlmoe/checkpoint/manifest.py",
        "if index % num_parts == part and describe(folder / name) != expected:",
        "if index % num_parts == part and describe(folder / name) == {}:",
        "tests/checkpoint",
    ),
    Break(
        "gradients clipped by the squared norm",
        "torchlmoe/training/optimizer.py",
        "factor = (max_norm / norm).clamp(max=1.0)",
        "factor = (max_norm / norm**2).clamp(max=1.0)",
        "tests/training",
    ),
    Break(
        "queries and gates read from wrong rows of another format's projection",
        "torchlmoe/interop/qwen3_next.py",
        "Split((head_dim, head_dim), groups=num_heads)",
        "Split((num_heads * head_dim,) * 2)",
        "tests/interop/test_rules.py tests/mixers/test_against_transformers.py",
    ),
    Break(
        "heads split by count, on a rank that has half of them",
        "torchlmoe/mixers/recurrent.py",
        "q, k = (x.unflatten(-1, (-1, key_width)) for x in (q, k))",
        "q, k = (x.unflatten(-1, (self.num_key_heads, -1)) for x in (q, k))",
        "tests/mixers/test_roles.py",
    ),
    Break(
        "a constant per head taken from the head's number on its rank",
        "torchlmoe/mixers/recurrent.py",
        "chunk(num_parts)[part]",
        "chunk(num_parts)[0]",
        "tests/mixers/test_roles.py",
    ),
    Break(
        "gradient of a parameter that heads share not summed over them",
        "torchlmoe/styles/heads.py",
        "[Partial() if place.is_replicate() else place for place in parameter.placements]",
        "list(parameter.placements)",
        "tests/parallel/test_tensor_parallel.py",
    ),
    Break(
        "balance of memories, equal on all ranks of heads, counted on each of them",
        "torchlmoe/parallel/tensor.py",
        "if isinstance(mixer, RoutedLayer) and rank > 0:",
        "if isinstance(mixer, RoutedLayer) and rank > degree:",
        "tests/parallel/test_tensor_parallel.py",
    ),
    Break(
        "a router's padding and rows read from another piece of tokens",
        "torchlmoe/parallel/tensor.py",
        "replace(sequence, share=share).span(rank, degree)",
        "replace(sequence, share=share).span(0, degree)",
        "tests/parallel/test_expert_parallel.py",
    ),
    Break(
        "loss counted once per rank of heads",
        "torchlmoe/parallel/ranks.py",
        'return self._once(loss, ("tp",))',
        "return loss",
        "tests/parallel/test_tensor_parallel.py",
    ),
    Break(
        "a norm over all heads taken over those of the rank",
        "torchlmoe/styles/heads.py",
        "module.total = partial(total_of_group, mesh=device_mesh, **options)",
        "pass",
        "tests/parallel/test_tensor_parallel.py",
    ),
    Break(
        "tokens returned from experts in the order of the experts",
        "torchlmoe/routing/exchange.py",
        "y_MD = all_to_all_single_autograd(sum_slots(y, slots), arrived.sent, arrived.received, self.mesh)",
        "y_MD = all_to_all_single_autograd(y, arrived.sent, arrived.received, self.mesh)",
        "tests/parallel/test_expert_parallel.py",
    ),
    Break(
        "the gradient of parameters that stages share not summed over them",
        "torchlmoe/parallel/shared.py",
        "dist.all_reduce(local, group=group)",
        "pass",
        "tests/parallel/test_pipeline.py",
    ),
    Break(
        "a parameter of several stages counted on each in the gradient's norm",
        "torchlmoe/parallel/shared.py",
        "if own in places[1:]}",
        "if own in places[2:]}",
        "tests/parallel/test_pipeline.py",
    ),
    Break(
        "a stage that ignores the tensor that earlier layers share",
        "torchlmoe/parallel/stages.py",
        "shared = received[1] if self.place.takes_shared else None",
        "shared = None",
        "tests/parallel/test_pipeline.py",
    ),
    Break(
        "a stage whose balance losses do not know their share of the step",
        "torchlmoe/parallel/stages.py",
        "tokens, document_bounds, labels, loss_weight, part.span,",
        "tokens, document_bounds, labels, None, part.span,",
        "tests/parallel/test_pipeline.py",
    ),
    Break(
        "tokens counted once per stage",
        "torchlmoe/parallel/ranks.py",
        '_SAME_ROWS = ("pp", "cp", "tp")',
        '_SAME_ROWS = ("cp", "tp")',
        "tests/parallel/test_pipeline.py",
    ),
    Break(
        "a report that does not change when its rank begins another operation",
        "torchlmoe/parallel/heartbeat.py",
        "self._moves += 1",
        "pass",
        "tests/parallel/test_heartbeat.py",
    ),
    Break(
        "ranks of nodes whose launchers count attempts differently kept apart",
        "torchlmoe/parallel/mesh.py",
        "if is_store_of_launcher():",
        "if True:",
        "tests/parallel/test_heartbeat.py",
    ),
    Break(
        "restarted ranks read the store of the preceding attempt",
        "torchlmoe/parallel/mesh.py",
        "if is_store_of_launcher():",
        "if False:",
        "tests/parallel/test_launch.py",
    ),
    Break(
        "waiting for a store that does not answer",
        "torchlmoe/parallel/heartbeat.py",
        "return answer.result(2 * _SECONDS_OF_A_REQUEST)",
        "return answer.result()",
        "tests/parallel/test_heartbeat.py",
    ),
    Break(
        "a source of a mixture restarted in each step",
        "torchlmoe/data/order.py",
        "yield source, places[is_own], before + np.arange(is_own.sum())",
        "yield source, places[is_own], np.arange(is_own.sum())",
        "tests/data",
    ),
    Break(
        "shares of a mixture rounded in each step",
        "torchlmoe/data/order.py",
        "remainder = first * share - before * UNIT",
        "remainder = 0",
        "tests/data",
    ),
    Break(
        "a piece read from its start again after some of its shards were finished",
        "torchlmoe/data/tokenizing.py",
        "num_read = sum(facts.num_read for facts in shards)",
        "num_read = 0",
        "tests/data",
    ),
    Break(
        "tokens read from the start of their shard",
        "torchlmoe/data/store.py",
        "[offset : offset + stop - position]",
        "[: stop - position]",
        "tests/data",
    ),
    Break(
        "a plan without the buffers that a schedule holds for every microbatch",
        "torchlmoe/planning/rank.py",
        "trace.activation_bytes += held + rest",
        "trace.activation_bytes += rest",
        "tests/planning/test_parts.py",
    ),
    Break(
        "reductions over ranks planned with half of their bytes",
        "torchlmoe/planning/communication.py",
        "num_bytes = sum(x.numel() * x.element_size() for",
        "num_bytes = sum(x.numel() * x.element_size() // (1 + collective.startswith('reduce')) for",
        "tests/planning/test_parts.py::test_fsdp_sends_each_parameter_twice_and_its_gradient_once",
    ),
    Break(
        "Muon updates each part of an expert's matrix separately",
        "torchlmoe/optim/muon.py",
        "return not place.is_replicate() and place.dim >= x.dim() - 2",
        "return not place.is_replicate() and place.dim >= x.dim() - 2 and x.dim() == 2",
        "tests/parallel/test_expert_parallel.py::test_fewer_experts_than_ranks_that_share_them",
    ),
    Break(
        "no wait for the rows that experts return in a recompute",
        "torchlmoe/routing/exchange.py",
        "y_MD.trigger_wait()",
        "pass",
        "tests/parallel/test_expert_parallel.py::test_every_message_is_waited_for",
    ),
    Break(
        "a feed-forward layer's token shift sees no token of the piece before",
        "torchlmoe/parallel/parallelize.py",
        "if ranks.pieces.size() > 1:",
        "if False:",
        "tests/parallel/test_tensor_parallel.py::test_equals_one_process",
    ),
    Break(
        "a feed-forward layer's token shift restarts with each piece that is decoded",
        "torchlmoe/layers/token_shift.py",
        "self.token_shift(x, sequence=sequence, cache=cache) - x",
        "self.token_shift(x, sequence=sequence) - x",
        "tests/inference/test_cache.py",
    ),
    Break(
        "an export takes no notice of what multiplies the embeddings",
        "torchlmoe/interop/family.py",
        '{"model.embedding_multiplier": model.spec.embedding_multiplier}',
        "{}",
        "tests/interop/test_rwkv7.py",
    ),
]


def caught_by(tree: Path, broken: Break, *options: str) -> str | None:
    """The first test that fails on a broken copy of the tree."""
    with tempfile.TemporaryDirectory() as temporary:
        copy = Path(temporary) / "copy"
        hidden = shutil.ignore_patterns(".*", "outputs", "build", "__pycache__", "*.egg-info")
        shutil.copytree(tree, copy, ignore=hidden)
        path = copy / broken.file
        text = path.read_text()
        if text.count(broken.right) != 1:
            raise SystemExit(f"{broken.file} holds {broken.right!r} {text.count(broken.right)} times, not once.")
        path.write_text(text.replace(broken.right, broken.wrong))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", "-p", "no:cacheprovider", *options]
        output = subprocess.run([*command, *broken.tests.split()], cwd=copy, capture_output=True, text=True).stdout
        failed = re.search(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE)
        return failed[1] if failed else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tree", type=Path, default=ROOT, help="another checkout to break")
    parser.add_argument("--long", action="store_true", help="run the tests of make test-long, too")
    parser.add_argument("--only", type=int, nargs="*", help="the breaks to make, numbered from 1")
    flags = parser.parse_args()
    options = ["-o", "addopts="] if flags.long else []
    missed = 0
    print("| | break | caught by |\n|---|---|---|")
    for number, broken in enumerate(BREAKS, 1):
        if flags.only and number not in flags.only:
            continue
        test = caught_by(flags.tree, broken, *options)
        missed += test is None
        print(f"| {number} | {broken.what} | {f'`{test}`' if test else 'nothing'} |", flush=True)
    sys.exit(missed > 0)


if __name__ == "__main__":
    main()

"""The dual form of `online_gradient`: a slab of mini-batches.

A mini-batch takes its gradients G at the weights A that it starts from, with z = K A. In the notation of
`online_gradient`, with s the step scale of its last token (one if there is none, or if the document ends before it):

    e  = weight^2 * unit + (bias - v) * weight          unit: z minus its mean, over its standard deviation
    G  = P(e)                                           P(x) = (x - mean(x) - unit * mean(unit * x)) / deviation
    A <- (1 - s) A + s (f W + p S + written^T G)        S <- h S + momentum_written^T G             then W = A

P is the gradient of that layer norm. Only z, G, A and S run one mini-batch after another (`descend`). `weigh` computes
their coefficients for a whole slab before, and `read` what the queries read after. The backward
(`mini_batches_backward.py`) runs each slab again and then in reverse.

Legend: M mini-batches of a slab, H heads, N = M * H, D documents times heads, P parts of the state (A, W, and S with
momentum), C slots of a mini-batch, K key width, V value width.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from torchlmoe.ops.chunk_layout import Slab
from torchlmoe.ops.chunked import carry


class Terms(NamedTuple):
    """The tensor arguments of `online_gradient`."""

    q: Tensor
    k: Tensor
    v: Tensor
    learning_rate: Tensor
    norm_weight: Tensor
    norm_bias: Tensor
    log_decay: Tensor | None = None
    log_momentum: Tensor | None = None
    step_scale: Tensor | None = None

    def present(self, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """Apply `function` to each term that is not None; returns results by name."""
        return {name: function(x) for name, x in self._asdict().items() if x is not None}


@dataclass
class MiniBatches:
    """A slab of mini-batches, ordered by place in the document, then from the longest document to the shortest."""

    slab: Slab
    num_heads: int
    complete_M: Tensor  # whether the mini-batch ends with its last slot
    first: bool  # whether the slab's first mini-batches may have begun earlier, so that W differs from A

    @property
    def counts(self) -> list[int]:
        """Documents times heads that have a j-th mini-batch of the slab, for each j."""
        return [count * self.num_heads for count in self.slab.num_active]

    def of_heads(self, x_M: Tensor) -> Tensor:
        """[M, ...] -> [N, ...]"""
        return x_M.repeat_interleave(self.num_heads, 0)

    def cut(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """[B, T, H, ...] -> [N, C, ...], zero in empty slots."""
        num_mini_batches, num_slots = self.slab.tokens_MC.shape
        return self.slab.cut_into(
            x, x.new_empty(num_mini_batches * self.num_heads, num_slots, *x.shape[3:], dtype=dtype)
        )

    def cut_terms(self, terms: Terms, dtype: torch.dtype) -> dict[str, Tensor]:
        """The terms as `weigh` takes them."""
        return terms.present(lambda x: x.to(dtype) if x.dim() == 2 else self.cut(x, dtype))

    def ends(self) -> list[tuple[slice, Tensor] | None]:
        """For each j: the documents times heads whose j-th mini-batch is their last of the slab, and whether it is
        complete, [.., 1, 1]; None without any.
        """
        ends: list[tuple[slice, Tensor] | None] = []
        start, complete_N11 = 0, self.of_heads(self.complete_M)[:, None, None]
        for count, following in zip(self.counts, [*self.counts[1:], 0], strict=True):
            ended = slice(following, count), complete_N11[start + following : start + count]
            ends.append(ended if following < count else None)
            start += count
        return ends

    def split(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Split tensors [N, ...] into the rows of each mini-batch of the documents."""
        parts = {name: x.split(self.counts) for name, x in tensors.items()}
        return [{name: part[j] for name, part in parts.items()} for j in range(len(self.counts))]


def weigh(batches: MiniBatches, terms: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The coefficients of `descend` and those of `read`, by name; differentiable. terms: from `cut_terms`."""
    q, k, v, learning_rate, norm_weight, norm_bias, log_decay, log_momentum, step_scale = Terms(**terms)
    num_mini_batches, num_slots = len(batches.complete_M), q.shape[1]

    def of_rows(x_H: Tensor) -> Tensor:
        return x_H.expand(batches.num_heads, -1).repeat(num_mini_batches, 1)

    weight_N1V, bias_N1V = of_rows(norm_weight)[:, None], of_rows(norm_bias)[:, None]
    from_start, path = _decays(torch.zeros_like(learning_rate) if log_decay is None else log_decay)
    momentum_path = from_momentum = None
    if log_momentum is not None:
        momentum_from_start, momentum_path = _decays(log_momentum)
        if batches.slab.padded_MC is not None:  # an empty slot must not add S to W again
            path = path * batches.of_heads(~batches.slab.padded_MC)[:, None]
        from_momentum = (path @ momentum_from_start[..., None])[..., 0]
        path = path @ momentum_path
    path = path * learning_rate[:, None]

    steps = {
        "keys": k,
        "target": (bias_N1V - v) * weight_N1V,
        "squared_weight": weight_N1V.square(),
        "written": -k * path[:, -1, :, None],
        "keep": from_start[:, -1:, None],
    }
    reads = {"q": q * from_start[..., None], "scores": (q @ -k.mT) * path}
    if momentum_path is not None and from_momentum is not None:
        steps["momentum_written"] = -k * (momentum_path[:, -1] * learning_rate)[..., None]
        steps["momentum_decay"] = momentum_from_start[:, -1:, None]
        steps["from_momentum"] = from_momentum[:, -1:, None]
        reads["momentum_q"] = q * from_momentum[..., None]
    if batches.first:
        reads["excess_q"] = reads["q"][: batches.counts[0]]
    if step_scale is not None:
        scale_NC1 = of_rows(step_scale[:, :num_slots])[..., None]  # short documents have fewer slots
        read_q = torch.lerp(q, reads["q"], scale_NC1)
        reads = {name: scale_NC1[: len(x)] * x for name, x in reads.items()} | {"q": read_q}
        complete_N11 = batches.of_heads(batches.complete_M)[:, None, None]
        steps["scale"] = torch.where(complete_N11, scale_NC1[:, -1:], 1)
    return steps, reads


def _decays(log: Tensor) -> tuple[Tensor, Tensor]:
    """exp of the sums of log [N, C] since the start, and between two places, [N, C, C] (zero above)."""
    total = log.double().cumsum(-1)
    between = (total[..., :, None] - total[..., None, :]).tril()  # no exponent is positive
    return total.to(log.dtype).exp(), between.to(log.dtype).exp().tril()


def read(reads: dict[str, Tensor], states: dict[str, Tensor]) -> Tensor:
    """o [N, C, V]; differentiable. reads: from `weigh`; states: from `descend`."""
    o = torch.baddbmm(torch.bmm(reads["q"], states["anchors"]), reads["scores"], states["gradients"])
    if "momenta" in states:
        o = torch.baddbmm(o, reads["momentum_q"], states["momenta"])
    if "excess" in states:
        first, others = o.tensor_split([len(states["excess"])])
        o = torch.cat([torch.baddbmm(first, reads["excess_q"], states["excess"]), others])
    return o


def descend(
    batches: MiniBatches, norm_eps: float, steps: dict[str, Tensor], state_DPKV: Tensor
) -> tuple[dict[str, Tensor], Tensor, Tensor]:
    """Run a slab. steps: from `weigh`; state: of its documents.

    Returns G [N, C, V], A and S at the start of every mini-batch [N, K, V] and, in the first slab, W - A before it
    [D, K, V], by name; z [N, C, V]; and the state after the slab or after the document's last mini-batch.
    """
    inner, gradients = torch.empty_like(steps["target"]), []
    states = {}
    for name, x in zip(("anchors", "momenta"), state_DPKV[:, ::2].unbind(1), strict=False):
        states[name] = x.new_empty(len(inner), *x.shape[1:])
        states[name][: len(x)] = x
    rows = batches.split(scaled(steps) | states | {"inner": inner})
    plus = None
    if batches.first:
        states["excess"] = state_DPKV[:, 1] - state_DPKV[:, 0]
        plus = states["excess"] * kept_excess(steps, len(state_DPKV))
    after_DPKV = torch.empty_like(state_DPKV)
    for here, following, end in zip(rows, [*rows[1:], {}], batches.ends(), strict=True):
        anchor, z = here["anchors"], torch.bmm(here["keys"], here["anchors"], out=here["inner"])
        unit, *norm = normed(z, norm_eps)
        error = torch.addcmul(here["target"], unit, here["squared_weight"])
        gradients.append(gradient := norm_gradient(error, *norm))
        change = torch.bmm(here["written"].mT, gradient)
        if plus is not None:
            change, plus = change.add_(plus), None
        if "momenta" in here:
            change.addcmul_(here["momenta"], here["from_momentum"])
            momentum_change = torch.bmm(here["momentum_written"].mT, gradient)
        parts = {"anchors": carry(anchor, here["keep"], change, following.get("anchors"))}
        if "momenta" in here:
            parts["momenta"] = carry(here["momenta"], here["momentum_decay"], momentum_change, following.get("momenta"))
        if end is not None:
            ended, complete = end
            weights, *momentum = (x[ended] for x in parts.values())
            ends = [torch.where(complete, weights, anchor[ended]), weights, *momentum]
            torch.stack(ends, 1, out=after_DPKV[ended])
            for name in following.keys() & parts:
                following[name].copy_(parts[name][: ended.start])
    return states | {"gradients": torch.cat(gradients)}, inner, after_DPKV


def scaled(steps: dict[str, Tensor]) -> dict[str, Tensor]:
    """The coefficients with the step scale in them, if there is one."""
    if "scale" not in steps:
        return steps
    scaled = {name: steps["scale"] * steps[name] for name in ("written", "from_momentum") if name in steps}
    return steps | scaled | {"keep": torch.lerp(torch.ones_like(steps["keep"]), steps["keep"], steps["scale"])}


def kept_excess(steps: dict[str, Tensor], count: int) -> Tensor:
    """s f of the first `count` rows, by which W - A before a slab reaches the next A."""
    keep = steps["keep"][:count]
    return keep * steps["scale"][:count] if "scale" in steps else keep


def normed(z: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The layer norm of z over its last dim; z minus a number for each row, the mean of that, and one over its standard
    deviation.
    """
    shifted = z - z[..., :1]  # torch's layer norm loses the digits by which a mean is larger than the deviation
    unit, mean, inverse = torch.native_layer_norm(shifted, z.shape[-1:], None, None, eps)
    return unit, shifted, mean, inverse


def norm_gradient(grad: Tensor, shifted: Tensor, mean: Tensor, inverse: Tensor) -> Tensor:
    """P(grad)"""
    of_z, *_ = torch.ops.aten.native_layer_norm_backward(
        grad, shifted, shifted.shape[-1:], mean, inverse, None, None, [True, False, False]
    )
    return of_z

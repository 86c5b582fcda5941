"""The gradient of a slab of mini-batches, in reverse from its end.

In the notation of `mini_batches.py`, with dA and dS the gradients of the A and S that a mini-batch leaves:

    dG  = scores^T do + s written dA + momentum_written dS              de = P(dG)
    dz  = P(weight^2 * de - (dG * mean(unit * e) + e * mean(unit * dG)) / deviation) - unit * mean(dG * G) / deviation
    dA <- q^T do + (1 - s + s f) dA + K^T dz                            dS <- momentum_q^T do + h dS + s p dA
"""

import torch
from torch import Tensor

from torchlmoe.ops.mini_batches import MiniBatches, kept_excess, norm_gradient, normed, scaled


def climb(
    batches: MiniBatches,
    norm_eps: float,
    steps: dict[str, Tensor],
    states: dict[str, Tensor],
    inner: Tensor,
    of_read: dict[str, Tensor],
    of_after_DPKV: Tensor,
) -> tuple[dict[str, Tensor], Tensor]:
    """Gradients of the arguments `steps` and `state` of `descend`, from those of its results, z left out.

    of_read: the gradients of `states`; that of G is completed in place. of_after: that of the state after the slab.
    """
    unit, shifted, mean, inverse = normed(inner, norm_eps)
    error = torch.addcmul(steps["target"], unit, steps["squared_weight"])
    share = inverse / inner.shape[-1]
    # Of z, and of A and S after each mini-batch.
    found = {f"of_{name}": torch.empty_like(states[name]) for name in ("anchors", "momenta") if name in states}
    found["of_inner"] = torch.empty_like(inner)
    given = {
        "shifted": shifted,
        "mean": mean,
        "inverse": inverse,
        "unit_and_gradient": torch.stack([unit, states["gradients"]], 2),
        "mean_error": (unit * error).sum(-1, keepdim=True) * share,
        "scaled_error": error * share,
        "scaled_unit": unit * share,
        **{f"read_{name}": x for name, x in of_read.items() if name != "excess"},
    }
    of_state = _reverse(batches, scaled(steps) | given | found, of_after_DPKV)
    if "excess" in states:
        count = len(of_state)
        of_excess = torch.addcmul(of_read["excess"], found["of_anchors"][:count], kept_excess(steps, count))
        of_state[:, 0] -= of_excess
        of_state[:, 1] = of_excess
    found["of_error"] = norm_gradient(of_read["gradients"], shifted, mean, inverse)
    grads = _of_steps(steps, states, unit, found)
    return {name: grads[name] for name in steps}, of_state  # `torch.func.vjp` wants the order of `weigh`


def _reverse(batches: MiniBatches, tensors: dict[str, Tensor], of_after_DPKV: Tensor) -> Tensor:
    """Fill the gradients of z, and those of A and S after each mini-batch; complete that of G. Returns dA and dS before
    the slab, in the places of A and S, zero for W.
    """
    rows = batches.split(tensors)
    of_state = torch.zeros_like(of_after_DPKV)
    before = {"of_anchors": of_state[:, 0], "of_momenta": of_state[:, -1]}
    steps = list(zip(rows, [before, *rows[:-1]], batches.ends(), strict=True))
    for here, preceding, end in reversed(steps):
        of_anchor, of_momentum = here["of_anchors"], here.get("of_momenta")
        if end is not None:
            ended, complete = end
            of_last, of_weights, *of_others = of_after_DPKV[ended].unbind(1)
            of_anchor[ended] = of_weights + torch.where(complete, of_last, 0)
            here["read_anchors"][ended] += torch.where(complete, 0, of_last)
            if of_momentum is not None:
                of_momentum[ended] = of_others[0]
        dG = here["read_gradients"]
        dG.baddbmm_(here["written"], of_anchor)
        if of_momentum is not None:
            dG.baddbmm_(here["momentum_written"], of_momentum)
        norm = here["shifted"], here["mean"], here["inverse"]
        along_unit, along_gradient = (dG.unsqueeze(2) * here["unit_and_gradient"]).sum(-1, keepdim=True).unbind(2)
        x = (norm_gradient(dG, *norm) * here["squared_weight"]).addcmul_(dG, here["mean_error"], value=-1)
        x = norm_gradient(x.addcmul_(here["scaled_error"], along_unit, value=-1), *norm)
        of_inner = torch.addcmul(x, here["scaled_unit"], along_gradient, value=-1, out=here["of_inner"])
        into = preceding["of_anchors"][: len(of_anchor)]
        torch.addcmul(here["read_anchors"], of_anchor, here["keep"], out=into).baddbmm_(here["keys"].mT, of_inner)
        if of_momentum is not None:
            into = preceding["of_momenta"][: len(of_anchor)]
            torch.addcmul(here["read_momenta"], of_momentum, here["momentum_decay"], out=into)
            into.addcmul_(of_anchor, here["from_momentum"])
    return of_state


def _of_steps(
    steps: dict[str, Tensor], states: dict[str, Tensor], unit: Tensor, found: dict[str, Tensor]
) -> dict[str, Tensor]:
    anchors, gradients, of_anchors = states["anchors"], states["gradients"], found["of_anchors"]
    momenta, excess = states.get("momenta"), states.get("excess")
    grads = {
        "keys": torch.bmm(found["of_inner"], anchors.mT),
        "target": found["of_error"],
        "squared_weight": (found["of_error"] * unit).sum(1, keepdim=True),
    }
    if "scale" in steps:
        # One product with the whole change, as its parts may cancel.
        change = torch.baddbmm((steps["keep"] - 1) * anchors, steps["written"].mT, gradients)
        if momenta is not None:
            change.addcmul_(momenta, steps["from_momentum"])
        if excess is not None:
            change[: len(excess)].addcmul_(excess, steps["keep"][: len(excess)])
        grads["scale"] = _along(of_anchors, change)
        of_anchors = of_anchors * steps["scale"]
    grads["written"] = torch.bmm(gradients, of_anchors.mT)
    grads["keep"] = _along(of_anchors, anchors)
    if excess is not None:
        grads["keep"][: len(excess)] += _along(of_anchors[: len(excess)], excess)
    if momenta is not None:
        grads["from_momentum"] = _along(of_anchors, momenta)
        grads["momentum_written"] = torch.bmm(gradients, found["of_momenta"].mT)
        grads["momentum_decay"] = _along(found["of_momenta"], momenta)
    return grads


def _along(x: Tensor, y: Tensor) -> Tensor:
    """[N, K, V] -> [N, 1, 1]"""
    return (x * y).sum((1, 2), keepdim=True)

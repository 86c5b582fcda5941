"""Prints a plan: a table for people, and a JSON object for programs."""

from typing import Any

from torchlmoe.planning.layout import Plan

GIB = 2**30


def as_json(plan: Plan) -> dict[str, Any]:
    """The plan as a JSON object. Units: bytes and FLOPs per step, seconds; fractions lie between 0 and 1."""
    return {
        "world_size": plan.world_size,
        "layout": dict(plan.layout.degrees),
        "parameters": plan.parameters,
        "active_parameters": plan.active_parameters,
        "flops_per_rank": plan.flops_per_rank,
        "seconds_per_step": plan.seconds_per_step,
        "mfu": plan.mfu,
        "bubble_fraction": plan.bubble_fraction,
        "fits": plan.fits,
        "communication": [
            {"axis": axis, "collective": collective, "count": count, "bytes": num_bytes}
            for axis, collective, count, num_bytes in plan.communication()
        ],
        "per_rank": [
            {
                "stage": trace.stage,
                "parameter_bytes": trace.parameter_bytes,
                "gradient_bytes": trace.gradient_bytes,
                "optimizer_bytes": trace.optimizer_bytes,
                "activation_bytes": trace.activation_bytes,
                "peak_bytes": trace.peak_bytes,
            }
            for trace in plan.traces
        ],
    }


def as_table(plan: Plan) -> str:
    """The plan as a table of several lines: memory in GiB, messages in MiB."""
    total, active = (number / 1e6 for number in (plan.parameters, plan.active_parameters))
    lines = [
        f"{plan.world_size:,} x {plan.gpu}: {plan.layout}",
        f"model: {total:,.2f}M parameters, {active:,.2f}M active",
        "",
        f"{'GiB of a rank of':<20}{'parameters':>12}{'gradients':>12}{'optimizer':>12}{'activations':>13}{'peak':>10}",
    ]
    for trace in plan.traces:
        figures = (trace.parameter_bytes, trace.gradient_bytes, trace.optimizer_bytes)
        row = "".join(f"{figure / GIB:>12.3f}" for figure in figures)
        lines.append(
            f"{f'stage {trace.stage}':<20}{row}{trace.activation_bytes / GIB:>13.3f}{trace.peak_bytes / GIB:>10.3f}"
        )
    lines += ["", f"{'a step sends over':<20}{'collective':>16}{'count':>10}{'MiB':>12}"]
    lines += [
        f"{axis:<20}{collective:>16}{count:>10,}{num_bytes / 2**20:>12,.2f}"
        for axis, collective, count, num_bytes in plan.communication()
    ]
    speed = plan.tokens_per_step / plan.seconds_per_step
    lines += [
        "",
        f"a step of {plan.tokens_per_step:,} tokens: {plan.flops_per_rank / 1e12:,.2f} TFLOP on a rank, "
        f"{plan.seconds_per_step:.3f} s predicted, {speed:,.0f} tokens/s, MFU {plan.mfu:.1%}, "
        f"bubble {plan.bubble_fraction:.1%}",
        f"{'fits' if plan.fits else 'does not fit'}: {plan.reason}",
    ]
    return "\n".join(lines)


def as_line(plan: Plan) -> str:
    """The plan as one line of a search's output."""
    fits = "" if plan.fits else "  does not fit"
    return (
        f"{plan.seconds_per_step:>9.3f} s  MFU {plan.mfu:>6.1%}  bubble {plan.bubble_fraction:>5.1%}  "
        f"peak {plan.peak_bytes / GIB:>8.2f} GiB  {plan.layout}{fits}"
    )

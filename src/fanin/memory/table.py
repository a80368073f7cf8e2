"""The plan as a table for people."""

from __future__ import annotations

from collections.abc import Iterable

from fanin.lexical import lexical_sizes
from fanin.memory.advice import Change
from fanin.memory.job import MIB, Job
from fanin.memory.plan import Plan


def title(job: Job) -> str:
    """One line: what is planned."""
    head, config = job.config.head, job.config
    dense = head.dense_labels(job.labels)
    sizes = {
        "fixed_fan_in": f"K = {head.fan_in}, G = {head.group}, {head.dtype}",
        "head_tail": f"{dense:,} dense rows, K = {head.fan_in}, {head.dtype}",
        "bottleneck": f"rank {head.bottleneck}",
    }
    shape = sizes.get(head.kind, "fp32")
    profiles, words = lexical_sizes(head, job.shape.vocabulary, job.inner, job.labels)
    beside = (f", {profiles} profiles" if profiles else "") + (f" and {words} words" if words else "")
    share = f", {job.ranks} ranks (each rank's share)" if job.ranks > 1 else ""
    precision = str(job.precision).removeprefix("torch.")
    return (
        f"{head.kind} head ({shape}), {job.labels:,} labels, {job.inner} features{beside}; encoder {config.encoder.name}, "
        f"batch {config.train.batch} x {job.tokens} tokens, {precision}, {job.device.type}{share}"
    )


def table(plan: Plan, room: int | None) -> str:
    """Parts at the peak in MiB, every phase's own peak, and whether it fits into `room` bytes."""
    rows = [(name, size) for name, size in plan.lines().items() if size]
    width = max(len(name) for name, _ in rows)
    lines = [f"  {name:<{width}}  {size / MIB:>10,.1f} MiB" for name, size in rows]
    lines.append(f"  {'peak':<{width}}  {plan.need / MIB:>10,.1f} MiB, in the {plan.phase} phase")
    others = ", ".join(f"{name} {(plan.resident + phase.total) / MIB:,.0f}" for name, phase in plan.phases.items())
    lines.append(f"  without slack, by phase: {others} MiB")
    if room is not None:
        verdict = "fits" if plan.need <= room else "fits tightly, without slack," if plan.peak <= room else "does not fit"
        lines.append(f"  {verdict} into {room / MIB:,.0f} MiB ({(room - plan.need) / MIB:+,.0f})")
    return "\n".join(lines)


def options(found: Iterable[tuple[Change, Plan]]) -> str:
    """Changes that make a run fit, a line each, with the predicted peak."""
    return "\n".join(f"  {plan.need / MIB:>10,.1f} MiB  {change}" for change, plan in found)

"""Whether a run fits, asked before it starts; and what to say where it did not after all."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch

from fanin.checkpoint import last_good
from fanin.config import Config
from fanin.encoder import choose_precision, load_description
from fanin.files import InputError
from fanin.memory import advice
from fanin.memory.job import MIB, Job, available
from fanin.memory.peaks import Trimmer, pin_allocator
from fanin.memory.plan import Plan
from fanin.memory.shapes import EncoderShape
from fanin.ranks import ALONE, Ranks

_KEPT = 0.3  # of what a step takes for itself may stay beside the peak until it is given back; less would cost time
_LESS = 0.9  # of a plan that did not fit: what a change must bring to be worth naming
# What the first training step loads beside what is imported by then: transformers' model code and torch's optimisers on a
# CPU (205 MiB measured), the libraries' workspaces on a GPU.
FIRST_USE = {"cpu": 208 * MIB, "cuda": 64 * MIB}
CUDA_CONTEXT = 512 * MIB
"""What CUDA itself takes of a device; what a device says is free is counted after it."""


def job_of(config: Config, description: Mapping[str, Any], device: torch.device, ranks: int = 1) -> Job:
    """This run's training step; `description` is data/tokens/tokens.json. Raises InputError where the encoder is missing."""
    return Job(
        config=config,
        shape=EncoderShape.of(load_description(config.encoder.name), config.encoder.hidden_dropout),
        labels=description["labels"],
        tokens=description.get("max_length", config.tokens.max_length),
        device=device,
        precision=choose_precision(config.train.precision, device),
        documents=description.get("documents", {}).get("train", 0),
        ranks=ranks,
    )


def check(config: Config, description: Mapping[str, Any], device: torch.device, ranks: Ranks = ALONE) -> Plan:
    """Plan this run's training step, to be built in this process on `device`, before anything of it is built.

    description: data/tokens/tokens.json; ranks: on a CPU those of one machine share its memory. Raises InputError, with the
    plan's figures and the settings to change, where the step cannot fit into what is free on the GPU, or on a CPU in the
    system and its control group. Where only the allocator's slack would not fit, says so on stderr; on a CPU the allocator
    then keeps nothing back from now on, which costs some time. Returns the plan of what is still to be taken.
    """
    job = job_of(config, description, device, ranks.size)
    room = _room(device, ranks)
    plan = job.plan(FIRST_USE["cpu" if device.type == "cpu" else "cuda"])
    if plan.peak > room:
        raise InputError(f"train: this run does not fit: {refusal(job, plan, room)}")
    if plan.need > room:
        pinned = device.type == "cpu" and pin_allocator()
        way = "; until then freed blocks go back to the system at once, which is slower" if pinned else ""
        print(f"memory is tight: {refusal(job, plan, room)}{way}", file=sys.stderr)
    return plan


def between_steps(plan: Plan, device: torch.device, ranks: Ranks = ALONE) -> Callable[[], None]:
    """What training is to call between steps, so that on a CPU it stays within `plan` however long it runs: a `Trimmer` just
    above the plan's peak, or below where that and a step more would not fit into what is free now."""
    if device.type != "cpu":
        return lambda: None
    a_step = plan.peak - plan.resident
    return Trimmer(max(min(plan.peak + int(_KEPT * a_step), _room(device, ranks) - a_step), 0))


def _room(device: torch.device, ranks: Ranks) -> int:
    """Bytes free for this process: ranks of one machine share its memory, and have a GPU each."""
    return available(device) // (ranks.local if device.type == "cpu" else 1)


def refusal(job: Job, plan: Plan, room: int) -> str:
    """One sentence: what the run takes, what there is, and the least harmful settings to change."""
    head, largest = job.config.head, max(plan.lines().items(), key=lambda line: line[1])
    said = (
        f"a training step of the {head.kind} head with {job.labels:,} labels, train.batch {job.config.train.batch} and "
        f"{job.tokens} tokens takes about {plan.need / MIB:,.0f} MiB (in the {plan.phase} phase; {largest[0]} "
        f"{largest[1] / MIB:,.0f}), and {room / MIB:,.0f} MiB are free; "
    )
    found = advice.cheapest(job, room, plan.baseline)
    if found:
        options = "; or ".join(f"{change} ({other.need / MIB:,.0f} MiB)" for change, other in found)
        return f"{said}it fits with {options}"
    change, other = advice.least(job, plan.baseline)
    return f"{said}even {change} takes {other.need / MIB:,.0f} MiB; use a larger device, or fewer labels"


@contextmanager
def memory_explained(job: Job, plan: Plan, checkpoints: Path) -> Iterator[None]:
    """Turn running out of memory into an InputError: what was held, what `plan` says is large, what to change."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        told = isinstance(error, torch.OutOfMemoryError | MemoryError)
        # what torch's allocator on a CPU raises has no class of its own
        if not told and "t allocate memory" not in text and "not enough memory" not in text:
            raise
        if job.device.type == "cuda":
            total = torch.cuda.get_device_properties(job.device).total_memory / MIB
            held = f"at most {torch.cuda.max_memory_allocated(job.device) / MIB:,.0f} of {total:,.0f} MiB were allocated"
        else:
            held = f"{psutil.Process().memory_info().rss / MIB:,.0f} MiB were resident"
        sizes = sorted(((size, part) for part, size in plan.lines().items() if size >= MIB), reverse=True)
        largest = ", ".join(f"{part} {size / MIB:,.0f}" for size, part in sizes[:4])
        enough = plan.baseline + int(_LESS * (plan.need - plan.baseline))
        found = advice.cheapest(job, enough, plan.baseline)
        options = "; or ".join(f"{change} ({other.need / MIB:,.0f} MiB)" for change, other in found)
        raise InputError(
            f"training ran out of memory on {job.device}: {held}; planned were {plan.need / MIB:,.0f} MiB, in the {plan.phase} "
            f"phase ({largest}); less is taken with {options or 'fewer labels only'}; {last_good(checkpoints)} ({text[:300]})"
        ) from error

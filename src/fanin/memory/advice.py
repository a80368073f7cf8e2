"""What makes a run fit: the least harmful changes of its settings, and the largest fan-in that fits.

Harm is an order, not a measure: first what changes no number (activations computed again), then what changes the course of
training a little (smaller micro-batches, for the head steps on each; moments in bf16; weights in bf16), then what changes it
more (no momentum; shared indices; fp8), last what takes capacity away (fan-in, the bottleneck's width, a sparse head for a
dense one). A pair is as harmful as both together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import combinations

from fanin.config import FAN_IN_LIMIT, Config, check
from fanin.files import InputError
from fanin.memory.job import Job
from fanin.memory.plan import Plan

STEP = 8  # fan-ins are multiples of it: whole vectors in every kernel


@dataclasses.dataclass(frozen=True)
class Change:
    """New values of some settings. harm: its place in the order above."""

    settings: tuple[tuple[str, object], ...]
    harm: int

    def __str__(self) -> str:
        return ", ".join(f"{key}={str(value).lower() if isinstance(value, bool) else value}" for key, value in self.settings)

    def apply(self, config: Config) -> Config:
        """A copy of `config` with these values."""
        for key, value in self.settings:
            section, name = key.split(".")
            changed = dataclasses.replace(getattr(config, section), **{name: value})
            config = dataclasses.replace(config, **{section: changed})
        return config

    def joined(self, other: Change) -> Change:
        return Change(self.settings + other.settings, self.harm + other.harm)

    @property
    def keys(self) -> frozenset[str]:
        """The settings that it changes."""
        return frozenset(key for key, _ in self.settings)


def changes(config: Config) -> list[Change]:
    """Every single change that would lower this run's memory, the least harmful first."""
    head, train = config.head, config.train
    found: list[Change] = []

    def offer(harm: int, **settings: object) -> None:
        found.append(Change(tuple((key.replace("__", "."), value) for key, value in settings.items()), harm))

    if not config.encoder.checkpointing:
        offer(1, encoder__checkpointing=True)
    for halvings in range(1, 5):
        batch = train.batch >> halvings
        if batch and train.batch % batch == 0:
            offer(1 + halvings, train__batch=batch, train__accumulation=train.accumulation << halvings)
    if train.encoder_moments == "fp32":
        offer(3, train__encoder_moments="bf16")
    if train.momentum:
        offer(8, train__momentum=0.0)
    if head.sparse:
        for harm, dtype in ((4, "bf16"), (10, "fp8")):
            if _below(dtype, head.dtype):
                offer(harm, head__dtype=dtype)
        for harm, group in ((9, 16), (11, 64)):
            if group > head.group:
                offer(harm, head__group=group)
        for harm, parts in ((12, 2), (16, 4)):
            fan_in = head.fan_in // parts // STEP * STEP
            if fan_in:
                offer(harm, head__fan_in=fan_in)
    elif head.kind == "bottleneck":
        for harm, parts in ((12, 2), (16, 4)):
            if head.bottleneck >= 2 * parts:
                offer(harm, head__bottleneck=head.bottleneck // parts)
    else:
        offer(14, head__kind="fixed_fan_in", head__fan_in=32)
    return sorted(found, key=lambda change: change.harm)


def cheapest(job: Job, room: int, baseline: int, wanted: int = 3) -> list[tuple[Change, Plan]]:
    """The `wanted` least harmful changes, singly or in pairs, with which the run fits into `room`, each with its plan.

    Left out: a pair of which one is enough, and more of a change that is enough as it is. Fewer than `wanted`, or none,
    where no more fit.
    """
    single = changes(job.config)
    pairs = [(one, two) for one, two in combinations(single, 2) if not one.keys & two.keys]
    fitting: list[tuple[Change, Plan]] = []
    for parts in [*((one,) for one in single), *sorted(pairs, key=lambda pair: pair[0].harm + pair[1].harm)]:
        change = parts[0] if len(parts) == 1 else parts[0].joined(parts[1])
        settled = any(own.keys == one.keys and own.harm >= one.harm for own in (change, *parts) for one, _ in fitting)
        if settled or not _valid(change.apply(job.config)):
            continue
        plan = _planned(job, change, baseline)
        if plan.need <= room:
            fitting.append((change, plan))
    return sorted(fitting, key=lambda found: found[0].harm)[:wanted]


def least(job: Job, baseline: int) -> tuple[Change, Plan]:
    """The pair of changes with the smallest plan: for a run that no change makes fit."""
    pairs = (one.joined(two) for one, two in combinations(changes(job.config), 2) if not one.keys & two.keys)
    found = [(pair, _planned(job, pair, baseline)) for pair in pairs if _valid(pair.apply(job.config))]
    return min(found, key=lambda pair: pair[1].need)


def least_fan_in(job: Job) -> int:
    """The smallest multiple of 8 that leaves a feature of the encoder beside the words."""
    return (job.config.head.lexical // STEP + 1) * STEP


def largest_fan_in(job: Job, room: int, baseline: int) -> tuple[int, Plan] | None:
    """The largest fan-in, a multiple of 8, with which the run fits into `room`, and its plan; None where none does."""
    best = None
    low, high = least_fan_in(job) // STEP, min(FAN_IN_LIMIT, job.features) // STEP
    while low <= high:
        middle = (low + high) // 2
        plan = _planned(job, Change((("head.fan_in", STEP * middle),), 0), baseline)
        if plan.need <= room:
            best, low = (STEP * middle, plan), middle + 1
        else:
            high = middle - 1
    return best


def _planned(job: Job, change: Change, baseline: int) -> Plan:
    return dataclasses.replace(job, config=change.apply(job.config)).plan(baseline)


def _valid(config: Config) -> bool:
    try:
        check(config)
    except InputError:
        return False
    return True


def _below(dtype: str, other: str) -> bool:
    order: Iterator[str] = iter(("fp8", "bf16", "fp32"))
    return dtype != other and dtype in order and other in order

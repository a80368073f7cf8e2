"""python -m fanin.memory plan: does a run fit? See --help. (`measure` is what measurements run in a process of their own.)"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
from pathlib import Path
from typing import Any

import torch

from fanin.config import load_config
from fanin.devices import choose_device
from fanin.files import InputError, read_json, write_json
from fanin.memory import advice, table
from fanin.memory.fits import CUDA_CONTEXT, FIRST_USE, job_of
from fanin.memory.job import Job, available
from fanin.memory.jobs import answer, process_bytes

_TOKENS = Path("data/tokens/tokens.json")
_UNITS = {"": 1, "k": 2**10, "m": 2**20, "g": 2**30, "t": 2**40}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m fanin.memory", description="Memory of the training step.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")
    plan = commands.add_parser(
        "plan",
        help="predict a training step's memory from params.yaml",
        description="Predict the memory of the training step that params.yaml describes, part by part; whether it fits; and, "
        "where it does not, the three least harmful changes that make it fit. Exit code 1 where it does not fit even without "
        "the allocator's slack.",
    )
    plan.add_argument("--memory", type=size, metavar="24GiB", help="the device's memory (default: what is free here)")
    plan.add_argument("--for", type=size, metavar="24GiB", dest="target", help="the largest fan-in that fits into so much")
    plan.add_argument("--labels", type=int, metavar="N", help=f"number of labels (default: as {_TOKENS} says)")
    plan.add_argument("--device", choices=("cpu", "cuda"), help="default: as train.device says; cuda needs no GPU here")
    plan.add_argument("--ranks", type=int, default=1, metavar="R", help="processes that share the labels (default 1)")
    plan.add_argument("--params", type=Path, default=Path("params.yaml"), help="default: params.yaml")
    measure = commands.add_parser("measure", help="run a training step in this process and write its peak memory")
    measure.add_argument("request", type=Path, help="JSON: config and the arguments of probe.measure")
    measure.add_argument("result", type=Path, help="JSON to write; sizes in bytes")
    options = parser.parse_args(arguments)
    if options.command == "measure":
        write_json(options.result, answer(read_json(options.request)))
        return 0
    try:
        return _plan(options)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def size(text: str) -> int:
    """Bytes of "24GiB", "512 MiB", "24G" or "1073741824"; all units are powers of 1024."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text, re.IGNORECASE)
    if match is None or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is not an amount of memory; write it as 24GiB or 512MiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def _plan(options: argparse.Namespace) -> int:
    job, baseline = _job(options)
    if options.target is not None:
        return _largest(job, options.target, baseline)
    here = job.device.type == "cpu" or torch.cuda.is_available()
    room = options.memory if options.memory is not None else available(job.device) if here else None
    plan = job.plan(baseline)
    print(table.title(job))
    print(table.table(plan, room))
    if room is None or plan.need <= room:
        return 0
    found = advice.cheapest(job, room, baseline)
    if found:
        print("the least harmful changes that make it fit, each with its peak:")
        print(table.options(found))
    else:
        print("no change, alone or with another, makes it fit; the smallest pair:")
        print(table.options([advice.least(job, baseline)]))
    return int(plan.peak > room)


def _largest(job: Job, room: int, baseline: int) -> int:
    if not job.config.head.sparse:
        raise InputError(f"--for: only a fixed_fan_in or head_tail head has a fan-in, but head.kind is {job.config.head.kind}")
    found = advice.largest_fan_in(job, room, baseline)
    if found is None:
        least = advice.least_fan_in(job)
        smallest = dataclasses.replace(job, config=advice.Change((("head.fan_in", least),), 0).apply(job.config))
        print(f"not even head.fan_in={least} fits:")
        print(table.title(smallest))
        print(table.table(smallest.plan(baseline), room))
        return 1
    fan_in, plan = found
    chosen = dataclasses.replace(job, config=advice.Change((("head.fan_in", fan_in),), 0).apply(job.config))
    print(f"the largest fan-in that fits (a multiple of {advice.STEP}): head.fan_in={fan_in}")
    print(table.title(chosen))
    print(table.table(plan, room))
    return 0


def _job(options: argparse.Namespace) -> tuple[Job, int]:
    """What to plan, and the bytes of a process that has built nothing yet."""
    config = load_config(options.params)
    description: dict[str, Any] = read_json(_TOKENS) if _TOKENS.exists() else {}
    description["max_length"] = config.tokens.max_length  # params.yaml's, whatever the present tokens were cut to
    if options.labels is not None:
        description |= {"labels": options.labels}
    for name in ("labels", "ranks"):
        value = description.get("labels") if name == "labels" else options.ranks
        if value is None:
            raise InputError(f"--labels: {_TOKENS} is not there yet, so say how many labels there are, as --labels 670091")
        if not isinstance(value, int) or value < 1:
            raise InputError(f"--{name}: {value} is not a number from 1 on")
    device = torch.device(options.device) if options.device else choose_device(config.train.device)
    if device.type == "cuda" and not torch.cuda.is_available() and config.train.precision == "auto":
        config = dataclasses.replace(config, train=dataclasses.replace(config.train, precision="bf16"))  # as GPUs choose
    job = job_of(config, description, device, options.ranks)
    if device.type == "cpu":
        return job, process_bytes(job)
    whole = options.memory is not None or options.target is not None or not torch.cuda.is_available()
    return job, FIRST_USE["cuda"] + (CUDA_CONTEXT if whole else 0)


if __name__ == "__main__":
    sys.exit(main())

"""What a long run meets: kill -9 anywhere, a full disk, damaged files, NaN, a second run, no memory, a clock that jumps."""

from __future__ import annotations

import contextlib
import copy
import errno
import itertools
import json
import os
import random
import resource
import signal
import socket
import threading
import time
from contextlib import suppress

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from fanin import checkpoint as checkpoint_module
from fanin import trainer as trainer_module
from fanin import training as training_module
from fanin.checkpoint import Checkpoint, list_checkpoints, save_checkpoint
from fanin.config import Config
from fanin.faults import finite, sole_run
from fanin.files import InputError
from fanin.heads import FixedFanIn
from fanin.memory.peaks import Peaks, current
from fanin.model import Classifier
from fanin.tensor_file import BLOCK, Damaged, read_tensors, write_tensors
from fanin.tracking import Run
from fanin.trainer import PATIENCE, Trainer
from training_folder import Forks, assert_same_run, prepare, train_in

CPU = torch.device("cpu")
TENSORS, STATE, SUMS = "state.safetensors", "state.json", "checksums.json"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("faults")
    config = prepare(path)
    train_in(path, config)
    return path, config


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


class Crash(Exception):
    """What a test ends a run with."""


def crash_at(step: int):
    def log(metrics: dict[str, float], now: int) -> None:
        if now == step:
            raise Crash

    return log


def some_tensors() -> dict[str, torch.Tensor]:
    """Every stored type; sizes that share blocks, cross them and fall between them."""
    types = (
        torch.float32,
        torch.bfloat16,
        torch.float8_e4m3fn,
        torch.uint16,
        torch.int32,
        torch.int64,
        torch.uint8,
        torch.bool,
    )
    tensors = {f"of {dtype}": torch.randn(37, 5).to(dtype) for dtype in types}
    tensors |= {"large": torch.randn(3 * BLOCK // 4 + 1), "step": torch.tensor(7.0), "empty": torch.empty(0, 4)}
    return tensors | {"columns": torch.randn(6, 9).T, "last": torch.randn(BLOCK // 2)}


# files ------------------------------------------------------------------------------------------------------------------


def test_what_is_written_is_read_and_is_a_safetensors_file(tmp_path):
    tensors = some_tensors()
    sums = write_tensors(tmp_path / "file", tensors)
    assert sums.bytes == (tmp_path / "file").stat().st_size
    assert len(sums.crc32) == -(-sums.bytes // BLOCK) > 4
    targets = {key: torch.ones(tensor.shape).to(tensor.dtype) for key, tensor in reversed(tensors.items())}
    read_tensors(tmp_path / "file", sums, targets)
    theirs = load_file(tmp_path / "file")
    for key, tensor in tensors.items():
        for read in (targets[key], theirs[key]):
            assert (read.dtype, read.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(read.double(), tensor.double()), key


def test_other_tensors_than_asked_for_are_refused(tmp_path):
    sums = write_tensors(tmp_path / "file", {"a": torch.ones(3), "b": torch.ones(2)})
    with pytest.raises(Damaged, match="differ in b"):
        read_tensors(tmp_path / "file", sums, {"a": torch.ones(3)})
    with pytest.raises(Damaged, match=r"b is torch.float32 \(2,\), not"):
        read_tensors(tmp_path / "file", sums, {"a": torch.ones(3), "b": torch.ones(2, dtype=torch.int32)})


@pytest.mark.parametrize("place", [0, 9, BLOCK, 3 * BLOCK + 77, -1])
def test_one_flipped_bit_is_found(tmp_path, place):
    tensors = some_tensors()
    sums = write_tensors(tmp_path / "file", tensors)
    flip(tmp_path / "file", place)
    tensors["columns"] = tensors["columns"].contiguous()
    with pytest.raises(Damaged, match=r"file: the checksum of bytes \d+ to \d+ is wrong"):
        read_tensors(tmp_path / "file", sums, tensors)


def flip(path, place: int) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 4
    path.write_bytes(content)


def test_a_checkpoint_takes_no_second_copy_in_memory(tmp_path):
    """192 MiB, written and read: at most 16 MiB beside the tensors, and what threads and buffers need."""
    tensors = {"a": torch.randn(2**25), "b": torch.randn(2**24)}
    save_checkpoint(tmp_path, 1, {"a": torch.ones(9)}, {})  # what is loaded at its first use is no growth
    before, peaks = current(CPU), Peaks(CPU)
    peaks.begin("write")
    path = save_checkpoint(tmp_path, 2, tensors, {})
    peaks.enter("read")
    Checkpoint(path).read(tensors)
    peaks.enter("after")
    assert max(peaks.highest.values()) - before < 40 * 2**20


def test_the_newest_two_are_kept(tmp_path):
    for step in (5, 10, 99, 100):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {})
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000000099", "step-000000100"]


def test_what_another_training_left_gives_way_to_later_checkpoints(tmp_path):
    """A run that goes on has removed what is newer than its checkpoint: such ones are of a training with other settings."""
    left = []
    for step in (30, 40, 5, 35, 36):
        save_checkpoint(tmp_path, step, {"a": torch.ones(1)}, {})
        left.append([int(path.name[-2:]) for path in list_checkpoints(tmp_path)])
    assert left == [[30], [30, 40], [5], [5, 35], [35, 36]]


def test_other_settings_start_anew_and_say_so_and_setting_them_back_goes_on(folder, capsys):
    path, config = folder
    assert [p.name[-2:] for p in break_off(path, config, "changed", 22)] == ["15", "20"]
    other = copy.deepcopy(config)
    other.train.encoder_lr *= 2
    with pytest.raises(Crash):
        train_in(path, other, "changed", crash_at(3))
    said = capsys.readouterr().err
    assert "step-000000020 is of a training with other settings or inputs: training starts from the beginning" in said
    watched = copy.deepcopy(config)
    watched.train.validate_every = 3 * config.train.validate_every  # what is only looked at may change
    assert [p.name[-2:] for p in break_off(path, watched, "changed", 23)] == ["15", "20"]
    assert "resuming at step 20 of 40\n" in capsys.readouterr().err
    assert [p.name[-2:] for p in break_off(path, other, "changed", 7)] == ["05"]


def test_resuming_with_other_sources_says_so(folder, monkeypatch, capsys):
    path, config = folder
    break_off(path, config, "sources", 12)
    monkeypatch.setattr(trainer_module, "sources_digest", lambda: "other")
    assert train_in(path, config, "sources")["resumed_from"] == 10
    assert "resuming at step 10 of 40; warning: fanin's sources have changed since" in capsys.readouterr().err


def test_an_encoder_that_recoding_can_make_nothing_of_is_said_to_be_that(folder, monkeypatch):
    path, config = folder
    config = copy.deepcopy(config)
    config.rewiring.recode_at = 0.5

    def fail(*given):
        raise InputError("the embeddings do not differ")

    monkeypatch.setattr(training_module, "recode_now", fail)
    with pytest.raises(InputError, match=r"step 20: rows cannot be coded .* do not differ; .*lower train\.encoder_lr"):
        train_in(path, config, "collapsed")


# damage -----------------------------------------------------------------------------------------------------------------


def break_off(folder, config, name: str, step: int) -> list:
    """Crash a run after `step`; its checkpoints."""
    with pytest.raises(Crash):
        train_in(folder, config, name, crash_at(step))
    return list_checkpoints(folder / name / "checkpoints")


def lengthen(sums) -> None:
    """Make them those of longer files."""
    sums.write_bytes(sums.read_bytes().replace(b'"bytes": ', b'"bytes": 1'))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        (TENSORS, lambda path: flip(path, 5000)),
        (TENSORS, lambda path: os.truncate(path, path.stat().st_size // 2)),
        (TENSORS, lambda path: path.unlink()),
        (STATE, lambda path: flip(path, 20)),
        (SUMS, lambda path: path.write_bytes(b"")),
        (SUMS, lengthen),
    ],
    ids=["flipped", "truncated", "missing", "state", "no sums", "other sums"],
)
def test_a_damaged_checkpoint_is_passed_over(folder, capsys, request, file, damage):
    """The one before lies before the auxiliary cut-off, the damaged one after it."""
    path, config = folder
    name = f"damaged-{request.node.callspec.id}"
    older, newest = break_off(path, config, name, 22)
    damage(newest / file)
    assert train_in(path, config, name)["resumed_from"] == 15
    errors = capsys.readouterr().err
    assert "warning: a checkpoint is damaged and not used: " in errors
    assert f"{newest.name}/{file if damage is not lengthen else STATE}" in errors
    assert "resuming at step 15 of 40" in errors
    assert older.name == "step-000000015"
    assert_same_run(path, "run", name)


def test_a_damaged_one_does_not_outlive_better_ones(folder):
    """Left in place it would count as the newest, and the good ones written since would be removed before it."""
    path, config = folder
    newest = break_off(path, config, "outlived", 22)[-1]
    flip(newest / TENSORS, 5000)
    assert [p.name[-2:] for p in break_off(path, config, "outlived", 17)] == ["15"]


def test_nothing_whole_left_is_an_error_and_removes_nothing(folder):
    path, config = folder
    left = break_off(path, config, "hopeless", 12)
    for checkpoint in left:
        flip(checkpoint / TENSORS, -1)
    with pytest.raises(InputError, match=r"no whole checkpoint is left .*checksum.*; remove the folder to start from"):
        train_in(path, config, "hopeless")
    assert list_checkpoints(path / "hopeless/checkpoints") == left


# the disk ---------------------------------------------------------------------------------------------------------------


def test_a_full_disk_costs_a_checkpoint_and_no_more(folder, monkeypatch, capsys):
    path, config = folder
    calls, real = itertools.count(1), checkpoint_module.write_bytes

    def full(*arguments):
        if next(calls) in (3, 4, 5):  # both files of the second and third checkpoint
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(*arguments)

    monkeypatch.setattr(checkpoint_module, "write_bytes", full)
    left = break_off(path, config, "full", 17)
    errors = capsys.readouterr().err
    assert "warning: step 10: no checkpoint is written: cannot write" in errors
    assert "the disk is full; free some space and run again; training goes on; the last good checkpoint is" in errors
    assert [p.name[-2:] for p in left] == ["05"]
    assert not list((path / "full/checkpoints").glob(".step-*"))
    monkeypatch.undo()
    assert train_in(path, config, "full")["resumed_from"] == 5
    assert_same_run(path, "run", "full")


def test_what_the_system_cut_off_is_removed(tmp_path):
    """A true short write: the kernel stops the file at 2 MiB."""
    save_checkpoint(tmp_path, 1, {"a": torch.ones(9)}, {})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**21, hard))
    try:
        with pytest.raises(InputError, match=r"step-000000002: the file grew past the size allowed"):
            save_checkpoint(tmp_path, 2, {"a": torch.ones(2**20)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000001"]
    Checkpoint(tmp_path / "step-000000001").read({"a": torch.empty(9)})


def test_a_full_disk_at_the_end_leaves_the_checkpoints(folder, monkeypatch):
    path, config = folder

    def full(*arguments):
        raise InputError("cannot write models: the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "save", full)
        with pytest.raises(InputError, match="the disk is full"):
            train_in(path, config, "late")
    assert train_in(path, config, "late")["resumed_from"] == 35
    assert_same_run(path, "run", "late")


# NaN --------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def poison(monkeypatch):
    """Spoil the head's steps with these seeds (config.seed + micro-batch number): what it reads, its dx, or its loss."""
    real = FixedFanIn.step

    def spoil(x: set[int] = frozenset(), dx: set[int] = frozenset(), loss: set[int] = frozenset()) -> None:
        def step(self, features, positives, *, seed, **settings):
            if seed - 1 in x:
                features = features.clone()
                features[1, 3] = float("nan")
            found = real(self, features, positives, seed=seed, **settings)
            if seed - 1 in dx:
                found[0][0, 0] = float("inf")
            return (found[0], found[1] * float("inf")) if seed - 1 in loss else found

        monkeypatch.setattr(FixedFanIn, "step", step)

    return spoil


def test_poisoned_batches_are_skipped_counted_and_repeated_on_resuming(folder, poison, capsys):
    """Half of step 5, all of step 8 (which rewires), dx of step 17, the loss of step 24; a break after each of them."""
    path, config = folder
    poison(x={8, 14, 15}, dx={33}, loss={46})
    logged = {}
    summary = train_in(path, config, "poisoned", lambda m, step: logged.setdefault(step, m))
    errors = capsys.readouterr().err
    assert summary["skipped_batches"] == 1 + 2 + 2 + 2
    assert "step 5: 1 batch(es) skipped, 1 so far: the encoder's output is not finite (x holds NaN" in errors
    assert "step 17: 2 batch(es) skipped, 5 so far: the encoder's gradient is not finite" in errors
    assert "step 24: 2 batch(es) skipped, 7 so far: the loss is inf" in errors
    assert logged[8] == {"skipped_batches": 2}
    lines = (path / "poisoned/reports/train_curve.csv").read_text().splitlines()
    assert [int(line.split(",")[0]) for line in lines[1:]] == [s for s in range(1, 41) if s not in (8, 17, 24)]
    assert "\n8," not in (path / "poisoned/reports/rewiring_curve.csv").read_text()
    for step in (6, 11, 19, 26):
        break_off(path, config, "poisoned-again", step)
    again = train_in(path, config, "poisoned-again")
    assert (again["resumed_from"], again["skipped_batches"]) == (25, 7)
    assert_same_run(path, "poisoned", "poisoned-again")


@pytest.mark.parametrize("kind", ["x", "dx"])
def test_a_lost_step_leaves_the_encoder_as_it_was(folder, poison, monkeypatch, kind):
    path, config = folder
    poison(**{kind: {12, 13}})
    seen = {}
    real = Trainer._train_step

    def spy(self, stream):
        found = real(self, stream)
        seen[self.step] = [p.detach().clone() for p in self.classifier.parameters()]
        assert all(p.grad is None for p in self.classifier.parameters())
        return found

    monkeypatch.setattr(Trainer, "_train_step", spy)
    break_off(path, config, f"unmoved-{kind}", 8)
    assert all(torch.equal(a, b) for a, b in zip(seen[6], seen[7], strict=True))
    assert not all(torch.equal(a, b) for a, b in zip(seen[5], seen[6], strict=True))


def test_nan_step_after_step_stops_the_run_at_its_last_good_checkpoint(folder, poison):
    path, config = folder
    poison(x=set(range(24, 999)))
    with pytest.raises(InputError) as found:
        train_in(path, config, "lost")
    assert f"step {12 + PATIENCE}: {PATIENCE} steps in a row met NaN or infinite values" in str(found.value)
    (_, last) = list_checkpoints(path / "lost/checkpoints")
    assert str(found.value).endswith(f"the last good checkpoint is {last}")
    assert last.name == "step-000000010"
    assert not (path / "lost/models").exists()


def test_a_head_that_diverged_is_never_kept(folder, capsys):
    path, config = folder
    config = copy.deepcopy(config)
    config.train.head_lr, config.head.loss, config.train.checkpoint_every = 1e4, "squared_hinge", 1
    with pytest.raises(InputError, match=r"in a row met NaN .*lower train.encoder_lr \(.*\) or train.head_lr \(10000.0\)"):
        train_in(path, config, "diverged")
    assert "no checkpoint is written: training meets NaN or infinite values" in capsys.readouterr().err
    for kept in list_checkpoints(path / "diverged/checkpoints"):
        assert finite(load_file(kept / TENSORS).values())


def test_finite_looks_at_every_type():
    for dtype in (torch.float32, torch.bfloat16, torch.float8_e4m3fn):
        tensor = torch.ones(5).to(dtype)
        assert finite([torch.arange(3), torch.empty(0), tensor])
        tensor[4] = float("nan")
        assert not finite([tensor])
    assert not finite([torch.tensor([1.0, float("-inf")])])


# one run a folder -------------------------------------------------------------------------------------------------------


def test_the_lock_ends_with_its_block_and_needs_a_folder(tmp_path):
    for _ in range(2):
        with (
            sole_run(tmp_path / "run"),
            pytest.raises(InputError, match=f"process {os.getpid()} on"),
            sole_run(tmp_path / "run"),
        ):
            pass
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot write .*file/\.lock"), sole_run(tmp_path / "file"):
        pass


# kill -9 ----------------------------------------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_not_taken_up(folder, monkeypatch):
    """Died between two files of the second checkpoint; only rubbish under a temporary name is left of it, and goes."""
    path, config = folder
    calls, real = itertools.count(1), checkpoint_module.write_bytes

    def die(target, content):
        if next(calls) == 3:
            half = path / "half/checkpoints/.step-000000010.1.tmp"
            half.mkdir()
            (half / TENSORS).write_bytes(b"x" * 999)
            raise Crash
        return real(target, content)

    monkeypatch.setattr(checkpoint_module, "write_bytes", die)
    with pytest.raises(Crash):
        train_in(path, config, "half")
    monkeypatch.undo()
    assert train_in(path, config, "half")["resumed_from"] == 5
    assert_same_run(path, "run", "half")
    assert [file.name for file in (path / "half/checkpoints").iterdir()] == [".lock"]


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_kill_9_at_twenty_random_moments(folder, forks):
    """Within or after twenty different steps: in a checkpoint's writing, a rewiring, validation, whatever is going on then."""
    path, config = folder
    rng = random.Random(5)
    resumed = []
    for step in rng.sample(range(40), 20):
        name = f"random-{step}"
        while True:
            fork = forks.start(path, name)
            fork.wait_for_step(step)
            time.sleep(rng.uniform(0, 0.05))
            with suppress(ProcessLookupError):  # it was quicker; once more
                fork.send(signal.SIGKILL)
            if fork.wait() == -signal.SIGKILL:
                break
        resumed.append(train_in(path, config, name)["resumed_from"])
        assert_same_run(path, "run", name)
    assert len(resumed) == 20
    assert len(set(resumed)) > 3, f"the moments were not spread over the run: {resumed}"


# memory, time, tracking -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("owner", "method", "error"),
    [
        (FixedFanIn, "step", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has ...")),
        (Classifier, "embed", torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")),
        (Classifier, "embed", RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried 9 bytes")),
        (Classifier, "build", MemoryError()),
    ],
)
def test_running_out_of_memory_says_what_was_planned_and_what_to_change(folder, monkeypatch, owner, method, error):
    path, config = folder

    def fail(*arguments, **settings):
        raise error

    monkeypatch.setattr(owner, method, fail)
    with pytest.raises(InputError) as found:
        train_in(path, config, f"memory-{method}")
    text = str(found.value)
    assert text.startswith("training ran out of memory on cpu: ")
    for part in ("MiB were resident; planned were ", " MiB, in the ", "process and libraries ", "less is taken with "):
        assert part in text
    assert "no checkpoint had been written yet" in text


def test_a_run_whose_plan_does_not_fit_is_refused(folder, monkeypatch):
    path, config = folder
    monkeypatch.setattr("fanin.memory.fits.available", lambda device: 2**20)
    with pytest.raises(InputError, match=r"this run does not fit: .*train.batch 7"):
        train_in(path, config, "too large")
    assert not (path / "too large/models").exists()


def test_moments_in_bf16_resume_to_the_same_bits(folder):
    path, config = folder
    config = copy.deepcopy(config)
    config.train.encoder_moments = "bf16"
    train_in(path, config, "bf16")
    newest = break_off(path, config, "bf16-again", 12)[-1]
    kept = load_file(newest / TENSORS)
    assert {kept[key].dtype for key in kept if "exp_avg" in key} == {torch.bfloat16}
    assert train_in(path, config, "bf16-again")["resumed_from"] == 10
    assert_same_run(path, "bf16", "bf16-again")


def test_other_errors_pass_as_they_are(folder, monkeypatch):
    path, config = folder

    def fail(*arguments, **settings):
        raise NotImplementedError("a kernel")

    monkeypatch.setattr(FixedFanIn, "step", fail)
    with pytest.raises(NotImplementedError, match="a kernel"):
        train_in(path, config, "other")


def test_a_clock_that_jumps_changes_nothing(folder, monkeypatch):
    """The wall clock goes back a day and forth a year; files get times in the wrong order."""
    path, config = folder
    jumps = itertools.cycle([0.0, -86400.0, 3.2e7])
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + next(jumps))
    older, newest = break_off(path, config, "clock", 12)
    for number, checkpoint in enumerate((newest, older)):
        os.utime(checkpoint, (number * 1e9, number * 1e9))
    summary = train_in(path, config, "clock")
    assert summary["resumed_from"] == 10
    assert 0 < summary["seconds"] < 120
    assert summary["documents_per_second"] > 0
    rows = (path / "clock/reports/train_curve.csv").read_text().splitlines()[1:]
    rates = np.array([float(row.rpartition(",")[2]) for row in rows])
    assert (rates >= 0).all()
    assert (rates < 1e6).all()
    assert_same_run(path, "run", "clock")


def test_a_tracking_server_that_hangs_costs_a_run_nothing(folder, tmp_path, monkeypatch):
    """Metrics go to a journal on disk; the server, which accepts and never answers, is another process's concern."""
    path, config = folder
    with socket.create_server(("127.0.0.1", 0)) as server:
        held: list[socket.socket] = []
        server.settimeout(60)

        def hold() -> None:
            with contextlib.suppress(OSError):  # closed at the end
                held.append(server.accept()[0])

        threading.Thread(target=hold, daemon=True).start()
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("FANIN_TRACKING", "offline")
        monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{server.getsockname()[1]}")
        run = Run.start("train", Config())
        train_in(path, config, "tracked", run.metrics)
        run.end("FINISHED")
        assert not held  # training itself never spoke to it
    journals = list(tmp_path.glob("outbox/*/train*/journal.jsonl"))
    events = [json.loads(line) for journal in journals for line in journal.read_text().splitlines()]
    assert sum(event["event"] == "metrics" and "loss" in event["values"] for event in events) == 40
    assert_same_run(path, "run", "tracked")

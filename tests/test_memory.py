"""Memory: the plan's arithmetic against what torch really allocates and saves, and against measured peaks."""

from __future__ import annotations

import csv
import dataclasses
import json
import platform
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import BertConfig, BertModel, DistilBertConfig, ResNetConfig

from fanin.config import Config, Head
from fanin.files import InputError, write_json
from fanin.heads import build_head
from fanin.memory import jobs, probe
from fanin.memory.jobs import Job, measure_all
from fanin.memory.peaks import Peaks
from fanin.memory.plan import PARTS, Plan, head_bytes, predict, rewire_buffers, step_buffers
from fanin.memory.record import record
from fanin.memory.shapes import EncoderShape, random_encoder
from fanin.objectives import Positives
from fanin.rewiring import Schedule
from tiny import tiny_tokenizer

CPU = torch.device("cpu")
BF16, FP32 = torch.bfloat16, torch.float32


class Live(TorchDispatchMode):
    """Counts the bytes of all storages that are alive, and their highest sum."""

    def __init__(self, *known: Tensor) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.now = self.peak = 0
        for tensor in known:
            self._see(tensor)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self.sizes:
            self.sizes[key] = storage.nbytes()
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.now -= self.sizes.pop(key, 0)


class LivePeaks(Peaks):
    """Peaks of the live tensors instead of the process."""

    def __init__(self, live: Live) -> None:
        super().__init__(CPU)
        self.live, self.resettable = live, True

    def _peak(self) -> int:
        return self.live.peak

    def _reset(self) -> None:
        self.live.peak = self.live.now


def bert(dropout: float = 0.0, attention: float = 0.0, **sizes: int) -> BertConfig:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96} | sizes
    return BertConfig(
        vocab_size=128,
        max_position_embeddings=256,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=attention,
        **sizes,
    )


def distilbert(dropout: float, attention: float) -> DistilBertConfig:
    sizes = {"dim": 32, "n_layers": 3, "n_heads": 2, "hidden_dim": 64}
    return DistilBertConfig(vocab_size=128, dropout=dropout, attention_dropout=attention, **sizes)


def settings(kind: str = "fixed_fan_in", intermediate: int = 0, **changes: Any) -> Config:
    """A config with this head; other settings as section=dict of changes."""
    config = Config(head=Head(kind=kind, fan_in=8, intermediate=intermediate, bottleneck=16, **changes.pop("head", {})))
    config.encoder.hidden_dropout = None
    for section, values in changes.items():
        setattr(config, section, dataclasses.replace(getattr(config, section), **values))
    return config


def plan(config: Config, labels: int = 1000, **changes: Any) -> Plan:
    return predict(config, EncoderShape.of(bert()), labels, **{"batch": 16, "tokens": 32} | changes)


# the head ---------------------------------------------------------------------------------------------------------

HEADS = {
    "sparse": (Head(fan_in=32), 384, 64),
    "sparse, few labels": (Head(fan_in=8), 128, 256),
    "groups": (Head(fan_in=32, group=64), 512, 128),
    "wide": (Head(fan_in=32, loss="squared_hinge"), 4096, 128),
    "dense": (Head(kind="dense"), 384, 64),
    "dense, narrow": (Head(kind="dense"), 64, 256),
    "dense, bf16": (Head(kind="dense", dtype="bf16"), 384, 64),
    "dense, fp8": (Head(kind="dense", dtype="fp8", rounding="kahan"), 128, 64),
    "bottleneck": (Head(kind="bottleneck", bottleneck=64), 384, 64),
    "split": (Head(kind="head_tail", fan_in=32, dense_share=0.02), 384, 64),
    "split, bf16": (Head(kind="head_tail", fan_in=16, dense_share=0.3, dtype="bf16"), 384, 64),
}


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("name", HEADS)
def test_head_bytes_are_those_of_the_real_head(name: str, momentum: float) -> None:
    head, features, _ = HEADS[name]
    real = build_head(head, 1001, features)
    real.prepare_training(momentum)
    assert head_bytes(head, 1001, features, momentum=momentum > 0) == real.bytes()


@pytest.mark.parametrize("labels", [700, 10000])
@pytest.mark.parametrize("name", HEADS)
def test_step_buffers_are_what_a_step_allocates(name: str, labels: int) -> None:
    head, features, batch = HEADS[name]
    real = build_head(head, labels, features)
    real.prepare_training(0.9)
    x, positives = torch.randn(batch, features), Positives(torch.arange(100), torch.arange(100) % batch)
    live = Live(x, *positives, *real.buffers())
    before = live.now
    with live:
        real.step(x, positives, lr=0.1, momentum=0.9, want_loss=True)
    assert step_buffers(head, labels, features, batch) == pytest.approx(live.peak - before, rel=0.1)


@pytest.mark.parametrize("method", ["set", "rigl"])
@pytest.mark.parametrize("prune", ["fraction", "global"])
@pytest.mark.parametrize("name", ["sparse", "sparse, few labels", "groups"])
def test_rewire_buffers_are_what_rewiring_allocates(name: str, prune: str, method: str) -> None:
    head, features, batch = HEADS[name]
    real = build_head(head, 12000, features)
    real.prepare_training(0.9)
    x, positives = torch.randn(batch, features), Positives(torch.arange(100), torch.arange(100) % batch)
    schedule = Schedule(method=method, prune=prune, amount=0.15, interval=1, end_step=9)
    live = Live(x, *positives, *real.buffers())
    before = live.now
    with live:
        real.rewire(schedule, 1, 0, x, positives)
    assert rewire_buffers(head, 12000, features, batch, method, prune) == pytest.approx(live.peak - before, rel=0.1)


# the encoder ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", [FP32, BF16])
@pytest.mark.parametrize(("dropout", "attention"), [(0.0, 0.0), (0.1, 0.1), (0.1, 0.0), (0.0, 0.1)])
@pytest.mark.parametrize("family", [bert, distilbert])
def test_saved_tensors_are_those_of_autograd(
    family: Any, dropout: float, attention: float, precision: torch.dtype, checkpointing: bool
) -> None:
    changes = {"train": {"batch": 6, "max_steps": 1}, "encoder": {"checkpointing": checkpointing}}
    shape, config = family(dropout, attention), settings("dense", **changes)
    classifier = probe.random_classifier(config, random_encoder(shape), 50, CPU, precision)
    trainer = probe._trainer(config, classifier, 40, 1, Path("unused"))
    planned = EncoderShape.of(shape).saved(6, 40, "cpu", precision, checkpointing)
    assert planned == pytest.approx(probe.saved_bytes(classifier, trainer), rel=0.005)


@pytest.mark.parametrize("probability", [0.0, 0.1])
def test_hidden_dropout_replaces_the_models_own(probability: float) -> None:
    for own in (0.0, 0.3):
        assert EncoderShape.of(bert(own, own), probability) == EncoderShape.of(bert(probability, probability))


def test_encoder_shape_counts_the_real_parameters() -> None:
    model = BertModel(bert(), add_pooling_layer=False)
    shape = EncoderShape.of(model.config)
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert (shape.layers, shape.heads, shape.feed_forward, shape.vocabulary) == (2, 4, 96, 128)


def test_an_encoder_that_is_no_transformer_is_refused() -> None:
    with pytest.raises(InputError, match=r"encoder\.name.*num_attention_heads"):
        EncoderShape.of(ResNetConfig())


# the whole step ---------------------------------------------------------------------------------------------------

STEPS = {
    "sparse": (settings(intermediate=64, train={"batch": 32}), bert(), 3000, 64, FP32),
    "dense, dropout": (settings("dense", train={"batch": 16}), bert(0.1, 0.1), 3000, 64, FP32),
    "long documents": (settings("dense", train={"batch": 4}), bert(0.1, 0.1, num_attention_heads=8), 500, 192, FP32),
    "bf16": (settings(train={"batch": 32}), bert(intermediate_size=256), 3000, 64, BF16),
    "one document": (settings("bottleneck", train={"batch": 1}), bert(hidden_size=128), 3000, 8, FP32),
    "accumulation": (
        settings("dense", train={"batch": 4, "accumulation": 2, "momentum": 0.0}),
        bert(hidden_size=128),
        50,
        32,
        FP32,
    ),
    "branch": (settings(train={"batch": 32}, auxiliary={"enabled": True}), bert(), 2000, 64, FP32),
    "groups": (settings(head={"group": 16}, train={"batch": 32}), bert(), 20_000, 32, FP32),
    "checkpointing": (settings(train={"batch": 32}, encoder={"checkpointing": True}), bert(num_hidden_layers=6), 300, 64, FP32),
    "checkpointing, dropout": (
        settings(train={"batch": 16}, encoder={"checkpointing": True}),
        bert(0.1, 0.1, num_hidden_layers=6),
        300,
        64,
        FP32,
    ),
    "checkpointing, bf16": (
        settings(train={"batch": 32}, encoder={"checkpointing": True}),
        bert(num_hidden_layers=6, intermediate_size=256),
        300,
        64,
        BF16,
    ),
    "rewiring": (settings(train={"batch": 8}, rewiring={"method": "rigl"}), bert(), 60000, 8, FP32),
}


@pytest.mark.parametrize("name", STEPS)
def test_each_phase_is_planned_as_it_is(name: str, tmp_path: Path) -> None:
    """Live tensors of the trainer's own steps; no process, so no noise."""
    config, shape, labels, tokens, precision = STEPS[name]
    classifier = probe.random_classifier(config, random_encoder(shape), labels, CPU, precision)
    trainer = probe._trainer(config, classifier, tokens, 2, tmp_path)
    probe._make_moments(trainer.optimizer)
    branch = trainer.auxiliary
    moments = [t for state in trainer.optimizer.state.values() for t in state.values()]
    kept = [*classifier.parameters(), *classifier.buffers(), *moments]
    kept += [*branch.parameters(), *branch.buffers()] if branch is not None else []
    live = Live(*kept)
    order = trainer.batches._label_rows
    live.now += 0 if order is None else order.nbytes  # NumPy's, so that torch does not tell of it
    planned = predict(config, EncoderShape.of(shape), labels, batch=config.train.batch, tokens=tokens, precision=precision)
    assert planned.resident == pytest.approx(live.now, rel=0.01)
    peaks = LivePeaks(live)
    peaks.watch(trainer)
    peaks.begin("before")
    with live:
        trainer.run()
    for phase, size in planned.phases.items():
        assert planned.resident + size.total == pytest.approx(peaks.highest[phase], rel=0.1), phase
    assert planned.peak == pytest.approx(max(peaks.highest.values()), rel=0.05)


def test_parts_sum_to_the_peak_of_the_highest_phase() -> None:
    planned = plan(settings(intermediate=64, auxiliary={"enabled": True}), baseline=1000)
    assert tuple(planned.parts()) == PARTS
    assert sum(planned.parts().values()) == planned.peak
    assert planned.peak == planned.resident + max(phase.total for phase in planned.phases.values())
    assert planned.parts()["baseline"] == 1000


@pytest.mark.parametrize("kind", ["fixed_fan_in", "dense", "bottleneck"])
def test_memory_grows_linearly_in_labels(kind: str) -> None:
    one, two, three = (plan(settings(kind), labels).peak for labels in (600_000, 1_200_000, 1_800_000))
    each = head_bytes(settings(kind).head, 600_000, 32, momentum=True)
    steady = 2 * 4 * 16 * 32 if kind == "bottleneck" else 0  # the projection and its momentum do not grow
    assert three - two == two - one == sum(each.values()) - steady


def test_only_a_sparse_head_has_indices_and_rewiring() -> None:
    sparse, dense = plan(settings(rewiring={"method": "set"})), plan(settings("dense"))
    assert sparse.indices == 1000 * 8 * 2  # uint16
    assert dense.indices == 0
    assert "rewire" in sparse.phases
    assert "rewire" not in dense.phases
    refitted = {"recode_at": 0.8, "refit_epochs": 2}
    assert "exchange" in plan(settings(rewiring=refitted)).phases
    for other in (settings("dense", rewiring=refitted), settings(rewiring=refitted | {"exchange": 0.0})):
        assert "exchange" not in plan(other).phases


def test_momentum_and_half_precision_are_seen() -> None:
    assert plan(settings(train={"momentum": 0.0})).head_optimizer == 0
    assert plan(settings(), precision=BF16).phases["head"].activations < plan(settings()).phases["head"].activations
    cuda = plan(settings(), device="cuda")
    assert cuda.head_weights == plan(settings()).head_weights


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_a_random_classifier_holds_small_finite_weights_in_every_type(dtype: str) -> None:
    classifier = probe.random_classifier(settings(head={"dtype": dtype}), random_encoder(bert()), 70_000, CPU, FP32)
    weight = classifier.head.weight.float()  # type: ignore[operator, union-attr]
    assert weight.abs().max() < 0.11
    assert weight.std() > 0.05


def test_random_indices_are_distinct_and_ascending() -> None:
    for fan_in, width in ((8, 32), (32, 32), (7, 100)):
        index = torch.empty(500, fan_in, dtype=torch.uint8)
        probe._spread(index, width)
        assert (index[:, 1:].int() > index[:, :-1].int()).all()
        assert int(index.max()) < width


# the stage --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Config]:
    """A folder with an encoder of some substance, and the settings of a run in it."""
    folder = tmp_path_factory.mktemp("memory")
    model = BertModel(bert(hidden_size=128, intermediate_size=512, num_hidden_layers=3), add_pooling_layer=False)
    model.save_pretrained(folder / "encoder")
    tiny_tokenizer().save_pretrained(folder / "encoder")
    (folder / "tokens").mkdir()
    write_json(folder / "tokens/tokens.json", {"labels": 60_000, "max_length": 64, "vocabulary": 128})
    config = settings(train={"batch": 64, "precision": "fp32", "device": "cpu"})
    config.encoder.name = str(folder / "encoder")
    config.memory = dataclasses.replace(config.memory, scale_labels=[400_000, 200_001], steps=1)
    return folder, config


@pytest.fixture(scope="module")
def recorded(workspace: tuple[Path, Config]) -> dict[str, Any]:
    """memory.json of a sparse run, measured in two processes."""
    folder, config = workspace
    content = record(config, tokens_folder=folder / "tokens", reports=folder / "reports")
    text = (folder / "reports/memory.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == content
    return content


def test_measured_peaks_are_as_predicted(recorded: dict[str, Any]) -> None:
    assert [(run["role"], run["head"]) for run in recorded["runs"]] == [("this run", "fixed_fan_in"), ("dense", "dense")]
    for run in recorded["runs"]:
        predicted, measured = run["predicted_mib"], run["measured_mib"]
        own, real = (sizes["peak"] - sizes["baseline"] for sizes in (predicted, measured))  # without what torch itself takes
        assert own == pytest.approx(real, rel=0.1), run["role"]
        assert abs(run["error_percent"]) < 5
        for part in ("encoder", "encoder_optimizer", "head_weights", "indices", "head_optimizer"):
            assert predicted[part] == pytest.approx(measured[part], abs=0.02), part
        assert set(predicted) == set(measured) == {*PARTS, "peak"}
        assert sum(measured[part] for part in PARTS) == pytest.approx(measured["peak"], abs=0.1)
        assert run["saved_mib"] == pytest.approx(predicted["activations"], rel=0.02)
    sparse, dense = recorded["runs"]
    assert dense["measured_mib"]["indices"] == 0 < sparse["measured_mib"]["indices"]
    assert sparse["measured_mib"]["peak"] < dense["measured_mib"]["peak"]
    assert sparse["allocator_mib"] is None or sparse["allocator_mib"] >= 0


def test_the_record_names_sizes_and_scale(recorded: dict[str, Any], workspace: tuple[Path, Config]) -> None:
    assert (recorded["device"], recorded["batch"], recorded["tokens"], recorded["dtype"]) == ("cpu", 64, 64, "float32")
    assert recorded["head_bytes"] == {"this": 60_000 * 8 * 6, "dense": 60_000 * 128 * 4}
    assert recorded["ratio"] == pytest.approx(128 * 4 / (8 * 6))
    scale = [(row["labels"], row["head"]) for row in recorded["scale"]]
    assert scale == [(200_001, "fixed_fan_in"), (200_001, "dense"), (400_000, "fixed_fan_in"), (400_000, "dense")]
    for row in recorded["scale"]:
        assert sum(row["parts_mib"].values()) == pytest.approx(row["predicted_mib"], abs=0.1)
        assert row["measured_peak_mib"] is None  # too many labels
    with open(workspace[0] / "reports/memory_scale.csv", newline="", encoding="utf-8") as file:
        rows = [(int(row["labels"]), row["head"], float(row["predicted_mib"])) for row in csv.DictReader(file)]
    assert rows == [(row["labels"], row["head"], row["predicted_mib"]) for row in recorded["scale"]]


def a_job(workspace: tuple[Path, Config]) -> Job:
    shape = EncoderShape.of(bert())
    return Job(config=workspace[1], shape=shape, labels=100, tokens=16, device=CPU, precision=FP32)


def stand_in(folder: Path, script: str) -> str:
    """An executable that is started in place of Python."""
    path = folder / "stand_in"
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_dense_run_is_measured_alone(workspace: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, config = workspace
    asked: list[Job] = []

    def measured(wanted: list[Job], *options: Any) -> list[dict[str, Any]]:
        asked.extend(wanted)
        sizes = dict.fromkeys((*PARTS, "peak", "saved"), 1)
        return [sizes | {"phase": "head", "phases": {"head": 1}, "allocator": None, "reserved": None} for _ in wanted]

    monkeypatch.setattr("fanin.memory.record.measure_all", measured)
    config = dataclasses.replace(config, head=Head(kind="dense", intermediate=0))
    content = record(config, tokens_folder=folder / "tokens", reports=tmp_path)
    assert [run["role"] for run in content["runs"]] == ["this run"]
    assert len(asked) == 1
    assert content["ratio"] == 1


def test_a_child_that_the_kernel_killed_is_explained(
    workspace: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.sys, "executable", stand_in(tmp_path, "kill -9 $$"))
    with pytest.raises(InputError, match=r"ran out of memory.*100 labels.*MiB.*2,048 MiB are free; lower train\.batch"):
        measure_all([a_job(workspace)], 1, 1, 2**31)


def test_a_child_that_fails_shows_its_last_words(
    workspace: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jobs.sys, "executable", stand_in(tmp_path, "echo something broke >&2; exit 3"))
    with pytest.raises(RuntimeError, match=r"exit code 3:\nsomething broke"):
        measure_all([a_job(workspace)], 1, 1, 2**31)


def test_what_the_child_refuses_and_where_memory_ends(workspace: tuple[Path, Config], monkeypatch: pytest.MonkeyPatch) -> None:
    request = {"config": dataclasses.asdict(workspace[1]), "labels": 10, "tokens": 16, "steps": 1, "device": "cpu"}
    request |= {"precision": "float32", "thorough": False, "allocator": False}
    for error, key in ((InputError("no"), "refused"), (MemoryError("no"), "out_of_memory")):

        def fail(*arguments: Any, error: Exception = error, **options: Any) -> None:
            raise error

        monkeypatch.setattr(probe, "measure", fail)
        assert jobs.answer(request) == {key: "no"}


KEPT_BLOCKS = """
import torch
from fanin.memory import peaks

peaks.release_allocator()
held = []
for number in range(200):  # 1 MiB that is freed, and an eighth behind it that stays: the heap cannot shrink
    block = torch.ones(2**18)
    held += [block, torch.ones(2**15)]
del block, held[::2]
before = peaks._anonymous()
far, near = peaks.Trimmer(2**30), peaks.Trimmer(-(2**20))
far()
assert peaks._anonymous() > before - 2**24 and far.trimmed == 0
near()
after = peaks._anonymous()
assert after < before - 150 * 2**20, (before, after)
near()
assert near.trimmed == 1  # there is nothing left that it could give back
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_what_glibc_keeps_of_freed_blocks_goes_back_between_steps() -> None:
    subprocess.run([sys.executable, "-c", KEPT_BLOCKS], check=True)


def test_a_run_that_cannot_fit_is_refused(
    workspace: tuple[Path, Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fanin.memory.record.available", lambda device: 2**20)
    with pytest.raises(InputError, match=r"does not fit.*60,000 labels.* 1 MiB are free"):
        record(workspace[1], tokens_folder=workspace[0] / "tokens", reports=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("tokens", "encoder", "message"),
    [
        ({"labels": 10}, None, r"tokens\.json: no number of max_length"),
        ({"labels": 10, "max_length": 16}, "/nowhere", r"encoder\.name: there is no folder"),
        (None, None, r"tokens\.json is missing"),
    ],
)
def test_bad_input(
    workspace: tuple[Path, Config], tmp_path: Path, tokens: dict[str, int] | None, encoder: str | None, message: str
) -> None:
    config = dataclasses.replace(workspace[1], encoder=dataclasses.replace(workspace[1].encoder))
    config.encoder.name = encoder or config.encoder.name
    if tokens is not None:
        write_json(tmp_path / "tokens.json", tokens)
    with pytest.raises(InputError, match=message):
        record(config, tokens_folder=tmp_path, reports=tmp_path / "reports")

"""Several processes that train one model: what they tell each other, and that their number changes last bits alone."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from safetensors.torch import load_file

from fanin import profiles
from fanin.checkpoint import list_checkpoints
from fanin.config import Config
from fanin.data.tokens import TokenSet, vocabulary_size
from fanin.files import InputError
from fanin.model import Classifier
from fanin.ranks import ALONE, Ranks
from fanin.refitting import refit
from fanin.retrieval import rank as rank_documents
from fanin.start.build import build_start
from fanin.trainer import Trainer
from tiny import tiny_tokenizer
from together import Together
from training_folder import LABELS, assert_same_run, prepare, small_config, train_in


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    server = Together(tmp_path_factory.mktemp("together"), "test_ranks")
    yield server
    server.close()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, together):
    """Data, and runs of it by one, two and four processes: runs/1, runs/2, ..."""
    path = tmp_path_factory.mktemp("ranks")
    prepare(path)
    for size in (1, 2, 4):
        together.run(size, "test_ranks.train_here", str(path), str(size), {})
    return path


def settings(folder: Path, changes: dict) -> Config:
    """Nothing that rounding can turn into another choice: features regrown at random, no dropout."""
    config = small_config(folder / "encoder")
    config.encoder.dropout, config.encoder.hidden_dropout, config.rewiring.method = 0.0, 0.0, "set"
    for name, value in changes.items():
        section, _, key = name.partition(".")
        setattr(getattr(config, section), key, value)
    return config


# in the processes -------------------------------------------------------------------------------------------------------


def train_here(ranks: Ranks, folder: str, name: str, changes: dict, die: list | None = None) -> None:
    """Train; die: [rank, step] that kills itself, [-1, step] all of them."""
    if die:
        step_of, own = Trainer._train_step, die[0] in (-1, ranks.rank)

        def step_and_die(self, stream):
            if own and self.step == die[1]:
                os.kill(os.getpid(), signal.SIGKILL)
            return step_of(self, stream)

        Trainer._train_step = step_and_die
    train_in(Path(folder), settings(Path(folder), changes), name, ranks=ranks)


def train_profiles_here(ranks: Ranks, folder: str, name: str, changes: dict) -> None:
    profiles.EVERY = 12  # so that five labels have one
    train_here(ranks, folder, name, changes)


def refit_profiles_here(ranks: Ranks, folder: str, out: str, changes: dict) -> None:
    """Two epochs of the head alone on made-up embeddings; every rank leaves its profiles."""
    profiles.EVERY = 12
    config = settings(Path(folder), changes)
    classifier = Classifier.build(config, LABELS, ranks=ranks)
    classifier.load_start(Path(folder) / "data/start/head.safetensors")
    classifier.prepare_training()
    rows = np.arange(0, 88, 2)  # the last batch is smaller than the number of ranks
    embeddings = np.random.default_rng(0).normal(size=(len(rows), classifier.encoder.width)).astype(np.float16)
    refit(classifier, TokenSet.open(Path(folder) / "data/tokens/train.arrow"), rows, embeddings, 2)
    np.save(f"{out}-{ranks.rank}.npy", classifier.lexical.profiles.weight.numpy())


def collectives(ranks: Ranks) -> None:
    whole = torch.arange(7 * 3, dtype=torch.float32).view(7, 3)
    first, last = ranks.share(7)
    torch.testing.assert_close(ranks.gather(whole[first:last], 7), whole)
    torch.testing.assert_close(ranks.scatter_sum(whole * (ranks.rank + 1)), whole[first:last] * sum(range(1, ranks.size + 1)))
    few = torch.ones(1, 2)
    assert ranks.gather(few[slice(*ranks.share(1))], 1).equal(few)  # a batch smaller than the number of ranks
    assert len(ranks.scatter_sum(few)) == ranks.share(1)[1] - ranks.share(1)[0]
    tensors = [torch.full((5,), float(ranks.rank)), torch.ones(2, 2).t(), torch.zeros(())]
    ranks.sum_(tensors)
    everyone = ranks.size * (ranks.size - 1) / 2
    assert [float(tensor.unique()) for tensor in tensors] == [everyone, ranks.size, 0]
    assert ranks.most([ranks.rank, -ranks.rank]) == [ranks.size - 1, 0]
    assert ranks.total([1, ranks.rank]) == [ranks.size, everyone]
    assert ranks.of_first(f"said by {ranks.rank}") == "said by 0"
    with pytest.raises(OSError, match="rank 1: broken" if ranks.rank != 1 else "^broken"), ranks.agreed():
        breaks(ranks)
    with ranks.agreed():
        pass


def breaks(ranks: Ranks) -> None:
    if ranks.rank == 1:
        raise OSError("broken")


def rank_here(ranks: Ranks, folder: str, models: str, out: str) -> None:
    classifier = Classifier.load(models, ranks=ranks)
    tokens = TokenSet.open(Path(folder) / "data/tokens/train.arrow")
    labels, scores = rank_documents(classifier, tokens, np.arange(37), 20, 16)
    np.savez(f"{out}-{ranks.rank}.npz", labels=labels, scores=scores)


# what they say ------------------------------------------------------------------------------------------------------------


def test_shares_are_whole_units_and_cover_everything():
    for size, count, unit in ((1, 5, 1), (3, 100, 8), (4, 3, 1), (8, 65, 16)):
        shares = [Ranks(rank, size).share(count, unit) for rank in range(size)]
        assert (shares[0][0], shares[-1][1]) == (0, count)
        assert all(one[1] == two[0] and two[0] % unit in (0, count % unit) for one, two in itertools.pairwise(shares))
    assert ALONE.share(9) == (0, 9)


@pytest.mark.parametrize("size", [2, 4])
def test_collectives(together, size):
    together.run(size, "test_ranks.collectives")


# training -----------------------------------------------------------------------------------------------------------------


def assert_close_runs(folder: Path, one: str, two: str) -> None:
    """The same indices and the same steps, numbers within rounding."""
    for file in ("models/head.safetensors", "models/encoder/model.safetensors"):
        first, second = load_file(folder / one / file), load_file(folder / two / file)
        assert first.keys() == second.keys()
        for key in first:
            torch.testing.assert_close(
                second[key],
                first[key],
                rtol=2e-3,
                atol=2e-3 if key == "bias" else 2e-4,  # calibrated on few documents, whose last candidates may be others
                msg=lambda text, key=key: f"{key}: {text}",
            )
        if "index" in first:
            assert torch.equal(first["index"].int(), second["index"].int())
    for curve in ("rewiring", "validation"):
        assert (folder / one / f"reports/{curve}_curve.csv").read_text() == (
            folder / two / f"reports/{curve}_curve.csv"
        ).read_text()
    losses = [np.loadtxt(folder / run / "reports/train_curve.csv", delimiter=",", skiprows=1)[:, 1:3] for run in (one, two)]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-3)


@pytest.mark.parametrize("size", [2, 4])
def test_ranks_equal_one_process(folder, size):
    assert_close_runs(folder, "1", str(size))
    summary = json.loads((folder / str(size) / "reports/train.json").read_text())
    alone = json.loads((folder / "1/reports/train.json").read_text())
    assert (summary["processes"], summary["labels"]) == (size, LABELS)
    for same in ("head_bytes", "feature_use", "moved", "documents", "steps", "intermediate_bytes"):
        assert summary[same] == alone[same], same


def test_the_same_number_of_ranks_gives_the_same_bits(folder, together):
    together.run(2, "test_ranks.train_here", str(folder), "again", {})
    assert_same_run(folder, "2", "again")


@pytest.mark.parametrize(
    "changes",
    [
        {"head.group": 4, "rewiring.prune": "global"},
        {"head.kind": "dense", "rewiring.method": "none"},
        {"head.dtype": "bf16", "rewiring.method": "none", "train.encoder_lr": 0.0, "train.momentum": 0.0},
    ],
    ids=["groups", "dense", "bf16"],
)
def test_other_heads(folder, together, changes, request):
    name = request.node.callspec.id
    for size in (1, 4):
        together.run(size, "test_ranks.train_here", str(folder), f"{name}-{size}", changes)
    assert_close_runs(folder, f"{name}-1", f"{name}-4")


def test_words_and_profiles(tmp_path, together, monkeypatch):
    """Every rank holds all profiles; they learn from all ranks' documents and labels, in training and while refitting."""
    prepare(tmp_path)
    about = tmp_path / "data/tokens/tokens.json"
    about.write_text(json.dumps(json.loads(about.read_text()) | {"vocabulary": vocabulary_size(tiny_tokenizer())}))
    changes = {"head.fan_in": 9, "head.lexical": 3, "head.profiles": 12, "start.source": "data"}
    changes["rewiring.recode_at"] = 0.0  # rounding could choose other features
    monkeypatch.setattr(profiles, "EVERY", 12)
    data = tmp_path / "data"
    build_start(settings(tmp_path, changes), data / "tokens", data / "embeddings", data / "clusters", data / "start")
    for size in (1, 3):
        together.run(size, "test_ranks.train_profiles_here", str(tmp_path), str(size), changes)
    assert_close_runs(tmp_path, "1", "3")
    start, end = (load_file(tmp_path / part) for part in ("data/start/head.safetensors", "3/models/head.safetensors"))
    before = start["lexical.profiles.weight"]
    used = before.any(dim=1)
    assert len(before) == 5
    assert used.any()
    assert ((end["lexical.profiles.weight"] - before).abs().amax(dim=1) > 1e-3).equal(used)

    for size in (1, 3):
        together.run(size, "test_ranks.refit_profiles_here", str(tmp_path), str(tmp_path / f"refitted-{size}"), changes)
    alone = np.load(tmp_path / "refitted-1-0.npy")
    for rank in range(3):
        np.testing.assert_allclose(np.load(tmp_path / f"refitted-3-{rank}.npy"), alone, rtol=1e-3, atol=1e-5)
    assert (np.abs(alone - before.numpy()).max(axis=1) > 1e-3).tolist() == used.tolist()


@pytest.mark.parametrize("size", [2, 4])
def test_a_ranking_by_many_is_that_of_one(folder, together, tmp_path, size):
    models = str(folder / "1/models")
    for count in (1, size):
        together.run(count, "test_ranks.rank_here", str(folder), models, str(tmp_path / str(count)))
    alone = np.load(tmp_path / "1-0.npz")
    for rank in range(size):
        found = np.load(tmp_path / f"{size}-{rank}.npz")
        np.testing.assert_allclose(found["scores"], alone["scores"], rtol=1e-5, atol=1e-5)
        assert (found["labels"] == alone["labels"]).mean() > 0.999  # equal scores can change places


# checkpoints and faults -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 4), (4, 1), (1, 2), (2, 2)])
def test_a_checkpoint_is_taken_up_by_any_number_of_ranks(folder, together, before, after):
    name = f"{before}-then-{after}"
    together.start(before, "test_ranks.train_here", str(folder), name, {}, [-1, 17])
    assert together.wait() == [-signal.SIGKILL] * before
    assert [path.name for path in list_checkpoints(folder / name / "checkpoints")] == ["step-000000010", "step-000000015"]
    together.run(after, "test_ranks.train_here", str(folder), name, {})
    assert "resuming at step 15 of 40" in together.errors
    assert_close_runs(folder, "1", name)
    if before == after:
        assert_same_run(folder, str(before), name)
    assert not list_checkpoints(folder / name / "checkpoints")


def test_damage_in_one_part_sends_all_ranks_to_the_checkpoint_before(folder, together):
    together.start(2, "test_ranks.train_here", str(folder), "damaged", {}, [-1, 17])
    together.wait()
    path = folder / "damaged/checkpoints/step-000000015/state-1.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    together.run(2, "test_ranks.train_here", str(folder), "damaged", {})
    assert "state-1.safetensors: the checksum of bytes" in together.errors
    assert "resuming at step 10 of 40" in together.errors
    assert_same_run(folder, "2", "damaged")


def test_when_a_rank_dies_all_stop_and_the_run_can_go_on(folder, together):
    began = time.monotonic()
    together.start(4, "test_ranks.train_here", str(folder), "dying", {}, [2, 13])
    codes = together.wait()
    assert codes[2] == -signal.SIGKILL
    assert 0 not in codes
    assert time.monotonic() - began < 60  # none waits for the dead one
    together.run(4, "test_ranks.train_here", str(folder), "dying", {})
    assert_same_run(folder, "4", "dying")


def test_what_cannot_be_shared_is_refused(folder, tmp_path):
    config = settings(folder, {})
    description = copy.deepcopy(config)
    description.head.kind, description.rewiring.method = "bottleneck", "none"
    with pytest.raises(InputError, match=r"head\.kind: bottleneck cannot share"):
        Classifier.build(description, LABELS, ranks=Ranks(0, 2, 2))
    with pytest.raises(InputError, match=r"train\.processes: 60 labels in groups of 1 cannot be shared by 61"):
        Classifier.build(config, LABELS, ranks=Ranks(0, 61, 61))
    classifier = Classifier.build(config, LABELS, ranks=Ranks(0, 8, 8))
    tokens = TokenSet.open(folder / "data/tokens/train.arrow")
    with pytest.raises(InputError, match=r"train\.batch: 7 documents cannot be shared by 8 processes"):
        Trainer(config, classifier, tokens, np.arange(9), np.arange(0), pad_id=0)


# as a stage ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow  # torchrun and two processes that import everything
def test_the_stage_starts_its_processes_and_leaves_what_one_leaves(tmp_path):
    config = prepare(tmp_path)
    config.train.processes, config.train.max_steps, config.encoder.dropout = 2, 6, 0.0
    sections = {
        name: value for name, value in dataclasses.asdict(config).items() if name in ("encoder", "head", "train", "start")
    }
    (tmp_path / "presets").mkdir()
    (tmp_path / "presets/wordnet.yaml").write_text("train:\n  batch: 7\n")
    (tmp_path / "params.yaml").write_text(yaml.safe_dump({"preset": "wordnet", **sections}))
    pq.write_table(pa.table({"text": ["a", "b"]}), tmp_path / "data/corpus/test.parquet")
    script = Path(__file__).parents[1] / "pipeline/train.py"
    environment = os.environ | {"FANIN_TRACKING": "off", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [sys.executable, str(script)], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert ended.returncode == 0, ended.stderr
    summary = json.loads((tmp_path / "reports/train.json").read_text())
    assert (summary["processes"], summary["steps"], summary["head_bytes"]["bias"]) == (2, 6, 4 * LABELS)
    assert Classifier.load(tmp_path / "models").labels == LABELS
    assert json.loads((tmp_path / "reports/stages/train.json").read_text())["stage"] == "train"

"""The loop as a whole: it learns, it can be killed anywhere, it frees what it no longer needs."""

from __future__ import annotations

import copy
import gc
import json
import shutil
import signal
import socket
import weakref

import numpy as np
import pytest
import torch

from fanin import optim
from fanin.checkpoint import list_checkpoints
from fanin.data.tokens import TokenSet
from fanin.files import InputError
from fanin.metrics import csr, match, precision
from fanin.model import Classifier
from fanin.retrieval import rank
from fanin.trainer import Trainer
from training_folder import DOCUMENTS, Forks, assert_same_run, prepare, train_in


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("train")
    config = prepare(path)
    summary = train_in(path, config)
    return path, config, summary


@pytest.fixture(scope="module")
def forks():
    server = Forks()
    yield server
    server.close()


def test_it_learns_the_training_set_by_heart(folder):
    path, config, _ = folder
    config = copy.deepcopy(config)
    config.encoder.dropout = 0.0
    config.train.epochs, config.train.encoder_lr = 18.0, 3e-3
    config.train.validation_documents = 0  # on other documents it would be told not to trust its memory
    train_in(path, config, "heart")
    tokens = TokenSet.open(path / "data/tokens/train.arrow")
    rows = np.arange(len(tokens))
    ranked, _ = rank(Classifier.load(path / "heart/models"), tokens, rows, 5, 64)
    untrained, _ = rank(Classifier.build(config, 60).eval(), tokens, rows, 5, 64)
    learnt, before = (precision(match(r, *csr(tokens.labels(rows))))["P@1"] for r in (ranked, untrained))
    assert before < 20
    assert learnt > 90


def test_no_document_outweighs_its_batch(folder, monkeypatch):
    path, config, _ = folder
    config = copy.deepcopy(config)
    config.train.epochs = 0.5
    monkeypatch.setattr(optim, "_OUTLIER", 1.5)
    backward, longest = torch.autograd.backward, []

    def spy(outputs, gradients):
        lengths = gradients[0].norm(dim=1)
        longest.append(float(lengths.max() / lengths.median()))
        backward(outputs, gradients)

    monkeypatch.setattr(torch.autograd, "backward", spy)
    train_in(path, config, "even")
    assert max(longest) == pytest.approx(1.5, rel=1e-5)


def test_it_leaves_a_whole_model(folder):
    path, _, summary = folder
    assert len((path / "run/reports/train_curve.csv").read_text().splitlines()) == 41
    assert summary["steps"] == 40
    assert summary["documents"] == 40 * 14
    assert summary["moved"] > 0.1
    assert sum(summary["feature_use"]) == 60 * 6
    assert summary["head_bytes"]["optimizer"] == 60 * 6 * 4 + 60 * 4
    assert summary["skipped_batches"] == 0
    assert summary["recoding"]["step"] == 18
    assert 50 < summary["recoding"]["labels"] <= 60
    assert not (path / "run/checkpoints/.recoding").exists()
    assert [file.name for file in (path / "run/checkpoints").iterdir()] == [".lock"]
    loaded = Classifier.load(path / "run/models")
    scores, labels = loaded.topk(*loaded.encode(["ba de", "go gu"]), 5)
    assert labels.shape == (2, 5)
    assert (scores[:, :-1] >= scores[:, 1:]).all()
    assert loaded.label_texts[int(labels[0, 0])] == f"label {int(labels[0, 0])}"


@pytest.mark.parametrize("step", [3, 13, 22])
def test_kill_9_then_resume_ends_bit_for_bit_the_same(folder, forks, step):
    """Before the first checkpoint, with the auxiliary branch alive and rewiring between, and after its cut-off."""
    path, config, _ = folder
    name = f"killed-{step}"
    fork = forks.start(path, name)
    fork.wait_for_step(step)
    fork.send(signal.SIGKILL)
    assert fork.wait() == -signal.SIGKILL
    assert not (path / name / "models").exists()
    summary = train_in(path, config, name)
    assert (summary["resumed_from"] is not None) == (step > 5)
    assert_same_run(path, "run", name)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_a_checkpoint_of_that_very_step(folder, forks, number):
    path, config, _ = folder
    name = f"stopped-{number}"
    fork = forks.start(path, name)
    fork.wait_for_step(7)
    fork.send(number)
    assert fork.wait() != 0
    newest = list_checkpoints(path / name / "checkpoints")[-1]
    step = json.loads((newest / "state.json").read_text())["step"]
    assert f"stopped at step {step} of 40; the checkpoint is in" in fork.errors
    if number == signal.SIGINT:  # other settings must not take it up
        config = copy.deepcopy(config)
        config.train.encoder_lr *= 2
    assert train_in(path, config, name)["resumed_from"] == (step if number == signal.SIGTERM else None)


def test_a_second_run_in_the_folder_is_refused_until_the_first_one_is_dead(folder, forks):
    path, config, _ = folder
    first = forks.start(path, "twice")
    first.wait_for_step(7)
    first.send(signal.SIGSTOP)  # a hanging run holds its folder as well
    with pytest.raises(InputError, match=rf"another training run \(process {first.pid} on {socket.gethostname()}\)"):
        train_in(path, config, "twice")
    assert not (path / "twice/models").exists()
    first.send(signal.SIGKILL)
    assert first.wait() == -signal.SIGKILL
    assert train_in(path, config, "twice")["resumed_from"] is not None
    assert_same_run(path, "run", "twice")


@pytest.mark.parametrize(
    ("at", "step", "epochs", "budget"),
    [
        (0.0, None, 1, 10**6),
        (0.001, 1, 1, 10**6),
        (0.45, 18, 1, 10**6),
        (1.0, 40, 1, 10**6),
        (0.45, 18, 2, 110),
        (0.45, 18, 0, 110),
    ],
)
def test_recoding_comes_once_when_it_is_due(folder, tmp_path, at, step, epochs, budget):
    """Of the start's sample; where the head is refitted, of all training documents that the budget allows."""
    path, config, _ = folder
    shutil.copytree(path / "data", tmp_path / "data")
    sample = np.sort(np.random.default_rng(0).permutation(DOCUMENTS - config.train.validation_documents)[:90])
    for name in ("documents", "embeddings"):
        file = tmp_path / "data/embeddings" / f"{name}.npy"
        np.save(file, np.load(file)[sample])
    config = copy.deepcopy(config)
    config.rewiring.recode_at, config.rewiring.refit_epochs, config.train.validate_every = at, epochs, 0
    config.encoder.embed_documents = budget
    logged = {}

    def log(metrics, step):
        if "recoding/labels" in metrics:
            logged[step] = metrics

    summary = train_in(tmp_path, config, "recoded", log)
    assert list(logged) == ([] if step is None else [step])
    assert (summary["recoding"] or {}).get("step") == step
    if step:  # by then without accumulation
        documents = min(budget, DOCUMENTS - config.train.validation_documents) if epochs else 90
        assert summary["recoding"]["documents"] == documents
        assert summary["recoding"]["refitted"] == epochs * -(-documents // config.train.batch)


def test_the_auxiliary_branch_is_freed_at_the_cut_off(folder, monkeypatch):
    path, config, _ = folder
    seen = {}
    original = Trainer._train_step

    def spy(self, stream):
        metrics = original(self, stream)
        if self.step == 1:
            layer = self.auxiliary.layer
            seen["watched"] = [
                weakref.ref(t) for t in (self.auxiliary, layer.weight, self.optimizer.state[layer.weight]["exp_avg"])
            ]
            seen["groups"] = len(self.optimizer.param_groups)
        if self.step == self.cutoff_step:
            gc.collect()
            seen["alive"] = [ref() is not None for ref in seen["watched"]]
            assert self.auxiliary is None
            assert len(self.optimizer.param_groups) < seen["groups"]
        return metrics

    monkeypatch.setattr(Trainer, "_train_step", spy)
    train_in(path, config, "auxiliary")
    assert seen["alive"] == [False, False, False]


def test_groups_and_label_order_round_trip(folder):
    """With G > 1 the head's rows are in cluster order; rankings still speak of label ids."""
    path, config, _ = folder
    config = copy.deepcopy(config)
    config.head.group = 8
    train_in(path, config, "grouped")
    loaded = Classifier.load(path / "grouped/models")
    assert loaded.order is not None
    assert sorted(loaded.order.tolist()) == list(range(60))
    ids, mask = loaded.encode(["ba de gi"])
    scores, labels = loaded.topk(ids, mask, 60)
    rows = loaded.head.logits(loaded.features(ids, mask), 0, 60)
    torch.testing.assert_close(rows[0][torch.argsort(loaded.order)][labels[0]], scores[0])


def test_missing_and_misfit_inputs(folder, tmp_path):
    path, config, _ = folder
    shutil.copytree(path / "data", tmp_path / "data")
    order = tmp_path / "data/clusters/order.npy"
    order.write_bytes(b"")
    with pytest.raises(InputError, match=r"order.npy: .*run the clusters stage"):
        train_in(tmp_path, config)
    order.unlink()
    with pytest.raises(InputError, match=r"run the clusters stage"):
        train_in(tmp_path, config)
    (tmp_path / "data/start/head.safetensors").write_bytes(b"12345678")
    shutil.copy(path / "data/clusters/order.npy", order)
    with pytest.raises(InputError, match=r"head.safetensors: not a whole safetensors file"):
        train_in(tmp_path, config)
    assert not (tmp_path / "run/models").exists()

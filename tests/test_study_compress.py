"""Pruning and quantising a trained dense head: exact where it must be, and as stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fanin.config import Config
from fanin.files import InputError
from fanin.heads import FixedFanIn
from fanin.model import Classifier
from study.compress import BLOCK, compress, prune, quantise
from tiny import tiny_encoder_folder, tiny_texts

LABELS, WIDTH = 90, 32


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """A saved classifier with a dense head on the tiny encoder's 32 features."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    config = Config()
    config.encoder.name = str(tiny_encoder_folder(tmp_path))
    config.tokens.max_length = 32
    config.head.kind, config.head.intermediate = "dense", 0
    config.head.lexical, config.head.profiles = 8, 64  # as params.yaml has them: a dense head has no words
    config.train.device, config.train.precision = "cpu", "fp32"
    pq.write_table(pa.table({"id": range(LABELS), "text": [str(i) for i in range(LABELS)]}), tmp_path / "labels.parquet")
    classifier = Classifier.build(config, LABELS)
    classifier.head.bias.copy_(torch.randn(LABELS, generator=torch.Generator().manual_seed(5)))
    classifier.save(tmp_path / "models", tmp_path / "labels.parquet")
    return tmp_path / "models"


def logits(models: Path) -> torch.Tensor:
    classifier = Classifier.load(models)
    ids, mask = classifier.encode(tiny_texts(12, seed=4))
    with torch.inference_mode():
        return classifier.head.logits(classifier.features(ids, mask), 0, LABELS)


def test_pruning_keeps_the_largest_of_each_label() -> None:
    weight = torch.tensor([[0.1, -3.0, 2.0, 0.0], [1.0, 0.2, -0.3, -4.0]])
    kept, index = prune(weight, 2)
    assert kept.tolist() == [[-3.0, 2.0], [1.0, -4.0]]
    assert index.tolist() == [[1, 2], [0, 3]]
    assert index.dtype == torch.uint16


def test_a_pruned_model_is_a_sparse_one_with_the_same_logits_on_what_is_left(models: Path) -> None:
    state = load_file(models / "head.safetensors")
    stored = compress(models, {"compress": "prune", "K": 8})
    weight = torch.zeros(LABELS, WIDTH)
    rows = state["weight"].abs().topk(8, dim=1).indices
    weight.scatter_(1, rows, state["weight"].gather(1, rows))
    classifier = Classifier.load(models)
    assert isinstance(classifier.head, FixedFanIn)
    ids, mask = classifier.encode(tiny_texts(12, seed=4))
    with torch.inference_mode():
        x = classifier.features(ids, mask)
    torch.testing.assert_close(logits(models), x @ weight.T + state["bias"], rtol=1e-5, atol=1e-5)
    own = classifier.head.bytes()
    assert stored == {name: own[name] for name in ("weights", "indices", "bias")}


def test_pruning_nothing_changes_nothing(models: Path) -> None:
    before = logits(models)
    compress(models, {"compress": "prune", "K": WIDTH})
    torch.testing.assert_close(logits(models), before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_are_few_numbers_near_the_old_ones(bits: int) -> None:
    weight = torch.randn(50, 150, generator=torch.Generator().manual_seed(0))
    weight[7] = 0
    found = quantise(weight, bits)
    assert found.shape == weight.shape
    assert (found[7] == 0).all()
    largest = 2 ** (bits - 1) - 1
    for block, old in zip(found.split(BLOCK, dim=1), weight.split(BLOCK, dim=1), strict=True):
        assert max(len(row.unique()) for row in block) <= 2 * largest + 1
        # no worse than rounding with the scale of the largest, of which bfloat16 keeps eight bits
        scale = (old.abs().amax(1, keepdim=True) / largest).bfloat16().float().clamp_min(1e-30)
        plain = (old / scale).round().clamp(-largest, largest) * scale
        assert ((block - old).square().sum(1) <= (plain - old).square().sum(1) + 1e-6).all()
    assert (found - weight).norm() / weight.norm() < {4: 0.12, 8: 0.01}[bits]


def test_a_quantised_model_ranks_with_the_numbers_it_stands_for(models: Path) -> None:
    before, old = logits(models), load_file(models / "head.safetensors")["weight"]
    stored = compress(models, {"compress": "quantise", "bits": 8})
    assert stored == {"weights": LABELS * WIDTH + 2 * LABELS, "indices": 0, "bias": 4 * LABELS}
    assert torch.equal(load_file(models / "head.safetensors")["weight"], quantise(old, 8))
    after = logits(models)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.1)


def test_a_sparse_head_is_quantised_with_its_indices_as_they_are(models: Path) -> None:
    compress(models, {"compress": "prune", "K": 8})
    before, old = logits(models), load_file(models / "head.safetensors")
    stored = compress(models, {"compress": "quantise", "bits": 8})
    assert stored == {"weights": LABELS * (8 + 2), "indices": 2 * LABELS * 8, "bias": 4 * LABELS}
    state = load_file(models / "head.safetensors")
    assert torch.equal(state["index"].view(torch.int16), old["index"].view(torch.int16))
    assert torch.equal(state["weight"], quantise(old["weight"], 8))
    after = logits(models)
    assert not torch.equal(before, after)
    torch.testing.assert_close(after, before, rtol=0.05, atol=0.1)


def test_profiles_are_quantised_with_the_head(models: Path) -> None:
    state, rows = load_file(models / "head.safetensors"), torch.randn(5, 64, generator=torch.Generator().manual_seed(1))
    extra = {"lexical.profiles.weight": rows, "lexical.profiles.index": torch.zeros(5, 64, dtype=torch.int32)}
    save_file(state | extra, models / "head.safetensors")
    stored = compress(models, {"compress": "quantise", "bits": 4})
    assert stored["weights"] == LABELS * (WIDTH // 2 + 2) + 5 * (64 // 2 + 2)
    assert stored["indices"] == 4 * 5 * 64
    found = load_file(models / "head.safetensors")["lexical.profiles.weight"]
    assert torch.equal(found, quantise(rows, 4))
    assert not torch.equal(found, rows)


def test_what_cannot_be_compressed_is_refused_as_it_is(models: Path) -> None:
    compress(models, {"compress": "prune", "K": 8})
    before = (models / "head.safetensors").read_bytes()
    with pytest.raises(InputError, match="holds a fixed_fan_in head in float32; prune takes dense in float32"):
        compress(models, {"compress": "prune", "K": 4})
    assert (models / "head.safetensors").read_bytes() == before
    state = load_file(models / "head.safetensors")
    save_file(state | {"weight": state["weight"].bfloat16()}, models / "head.safetensors")
    with pytest.raises(InputError, match="in bfloat16; quantise takes dense or fixed_fan_in in float32"):
        compress(models, {"compress": "quantise", "bits": 4})

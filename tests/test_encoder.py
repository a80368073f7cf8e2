"""The encoder: pooling, what is loaded and trained, round trips, precision, and models that cannot be used."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, BertConfig, BertModel, DistilBertConfig, RobertaConfig, T5Config, T5EncoderModel

from fanin import encoder as module
from fanin.data.batches import collate
from fanin.encoder import Encoder, choose_precision, load_tokenizer, resolve
from fanin.files import InputError
from tiny import tiny_encoder_folder, tiny_texts, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_encoder_folder(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return collate(tiny_tokenizer()(tiny_texts(5))["input_ids"], pad_id=0)


def hidden_states(folder: Path, ids: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(ids, mask, output_hidden_states=True).hidden_states


def test_mean_pooling_is_the_mean_over_the_tokens(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, mask = batch
    last = hidden_states(folder, ids, mask)[-1]
    expected = torch.stack([last[i, : int(mask[i].sum())].mean(0) for i in range(len(ids))])
    torch.testing.assert_close(Encoder.load(folder)(ids, mask).detach(), expected)


def test_padding_changes_nothing(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    ids, mask = batch
    encoder = Encoder.load(folder)
    for i in range(len(ids)):
        alone = slice(0, int(mask[i].sum()))
        torch.testing.assert_close(encoder(ids[i : i + 1, alone], mask[i : i + 1, alone])[0], encoder(ids, mask)[i])


@pytest.mark.parametrize(("pooling", "layers"), [("cls", 1), ("cls_layers", 1), ("cls_layers", 2)])
def test_cls_pooling(folder: Path, batch: tuple[torch.Tensor, torch.Tensor], pooling: str, layers: int) -> None:
    states = hidden_states(folder, *batch)
    encoder = Encoder.load(folder, pooling, layers)
    embedding = encoder(*batch)
    torch.testing.assert_close(embedding.detach(), torch.cat([state[:, 0] for state in states[-layers:]], dim=1))
    assert embedding.shape[1] == encoder.width == 32 * layers


def test_settings_that_cannot_be_are_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"encoder\.layers: 3 is above the 2 hidden layers"):
        Encoder.load(folder, "cls_layers", 3)
    with pytest.raises(InputError, match=r"encoder\.pooling: 'max'"):
        Encoder.load(folder, "max")


def test_embedding_dropout_is_for_training_alone(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = Encoder.load(folder, dropout=0.5)  # the tiny model's own dropout is 0
    plain = encoder(*batch)
    torch.testing.assert_close(encoder(*batch), plain)
    dropped = encoder.train()(*batch)
    kept = dropped != 0
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(dropped[kept], 2 * plain[kept])


def test_the_models_own_dropout_stays(tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = Encoder.load(tiny_encoder_folder(tmp_path, dropout=0.2))
    assert torch.equal(encoder(*batch), encoder(*batch))
    encoder.train()
    assert not torch.equal(encoder(*batch), encoder(*batch))


def test_saved_and_loaded_it_is_the_same(folder: Path, tmp_path: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = Encoder.load(folder, "cls_layers", 2, 0.25)
    encoder.save(tmp_path / "saved")
    again = Encoder.load(tmp_path / "saved")
    assert (again.pooling, again.layers, again.dropout, again.width) == ("cls_layers", 2, 0.25, 64)
    assert torch.equal(again(*batch), encoder(*batch))
    assert again.tokenizer(tiny_texts(5))["input_ids"] == encoder.tokenizer(tiny_texts(5))["input_ids"]
    assert not list(tmp_path.glob("saved/*.bin"))
    assert Encoder.load(tmp_path / "saved", "mean", dropout=0.0).width == 32  # settings given win
    assert AutoModel.from_pretrained(tmp_path / "saved").config.hidden_size == 32  # an ordinary Hugging Face folder


def tiny_config(kind: str) -> Any:
    size = {"vocab_size": 205, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "t5":
        return T5Config(vocab_size=205, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    if kind == "distilbert":
        return DistilBertConfig(vocab_size=205, dim=32, hidden_dim=64, n_layers=2, n_heads=4, max_position_embeddings=64)
    config = RobertaConfig if kind == "roberta" else BertConfig
    return config(hidden_size=32, intermediate_size=64, max_position_embeddings=66, **size)


@pytest.mark.parametrize("kind", ["bert", "roberta", "distilbert", "t5"])
def test_every_parameter_is_trained_whatever_the_model(tmp_path: Path, kind: str) -> None:
    config = tiny_config(kind)
    model = T5EncoderModel(config) if kind == "t5" else AutoModel.from_config(config)  # bert and roberta: with a pooler
    model.save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    encoder = Encoder.load(tmp_path)
    ids, mask = collate(tiny_tokenizer()(tiny_texts(5))["input_ids"], pad_id=0)
    embedding = encoder.train()(ids, mask)
    (embedding * torch.randn_like(embedding)).sum().backward()
    assert embedding.shape == (5, encoder.width) == (5, 32)
    assert [name for name, weight in encoder.named_parameters() if weight.grad is None] == []
    assert not [name for name in encoder.state_dict() if "pooler" in name]


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16])
def test_checkpointing_gives_the_same_gradients_from_fewer_saved_tensors(kind: str, precision: torch.dtype) -> None:
    """With dropout in every layer: it falls the same way when a layer is computed again."""
    config = tiny_config(kind)
    for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout"):
        if hasattr(config, name):
            setattr(config, name, 0.2)
    torch.manual_seed(0)
    model = AutoModel.from_config(config)
    model.pooler = None
    ids, mask = collate(tiny_tokenizer()(tiny_texts(5))["input_ids"], pad_id=0)
    found = []
    for checkpointing in (False, True):
        encoder = Encoder(model, None).train()
        if checkpointing:
            encoder.set_checkpointing()
        saved: list[int] = []
        torch.manual_seed(7)
        counted = torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t.numel()) or t, lambda t: t)
        with counted, torch.autocast("cpu", torch.bfloat16, enabled=precision == torch.bfloat16):
            embedding = encoder(ids, mask)
        gradients = torch.autograd.grad(embedding.square().sum(), list(encoder.parameters()))
        found.append((embedding.detach(), sum(saved), gradients))
    (plain, most, gradients), (again, fewest, others) = found
    assert torch.equal(plain, again)
    assert fewest < 0.5 * most
    for one, other in zip(gradients, others, strict=True):
        assert torch.equal(one, other)


def test_checkpointing_is_refused_where_the_model_has_no_layers_for_it() -> None:
    model = AutoModel.from_config(tiny_config("bert"))
    model.supports_gradient_checkpointing = False
    with pytest.raises(InputError, match=r"encoder\.checkpointing: this encoder cannot"):
        Encoder(model, None).set_checkpointing()


def test_a_cpu_trains_in_bfloat16_with_attention_in_float32(
    folder: Path, batch: tuple[torch.Tensor, torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[torch.dtype] = []
    fused = module.sdpa_attention_forward
    monkeypatch.setattr(
        module, "sdpa_attention_forward", lambda m, q, *args, **options: seen.append(q.dtype) or fused(m, q, *args, **options)
    )
    encoder = Encoder.load(folder)
    exact = torch.autograd.grad(encoder(*batch).square().sum(), list(encoder.parameters()))
    assert set(seen) == {torch.float32}
    seen.clear()
    with torch.autocast("cpu", torch.bfloat16):
        gradients = torch.autograd.grad(encoder(*batch).square().sum(), list(encoder.parameters()))
        assert set(seen) == {torch.float32}
        seen.clear()
        with torch.no_grad():
            encoder(*batch)
    assert set(seen) == {torch.bfloat16}
    for found, wanted in zip(gradients, exact, strict=True):
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= 0.1 * wanted.norm() + 1e-4


def test_a_saved_model_names_no_attention_that_only_this_project_has(folder: Path, tmp_path: Path) -> None:
    Encoder.load(folder).save(tmp_path / "model")
    assert "sdpa" not in (tmp_path / "model" / "config.json").read_text()
    assert AutoModel.from_pretrained(tmp_path / "model").config._attn_implementation == "sdpa"


def test_half_precision_weights_are_read_as_float32(tmp_path: Path) -> None:
    BertModel(tiny_config("bert"), add_pooling_layer=False).half().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    assert {weight.dtype for weight in Encoder.load(tmp_path).parameters()} == {torch.float32}


def test_autocast_gives_float32_close_to_float32(folder: Path, batch: tuple[torch.Tensor, torch.Tensor]) -> None:
    encoder = Encoder.load(folder)
    exact = encoder(*batch)
    with torch.autocast("cpu", torch.bfloat16):
        found = encoder(*batch)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0.05)
    assert not torch.equal(found, exact)


def copy(folder: Path, to: Path) -> Path:
    return Path(shutil.copytree(folder, to / "copy"))


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/at/all", "a/b/c", "two words"])
def test_a_folder_that_is_not_there(name: str) -> None:
    with pytest.raises(InputError, match="there is no folder"):
        resolve(name)


def test_an_id_that_cannot_be_fetched() -> None:  # conftest.py keeps the hub offline
    with pytest.raises(InputError, match=r"nobody/nothing is neither minilm, nor a folder here"):
        Encoder.load("nobody/nothing")


@pytest.mark.parametrize("lost", ["config.json", "model.safetensors", "tokenizer.json"])
def test_a_folder_without_a_file(folder: Path, tmp_path: Path, lost: str) -> None:
    path = copy(folder, tmp_path)
    (path / lost).unlink()
    with pytest.raises(InputError, match=r"encoder\.name"):
        Encoder.load(path)


def test_an_empty_folder_is_told_what_it_needs(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"found there: nothing.*model\.safetensors"):
        Encoder.load(tmp_path)


def test_truncated_weights(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    whole = (path / "model.safetensors").read_bytes()
    (path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"encoder\.name"):
        Encoder.load(path)


def test_incomplete_weights_and_nan(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    state = load_file(path / "model.safetensors")
    name = sorted(state)[0]
    save_file({k: v for k, v in state.items() if k != name}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"lack 1 tensors, {name}"):
        Encoder.load(path)
    save_file(state | {name: torch.full_like(state[name], float("nan"))}, path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InputError, match=f"not finite numbers \\({name}\\)"):
        Encoder.load(path)


def test_weights_of_another_shape(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))
    with pytest.raises(InputError, match=r"encoder\.name"):
        Encoder.load(path)


def test_a_tokenizer_with_too_many_ids(folder: Path, tmp_path: Path) -> None:
    path = copy(folder, tmp_path)
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["quux"])
    tokenizer.save_pretrained(path)
    with pytest.raises(InputError, match="ids up to 205, but the model only 205 embeddings"):
        Encoder.load(path)


def test_max_length_above_the_positions(folder: Path) -> None:
    assert load_tokenizer(folder, 64).vocab_size == 205
    with pytest.raises(InputError, match=r"tokens\.max_length: 65 is above the 64 positions"):
        load_tokenizer(folder, 65)


def test_positions_of_roberta_start_after_the_padding() -> None:
    assert module._positions(tiny_config("roberta")) == 64
    assert module._positions(tiny_config("bert")) == 66
    assert module._positions(tiny_config("t5")) is None


def test_precision_by_setting() -> None:
    assert choose_precision("fp32", "cpu") == torch.float32
    assert choose_precision("bf16", "cpu") == torch.bfloat16
    with pytest.raises(InputError, match=r"train\.precision: 'fp8'"):
        choose_precision("fp8", "cpu")


@pytest.mark.parametrize(("slow", "expected"), [("bf16", torch.float32), ("fp32", torch.bfloat16)])
def test_precision_auto_takes_the_measured_faster(monkeypatch: pytest.MonkeyPatch, slow: str, expected: torch.dtype) -> None:
    clock = {"now": 0.0}
    cost = {torch.float32: 3.0 if slow == "fp32" else 1.0, torch.bfloat16: 3.0 if slow == "bf16" else 1.0}

    def linear(x: torch.Tensor, weight: torch.Tensor) -> None:
        clock["now"] += cost[x.dtype]

    monkeypatch.setattr(module.F, "linear", linear)
    monkeypatch.setattr(module.time, "thread_time", lambda: clock["now"])
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx512_bf16": True}, raising=False)
    module._cpu_prefers_bf16.cache_clear()
    try:
        assert choose_precision("auto", "cpu") == expected
    finally:
        module._cpu_prefers_bf16.cache_clear()


def test_precision_auto_without_bf16_units_measures_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"architecture": "x86_64", "avx2": True}, raising=False)
    monkeypatch.setattr(module.time, "thread_time", lambda: pytest.fail("measured"))
    module._cpu_prefers_bf16.cache_clear()
    try:
        assert choose_precision("auto", "cpu") == torch.float32
    finally:
        module._cpu_prefers_bf16.cache_clear()


def test_the_bundled_model() -> None:
    encoder = Encoder.load("minilm")
    texts = ["a small furry animal that purrs", "a domestic cat", "the interest rate of the central bank"]
    with torch.inference_mode():
        embedding = encoder(*collate(encoder.tokenizer(texts)["input_ids"], encoder.tokenizer.pad_token_id))
    assert embedding.shape == (3, encoder.width) == (3, 384)
    unit = torch.nn.functional.normalize(embedding)
    assert unit[0] @ unit[1] > 0.4 > unit[0] @ unit[2] + 0.2
    assert (embedding.norm(dim=1) > 2).all()  # not normalised

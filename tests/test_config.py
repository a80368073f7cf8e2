"""params.yaml, its presets, and every kind of setting that cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fanin.config import Config, Train, check, load_config
from fanin.files import InputError

ROOT = Path(__file__).parents[1]


def write(folder: Path, params: str, preset: str = "{}") -> Path:
    (folder / "presets").mkdir(exist_ok=True)
    (folder / "presets/mine.yaml").write_text(preset)
    (folder / "params.yaml").write_text("preset: mine\n" + params)
    return folder / "params.yaml"


def test_the_committed_settings_and_every_preset_load(tmp_path):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    names = [path.stem for path in (ROOT / "presets").glob("*.yaml")]
    assert {"wordnet", "amazon-3m", "amazon-670k", "wiki-500k", "wiki10-31k"} < set(names)
    for name in names:
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(params | {"preset": name}))
        config = load_config(tmp_path / "params.yaml", ROOT / "presets")
        assert config.raw_folder == Path("data/raw") / name


def test_params_win_over_the_preset_and_null_means_the_preset(tmp_path):
    preset = "head: {fan_in: 64, group: 8}\ntrain: {batch: 32}"
    path = write(tmp_path, "head: {fan_in: 16, group: null}\ntrain: {batch: null, warmup: null}", preset)
    config = load_config(path)
    assert (config.head.fan_in, config.head.group, config.train.batch) == (16, 8, 32)
    assert config.train.warmup == Config().train.warmup


@pytest.mark.parametrize(
    ("settings", "batches", "steps"),
    [
        ({"epochs": 0.5}, 100, 50),
        ({"epochs": 0.5, "accumulation": 3}, 100, 17),  # 16.7
        ({"epochs": 1e-6}, 100, 1),
        ({"epochs": 4.0, "max_steps": 30}, 100, 30),
        ({}, 100, 820),  # a small corpus: 8.2 epochs
        ({}, 1124, 821),  # WordNet near: 0.73
        ({}, 100_000, 73_000),
        ({"accumulation": 2}, 100_000, 36_500),
        ({"max_steps": 30}, 100, 30),
    ],
)
def test_training_is_as_long_as_the_settings_say(settings, batches, steps):
    assert Train(**settings).total_steps(batches) == steps


@pytest.mark.parametrize(
    ("settings", "documents", "held_out"),
    [
        ({}, 72_912, 1000),
        ({}, 1300, 325),
        ({}, 3, 0),
        ({"validation_documents": 40}, 161, 40),
        ({"validation_documents": 40}, 159, 39),
        ({"validation_documents": 0}, 9999, 0),
    ],
)
def test_no_more_than_a_quarter_is_held_out(settings, documents, held_out):
    assert Train(**settings).held_out(documents) == held_out


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("head: {fanin: 3}", r"params.yaml: head.fanin is not a setting; the settings there are: kind, fan_in"),
        ("heads: {}", r"params.yaml: heads is not a setting; the settings there are: preset, seed, corpus"),
        ("head: {fan_in: many}", r"params.yaml: head.fan_in: Value 'many' of type 'str' could not be converted to Integer"),
        ("head: 3", r"params.yaml: head is a section of settings, but holds 3; write its settings below it"),
        ("head: {fan_in: 2000}", r"head.fan_in: 2000 is above the 1536 features of head.intermediate; lower the one or raise"),
        ("head: {fan_in: 0}", r"head.fan_in: 0 is outside 1 to"),
        ("head: {kind: spars}", r"head.kind: 'spars' is not one of fixed_fan_in, dense, bottleneck"),
        (
            "head: {kind: dense}\nrewiring: {method: set}",
            r"rewiring.method: set needs head.kind fixed_fan_in or head_tail, but it is dense",
        ),
        ("head: {kind: dense, group: 8}", r"head.group: 8 is for head.kind fixed_fan_in"),
        ("rewiring: {method: rigl, amount: 1.5}", r"rewiring.amount: a fraction must be below 1, found 1.5"),
        ("head: {fan_in: 8, intermediate: 8}\nrewiring: {method: set}", r"rewiring.method: nothing to rewire"),
        (
            "auxiliary: {enabled: true, cutoff: 3}\ntrain: {epochs: 2}",
            r"auxiliary.cutoff: 3.0 epochs is after the end of training",
        ),
        (
            "start: {source: random}\nhead: {activation: relu}\nrewiring: {recode_at: 0.5}",
            r"rewiring.recode_at: recoding needs head.activation linear",
        ),
        ("head: {activation: relu}", r"start.source: a start from data needs head.activation linear"),
        ("train: {encoder_lr: .nan}", r"train.encoder_lr: nan is outside"),
        ("train: {device: tpu}", r"train.device: 'tpu' is not auto, cpu, cuda or cuda:N"),
        ("evaluate: {tail_frequency: 50}", r"evaluate.tail_frequency must be below evaluate.head_frequency"),
        ("memory: {scale_labels: [0]}", r"memory.scale_labels: every entry must be at least 1"),
        ("head: [", r"params.yaml cannot be read as YAML: .*line \d"),
    ],
)
def test_what_cannot_work_is_named(tmp_path, params, message):
    with pytest.raises(InputError, match=message):
        load_config(write(tmp_path, params))


def test_an_error_in_a_preset_names_the_preset(tmp_path):
    with pytest.raises(InputError, match=r"presets/mine.yaml: head.fanin is not a setting"):
        load_config(write(tmp_path, "", "head: {fanin: 1}"))


def test_unknown_preset_and_missing_params(tmp_path):
    path = write(tmp_path, "")
    path.write_text("preset: yours")
    with pytest.raises(InputError, match=r"preset: 'yours' is not one of mine; choose one or add .*presets/yours.yaml"):
        load_config(path)
    with pytest.raises(InputError, match=r"params.yaml is missing"):
        load_config(tmp_path / "nowhere/params.yaml")


def test_everything_wrong_is_named_at_once():
    config = Config()
    config.head.fan_in, config.train.batch = 0, 0
    with pytest.raises(InputError) as caught:
        check(config)
    assert "head.fan_in" in str(caught.value)
    assert "train.batch" in str(caught.value)

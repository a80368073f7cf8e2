"""Every preset file loads, holds the published settings, tells where its data comes from, and runs on its layout."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml

from corpus_layouts import write_json_layout, write_raw_layout
from fanin.config import Config, load_config
from fanin.data.corpus import build_corpus
from fanin.data.xc import PUBLISHED
from fanin.files import InputError
from fanin.provenance import git

ROOT = Path(__file__).resolve().parents[1]
SECTIONS = ["corpus", "tokens", "encoder", "head", "rewiring", "auxiliary", "train", "evaluate"]
BERT = "bert-base-uncased"
MSMARCO = "sentence-transformers/msmarco-distilbert-base-v4"
PARAPHRASE = "sentence-transformers/paraphrase-distilroberta-base-v2"
# labels, encoder, pooling, tokens, batch x accumulation, dropout, K, intermediate, prune by, amount, interval
SHAPES = {
    "wiki10-31k": ("30,938", BERT, "mean", 128, 32, 1, 0.6, 64, 4096, "threshold", 0.01, 300),
    "lf-amazontitles-131k": ("131,073", MSMARCO, "mean", 32, 512, 1, 0.7, 128, 0, "fraction", 0.15, 1000),
    "lf-wikiseealso-320k": ("312,330", PARAPHRASE, "mean", 32, 128, 1, 0.55, 128, 0, "threshold", 0.02, 800),
    "wiki-500k": ("501,070", BERT, "mean", 128, 128, 1, 0.5, 128, 0, "threshold", 0.05, 600),
    "amazon-670k": ("670,091", BERT, "cls_layers", 128, 64, 1, 0.6, 128, 0, "threshold", 0.01, 800),
    "amazon-3m": ("2,812,281", BERT, "cls_layers", 128, 128, 2, 0.35, 128, 0, "fraction", 0.25, 1500),
}
# auxiliary used, cut-off, lambda, loss, epochs, warm-up, encoder/head lr, encoder decay, propensity a and b
TRAINING = {
    "wiki10-31k": (False, 5, 0.5, "squared_hinge", 100, 1000, 1e-5, 0.01, 0.01, 0.55, 1.5),
    "lf-amazontitles-131k": (True, 12, 0.4, "bce", 100, 5000, 1e-5, 0.08, 0.01, 0.6, 2.6),
    "lf-wikiseealso-320k": (False, 40, 0.5, "squared_hinge", 101, 5000, 2e-4, 0.01, 1e-3, 0.5, 0.4),
    "wiki-500k": (True, 8, 0.4, "squared_hinge", 50, 1000, 5e-5, 0.05, 0.01, 0.5, 0.4),
    "amazon-670k": (True, 15, 0.4, "squared_hinge", 110, 1000, 1e-5, 0.01, 0.01, 0.6, 2.6),
    "amazon-3m": (False, 5, 0.5, "squared_hinge", 51, 10000, 5e-5, 0.05, 0.01, 0.6, 2.6),
}


def load(preset: str, tmp_path: Path) -> Config:
    params = (ROOT / "params.yaml").read_text()
    changed = re.sub(r"^preset: .*$", f"preset: {preset}", params, flags=re.MULTILINE)
    (tmp_path / "params.yaml").write_text(changed)
    return load_config(tmp_path / "params.yaml", ROOT / "presets")


def test_all_presets_are_known_and_have_every_section_that_dvc_tracks() -> None:
    tracked = git("ls-files", "presets", folder=ROOT)  # one of one's own is not the project's
    paths = [ROOT / line for line in tracked.splitlines()] if tracked else list((ROOT / "presets").glob("*.yaml"))
    names = {path.stem for path in paths}
    assert names == {*PUBLISHED, "wordnet", "debian", "synthetic"} == {*SHAPES, "wordnet", "debian", "synthetic"}
    for path in paths:
        assert set(SECTIONS) <= set(yaml.safe_load(path.read_text())), path.name


@pytest.mark.parametrize("preset", SHAPES)
def test_published_settings(preset: str, tmp_path: Path) -> None:
    config = load(preset, tmp_path)
    encoder, head, rewiring, train, auxiliary = config.encoder, config.head, config.rewiring, config.train, config.auxiliary
    labels, *shape = SHAPES[preset]
    assert shape == [
        encoder.name, encoder.pooling, config.tokens.max_length, train.batch, train.accumulation, encoder.dropout,
        head.fan_in, head.intermediate, rewiring.prune, rewiring.amount, rewiring.interval,
    ]  # fmt: skip
    assert TRAINING[preset] == (
        auxiliary.enabled, auxiliary.cutoff, auxiliary.weight, head.loss, train.epochs, train.warmup,
        train.encoder_lr, train.head_lr, train.encoder_weight_decay, config.evaluate.propensity_a, config.evaluate.propensity_b,
    )  # fmt: skip
    assert (encoder.layers, train.meta_lr, train.head_weight_decay) == (1, 5e-4, 1e-4)
    assert (rewiring.method, rewiring.end_fraction) == ("set", 0.66)
    assert config.corpus.label_documents == preset.startswith("lf-")
    comment = (ROOT / "presets" / f"{preset}.yaml").read_text().partition("\ncorpus:")[0]
    assert all(line.startswith("# ") for line in comment.splitlines())
    assert f"{PUBLISHED[preset]}: {labels} labels" in comment
    assert "manikvarma.org/downloads/XC/XMLRepository.html" in comment


def test_the_synthetic_preset_shows_every_label(tmp_path: Path) -> None:
    corpus = load("synthetic", tmp_path).corpus
    assert corpus.labels == 2_812_281
    assert corpus.documents * (corpus.labels_per_document - 1) >= corpus.labels
    assert (ROOT / "data/raw/synthetic/README.md").is_file()  # DVC wants the raw folder of each preset


@pytest.mark.parametrize("preset", SHAPES)
def test_missing_data_says_which_files_go_where(preset: str, tmp_path: Path) -> None:
    config = load(preset, tmp_path)
    raw = tmp_path / config.raw_folder
    raw.mkdir(parents=True)
    shutil.copy(ROOT / config.raw_folder / "README.md", raw)
    with pytest.raises(InputError) as caught:
        build_corpus(config, raw, tmp_path / "corpus")
    message, readme = str(caught.value), (raw / "README.md").read_text()
    head = (ROOT / "presets" / f"{preset}.yaml").read_text()
    for name in re.match(r".*?: (.*) missing", message)[1].split(", "):  # type: ignore[index]
        assert f"`{name}`" in readme
        assert name in head
    assert str(raw) in message
    assert "manikvarma.org/downloads/XC/XMLRepository.html" in message
    assert "manikvarma.org/downloads/XC/XMLRepository.html" in readme
    assert str(raw / "README.md") in message


@pytest.mark.parametrize("preset", SHAPES)
def test_corpus_of_a_preset_once_its_files_are_there(preset: str, tmp_path: Path) -> None:
    config = load(preset, tmp_path)
    raw = tmp_path / preset
    {"xc_json": write_json_layout, "xc_raw": write_raw_layout}[config.corpus.format](raw)
    facts = build_corpus(config, raw, tmp_path / "corpus")
    assert facts["name"] == preset
    assert facts["source"].startswith(PUBLISHED[preset])
    assert facts["label_documents"] == (facts["labels"] if preset.startswith("lf-") else 0)
    assert (tmp_path / "corpus" / "filter.parquet").exists() == preset.startswith("lf-")

"""The study's table of methods: whole, valid, and at the bytes that it claims."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fanin.files import InputError
from fanin.heads import STORED, build_head
from fanin.kernels.layer import index_dtype
from study.corpora import CORPORA, corpus_of
from study.methods import Method, choose, configuration, load_methods

ROOT = Path(__file__).resolve().parents[1]
METHODS = load_methods()
TRAINED = [method for method in METHODS.values() if method.kind == "trained"]
WIDTH = 384  # of MiniLM, the encoder of the study's presets


@pytest.mark.parametrize("method", TRAINED, ids=lambda method: method.name)
def test_settings_make_a_valid_configuration_on_every_corpus(method: Method) -> None:
    for corpus in CORPORA.values():
        config = corpus.config(dict(method.settings), ROOT)
        # what decides the comparison is said in the table, not left to a preset
        said = ("head.kind", "head.intermediate", "start.source", "rewiring.method", "rewiring.recode_at", "auxiliary.enabled")
        assert set(said) <= set(method.settings)
        assert config.head.kind == method.settings["head.kind"]


def test_the_method_that_is_called_the_default_is_that_of_the_presets() -> None:
    own = [method for method in METHODS.values() if "(the default)" in method.about]
    assert len(own) == 1
    for corpus in ("near", "debian"):
        assert CORPORA[corpus].config(dict(own[0].settings), ROOT) == CORPORA[corpus].config({}, ROOT)


@pytest.mark.parametrize("method", [m for m in METHODS.values() if m.bytes_of], ids=lambda method: method.name)
def test_methods_of_the_same_bytes_have_them(method: Method) -> None:
    def bytes_a_label(of: Method) -> float:
        head = configuration(CORPORA["near"].settings | dict(of.settings), ROOT).head
        if head.kind == "bottleneck":
            return 4 * head.bottleneck
        stored = torch.empty((), dtype=STORED[head.dtype]).itemsize
        index = torch.empty((), dtype=index_dtype(head.intermediate or WIDTH)).itemsize / head.group
        dense = head.dense_share if head.kind == "head_tail" else 0
        return dense * (head.intermediate or WIDTH) * stored + (1 - dense) * head.fan_in * (stored + index)

    own, other = bytes_a_label(method), bytes_a_label(METHODS[method.bytes_of])
    assert 0.95 * other <= own <= 1.03 * other


def test_the_bytes_of_a_head_are_what_the_test_above_counts() -> None:
    head = configuration({"preset": "wordnet", "head.fan_in": 46, "head.lexical": 0, "head.group": 16}, ROOT).head
    built = build_head(head, 64, 1536).bytes()
    assert built["weights"] + built["indices"] == 64 * 46 * (4 + 2 / 16)


def test_there_is_a_ceiling_and_a_floor() -> None:
    roles = [method.role for method in METHODS.values() if method.tier == "main"]
    assert roles.count("floor") == 1
    assert roles.count("dense") >= 2  # dense with a random start, and with the care that sparse gets


@pytest.mark.parametrize("method", [method for method in METHODS.values() if method.against], ids=lambda method: method.name)
def test_methods_that_are_set_side_by_side_train_as_long(method: Method) -> None:
    ours, dense = (configuration(METHODS[name].settings, ROOT) for name in (method.name, method.against))
    assert ours.train.epochs == dense.train.epochs
    assert (ours.rewiring.recode_at, ours.rewiring.refit_epochs) == (dense.rewiring.recode_at, dense.rewiring.refit_epochs)


def test_methods_are_chosen_by_name_tier_and_kind() -> None:
    assert [m.name for m in choose(METHODS, "sparse, dense sparse")] == ["sparse", "dense"]
    assert {m.kind for m in choose(METHODS, "rivals")} == {"rival"}
    assert {m.tier for m in choose(METHODS, "ablation")} == {"ablation"}
    assert choose(METHODS, "") == list(METHODS.values()) == choose(METHODS, "all")
    with pytest.raises(InputError, match="METHODS: 'spars' is none of"):
        choose(METHODS, "spars")


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("a: {settings: {}}", "needs `about`"),
        ("bonsai: {about: x, settings: {}}", "a name that no rival has"),
        ("a: {about: x, settings: {}, speed: 3}", r"unknown keys \['speed'\]"),
        ("a: {about: x, settings: {}, tier: best}", "tier is one of"),
        ("a: {about: x, compress: prune, of: b}", "prune` with K"),
        ("a: {about: x, compress: prune, K: 3, of: b}", "'b' is not a method"),
        ("a: {about: x, compress: zip, of: b}", "compress takes"),
        ("a: {about: x, bytes_of: bonsai, settings: {}}", "'bonsai' is not a method of this table that is trained"),
        ("{a: {about: x, like: b, settings: {}}, b: {about: x, settings: {}}}", "a: like: 'b' is not a method further up"),
        ("{a: {about: x, settings: {}}, b: {about: x, against: a, settings: {}}}", "b: against: a has not the role dense"),
    ],
)
def test_a_broken_entry_is_named(entry: str, message: str, tmp_path: Path) -> None:
    table = tmp_path / "methods.yaml"
    table.write_text(entry)
    with pytest.raises(InputError, match=message):
        load_methods(table)


def test_a_method_takes_over_what_it_is_like(tmp_path: Path) -> None:
    table = tmp_path / "methods.yaml"
    table.write_text("{a: {about: x, settings: {p: 1, q: 2}}, b: {about: y, like: a, settings: {q: 3, r: 4}}}")
    methods = load_methods(table)
    assert methods["b"].settings == {"p": 1, "q": 3, "r": 4}
    assert methods["a"].settings == {"p": 1, "q": 2}


def test_a_setting_that_does_not_exist_is_told() -> None:
    with pytest.raises(InputError, match=r"^settings \{'head.fanin': 3\} over params.yaml: head\.fanin is not a setting"):
        configuration({"head.fanin": 3}, ROOT)


def test_any_preset_is_a_corpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert corpus_of("amazon-670k").settings == {"preset": "amazon-670k"}
    with pytest.raises(InputError, match="CORPUS: 'nowhere' is none of"):
        corpus_of("nowhere")

"""`python -m fanin.memory plan` and what stands behind it: table, changes that make a run fit, largest fan-in, refusal."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from transformers import BertConfig

from fanin.config import Config, Head, check
from fanin.files import InputError, write_json
from fanin.memory import __main__ as cli
from fanin.memory import advice, fits, job, peaks, table
from fanin.memory.advice import Change, cheapest, largest_fan_in
from fanin.memory.job import MIB, Job, available
from fanin.memory.shapes import EncoderShape
from tiny import tiny_encoder_folder

CPU = torch.device("cpu")
BERT = EncoderShape.of(BertConfig())
PRESETS = Path(__file__).parents[1] / "presets"


def a_job(labels: int = 670_091, device: str = "cpu", ranks: int = 1, **sections: dict[str, Any]) -> Job:
    config = Config(head=Head(fan_in=64, intermediate=0))
    for section, values in sections.items():
        setattr(config, section, dataclasses.replace(getattr(config, section), **values))
    check(config)
    return Job(
        config=config,
        shape=BERT,
        labels=labels,
        tokens=128,
        device=torch.device(device),
        precision=torch.float32,
        documents=10_000,
        ranks=ranks,
    )


# the table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("kind", ["fixed_fan_in", "dense", "bottleneck"])
def test_the_lines_sum_to_what_the_run_needs(kind: str, device: str) -> None:
    plan = a_job(device=device, head={"kind": kind}).plan(100 * MIB)
    assert sum(plan.lines().values()) == plan.need == plan.peak + plan.slack
    assert plan.slack > 0


def test_the_table_shows_every_part_the_phase_and_the_verdict() -> None:
    own = a_job(auxiliary={"enabled": True})
    plan = own.plan(100 * MIB)
    shown = table.table(plan, plan.need)
    for name, size in plan.lines().items():
        assert (f"  {name}  " in shown) == (size > 0), name
    assert f"{plan.need / MIB:,.1f} MiB, in the {plan.phase} phase" in shown
    assert " fits into " in shown
    assert "fits tightly, without slack, into" in table.table(plan, plan.need - 1)
    assert "does not fit into" in table.table(plan, plan.peak - 1)
    assert "fixed_fan_in head (K = 64, G = 1, fp32), 670,091 labels, 768 features; encoder" in table.title(own)
    words = table.title(a_job(head={"lexical": 8, "profiles": 64}))
    assert "768 features, 8192 profiles and " in words
    assert " words; encoder" in words


def test_checkpointing_and_bf16_moments_take_less_and_say_where() -> None:
    plain = a_job().plan(0)
    frugal = a_job(encoder={"checkpointing": True}, train={"encoder_moments": "bf16"}).plan(0)
    assert frugal.encoder_optimizer == plain.encoder_optimizer / 2
    assert frugal.phases["head"].activations < 0.2 * plain.phases["head"].activations
    assert frugal.peak < plain.peak


def test_ranks_share_labels_and_documents_and_hold_all_features() -> None:
    one, four = a_job().plan(0), a_job(ranks=4).plan(0)
    assert four.head_weights == pytest.approx(one.head_weights / 4, rel=1e-4)
    assert four.encoder == one.encoder
    assert four.phases["forward"].activations == pytest.approx(one.phases["forward"].activations / 4, rel=1e-4)
    features = 4 * a_job().config.train.batch * a_job().features
    own = four.phases["head"].temporaries - 3 * features  # theirs as they come and in order, and the gradients
    assert 0 < own <= one.phases["head"].temporaries


# changes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["fixed_fan_in", "dense", "bottleneck"])
def test_every_change_is_a_valid_config_that_takes_less(kind: str) -> None:
    own = a_job(head={"kind": kind})
    before, found = own.plan(0), advice.changes(own.config)
    assert [change.harm for change in found] == sorted(change.harm for change in found)
    for change in found:
        config = change.apply(own.config)
        check(config)
        after = dataclasses.replace(own, config=config).plan(0)
        assert after.need < before.need or after.resident < before.resident, str(change)
    assert own.config == a_job(head={"kind": kind}).config  # untouched


def test_the_least_harmful_changes_come_first_and_fit() -> None:
    own = a_job(labels=2_812_281)
    room = own.plan(0).need * 3 // 5
    found = cheapest(own, room, 0)
    assert len(found) == 3
    assert all(plan.need <= room for _, plan in found)
    harms = [change.harm for change, _ in found]
    assert harms == sorted(harms)
    # no single change of less harm was passed over, but for more of what is enough
    taken = [change.keys for change, _ in found]
    missed = [change for change in advice.changes(own.config) if change.harm < harms[-1] and change.keys not in taken]
    assert all(dataclasses.replace(own, config=change.apply(own.config)).plan(0).need > room for change in missed)


def test_what_already_helps_alone_is_not_paired() -> None:
    own = a_job()
    found = [change.keys for change, _ in cheapest(own, own.plan(0).need - 1, 0, wanted=20)]
    assert {"encoder.checkpointing"} in found
    assert not [one for one in found if "encoder.checkpointing" in one and len(one) > 1]
    assert len(set(found)) == len(found)  # nor more of the same: a quarter of the batch where half is enough


def test_pairs_come_where_no_single_change_is_enough() -> None:
    own = a_job(labels=2_812_281)
    singles = [dataclasses.replace(own, config=change.apply(own.config)).plan(0).need for change in advice.changes(own.config)]
    found = cheapest(own, min(singles) - MIB, 0)
    assert found
    assert all("," in str(change) for change, _ in found)


def test_nothing_fits_into_nothing() -> None:
    own = a_job()
    assert cheapest(own, MIB, 0) == []
    change, plan = advice.least(own, 0)
    assert plan.need < min(
        dataclasses.replace(own, config=one.apply(own.config)).plan(0).need for one in advice.changes(own.config)
    )
    assert len({key for key, _ in change.settings}) >= 2


def test_a_change_reads_as_settings() -> None:
    assert (
        str(Change((("encoder.checkpointing", True), ("head.dtype", "bf16")), 5))
        == "encoder.checkpointing=true, head.dtype=bf16"
    )


def test_the_largest_fan_in_is_the_last_that_fits() -> None:
    own = a_job()
    room = dataclasses.replace(own, config=Change((("head.fan_in", 96),), 0).apply(own.config)).plan(0).need
    found = largest_fan_in(own, room + MIB, 0)
    assert found is not None
    assert found[0] == 96
    assert found[1].need <= room + MIB
    assert largest_fan_in(own, 10 * 2**40, 0)[0] == 512  # type: ignore[index]
    assert largest_fan_in(own, MIB, 0) is None


# the device -------------------------------------------------------------------------------------------------------


def test_the_tightest_control_group_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = tmp_path / "outer/inner"
    own.mkdir(parents=True)
    for folder, limit in ((own, "max"), (own.parent, str(300 * MIB))):
        (folder / "memory.max").write_text(limit + "\n")
        (folder / "memory.current").write_text(f"{100 * MIB}\n")
    (tmp_path / "self").write_text("0::/outer/inner\n")
    monkeypatch.setattr(job, "_CGROUP", tmp_path)
    monkeypatch.setattr(job, "_OWN_GROUP", tmp_path / "self")
    assert available(CPU) == 200 * MIB
    (own.parent / "memory.current").write_text(f"{400 * MIB}\n")
    assert available(CPU) == 0
    (own.parent / "memory.max").write_text("max\n")
    assert available(CPU) == pytest.approx(psutil.virtual_memory().available, rel=0.2)


# the check before training ----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> tuple[Config, dict[str, Any]]:
    config = Config(head=Head(fan_in=8, intermediate=0))
    config.encoder.name = str(tiny_encoder_folder(tmp_path))
    config.train.device, config.train.precision = "cpu", "fp32"
    return config, {"labels": 1_000_000, "max_length": 32, "documents": {"train": 1000, "test": 10}}


def test_a_run_that_fits_is_let_through(small: tuple[Config, dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    plan = fits.check(*small, CPU)
    assert plan.head_weights == 36 * 1_000_000
    assert plan.loader > 0
    assert not capsys.readouterr().err


def test_a_run_that_cannot_fit_is_refused_with_what_to_change(
    small: tuple[Config, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = fits.check(*small, CPU)
    monkeypatch.setattr(fits, "available", lambda device: needed.peak - 20 * MIB)
    with pytest.raises(
        InputError,
        match=r"does not fit: .*1,000,000 labels.* MiB are free; it fits with .*head\.dtype=bf16, train\.batch=4, .* \(",
    ):
        fits.check(*small, CPU)
    monkeypatch.setattr(fits, "available", lambda device: 10 * MIB)
    with pytest.raises(InputError, match=r"even .*=.* takes .* MiB; use a larger device"):
        fits.check(*small, CPU)


def test_where_only_the_slack_is_missing_it_is_said_and_nothing_kept_back(
    small: tuple[Config, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    needed = fits.check(*small, CPU)
    pinned: list[bool] = []
    monkeypatch.setattr(fits, "pin_allocator", lambda: pinned.append(True) or True)
    fits.check(*small, CPU)
    assert not pinned
    monkeypatch.setattr(fits, "available", lambda device: needed.peak)
    fits.check(*small, CPU)
    assert pinned == [True]
    assert "memory is tight" in (said := capsys.readouterr().err)
    assert "freed blocks go back" in said


# the command ------------------------------------------------------------------------------------------------------


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with params.yaml for a tiny encoder; the process's own bytes are given, not measured."""
    encoder = tiny_encoder_folder(tmp_path)
    (tmp_path / "presets").symlink_to(PRESETS)
    head = "head:\n  intermediate: 64\n  fan_in: 16\n  lexical: 0\n"
    text = f"encoder:\n  name: {encoder}\n{head}train:\n  precision: fp32\n  device: cpu\n"
    (tmp_path / "params.yaml").write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "process_bytes", lambda job: 500 * MIB)
    return tmp_path


def test_plan_prints_whether_it_fits(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "--labels", "100000", "--memory", "2GiB"]) == 0
    shown = capsys.readouterr().out
    assert "100,000 labels, 64 features" in shown
    assert re.search(r"process and libraries +500\.0 MiB\n", shown)
    assert "fits into 2,048 MiB" in shown
    assert cli.main(["plan", "--labels", "2812281", "--memory", "900MiB"]) == 1
    verdict, _, changes = capsys.readouterr().out.partition("the least harmful changes")
    assert "does not fit into 900 MiB" in verdict
    assert len(changes.splitlines()) == 4
    assert "=" in changes.splitlines()[1]
    assert cli.main(["plan", "--labels", "2812281", "--memory", "400MiB"]) == 1
    assert "no change, alone or with another" in capsys.readouterr().out


def test_plan_takes_the_labels_of_the_tokens(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(project / "data/tokens/tokens.json", {"labels": 1234, "max_length": 20, "documents": {"train": 99}})
    assert cli.main(["plan", "--memory", "2GiB"]) == 0
    assert "1,234 labels" in (shown := capsys.readouterr().out)
    assert "x 64 tokens" in shown  # params.yaml's


def test_plan_answers_the_largest_fan_in_also_for_a_gpu_that_is_not_here(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["plan", "--for", "2GiB", "--labels", "2812281", "--device", "cuda"]) == 0
    shown = capsys.readouterr().out
    assert "head.fan_in=" in shown
    assert "float32, cuda" in shown
    assert cli.main(["plan", "--for", "40MiB", "--labels", "2812281", "--device", "cuda"]) == 1
    assert "not even head.fan_in=8 fits" in capsys.readouterr().out


def test_bad_questions_are_explained(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, said in (
        (["plan"], "--labels: data/tokens/tokens.json is not there yet"),
        (["plan", "--labels", "0"], "--labels: 0 is not a number from 1 on"),
        (["plan", "--labels", "9", "--ranks", "0"], "--ranks: 0"),
        (["plan", "--labels", "9", "--params", "none.yaml"], "none.yaml is missing"),
    ):
        assert cli.main(arguments) == 1
        assert said in capsys.readouterr().err
    (project / "params.yaml").write_text("head:\n  kind: dense\nrewiring:\n  method: none\n", encoding="utf-8")
    assert cli.main(["plan", "--labels", "9", "--for", "1GiB"]) == 1
    assert "only a fixed_fan_in or head_tail head has a fan-in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main(["plan", "--memory", "lots"])
    assert "'lots' is not an amount of memory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "bytes_"), [("24GiB", 24 * 2**30), ("512 MiB", 2**29), ("1.5g", 3 * 2**29), ("2GB", 2**31), ("4096", 4096)]
)
def test_sizes(text: str, bytes_: int) -> None:
    assert cli.size(text) == bytes_


def test_between_steps_training_holds_little_above_the_peak_or_less_where_a_step_more_would_not_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plan = a_job().plan(100 * MIB)
    a_step = plan.peak - plan.resident
    monkeypatch.setattr(peaks, "_anonymous", lambda: 5)
    for room, held in ((10 * plan.need, plan.peak + int(0.3 * a_step)), (plan.peak + a_step, plan.peak), (MIB, 0)):
        monkeypatch.setattr(fits, "available", lambda device, room=room: room)
        kept = fits.between_steps(plan, CPU)
        assert isinstance(kept, peaks.Trimmer)
        assert kept.limit == 5 + held
    assert not isinstance(fits.between_steps(plan, torch.device("cuda")), peaks.Trimmer)

"""Journals on disk, and which process and project a run belongs to."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from fanin.tracking.outbox import LINK_BYTES, Journal
from fanin.tracking.owner import Owner, project_root
from tracked import DEAD


def test_a_torn_line_harms_no_other(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    journal.append("metrics", values={"x": 1.0}, step=0)
    whole = journal.end_of_whole_lines()
    with open(journal.path, "a") as file:
        file.write('{"event": "metr')  # killed here
    assert [event["event"] for _, event in journal.events()] == ["metrics"]
    assert journal.end_of_whole_lines() == whole
    journal.append("end", status="KILLED")
    assert [event["event"] for _, event in journal.events()] == ["metrics", "end"]
    assert journal.ended("KILLED")


def test_the_end_of_a_long_journal_is_found(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    journal.folder.mkdir(parents=True)
    line = json.dumps({"event": "metrics", "time": 1, "values": {"x": 1.0}, "step": 0}) + "\n"
    journal.path.write_text(line * 5000)
    assert journal.end() is None
    journal.append("end", status="FINISHED")
    journal.append("tags", values={"late": "yes"})
    assert journal.ended("FINISHED")


def test_artifacts_stay_as_they_were_logged(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    small, large = tmp_path / "small.json", tmp_path / "large.bin"
    small.write_text("first")
    large.write_bytes(b"1" * LINK_BYTES)
    kept = [journal.folder / journal.keep(path, path.name) for path in (small, large)]
    small.write_text("second, in place")
    (tmp_path / "new").write_bytes(b"2" * LINK_BYTES)
    os.replace(tmp_path / "new", large)  # as fanin.files.atomic_path does
    assert kept[0].read_text() == "first"
    assert kept[1].read_bytes() == b"1" * LINK_BYTES
    again = journal.folder / journal.keep(small, small.name)
    assert (again.read_text(), again.name, kept[0].read_text()) == ("second, in place", "small.json", "first")


def test_a_large_artifact_takes_no_second_copy(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "outbox" / "a")
    large = tmp_path / "models" / "head.safetensors"
    large.parent.mkdir()
    large.write_bytes(b"1" * LINK_BYTES)
    kept = journal.folder / journal.keep(large.parent, "models") / large.name
    assert kept.stat().st_ino == large.stat().st_ino


def test_an_owner_is_one_process_and_not_a_later_one_with_its_number() -> None:
    me = Owner.this()
    assert me.alive()
    assert not Owner(me.host, me.pid, me.started - 60).alive()
    assert not DEAD.alive()
    assert me.key(Path("/a")) != me.key(Path("/b"))


def test_root_of_an_experiments_copy_is_the_repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FANIN_ROOT", raising=False)
    monkeypatch.delenv("DVC_ROOT", raising=False)
    copy = tmp_path / ".dvc" / "tmp" / "exps" / "standalone" / "tmpabc"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    assert project_root() == tmp_path
    monkeypatch.setenv("FANIN_ROOT", "/elsewhere")
    assert project_root() == Path("/elsewhere")

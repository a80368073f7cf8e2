"""Files are whole or absent."""

from __future__ import annotations

import errno

import pytest

from fanin.files import InputError, atomic_path, read_json, write_json


def test_a_file_and_a_folder_replace_the_old_ones(tmp_path):
    for _ in range(2):
        with atomic_path(tmp_path / "a/file") as path:
            path.write_text("new")
        with atomic_path(tmp_path / "a/folder", directory=True) as path:
            (path / "one").write_text("1")
    assert (tmp_path / "a/file").read_text() == "new"
    assert [p.name for p in (tmp_path / "a/folder").iterdir()] == ["one"]
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["file", "folder"]


@pytest.mark.parametrize("directory", [False, True])
@pytest.mark.parametrize("error", [RuntimeError("x"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_an_error_leaves_the_old_one_and_nothing_else(tmp_path, directory, error):
    target = tmp_path / "out"
    with atomic_path(target, directory=directory) as path:
        (path / "x" if directory else path).write_text("old")
    expected = InputError if isinstance(error, OSError) else type(error)

    def fail() -> None:
        with atomic_path(target, directory=directory) as path:
            (path / "x" if directory else path).write_text("half")
            raise error

    with pytest.raises(expected):
        fail()
    assert (target / "x" if directory else target).read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_cannot_take_its_place_leaves_the_old_one(tmp_path):
    def fail() -> None:
        with atomic_path(tmp_path / "out", directory=True) as path:
            path.rmdir()

    (tmp_path / "out").mkdir()
    (tmp_path / "out/x").write_text("old")
    with pytest.raises(FileNotFoundError):
        fail()
    assert (tmp_path / "out/x").read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (errno.ENOSPC, "the disk is full; free some space"),
        (errno.EACCES, "permission denied; make the folder writable"),
        (errno.EROFS, "the file system is read-only"),
    ],
)
def test_what_the_disk_refuses_is_said_plainly(tmp_path, number, words):
    def fail() -> None:
        with atomic_path(tmp_path / "out"):
            raise OSError(number, "as the system says it")

    with pytest.raises(InputError, match=f"cannot write .*out: {words}"):
        fail()


def test_a_file_where_a_folder_is_needed(tmp_path):
    (tmp_path / "data").write_text("")

    def fail() -> None:
        with atomic_path(tmp_path / "data/out"):
            pass

    with pytest.raises(InputError, match=r"cannot write .*data/out: .* is a file, but a folder is needed there"):
        fail()


def test_json(tmp_path):
    write_json(tmp_path / "x.json", {"P@1": 61.4, "text": "é"})
    assert read_json(tmp_path / "x.json") == {"P@1": 61.4, "text": "é"}
    with pytest.raises(ValueError, match="Out of range float"):
        write_json(tmp_path / "x.json", float("nan"))
    assert read_json(tmp_path / "x.json")["P@1"] == 61.4
    (tmp_path / "y.json").write_text('{\n"a": }')
    with pytest.raises(InputError, match=r"y.json, line 2: not valid JSON"):
        read_json(tmp_path / "y.json")
    with pytest.raises(InputError, match=r"z.json is missing; run the stage that writes it"):
        read_json(tmp_path / "z.json")

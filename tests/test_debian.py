"""Debian's package index as a corpus: control files in every packing, labels and texts, the split, bad input."""

from __future__ import annotations

import bz2
import gzip
import lzma
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.config import Config
from fanin.data import debian
from fanin.data.corpus import build_corpus
from fanin.data.debian import Debian, plain, stanzas, tags, targets
from fanin.files import InputError

TEAMS = 40  # packages come in as many families, whose members share a tag and a dependency


def entry(number: int) -> tuple[str, str]:
    """The index entry and the translation of one package."""
    family = number % TEAMS
    index = [
        f"Package: pkg{number:04d}",
        "Architecture: all",
        f"Depends: libfamily{family} (>= 1.0), libc6:any | libc6-udeb",
        "Section: contrib/net",
        f"Description: short {number}",
        f"Description-md5: {number:032x}",
        f"Tag: topic::family{family}, works-with::{{audio,",
        " video}",
    ]
    long = [
        f"Package: pkg{number:04d}",
        f"Description-md5: {number:032x}",
        f"Description-en: tool {number} of family {family}",
        " It does what",
        " it says.",
        " .",
        " And more.",
    ]
    return "\n".join(index), "\n".join(long)


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "debian"
    folder.mkdir()
    entries = [entry(number) for number in range(400)]
    (folder / "Packages").write_text("\n\n".join(index for index, _ in entries) + "\n")
    (folder / "Translation-en").write_text("\n\n".join(long for _, long in entries) + "\n")
    return folder


def config() -> Config:
    made = Config()
    made.preset, made.corpus.format = "debian", "debian"
    return made


def test_an_index_in_which_everything_is_common_is_refused(raw: Path) -> None:
    with pytest.raises(InputError, match=r"400 packages are too few .*labels above 1 % of them are left out"):
        Debian(raw)


def test_labels_above_one_per_cent_go(raw: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_TOO_COMMON", 0.03)
    facts = build_corpus(config(), raw, tmp_path / "corpus")
    assert facts["name"] == "debian"
    assert facts["train_documents"] + facts["test_documents"] == 400
    assert 0.12 < facts["test_documents"] / 400 < 0.28
    labels = pq.read_table(tmp_path / "corpus" / "labels.parquet")["text"].to_pylist()
    assert labels == sorted(f"{kind}family{n}" for kind in ("package lib", "tag topic::") for n in range(TEAMS))
    assert facts["labels_too_common"] == 5  # libc6, libc6-udeb, two works-with, the section
    for side in ("train", "test"):
        for row in pq.read_table(tmp_path / "corpus" / f"{side}.parquet").to_pylist():
            family = row["text"].split()[4].rstrip(".")
            assert row["text"].endswith(f"of family {family}. It does what it says. And more.")
            assert [labels[n] for n in row["labels"]] == [f"package libfamily{family}", f"tag topic::family{family}"]


def test_the_split_depends_on_the_text_alone(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_TOO_COMMON", 0.03)
    before = {text for text, _ in Debian(raw).test()}
    entries = (raw / "Packages").read_text().strip().split("\n\n")
    (raw / "Packages").write_text("\n\n".join(reversed(entries[:390])) + "\n")
    after = {text for text, _ in Debian(raw).test()}
    assert after <= before
    assert len(after) >= len(before) - 10


@pytest.mark.parametrize("suffix", ["", ".xz", ".gz", ".bz2", ".lz4", ".zst"])
def test_every_packing_reads_alike(raw: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_TOO_COMMON", 0.03)
    plain_documents = list(Debian(raw).train())
    for name in ("Packages", "Translation-en"):
        content = (raw / name).read_bytes()
        (raw / name).unlink()
        path = raw / f"deb.debian.org_debian_dists_bookworm_main_{name}{suffix}"
        packers = {"": bytes, ".xz": lzma.compress, ".gz": gzip.compress, ".bz2": bz2.compress}
        if suffix in packers:
            path.write_bytes(packers[suffix](content))
        else:
            with pa.output_stream(str(path), compression={".lz4": "lz4", ".zst": "zstd"}[suffix]) as file:
                file.write(content)
    assert list(Debian(raw).train()) == plain_documents


def test_fields_and_texts() -> None:
    assert list(tags("use::editing, works-with::{text, unicode},\n role::program")) == [
        "use::editing",
        "works-with::text",
        "works-with::unicode",
        "role::program",
    ]
    fields = {"Depends": "a1 (>= 2) | b2:any, c3 [amd64]", "Recommends": "d4", "Suggests": "e5", "Section": "main/net"}
    found = set(targets(fields))
    assert found == {"package a1", "package b2", "package c3", "package d4", "section net"}
    assert plain("short\nlong one,\n.\n * item\n") == "short. long one, * item"
    assert plain("short") == "short"


def test_a_package_without_translation_keeps_its_synopsis(raw: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(debian, "_TOO_COMMON", 0.03)
    whole = (raw / "Translation-en").read_text()
    (raw / "Translation-en").write_text(whole.replace(f"{7:032x}", "f" * 32))
    source = Debian(raw)
    assert "short 7" in {text for text, _ in [*source.train(), *source.test()]}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Packages", b"Package: a\nDescr", "Packages:2: expected `Field: value`"),
        ("Packages", b" lost\nPackage: a\n", "Packages:1: a continuation line"),
        ("Packages", b"Package: a\nSection: \xff\n", "Packages:2: not UTF-8"),
        ("Packages", b"Section: net\n", "Packages:1: an entry without a Package field"),
        ("Translation-en", b"Package: a\n\nPackage: b\n", "Translation-en:1: an entry without Description-md5"),
        ("Packages", b"", "too few for a training and a test set"),
    ],
)
def test_bad_input_names_file_and_line(raw: Path, name: str, content: bytes, message: str) -> None:
    (raw / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        Debian(raw)


def test_a_damaged_archive_is_told(raw: Path) -> None:
    packed = lzma.compress((raw / "Packages").read_bytes())
    (raw / "Packages").unlink()
    (raw / "Packages.xz").write_bytes(packed[: len(packed) // 2])
    with pytest.raises(InputError, match=r"Packages\.xz: damaged after line"):
        list(stanzas(raw / "Packages.xz", {"Package"}))


def test_missing_and_doubled_files_name_the_readme(raw: Path) -> None:
    (raw / "Packages.xz").write_bytes(b"")
    with pytest.raises(InputError, match="2 files are called Packages"):
        Debian(raw)
    (raw / "Packages.xz").unlink()
    (raw / "Packages").unlink()
    with pytest.raises(InputError, match=r"Packages missing.*README\.md"):
        Debian(raw)

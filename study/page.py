"""Renew what docs/study.md takes from the records: `python -m study.page` (`make study-page`).

Between `<!-- records: near -->` and `<!-- end -->` stands what is generated for a corpus: what it holds, where it was
measured, tables, plots (docs/study/<corpus>-<device>/); between `<!-- summary -->` and `<!-- end -->` the table over all
corpora. Everything outside is written by hand. With --check nothing is written, and the exit code is 1 where the page is
not what the records say.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from fanin.files import InputError, atomic_path
from study.corpora import CORPORA
from study.methods import Method, load_methods
from study.plots import draw_all
from study.records import RESULTS
from study.summary import Record, pairs, summary
from study.tables import results

PAGE = Path("docs/study.md")
_PLACE = re.compile(r"<!-- records: ([a-z0-9-]+) -->\n.*?<!-- end -->", re.DOTALL)
_SUMMARY = re.compile(r"<!-- summary -->\n.*?<!-- end -->", re.DOTALL)
_OF_A_DEVICE = ("train_seconds", "prepare_seconds", "rank_seconds", "peak_mib", "note")

File = tuple[Path, Sequence[Record]]

CAPTIONS = {
    "bytes": "Accuracy against the bytes of the output layer; the grey line is the front of what nothing beats in both",
    "model": "Accuracy against the bytes of the whole model, encoder too",
    "time": "Accuracy against training time",
    "frequency": "What head, torso and tail labels bring",
    "recovery": "Share of the dense-to-sparse hole that is closed",
    "convergence": "Validation P@1 while training",
}


def generated(corpus: str, methods: Mapping[str, Method], files: Sequence[File], plots: Path | None = None) -> str:
    """The generated part for a corpus: one section a record file (a device), so that no table and no share of the hole mixes
    devices; draws into `plots` where it is given.

    The first section is the fullest and has the plots, and such rivals as were run elsewhere, without their times; the others
    are folded.
    """
    if not files:
        return "No records yet."
    title = CORPORA[corpus].title if corpus in CORPORA else corpus
    (path, own), *others = files
    rivals = _elsewhere(own, others)
    parts = [f"### {title}: {own[0]['device']}"] if others else []
    parts += [_measured(own, path)]
    if rivals:
        known = dict.fromkeys(f"`{source.as_posix()}`" for source, _ in rivals)
        parts += [f"Rivals that were run elsewhere ({', '.join(known)}) have no times and no memory here."]
    shown = [*own, *(record for _, record in rivals)]
    parts += [results(shown, methods)]
    place = PAGE.parent / "study" / path.stem.removeprefix("study-")
    if plots is not None:
        draw_all(shown, methods, title, plots / place.name)
    drawn = [(name, place / f"{name}.png") for name in CAPTIONS if (place / f"{name}.png").exists()]
    parts += [f"![{title}: {CAPTIONS[name]}]({png.relative_to(PAGE.parent).as_posix()})" for name, png in drawn]
    for path, records in others:
        parts += [f"<details><summary>{title}: {records[0]['device']}</summary>"]
        parts += [_measured(records, path), results(records, methods), "</details>"]
    return "\n\n".join(parts)


def by_device(corpus: str, methods: Mapping[str, Method], folder: Path = RESULTS) -> list[File]:
    """The record files of a corpus, that with the most runs which the summary compares first, then the most trained ones."""
    files = [(path, json.loads(path.read_text(encoding="utf-8"))) for path in sorted(folder.glob(f"study-{corpus}-*.json"))]

    def fullness(file: File) -> tuple[int, int]:
        compared = sum(len(pairs([file[1]], method)) for method in methods.values() if method.against)
        return compared, sum(record["kind"] == "trained" for record in file[1])

    return sorted(files, key=fullness, reverse=True)


def _elsewhere(own: Sequence[Record], others: Sequence[File]) -> list[tuple[Path, Record]]:
    """Rivals that `own` lacks, from the first of `others` that has them: accuracy and model files depend on no device."""
    found: dict[str, tuple[Path, Record]] = {}
    known = {record["method"] for record in own}
    for path, records in others:
        for record in records:
            if record["kind"] == "rival" and "unavailable" not in record and record["method"] not in known:
                kept = {key: value for key, value in record.items() if key not in _OF_A_DEVICE}
                found.setdefault(record["method"], (path, kept))
    return list(found.values())


def _measured(records: Sequence[Record], path: Path) -> str:
    """What the corpus holds, and where and by which commits the records of a file were made."""
    device = records[0]["device"]
    data = next((record["data"] for record in records if "data" in record), None)
    corpus = ""
    if data is not None:
        documents = f"{data['train_documents']:,} training documents, {data['test_documents']:,} test documents"
        labels = f"{data['labels']:,} labels of which {data['labels_seen_once']:,} have one training document"
        corpus = f"{documents}, {labels}, {data['labels_per_document']:.1f} labels a document.\n\n"
    notes = "".join(f"\n\n{note}" for note in dict.fromkeys(record["note"] for record in records if "note" in record))
    commits = sorted({record["commit"][:12] + ("-dirty" if record["commit"].endswith("-dirty") else "") for record in records})
    return corpus + f"{len(records)} records, {device}, commit {', '.join(commits)} (`{path.as_posix()}`).{notes}"


def renewed(text: str, methods: Mapping[str, Method], plots: Path | None) -> str:
    """The page with its generated parts made anew. Raises InputError where it has none."""
    if not _PLACE.search(text):
        raise InputError(f"{PAGE}: no `<!-- records: CORPUS -->` ... `<!-- end -->` to fill")

    files = {name: by_device(name, methods) for name in {*CORPORA, *_PLACE.findall(text)}}

    def fill(place: re.Match[str]) -> str:
        return f"<!-- records: {place[1]} -->\n{generated(place[1], methods, files[place[1]], plots)}\n<!-- end -->"

    corpora = {CORPORA[name].title: [records for _, records in files[name]] for name in CORPORA}
    text = _SUMMARY.sub(lambda _: f"<!-- summary -->\n{summary(corpora, methods)}\n<!-- end -->", text)
    return _PLACE.sub(fill, text)


def main(arguments: Sequence[str] | None = None) -> int:
    """Renew the page, or check that it is up to date."""
    parser = argparse.ArgumentParser(prog="python -m study.page", description="Tables and plots of docs/study.md.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    options = parser.parse_args(arguments)
    try:
        before = PAGE.read_text(encoding="utf-8")
        after = renewed(before, load_methods(), None if options.check else PAGE.parent / "study")
    except (InputError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if options.check:
        print("up to date" if before == after else f"{PAGE} is not what the records say; run `make study-page`")
        return int(before != after)
    with atomic_path(PAGE) as temporary:
        temporary.write_text(after, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())

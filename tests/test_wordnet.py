"""The bundled WordNet: its parser on hand-written lines, the tasks on a small hierarchy, the whole data set's counts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from fanin.config import Config
from fanin.data import wordnet
from fanin.data.corpus import build_corpus
from fanin.data.wordnet import WordNet, build, definition, main, parse
from fanin.files import InputError

BUNDLED = Path(__file__).resolve().parents[1] / "data" / "raw" / "wordnet"
HEADER = "  1 This is the licence.  \n  2   \n  29 Its last line.  \n"
NOUNS = [
    "00000001 03 n 01 thing 0 000 | what there is  ",
    '00000002 03 n 02 dog 0 Canis_familiaris 0 002 @ 00000001 n 0000 + 00000001 v 0101 | an animal; "the dog barked"  ',
    "00000003 03 n 01 Rex 0 001 @i 00000002 n 0000 | a dog  ",
    "00000004 03 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 0 001 @ 00000002 n 0000 | ten lemmas  ",
]
VERBS = [
    "00000001 29 v 01 follow 0 002 @ 00000002 v 0000 + 00000002 n 0101 01 + 02 00 | go after  ",
    "00000002 29 v 01 chase 0 001 @ 00000001 v 0000 01 + 02 00 | go after fast  ",  # a cycle
]
ADJECTIVES = [
    "00000001 00 a 01 wild(p) 0 002 & 00000002 s 0000 & 00000002 s 0101 | not tame  ",
    "00000002 00 s 01 feral(a) 0 001 & 00000001 a 0000 | wild again  ",
]


@pytest.fixture
def dictionary(tmp_path: Path) -> Path:
    for name, lines in (("noun", NOUNS), ("verb", VERBS), ("adj", ADJECTIVES), ("adv", [])):
        (tmp_path / f"data.{name}").write_text(HEADER + "".join(line + "\n" for line in lines))
    return tmp_path


def test_parse(dictionary: Path) -> None:
    synsets = {synset.id: synset for synset in parse(dictionary)}
    assert sorted(synsets) == [
        "a00000001",
        "a00000002",
        "n00000001",
        "n00000002",
        "n00000003",
        "n00000004",
        "v00000001",
        "v00000002",
    ]
    dog = synsets["n00000002"]
    assert dog.lemmas == ["dog", "Canis familiaris"]
    assert dog.gloss == 'an animal; "the dog barked"'
    assert dog.pointers == [("+", "v00000001"), ("@", "n00000001")]
    assert synsets["n00000004"].lemmas == list("abcdefghij")  # the count of words is hexadecimal
    assert synsets["a00000001"].lemmas == ["wild"]  # without its syntactic marker
    assert synsets["a00000001"].pointers == [("&", "a00000002")]  # a satellite's id; the lexical pointer is the same one


@pytest.mark.parametrize(
    ("line", "where"),
    [
        ("00000005 03 n 01 x 0 001 @ | cut", "data.noun:8"),
        ("garbage", "data.noun:8"),
        ("00000005 03 n zz x 0 000 | y", "data.noun:8"),
    ],
)
def test_bad_database_line(dictionary: Path, line: str, where: str) -> None:
    with open(dictionary / "data.noun", "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=f"{where}: not a synset line"):
        list(parse(dictionary))


def test_bad_database_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as leave:
        main(["build", str(tmp_path), "--out", str(tmp_path / "raw")])
    assert str(leave.value).startswith(f"error: {tmp_path / 'data.noun'} cannot be read")
    assert list(tmp_path.iterdir()) == []


def test_build_keeps_everything(dictionary: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    raw = tmp_path / "raw"
    main(["build", str(dictionary), "--out", str(raw)])
    assert capsys.readouterr().out == f"8 synsets in {raw / 'synsets.parquet'}\n"
    assert (raw / "LICENSE").read_text() == "This is the licence.\n\nIts last line.\n"
    stored = pq.read_table(raw / "synsets.parquet").to_pylist()
    again = [(s["id"], s["lemmas"], s["gloss"], [(p["symbol"], p["target"]) for p in s["pointers"]]) for s in stored]
    assert again == [tuple(synset) for synset in sorted(parse(dictionary))]


def source(dictionary: Path, task: str, monkeypatch: pytest.MonkeyPatch, test: set[str]) -> WordNet:
    build(dictionary, dictionary / "raw")
    monkeypatch.setattr(wordnet, "_is_test", lambda id: id in test)
    monkeypatch.setattr(wordnet, "_TOO_COMMON", 0.7)  # of five documents
    return WordNet(dictionary / "raw", task)


def test_near_takes_inherited_hypernyms(dictionary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = source(dictionary, "near", monkeypatch, test={"n00000004"})
    # n1 covers 3 of the 5 documents with hypernyms (dog, Rex, ten lemmas); the verbs' cycle names no synset its own label
    documents = list(task.train())
    labels = list(task.labels())
    assert labels == ["thing", "dog, Canis familiaris", "follow", "chase"]
    assert documents == [
        ("dog, Canis familiaris: an animal", [0]),
        ("Rex: a dog", [0, 1]),
        ("follow: go after", [3]),
        ("chase: go after fast", [2]),
    ]
    assert list(task.test()) == [("a, b, c, d, e, f, g, h, i, j: ten lemmas", [0, 1])]


def test_near_leaves_out_hypernyms_that_cover_too_much(dictionary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(dictionary, dictionary / "raw")
    monkeypatch.setattr(wordnet, "_TOO_COMMON", 0.5)  # thing, with 3 of 5, is too common; dog is then left without labels
    monkeypatch.setattr(wordnet, "_is_test", lambda id: id == "n00000004")
    task = WordNet(dictionary / "raw", "near")
    assert [text for text, _ in task.train()] == ["Rex: a dog", "follow: go after", "chase: go after fast"]
    assert list(task.labels()) == ["dog, Canis familiaris", "follow", "chase"]


def test_relations_follow_every_pointer(dictionary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    task = source(dictionary, "relations", monkeypatch, test={"a00000001", "n00000003"})
    labels = list(task.labels())
    found = {text.split(":")[0].split(",")[0]: [labels[id] for id in ids] for text, ids in task.train()}
    assert found == {
        "feral": ["wild"],
        "dog": ["thing", "follow"],
        "a": ["dog, Canis familiaris"],
        "follow": ["dog, Canis familiaris", "chase"],
        "chase": ["follow"],
    }
    # wild's only label, feral, is in no training document: the document stays, without labels
    assert list(task.test()) == [("wild: not tame", []), ("Rex: a dog", [labels.index("dog, Canis familiaris")])]
    assert task.facts.counts == {"test_labels_unseen": 1}


@pytest.mark.parametrize(
    ("gloss", "wanted"),
    [
        ('an animal; "the dog barked"; "two dogs"', "an animal"),
        ("an animal", "an animal"),
        ('a phrase (as in "make strides"); "they made strides"', 'a phrase (as in "make strides")'),
        ('to begin, "As the thunder started"', "to begin"),
        ('in a state; e.g., "keep clean"', 'in a state; e.g., "keep clean"'),
    ],
)
def test_definition(gloss: str, wanted: str) -> None:
    assert definition(gloss) == wanted


def test_split_is_a_hash_of_the_id() -> None:
    ids = [f"n{number:08d}" for number in range(5000)]
    for id in ids[:50]:
        assert wordnet._is_test(id) == (int(hashlib.sha256(id.encode()).hexdigest()[:16], 16) % 5 == 0)
    assert sum(map(wordnet._is_test, ids)) == pytest.approx(1000, abs=100)


@pytest.mark.parametrize(
    ("task", "train", "test", "labels", "once", "mean"),
    [("near", 72_912, 18_073, 18_944, 6_677, 3.0068), ("relations", 93_457, 23_193, 103_538, 45_943, 3.0841)],
)
def test_bundled_tasks(task: str, train: int, test: int, labels: int, once: int, mean: float, tmp_path: Path) -> None:
    config = Config()
    config.corpus.task = task
    facts = build_corpus(config, BUNDLED, tmp_path / "corpus")
    assert (facts["train_documents"], facts["test_documents"], facts["labels"], facts["labels_seen_once"]) == (
        train,
        test,
        labels,
        once,
    )
    assert facts["labels_per_document"] == mean
    names = pq.read_table(tmp_path / "corpus" / "labels.parquet")
    assert names["frequency"].to_numpy().min() >= 1
    texts = names["text"].to_pylist()
    assert "dog, domestic dog, Canis familiaris" in texts
    documents = {}
    for part in ("train", "test"):
        table = pq.read_table(tmp_path / "corpus" / f"{part}.parquet")
        documents.update(zip(table["text"].to_pylist(), table["labels"].to_pylist(), strict=True))
    corgi = next(text for text in documents if text.startswith("corgi, Welsh corgi: "))
    found = {texts[label] for label in documents[corgi]}
    assert {"near": "dog, domestic dog, Canis familiaris", "relations": "Cardigan, Cardigan Welsh corgi"}[task] in found


def test_missing_and_damaged_parquet(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"synsets\.parquet is missing; it belongs to the repository"):
        build_corpus(Config(), tmp_path, tmp_path / "corpus")
    (tmp_path / "synsets.parquet").write_bytes((BUNDLED / "synsets.parquet").read_bytes()[:1_000_000])
    with pytest.raises(InputError, match=r"synsets\.parquet is broken .*fetch it again"):
        build_corpus(Config(), tmp_path, tmp_path / "corpus")
    assert not (tmp_path / "corpus").exists()

"""Token files: what is written, what is read back, and what is refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import CanineTokenizer

from fanin.data.tokens import TokenSet, tokenize_corpus, vocabulary_size, write_tokens
from fanin.files import InputError, read_json, write_json
from tiny import tiny_labels, tiny_texts, tiny_token_set, tiny_tokenizer


def table(texts: list[str], labels: list[list[int]]) -> pa.Table:
    return pa.table({"text": pa.array(texts, pa.string()), "labels": pa.array(labels, pa.list_(pa.int32()))})


def write_corpus(folder: Path, train: int = 150, test: int = 40, labels: int = 20) -> Path:
    folder.mkdir()
    for part, documents, seed in (("train", train, 0), ("test", test, 1)):
        data = table(tiny_texts(documents, seed), tiny_labels(documents, labels, seed))
        pq.write_table(data, folder / f"{part}.parquet", row_group_size=33)
    names = pa.table({"id": np.arange(labels, dtype=np.int32), "text": tiny_texts(labels, 2)})
    pq.write_table(names, folder / "labels.parquet")
    write_json(folder / "corpus.json", {"labels": labels, "label_documents": 7})
    return folder


def test_round_trip_matches_the_tokenizer_row_by_row(tmp_path: Path) -> None:
    tokens = tiny_token_set(tmp_path / "t.arrow", documents=200, rows_a_batch=64)
    tokenizer = tiny_tokenizer()
    rows = np.array([199, 0, 64, 63, 128, 64])  # any order, across record batches, repeated
    expected = tokenizer(tiny_texts(200))["input_ids"]
    assert [row.tolist() for row in tokens.ids(rows)] == [expected[row] for row in rows]
    labels = tiny_labels(200, 30)
    assert [row.tolist() for row in tokens.labels(rows)] == [labels[row] for row in rows]
    assert len(tokens) == 200
    assert tokens.lengths.dtype == np.int32
    assert tokens.lengths.tolist() == [len(row) for row in expected]
    assert {row.dtype for row in tokens.ids(rows)} == {np.dtype(np.uint16)}


@pytest.mark.parametrize(("max_length", "warned"), [(6, True), (512, False)])
def test_many_documents_cut_are_told(max_length: int, warned: bool, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    summary = tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=max_length, encoder="tiny")
    said = f"tokens.max_length: {summary['truncated']:.0%} of the documents are longer than {max_length} tokens"
    assert (said in capfd.readouterr().err) == warned == (summary["truncated"] > 0.2)


@pytest.mark.parametrize("chunk", [1, 100, 65536])
def test_label_pairs_come_in_document_order(tmp_path: Path, chunk: int) -> None:
    tokens = tiny_token_set(tmp_path / "t.arrow", documents=200, rows_a_batch=64)
    expected = [(i, label) for i, own in enumerate(tiny_labels(200, 30)) for label in own]
    parts = list(tokens.label_pairs(chunk))
    assert [pair for documents, labels in parts for pair in zip(documents.tolist(), labels.tolist(), strict=True)] == expected
    assert len(parts) == (1 if chunk > 200 else 4)
    assert parts[0][0].dtype == np.int64
    assert parts[0][1].dtype == np.int32


def test_record_batches_are_of_one_size_whatever_comes_in(tmp_path: Path) -> None:
    data = table(tiny_texts(100), tiny_labels(100, 9))
    ragged = [data.slice(0, 5), data.slice(5, 0), data.slice(5, 60), data.slice(65, 1), data.slice(66)]
    batches = [batch for part in ragged for batch in part.to_batches()]
    written = write_tokens(batches, tmp_path / "t.arrow", tiny_tokenizer(), max_length=32, rows_a_batch=16)
    with pa.memory_map(str(tmp_path / "t.arrow")) as source:
        reader = pa.ipc.open_file(source)
        assert [reader.get_batch(i).num_rows for i in range(reader.num_record_batches)] == [16] * 6 + [4]
    assert written.documents == 100
    assert TokenSet.open(tmp_path / "t.arrow").lengths.sum() == written.tokens


def test_long_documents_are_cut_and_counted(tmp_path: Path) -> None:
    texts = ["ban " * 10, "ban ban", "ban " * 6]
    written = write_tokens(table(texts, [[0]] * 3).to_batches(), tmp_path / "t.arrow", tiny_tokenizer(), max_length=8)
    tokens = TokenSet.open(tmp_path / "t.arrow")
    assert tokens.lengths.tolist() == [8, 4, 8]  # the third fits exactly
    assert written.truncated == 1
    assert [row[-1] for row in tokens.ids(np.arange(3))] == [3, 3, 3]  # [SEP] stays at the end


def test_a_large_vocabulary_is_stored_wider_and_a_slow_tokenizer_works(tmp_path: Path) -> None:
    tokenizer = CanineTokenizer()  # pure Python, ids up to 1,114,111
    assert not tokenizer.is_fast
    data = table(["ab\U0001f600", "long text"], [[0], [1]])
    written = write_tokens(data.to_batches(), tmp_path / "t.arrow", tokenizer, max_length=6)
    tokens = TokenSet.open(tmp_path / "t.arrow")
    first, second = tokens.ids(np.arange(2))
    assert first.dtype == np.int32
    assert first.tolist() == tokenizer("ab\U0001f600")["input_ids"]
    assert first.max() > 2**16
    assert len(second) == 6
    assert written.truncated == 1


def test_corpus_to_tokens(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    summary = tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=12, encoder="tiny")
    assert summary == read_json(tmp_path / "tokens" / "tokens.json")
    train, test = (TokenSet.open(tmp_path / "tokens" / f"{part}.arrow") for part in ("train", "test"))
    lengths = np.concatenate([train.lengths, test.lengths])
    full = [len(row) for seed, n in ((0, 150), (1, 40)) for row in tiny_tokenizer()(tiny_texts(n, seed))["input_ids"]]
    assert summary["documents"] == {"train": 150, "test": 40}
    assert summary["mean_length"] == pytest.approx(lengths.mean())
    assert summary["truncated"] == pytest.approx(np.mean(np.array(full) > 12))
    assert summary["vocabulary"] == vocabulary_size(tiny_tokenizer()) == 205
    assert (summary["labels"], summary["label_documents"], summary["pad_id"], summary["max_length"]) == (20, 7, 0, 12)
    names = TokenSet.open(tmp_path / "tokens" / "labels.arrow")
    expected = tiny_tokenizer()(tiny_texts(20, 2), truncation=True, max_length=12)["input_ids"]
    assert [row.tolist() for row in names.ids(np.arange(20))] == expected
    assert [len(row) for row in names.labels(np.arange(20))] == [0] * 20


def test_a_failing_stage_leaves_the_old_tokens(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=12, encoder="tiny")
    before = (tmp_path / "tokens" / "train.arrow").read_bytes()
    whole = (corpus / "test.parquet").read_bytes()
    (corpus / "test.parquet").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"test\.parquet cannot be read"):
        tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=8, encoder="tiny")
    assert (tmp_path / "tokens" / "train.arrow").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["corpus", "tokens"]


def test_a_corpus_that_is_missing_or_lacks_a_column_is_named(tmp_path: Path) -> None:
    corpus = write_corpus(tmp_path / "corpus")
    pq.write_table(pa.table({"text": ["a"]}), corpus / "train.parquet")
    with pytest.raises(InputError, match=r"train\.parquet has no column labels"):
        tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=12, encoder="tiny")
    (corpus / "train.parquet").unlink()
    with pytest.raises(InputError, match=r"train\.parquet is missing; run the corpus stage"):
        tokenize_corpus(corpus, tmp_path / "tokens", tiny_tokenizer(), max_length=12, encoder="tiny")
    assert not (tmp_path / "tokens").exists()


def test_files_that_are_no_token_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.arrow"
    with pytest.raises(InputError, match=r"t\.arrow is missing; run the tokens stage"):
        TokenSet.open(path)
    tiny_token_set(path)
    whole = path.read_bytes()
    for damaged in (whole[:-9], whole[: len(whole) // 2], b"", b"not arrow at all"):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="truncated or not an Arrow file"):
            TokenSet.open(path)
    foreign = table(["a"], [[0]])
    with pa.ipc.new_file(str(path), foreign.schema) as writer:
        writer.write_table(foreign)
    with pytest.raises(InputError, match="expected columns ids"):
        TokenSet.open(path)


def test_record_batches_of_mixed_sizes_are_refused(tmp_path: Path) -> None:
    tiny_token_set(tmp_path / "t.arrow", documents=30, rows_a_batch=10)
    with pa.memory_map(str(tmp_path / "t.arrow")) as source:
        whole = pa.ipc.open_file(source).read_all()
        with pa.ipc.new_file(str(tmp_path / "u.arrow"), whole.schema) as writer:
            for first, last in ((0, 10), (10, 13), (13, 30)):
                writer.write_table(whole.slice(first, last - first).combine_chunks())
    with pytest.raises(InputError, match="record batches differ in size"):
        TokenSet.open(tmp_path / "u.arrow")


@pytest.mark.parametrize("row", [-1, 200])
def test_a_row_out_of_range_is_refused(tmp_path: Path, row: int) -> None:
    tokens = tiny_token_set(tmp_path / "t.arrow", documents=200)
    for take in (tokens.ids, tokens.labels):
        with pytest.raises(InputError, match=rf"row {row} is outside 0\.\.199"):
            take(np.array([3, row]))
    assert tokens.ids(np.empty(0, np.int64)) == []

"""Tokenise data/corpus/ into data/tokens/."""

from __future__ import annotations

from fanin.config import Config
from fanin.data.tokens import tokenize_corpus
from fanin.encoder import load_tokenizer
from fanin.stage import run_stage
from fanin.tracking import Run


def main(config: Config, run: Run) -> None:
    name, max_length = config.encoder.name, config.tokens.max_length
    tokenizer = load_tokenizer(name, max_length)
    summary = tokenize_corpus("data/corpus", "data/tokens", tokenizer, max_length=max_length, encoder=name)
    run.params({"encoder": name, "max_length": max_length, "vocabulary": summary["vocabulary"]})
    run.metrics({key: summary[key] for key in ("mean_length", "truncated")})


if __name__ == "__main__":
    run_stage("tokens", main)

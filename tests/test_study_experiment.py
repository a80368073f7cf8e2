"""A trained method's run as a DVC experiment, in a repository whose one stage writes what the pipeline's stages would."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fanin.files import InputError
from study import experiment
from study.corpora import Corpus
from study.methods import Method
from study.records import DATA, FIGURES

ROOT = Path(__file__).resolve().parents[1]
METHOD = Method("tiny_sparse", "a small one", "trained", settings={"head.fan_in": 9, "start.source": "data"})
CORPUS = Corpus("near", "WordNet near", {"preset": "wordnet"}, ("data/raw/extra",))
STAGE = """
import json, sys, yaml
from pathlib import Path
params = yaml.safe_load(open("params.yaml"))
if params["head"]["fan_in"] == 13:
    sys.exit("unlucky")
Path("count").open("a").write("x")
figures = dict.fromkeys(%(figures)r, 1.5) | {"P@1": params["head"]["fan_in"] + params["seed"] / 10}
split = {"labels": 1, "P@5": 0.5, "PSP@5": 0.5, "recall@5": 2.0}
splits = dict.fromkeys(("head", "torso", "tail"), split)
bytes_ = {"weights": 2**20, "indices": 2**19, "bias": 2**18, "optimizer": 7}
training = {"head_bytes": bytes_, "intermediate_bytes": 2**20, "labels": 1000, "dense_fp32_bytes": 4 * 1000 * 384}
training |= {"lexical_bytes": 0, "seconds": 12.5, "peak_rss_mib": 800.0, "documents": 640, "steps": 10}
training |= {"calibration": {"slope": 0.9, "kept": 1.0}}
evaluation = {"metrics": figures, "intervals": {"P@1": [0, 2]}, "splits": splits, "ranking_seconds": 3.0, "documents": 50}
def write(path, value):
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(value if isinstance(value, str) else json.dumps(value))
write("reports/train.json", training)
write("reports/evaluation.json", evaluation)
for stage in ("embeddings", "clusters", "start"):
    write(f"reports/stages/{stage}.json", {"seconds": 2.0})
write("reports/validation_curve.csv", "step,P@1,P@3,P@5\\n5,10,8,6\\n10,20.12345,9,7\\n")
write("data/corpus/corpus.json", dict.fromkeys(%(data)r, 3))
write("models/head.txt", Path("data/raw/extra/big.txt").read_text())
"""
OUTS = [
    "models",
    "data/corpus",
    "reports/train.json",
    "reports/evaluation.json",
    "reports/validation_curve.csv",
    "reports/stages",
]


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git and DVC repository with the project's params and presets, and a raw file that git ignores."""
    monkeypatch.chdir(tmp_path)
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "tester")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "tester@localhost")
    monkeypatch.setenv("FANIN_TRACKING", "off")
    monkeypatch.setenv("DVC_NO_ANALYTICS", "1")
    monkeypatch.setenv("PYTHONPATH", f"{ROOT / 'src'}{os.pathsep}{ROOT}")
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    (tmp_path / "stage.py").write_text(STAGE % {"figures": list(FIGURES), "data": list(DATA)})
    outs = "".join(f"      - {out}\n" for out in OUTS)
    (tmp_path / "dvc.yaml").write_text(
        f"stages:\n  evaluate:\n    cmd: python stage.py\n    deps: [stage.py]\n    params: [seed, head]\n    outs:\n{outs}"
    )
    (tmp_path / ".gitignore").write_text("/data/raw/extra/*\n!/data/raw/extra/README.md\n/.study/\n")
    (tmp_path / "data/raw/extra").mkdir(parents=True)
    (tmp_path / "data/raw/extra/big.txt").write_text("raw data" * 2**17)  # 1 MiB
    (tmp_path / "data/raw/extra/README.md").write_text("what goes here")  # in git, so the folder is in every copy
    for words in (["git", "init", "-q"], [sys.executable, "-m", "dvc", "init", "-q"], ["git", "add", "-A"]):
        subprocess.run(words, check=True, timeout=60)
    subprocess.run(["git", "commit", "-qm", "start"], check=True, timeout=60)
    return tmp_path


@pytest.mark.slow
def test_an_experiment_becomes_a_record_once(repository: Path) -> None:
    record = experiment.run(METHOD, CORPUS, 2, "abcdef0123", {"train.max_steps": 10})
    assert record["P@1"] == 9.2  # the settings reached the stage, and so did the seed
    assert record["experiment"] == "study-near-tiny-sparse-s2-abcdef01"
    assert record["settings"] == {
        "preset": "wordnet",
        "head.fan_in": 9,
        "start.source": "data",
        "train.max_steps": 10,
        "seed": 2,
    }
    assert (record["head_mib"], record["shared_mib"]) == (1.75, 1.0)
    assert record["dense_mib"] == pytest.approx(1000 * 385 * 4 / 2**20, abs=1e-4)
    assert (record["train_seconds"], record["prepare_seconds"], record["peak_mib"]) == (12.5, 6.0, 800.0)
    assert record["calibration"]["kept"] == 1
    assert record["curve"][-1] == {"step": 10, "P@1": 20.123, "P@3": 9, "P@5": 7}
    assert record["model_mib"] == 1.0
    assert record["data"] == dict.fromkeys(DATA, 3)
    assert not (repository / "models").exists()  # it ran in a copy
    before = experiment.find(record["experiment"])
    assert before is not None
    again = experiment.run(METHOD, CORPUS, 2, "abcdef0123", {"train.max_steps": 10})  # killed before the record was taken
    assert again["wall_seconds"] < record["wall_seconds"]
    assert experiment.find(record["experiment"]) == before
    experiment.fetch(before, "models", repository / "fetched")
    assert (repository / "fetched/head.txt").read_text() == "raw data" * 2**17
    shutil.rmtree(repository / ".dvc/cache")
    with pytest.raises(InputError, match=r"models of experiment .* is no longer in DVC's cache"):
        experiment.fetch(before, "models", repository / "again")
    with pytest.raises(InputError, match=r"seed 1: dvc ended with exit code \d+; the whole of it is in (?s:.*)unlucky"):
        experiment.run(METHOD, CORPUS, 1, "ffff", {"head.fan_in": 13})


def test_the_command_carries_settings_tags_and_ignored_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Corpus, "ignored_files", lambda self: ["data/raw/extra/big.txt"])
    words = experiment._command("name", CORPUS, {"head.fan_in": 8, "auxiliary.enabled": False, "train.max_steps": None})
    text = " ".join(words)
    assert "-S head.fan_in=8 -S auxiliary.enabled=false -S train.max_steps=null" in text
    assert "--copy-paths data/raw/extra/big.txt" in text
    assert words[-1] == "evaluate"
    environment = experiment._environment(METHOD, CORPUS, 3)
    tags = json.loads(environment["FANIN_RUN_TAGS"])
    assert (tags["fanin.study"], tags["fanin.study.method"], tags["fanin.study.seed"]) == ("near", "tiny_sparse", "3")
    assert environment["FANIN_RUN_NAME"] == "near tiny_sparse seed3"

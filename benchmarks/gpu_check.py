"""What a GPU machine can tell in one call of under ten minutes: the tests marked gpu, the layer's benchmark, memory records.

Needs torch, triton, numpy, safetensors and pytest (with pytest-xdist it is faster); neither mlflow nor dvc. The memory records
(Amazon-3M's shape, sparse and dense, and 1,000,000,000 labels) and the test of the exchange of features also need transformers,
omegaconf and psutil; where those are missing they are left out, and named. Wheels unpacked into a folder that PYTHONPATH names
will do. Records and what was printed go to the folder named in $OUT, else to benchmarks/results/.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TESTS = ["tests/test_gpu.py", "tests/test_linear.py", "tests/test_linear_rewire.py"]
MEMORY = ["sparse-3m-frugal", "sparse-3m", "dense-3m", "sparse-1b"]
SECONDS = 570  # of the ten minutes


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; gpu-check is for a GPU machine", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", ROOT / "benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    paths = [str(ROOT / "src"), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in paths if p), "PYTHONUNBUFFERED": "1"}
    end = time.monotonic() + SECONDS
    lacking = [name for name in ("transformers", "omegaconf", "psutil") if importlib.util.find_spec(name) is None]
    tests = TESTS if lacking else [*TESTS, "tests/test_exchange.py"]
    pytest = ["-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu and not slow", *tests]
    workers = min((os.cpu_count() or 1) // 2, 10)  # most of their time goes into compiling kernels
    if importlib.util.find_spec("xdist") and workers > 1:
        pytest += ["-n", str(workers)]
    threads = {"OMP_NUM_THREADS": "2"}
    code = run(pytest, out / "gpu_tests.txt", environment | threads, min(240, end - time.monotonic()))
    # the goals first: should the time run out, what is there has been kept
    layer = ["benchmarks/classifier_step.py", "--out", str(out), "--only"]
    work = {f"classifier_step_{only}": [*layer, only] for only in ("step", "topk", "rewire", "growth")}
    work["tune"] = ["benchmarks/tune.py", "--shipped", "--out", str(out)]
    if lacking:
        print(f"memory, tests of exchange: left out, for {', '.join(lacking)} cannot be imported here")
    else:
        memory = {"memory": ["benchmarks/memory.py", "--out", str(out), "--only", *MEMORY]}
        work = {"classifier_step_step": work.pop("classifier_step_step"), **memory, **work}
    for name, words in work.items():
        left = end - time.monotonic()
        if left < 30:
            print(f"{name}: left out, the time is up")
            continue
        code = run(words, out / f"{name}.txt", environment, min(left, 150 if name == "memory" else left)) or code
    return code


def run(words: list[str], log: Path, environment: dict[str, str], seconds: float) -> int:
    """Run Python on `words`, show and keep what it prints; its exit code, 124 where it took too long."""
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen([sys.executable, *words], cwd=ROOT, env=environment, stdout=file, stderr=subprocess.STDOUT)
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = 124
            file.write(f"\nstopped after {seconds:.0f} s\n")
    print(f"--- {log.name}: exit {code}", log.read_text(encoding="utf-8", errors="replace")[-4000:], sep="\n", flush=True)
    return code


if __name__ == "__main__":
    sys.exit(main())

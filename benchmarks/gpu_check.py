"""What a GPU machine can tell, in one call: the tests marked gpu, then the head's benchmark. Needs torch, numpy, safetensors,
and pytest for the tests.

Records and the tests' output go to the folder named in $OUT, else to benchmarks/results/.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    import torch

    if not torch.cuda.is_available():
        print("error: torch sees no CUDA device here; gpu-check is for a GPU machine", file=sys.stderr)
        return 1
    out = Path(os.environ.get("OUT", ROOT / "benchmarks/results"))
    out.mkdir(parents=True, exist_ok=True)
    environment = os.environ | {"PYTHONPATH": f"{ROOT / 'src'}:{os.environ.get('PYTHONPATH', '')}"}
    tests = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-m", "gpu", "tests/test_gpu.py"]
    done = subprocess.run(tests, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    (out / "gpu_tests.txt").write_text(done.stdout + done.stderr)
    print(done.stdout[-3000:] + done.stderr[-3000:])
    code = done.returncode
    for shape in (("131072", "768", "128"), ("670091", "768", "128")):
        words = [
            "benchmarks/head_step.py",
            "--labels",
            shape[0],
            "--features",
            shape[1],
            "--batch",
            shape[2],
            "--out",
            str(out),
        ]
        code = subprocess.run([sys.executable, *words], cwd=ROOT, env=environment, check=False).returncode or code
    return code


if __name__ == "__main__":
    sys.exit(main())

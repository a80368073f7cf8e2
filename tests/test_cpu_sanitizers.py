"""The cpu backend's tests once more, on kernels compiled with the address and undefined-behaviour sanitizers.

`make test-slow` runs it. That threads do not race is tested by equal bits on one and two of them (test_kernels.py): the
thread sanitizer does not know OpenMP's barriers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fanin.kernels import Unavailable
from fanin.kernels.cpu import build

PROGRAM = """
import sys, pytest
from fanin.kernels.cpu import build
build.FLAGS = (*build.FLAGS, "-O2", "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-g")
sys.exit(pytest.main(["-q", "-x", "--capture=sys", "-p", "no:cacheprovider", sys.argv[1], "-k", "cpu"]))
"""


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_cpu_kernels_pass_their_tests_under_sanitizers(tmp_path):
    try:
        compiler = build.compiler()
    except Unavailable as error:
        pytest.skip(str(error))
    runtimes = [
        Path(subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip())
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(path.is_absolute() for path in runtimes):
        pytest.skip(f"{compiler} comes without the address sanitizer's library")
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(Path(__file__).with_name("test_kernels.py"))],
        env=os.environ
        | {
            "FANIN_CACHE": str(tmp_path),
            "LD_PRELOAD": " ".join(map(str, runtimes)),  # Python itself is not compiled with it
            "ASAN_OPTIONS": "detect_leaks=0",  # the interpreter's own
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"
    assert list(tmp_path.glob("fixed_fan_in-*.so")), "no kernel was compiled"
    assert "[100%]" in done.stdout

"""The Triton kernels compiled ahead of time for GPUs that are not here, against the table in the repository."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import re

import pytest

pytest.importorskip("triton", reason="Triton is not installed")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("what the interpreter is given cannot be compiled", allow_module_level=True)

from fanin.kernels.triton import aot, configs

GROUPS = (2, 3, 8, 16, 32, 64, 128, 200)
FAN_INS = (1, 3, 8, 17, 32, 60, 64, 100, 128, 256, 512)
BATCHES = (1, 5, 16, 17, 64, 130, 512)


@pytest.mark.timeout(900)
def test_every_kernel_fits_its_gpu_as_the_table_says():
    """One test: processes that share the tests would each compile all kernels, which takes minutes."""
    rows = aot.compile_all()
    assert len({(row["kernel"], row["capability"]) for row in rows}) == len(rows) > 400
    assert aot.faults(rows) == []
    assert aot.differences(rows, json.loads(aot.TABLE.read_text())) == [], (
        "python -m fanin.kernels.triton.aot --write renews it"
    )
    steps = [row for row in rows if row["kernel"].startswith(("grouped_step", "grouped_backward update", "spread"))]
    for capability, instruction in aot.TENSOR_CORES.items():
        own = [row for row in steps if row["capability"] == capability and "float32" not in row["kernel"]]
        large = [row for row in own if "G=64 K=128 B=128" in row["kernel"] or "G=1 K=128 B=128" in row["kernel"]]
        assert len(large) >= 5
        assert all(instruction in row["tensor_cores"] for row in large)


def test_every_configuration_is_compiled():
    """Blocks, warps and registers that some shape would choose, but that no kernel was compiled with, would ship unproved."""
    compiled = set()
    for launch in aot.shipped():
        constants, options, types = dict(launch.constants), dict(launch.options), dict(launch.signature)
        if launch.kernel in ("single", "grouped", "grouped_step"):
            wide, registers = types["xt"] == "*fp32", options.get("maxnreg")
            blocks = (constants.get("BLOCK_M"), constants["BLOCK_K"], constants["BLOCK_B"])
            compiled.add((launch.capability, wide, *blocks, options["num_warps"], registers))
    for capability, fan_in, batch, wide in itertools.product(aot.CAPABILITIES, FAN_INS, BATCHES, (False, True)):
        config = configs.single(fan_in, batch)
        assert (capability, wide, None, config.block_k, config.block_b, config.warps, None) in compiled, config
        for group in GROUPS:
            shape = dataclasses.astuple(configs.grouped(fan_in, group, batch, wide, capability))
            assert (capability, wide, *shape) in compiled, shape


def test_a_spread_tile_is_whole_before_it_is_read():
    """Threads write a tile in global memory that others read: zeros, a barrier, entries, a barrier, and only then loads."""
    launches = (launch for launch in aot.shipped() if launch.kernel == "spread" and "bfloat16 G=1 K=32 B=128" in launch.case)
    for launch in launches:
        pattern = r"(st\.global\.v4|st\.global\.b16|ld\.global\.v4|bar\.sync|wgmma\.mma_async|mma\.sync)"
        steps = re.findall(pattern, aot.assembled(launch).asm["ptx"])
        zeros = steps.index("st.global.v4")
        entries = [i for i, step in enumerate(steps) if step == "st.global.b16"]
        product = next(i for i, step in enumerate(steps) if step in ("wgmma.mma_async", "mma.sync"))
        assert zeros < entries[0] < entries[-1] < product
        assert "bar.sync" in steps[zeros : entries[0]]
        assert "bar.sync" in steps[entries[-1] : steps.index("ld.global.v4", entries[-1])]
        assert "bar.sync" in steps[product:]  # before the next tile's zeros


def test_faults_and_differences_are_told():
    good = {"kernel": "grouped STEP", "capability": 90, "registers": 9, "spilled": 0, "shared": 9, "tensor_cores": ["mma.sync"]}
    assert aot.faults([good]) == []
    bad = [{**good, "spilled": aot.SPILL_LIMIT + 8}, {**good, "shared": 300_000}, {**good, "tensor_cores": []}]
    assert len(aot.faults(bad)) == 3
    table = {"triton": aot.triton.__version__, "rows": [good, {**good, "kernel": "gone"}]}
    words = aot.differences([{**good, "registers": 10}, {**good, "kernel": "new"}], table)
    assert len(words) == 3
    assert aot.differences(bad, {**table, "triton": "0.0"}) == []

"""The cpu backend's library: compiled once, again where a source changed, a clear reason where it cannot be had."""

from __future__ import annotations

import platform
import shutil

import pytest
import torch

from fanin.kernels import Unavailable, backend
from layer_cases import FP32, SHAPES, case, check_rest, check_step


@pytest.fixture
def build(monkeypatch, tmp_path):
    from fanin.kernels.cpu import build

    try:
        build.compiler()
    except Unavailable as reason:
        pytest.skip(str(reason))
    monkeypatch.setenv("FANIN_CACHE", str(tmp_path / "cache"))
    build.library.cache_clear()
    yield build
    build.library.cache_clear()


def test_is_built_once(build, monkeypatch):
    build.library()
    (first,) = build.cache_folder().iterdir()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    build.library.cache_clear()
    build.library()
    assert [first] == list(build.cache_folder().iterdir())


def test_a_changed_header_is_compiled_anew(build, monkeypatch, tmp_path):
    sources, targets = tmp_path / "sources", []
    shutil.copytree(build.SOURCE.parent, sources)
    monkeypatch.setattr(build, "SOURCE", sources / build.SOURCE.name)
    monkeypatch.setattr(build, "_build", lambda command, target: targets.append(target))
    for _ in range(2):
        with pytest.raises(Unavailable, match="cannot be loaded"):
            build.library()
        with open(sources / "vectors.h", "a") as header:
            header.write("// changed\n")
    assert targets[0] != targets[1]


def test_no_compiler(build, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(Unavailable, match=r"needs a C\+\+ compiler: none of \$CXX"):
        build.library()


def test_a_compiler_that_fails(build, monkeypatch, tmp_path):
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho internal compiler error >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    with pytest.raises(Unavailable, match=r"could not compile fixed_fan_in.cpp: internal compiler error"):
        build.library()
    assert list(build.cache_folder().iterdir()) == []


def test_a_damaged_library_is_named(build, monkeypatch):
    monkeypatch.setattr(build, "_build", lambda command, target: target.write_bytes(b"not a library"))
    with pytest.raises(Unavailable, match=r"cannot be loaded .* remove it to build it again"):
        build.library()


@pytest.mark.parametrize("instructions", ["avx2 fma", "sse2"])
def test_narrower_vectors_than_this_processor_has(build, monkeypatch, instructions):
    from fanin.kernels.cpu import Cpu

    names = instructions.split()
    if platform.machine() != "x86_64" or not set(names) <= set(build._instructions().split()):
        pytest.skip(f"needs an x86-64 processor with {instructions}")
    flags = [flag for flag in build.FLAGS if flag != "-march=native"] + [f"-m{name}" for name in names]
    monkeypatch.setattr(build, "FLAGS", flags)
    narrow = Cpu()
    for shape in SHAPES:
        check_step(narrow, "cpu", shape)
        check_step(narrow, "cpu", shape, "squared_hinge")
        check_rest(narrow, "cpu", shape)
        layer, x, labels, documents = case(*shape, momentum=FP32)
        z = narrow.logits(x, layer)
        assert torch.equal(narrow.topk(x, layer, 1)[0], z.topk(1, dim=1).values)
        found = narrow.candidates(x, layer, labels, documents, 1)
        assert torch.equal(found, backend("reference").candidates(x, layer, labels, documents, 1))

"""dvc.yaml says truly what each stage uses."""

from __future__ import annotations

import ast
import dataclasses
from pathlib import Path

import pytest
import yaml

from fanin.config import Config
from fanin.files import SOURCES

ROOT = Path(__file__).parents[1]
STAGES = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
# Both only watch a stage: what they change shows in MLflow, never in a stage's outs.
WATCHERS = ("src/fanin/stage.py", "src/fanin/tracking/")


def imports(path: Path) -> set[str]:
    """The project's files that this one imports, as paths from the root."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            if name.split(".")[0] != "fanin":
                continue
            base = ROOT / "src" / Path(*name.split("."))
            for file in (base.with_suffix(".py"), base / "__init__.py"):
                if file.exists() and file.read_text().strip():
                    found.add(file.relative_to(ROOT).as_posix())
    return found


def closure(script: str) -> set[str]:
    """All files of src/fanin that a stage's result can depend on."""
    seen: set[str] = set()
    waiting = imports(ROOT / script)
    while waiting:
        file = waiting.pop()
        if file in seen or file.startswith(WATCHERS):
            continue
        seen.add(file)
        beside = (ROOT / file).parent.iterdir()  # C++ is compiled when imported
        seen |= {path.relative_to(ROOT).as_posix() for path in beside if path.suffix in (".cpp", ".h")}
        waiting |= imports(ROOT / file)
    return seen - {"src/fanin/__init__.py"}


@pytest.mark.parametrize("name", STAGES)
def test_deps_are_the_files_that_the_stage_uses(name):
    stage = STAGES[name]
    script = f"pipeline/{name}.py"
    assert stage["cmd"] == f"python {script}"
    listed = {dep for dep in stage["deps"] if dep.endswith(SOURCES)}
    assert listed == closure(script) | {script}


def keys_of(stage: dict) -> tuple[set[str], set[str]]:
    """The keys tracked in params.yaml and in the preset."""
    own, preset = set(), set()
    for entry in stage.get("params", []):
        if isinstance(entry, str):
            own.add(entry)
        else:
            ((file, keys),) = entry.items()
            assert file == "presets/${preset}.yaml"
            preset |= set(keys)
    return own, preset


@pytest.mark.parametrize("name", STAGES)
def test_params_exist_and_presets_are_tracked_alike(name):
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    own, preset = keys_of(STAGES[name])
    for key in own:
        value = params
        for part in key.split("."):
            assert part in value, f"{key} is not in params.yaml"
            value = value[part]
    for file in (ROOT / "presets").glob("*.yaml"):
        values = yaml.safe_load(file.read_text())
        for key in preset:
            value = values
            for part in key.split("."):
                assert part in value, f"{file.name} lacks {key}, which DVC tracks"
                value = value[part]
    # a key that a preset may decide is tracked in both places
    for key in own:
        section, _, rest = key.partition(".")
        held = params[section] if not rest else {rest: params[section][rest]}
        nulls = [k for k, v in held.items() if v is None] if isinstance(held, dict) else []
        if nulls and section != "tracking":
            assert section in preset or {f"{section}.{k}" for k in nulls} <= preset, f"{name}: {key} may come from the preset"


def test_params_yaml_lists_every_setting():
    params = yaml.safe_load((ROOT / "params.yaml").read_text())
    for field in dataclasses.fields(Config):
        default = getattr(Config(), field.name)
        if dataclasses.is_dataclass(default):
            assert set(params[field.name]) == {f.name for f in dataclasses.fields(default)}
        else:
            assert field.name in params


def test_evaluation_settings_reach_no_training_stage():
    for name in ("corpus", "tokens", "embeddings", "clusters", "start", "train"):
        own, preset = keys_of(STAGES[name])
        assert not any(key.startswith(("evaluate", "memory", "tracking")) for key in own | preset)


def test_scripts_shadow_no_standard_module():
    import sys

    assert not {path.stem for path in (ROOT / "pipeline").glob("*.py")} & sys.stdlib_module_names


def test_the_report_reruns_for_its_template():
    assert "src/fanin/reporting/templates" in STAGES["report"]["deps"]

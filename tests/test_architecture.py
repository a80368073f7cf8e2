"""docs/architecture.md's table of modules against the modules: all of them are there, with what they import."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = ROOT / "src/fanin"


def rows() -> Iterator[tuple[list[Path], set[str]]]:
    """The files that a row of the table names, and what it says that they import."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    table = text.split("## Modules", 1)[1].split("## Interfaces", 1)[0]
    for line in table.splitlines():
        if line.startswith("| `"):
            names, _, imports = (cell.strip() for cell in line.strip("|").split("|"))
            paths = [SOURCE / name for name in re.findall(r"`([^`]+)`", names)]
            yield paths, set() if imports == "-" else set(imports.split(", "))


def files(paths: list[Path]) -> list[Path]:
    assert all(path.exists() for path in paths), paths
    return [file for path in paths for file in (sorted(path.rglob("*.py")) if path.is_dir() else [path])]


def imported(file: Path) -> Iterator[str]:
    """Of fanin: a module by its name, one of a package by the package's; of the file's own package by the module's."""
    own = file.relative_to(SOURCE).parts
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        modules = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "fanin":
            modules = [node.module] if "." in node.module else [f"fanin.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names if alias.name.startswith("fanin.")]
        for module in modules:
            parts = module.split(".")[1:]
            inside = len(own) > 1 and len(parts) > 1 and parts[0] == own[0]
            if (SOURCE / parts[0]).is_dir() or (SOURCE / f"{parts[0]}.py").exists():  # fanin.__version__ is neither
                yield parts[1] if inside else parts[0]


def test_every_module_is_in_the_table_once() -> None:
    named = [file for paths, _ in rows() for file in files(paths)]
    assert len(named) == len(set(named))
    assert {file for file in SOURCE.rglob("*.py") if file.relative_to(SOURCE).parts[-1] != "__init__.py"} == {
        file for file in named if file.name != "__init__.py"
    }


def test_the_table_says_what_a_module_imports() -> None:
    for paths, said in rows():
        own = files(paths)
        inside = {name for file in own for name in (file.stem, file.parent.name)}
        assert {name for file in own for name in imported(file)} - inside == said, [path.name for path in paths]

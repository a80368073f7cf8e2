"""The table of methods, checked: each entry's settings must make a whole, valid configuration before anything runs."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fanin.config import Config, load_config
from fanin.files import InputError

TABLE = Path(__file__).with_name("methods.yaml")
TIERS = ("main", "ablation")
ROLES = ("", "dense", "floor")
COMPRESSIONS = {"prune": "K", "quantise": "bits"}
RIVALS = {  # of study/rivals/run.py: what a reader of the table sees
    "parabel": "Parabel (omikuji)",
    "bonsai": "Bonsai (omikuji)",
    "pecos": "PECOS XR-Linear (libpecos)",
    "napkinxc": "napkinXC, probabilistic label tree",
    "tfidf_knn": "TF-IDF, 30 nearest neighbours (scikit-learn)",
}


@dataclass(frozen=True)
class Method:
    """One row of the study. kind: trained, compressed (made from the model of `of`) or rival."""

    name: str
    about: str
    kind: str
    tier: str = "main"
    role: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)  # dotted keys over params.yaml; a compression's own
    of: str = ""
    bytes_of: str = ""
    against: str = ""


def load_methods(path: Path = TABLE) -> dict[str, Method]:
    """The rivals, then the table's methods in its order. Raises InputError naming the entry and what is wrong with it."""
    table: Any = OmegaConf.to_container(OmegaConf.load(path))
    methods = {name: Method(name, about, "rival") for name, about in RIVALS.items()}
    if not isinstance(table, dict):
        raise InputError(f"{path}: expected one entry a method")
    for name, entry in table.items():
        if not isinstance(entry, dict) or "about" not in entry or str(name) in RIVALS:
            raise InputError(f"{path}: {name}: an entry needs `about`, and a name that no rival has")
        methods[str(name)] = _method(str(name), dict(entry), methods, path)
    for method in methods.values():
        for other in filter(None, (method.of, method.bytes_of, method.against)):
            if methods.get(other) is None or methods[other].kind != "trained":
                raise InputError(f"{path}: {method.name}: {other!r} is not a method of this table that is trained")
        if method.against and methods[method.against].role != "dense":
            raise InputError(f"{path}: {method.name}: against: {method.against} has not the role dense")
    return methods


def _method(name: str, entry: dict[str, Any], before: Mapping[str, Method], path: Path) -> Method:
    defaults = {"tier": "main", "role": "", "about": "", "bytes_of": "", "against": ""}
    common = {key: entry.pop(key, default) for key, default in defaults.items()}
    if common["tier"] not in TIERS or common["role"] not in ROLES:
        raise InputError(f"{path}: {name}: tier is one of {', '.join(TIERS)}; role, if any, dense or floor")
    if "compress" in entry:
        compression = entry.pop("compress")
        number = COMPRESSIONS.get(compression)
        if number is None or set(entry) != {"of", number}:
            raise InputError(f"{path}: {name}: compress takes `prune` with K, or `quantise` with bits, and `of`")
        return Method(
            name, kind="compressed", of=entry["of"], settings={"compress": compression, number: entry[number]}, **common
        )
    like = entry.pop("like", None)
    if like is not None and (like not in before or before[like].kind != "trained"):
        raise InputError(f"{path}: {name}: like: {like!r} is not a method further up that is trained")
    if set(entry) != {"settings"} or not isinstance(entry["settings"], dict):
        raise InputError(f"{path}: {name}: unknown keys {sorted(set(entry) - {'settings'})}, or no settings")
    inherited = before[like].settings if like is not None else {}
    return Method(name, kind="trained", settings={**inherited, **entry["settings"]}, **common)


def choose(methods: Mapping[str, Method], names: str) -> list[Method]:
    """The methods that METHODS= names: names, tiers, `rivals` or `all`, between blanks or commas; "" is all.

    Raises InputError for a name that is none of these, with those that are.
    """
    chosen: dict[str, Method] = {}
    for name in names.replace(",", " ").split() or ["all"]:
        if name in methods:
            found = [methods[name]]
        elif name == "rivals":
            found = [method for method in methods.values() if method.kind == "rival"]
        elif name in (*TIERS, "all"):
            found = [m for m in methods.values() if name == "all" or (m.tier == name and m.kind != "rival")]
        else:
            raise InputError(f"METHODS: {name!r} is none of all, rivals, {', '.join(TIERS)}, {', '.join(methods)}")
        chosen |= {method.name: method for method in found}
    return list(chosen.values())


def configuration(settings: Mapping[str, Any], root: Path = Path()) -> Config:
    """params.yaml of `root` with dotted `settings` over it, checked as any params.yaml is. Raises InputError."""
    params = OmegaConf.load(root / "params.yaml")
    for key, value in settings.items():
        OmegaConf.update(params, key, value)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "params.yaml"
        OmegaConf.save(params, path)
        try:
            return load_config(path, root / "presets")
        except InputError as error:
            raise InputError(str(error).replace(str(path), f"settings {dict(settings)} over params.yaml")) from None

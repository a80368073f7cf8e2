"""What a user could do instead of training sparse: train dense, then prune or quantise the head, without training on.

Both work label by label on the trained weights, with the encoder and the bias as they are. Pruning keeps the K largest of
each label (magnitude pruning, Han et al., NeurIPS 2015) and is stored as a fixed fan-in head. Quantisation is round-to-nearest,
symmetric, with one bfloat16 scale for every 64 weights of a label; the scale is the one of a few candidates, each clipping
a little more, that has the least squared error. The quantised weights are ranked with as the numbers that they stand for;
`head_mib` is what they take as stored. A sparse head's weights, and those of its profiles, can be quantised too: a row is
then one block, and its indices stay.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from fanin.config import Config
from fanin.evaluation import evaluate
from fanin.files import InputError, read_json, write_json
from fanin.kernels.layer import index_dtype
from study import experiment
from study.corpora import WORK, Corpus
from study.methods import Method
from study.records import compressed

BLOCK = 64  # weights that share a scale
CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the block's largest weight


def run(method: Method, corpus: Corpus, parent: Mapping[str, Any]) -> dict[str, Any]:
    """Compress the model of the record `parent` (of the method `method.of`, same seed), evaluate it, return the record.

    Raises InputError where the parent's experiment, or its model in DVC's cache, is gone.
    """
    began = time.monotonic()
    revision = experiment.find(parent["experiment"])
    if revision is None:
        raise InputError(f"{method.name}: the experiment {parent['experiment']} is gone; remove its record, and it runs again")
    config = corpus.config(dict(parent["settings"]))
    with tempfile.TemporaryDirectory(dir=WORK) as place:
        root = Path(place)
        for path in ("models", "data/tokens", "data/corpus"):
            experiment.fetch(revision, path, root / path)
        found = evaluated(method, config, root / "models", root / "data/tokens", root / "data/corpus", root / "reports")
    own = {"of": parent["experiment"], "wall_seconds": round(time.monotonic() - began, 1)}
    return compressed(method, parent, **found) | own


def evaluated(method: Method, config: Config, models: Path, tokens: Path, corpus: Path, out: Path) -> dict[str, Any]:
    """Compress the model folder `models` in place and evaluate it into the folder `out`: what `compressed` takes."""
    stored = compress(models, method.settings)
    others = sum(p.stat().st_size for p in models.rglob("*") if p.is_file() and p.name != "head.safetensors")
    evaluate(config, models, tokens, corpus, out)
    return {
        "about": read_json(corpus / "corpus.json"),
        "evaluation": read_json(out / "evaluation.json"),
        "stored": stored,
        "others": others,
        "width": read_json(models / "fanin.json")["width"],
    }


def compress(models: Path, settings: Mapping[str, Any]) -> dict[str, int]:
    """Rewrite the head in a model folder; returns the bytes of weights, indices and bias as they would be stored.

    Raises InputError for a head that is not dense (to prune), or not dense or fixed_fan_in in float32 (to quantise).
    """
    state = load_file(models / "head.safetensors")
    description = read_json(models / "fanin.json")
    weight, kind = state["weight"], description["config"]["head"]["kind"]
    can = ("dense",) if settings["compress"] == "prune" else ("dense", "fixed_fan_in")
    if kind not in can or weight.dtype != torch.float32:
        held = f"a {kind} head in {str(weight.dtype).removeprefix('torch.')}"
        raise InputError(f"{models}: holds {held}; {settings['compress']} takes {' or '.join(can)} in float32")
    if settings["compress"] == "prune":
        state["weight"], state["index"] = prune(weight, settings["K"])
        sparse = {"kind": "fixed_fan_in", "fan_in": settings["K"], "group": 1, "lexical": 0, "profiles": 0}
        description["config"]["head"] |= sparse
        stored = {"weights": _bytes(state["weight"]), "indices": _bytes(state["index"])}
    else:
        bits, stored = settings["bits"], {"weights": 0, "indices": 0}
        for name in ("", "lexical.profiles."):
            if f"{name}weight" in state:
                old = state[f"{name}weight"]
                state[f"{name}weight"] = quantise(old, bits)
                scales = old.shape[0] * -(-old.shape[1] // BLOCK)
                stored["weights"] += -(-old.numel() * bits // 8) + 2 * scales
            if f"{name}index" in state:
                stored["indices"] += _bytes(state[f"{name}index"])
    save_file(state, models / "head.safetensors")
    write_json(models / "fanin.json", description)
    return stored | {"bias": _bytes(state["bias"])}


def prune(weight: Tensor, fan_in: int) -> tuple[Tensor, Tensor]:
    """weight [L, D] -> its `fan_in` largest entries a row [L, K], and their columns [L, K], ascending."""
    index = weight.abs().topk(fan_in, dim=1).indices.sort(dim=1).values
    return weight.gather(1, index).contiguous(), index.to(index_dtype(weight.shape[1]))


def quantise(weight: Tensor, bits: int) -> Tensor:
    """weight [L, D] -> the nearest numbers [L, D] that `bits` a weight and a bfloat16 scale a block can stand for."""
    largest = 2 ** (bits - 1) - 1
    return torch.cat([_quantise(rows, largest) for rows in weight.split(8192)])


def _quantise(weight: Tensor, largest: int) -> Tensor:
    rows, width = weight.shape
    blocks = torch.nn.functional.pad(weight, (0, -width % BLOCK)).unflatten(1, (-1, BLOCK))
    peak = blocks.abs().amax(dim=2, keepdim=True)
    best = error = None
    for clip in CLIPS:
        scale = (clip * peak / largest).to(torch.bfloat16).float().clamp_min(1e-30)
        found = (blocks / scale).round().clamp(-largest, largest) * scale
        wrong = (found - blocks).square().sum(dim=2, keepdim=True)
        if best is None or error is None:
            best, error = found, wrong
        else:
            best, error = torch.where(wrong < error, found, best), torch.minimum(wrong, error)
    assert best is not None
    return best.flatten(1)[:, :width].reshape(rows, width).contiguous()


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

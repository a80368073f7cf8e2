"""params.yaml as typed sections, checked before anything runs.

A setting's value is the one in params.yaml; where that is null, the preset's; where the preset has none, the default
below. So every setting can be changed from the command line (`dvc exp run -S head.fan_in=64`), whatever the preset says.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from fanin.files import InputError

EPOCHS, STEPS = 0.73, 820  # of training where `train.epochs` is null: the larger, or a small corpus would be shown too little


@dataclass
class Corpus:
    format: str = "wordnet"  # wordnet | debian | xc_json | xc_sparse | xc_raw | parquet | synthetic (made, of any size)
    task: str = "near"  # of the bundled WordNet: near | relations
    label_documents: bool = False  # each label's own text as one more training document (LF- data sets)
    labels: int = 100_000  # of a synthetic corpus, as the next three
    documents: int = 100_000  # for training; every label is seen where documents * (labels_per_document - 1) >= labels
    test_documents: int = 2_000
    labels_per_document: int = 5  # mean


@dataclass
class Tokens:
    max_length: int = 64  # tokens a document, special tokens counted


@dataclass
class Encoder:
    name: str = "minilm"  # minilm (bundled) | a Hugging Face id | a folder
    pooling: str = "mean"  # mean | cls | cls_layers (CLS of the last `layers` hidden layers, joined)
    layers: int = 1  # for cls_layers
    dropout: float = 0.0  # on the embedding
    hidden_dropout: float | None = None  # the model's own dropout; null: what its config says
    checkpointing: bool = False  # recompute each layer's activations in the backward pass: less memory, a third more time
    # training documents embedded at most; clusters and start need four of every label, or 30,000, refitting takes all it may
    embed_documents: int = 70_000


@dataclass
class Clusters:
    meta_labels: int = 512  # balanced label clusters that the auxiliary objective predicts


@dataclass
class Start:
    source: str = "data"  # data | random
    rounds: int = 4  # dictionary rounds of the sparse coding
    spread: float = 1.2  # standard deviation of a label's logit over documents (with loss bce)
    label_texts: float = 0.3  # what a label's own text counts beside one of its documents when its words are chosen


@dataclass
class Head:
    kind: str = "fixed_fan_in"  # fixed_fan_in | dense | bottleneck | head_tail (dense rows for frequent labels)
    fan_in: int = 32  # features that a label reads
    lexical: int = 0  # of these, how many are words of the document, behind the encoder's features
    profiles: int = 0  # words of a profile, which each 64th label, the most frequent, has (kind fixed_fan_in, lexical, group 1)
    group: int = 1  # labels that share an index row
    bottleneck: int = 64  # width of the bottleneck head's projection
    dense_share: float = 0.004  # of the labels, the most frequent ones, that have a dense row (kind head_tail)
    intermediate: int = 1536  # width of the layer between encoder and head; 0: none
    activation: str = "linear"  # of that layer: linear | relu
    loss: str = "bce"  # bce | squared_hinge
    dtype: str = "fp32"  # fp32 | bf16 | fp8 (e4m3): what the weights are stored in (bottleneck: fp32)
    rounding: str = "stochastic"  # stochastic | kahan: of updates below fp32
    backend: str = "auto"  # the kernels: auto (the fastest that runs here) | reference | torch | cpu | triton

    @property
    def inner_fan_in(self) -> int:
        """Of `fan_in`, how many are features of the encoder."""
        return self.fan_in - self.lexical

    @property
    def sparse(self) -> bool:
        """Whether labels, or most of them, have a fixed fan-in."""
        return self.kind in ("fixed_fan_in", "head_tail")

    @property
    def ordered(self) -> bool:
        """Whether the head's rows have an order of their own (`label_order`)."""
        return self.group > 1 or self.kind == "head_tail"

    def dense_labels(self, labels: int) -> int:
        """How many of `labels` labels have a dense row beside sparse ones."""
        return min(max(round(self.dense_share * labels), 1), labels - 1) if self.kind == "head_tail" else 0


@dataclass
class Rewiring:
    method: str = "none"  # none (static) | set | rigl
    prune: str = "fraction"  # fraction (of each row) | global (fraction of all) | threshold (on |w|, decays to 0)
    amount: float = 0.15  # that fraction, or the threshold at the start
    interval: int = 100  # steps
    end_fraction: float = 0.66  # of training; no rewiring after it
    recode_at: float = 0.0  # of training: when every label is coded anew by its documents' present embeddings; 0: never
    refit_epochs: int = 0  # right after recoding: epochs of the head alone over those embeddings
    exchange: float = 0.2  # of a sparse label's features, three times while refitting: for those that lower its loss more


@dataclass
class Auxiliary:
    enabled: bool = False
    weight: float = 0.4  # lambda at the start; a cosine takes it to 0 at the cut-off
    cutoff: float = 0.5  # epochs


@dataclass
class Train:
    epochs: float | None = None  # null: 0.73, or as many as 820 optimiser steps take where that is more
    max_steps: int | None = None  # optimiser steps; null: what `epochs` gives
    batch: int = 64  # documents a micro-batch
    accumulation: int = 1  # micro-batches an encoder update
    encoder_lr: float = 3e-4
    head_lr: float = 0.05
    meta_lr: float = 5e-4
    encoder_weight_decay: float = 0.01
    encoder_moments: str = "fp32"  # fp32 | bf16 (stochastically rounded): what AdamW's two moments are stored in
    head_weight_decay: float = 0.0
    momentum: float = 0.9  # of the head
    warmup: int = 50  # optimiser steps; a cosine to 0 follows
    precision: str = "auto"  # auto (the faster here) | fp32 | bf16
    device: str = "auto"  # auto | cpu | cuda
    processes: int = 1  # of this machine that share the labels, on GPUs one a card; more machines: docs/scaling.md
    log_every: int = 10  # optimiser steps
    validate_every: int = 200  # optimiser steps; 0: never
    validation_documents: int = 1000  # held out of training, at most a quarter of the documents
    checkpoint_every: int = 100  # optimiser steps; 0: only when stopped

    def held_out(self, documents: int) -> int:
        """How many of so many documents are held out of training."""
        return min(self.validation_documents, documents // 4)

    def total_steps(self, batches: int) -> int:
        """The optimiser steps of a training whose epoch has so many micro-batches."""
        an_epoch = batches / self.accumulation
        steps = max(EPOCHS * an_epoch, STEPS) if self.epochs is None else self.epochs * an_epoch
        return min(max(math.ceil(steps - 1e-9), 1), self.max_steps or sys.maxsize)


@dataclass
class Evaluate:
    documents: int | None = None  # test documents (the first ones of a fixed shuffle); null: all
    propensity_a: float = 0.55
    propensity_b: float = 1.5
    head_frequency: int = 50  # labels with at least so many training documents are head labels
    tail_frequency: int = 5  # labels with at most so many are tail labels; between: torso
    bootstrap: int = 1000  # resamples for the intervals; 0: none
    batch: int = 256  # documents


@dataclass
class Memory:
    scale_labels: list[int] = field(default_factory=lambda: [131072, 670091, 2812281])
    steps: int = 1  # measured training steps; their peak repeats


@dataclass
class Tracking:
    experiment: str = "fanin"
    uri: str | None = None  # null: $MLFLOW_TRACKING_URI, else mlflow.db beside params.yaml


@dataclass
class Config:
    preset: str = "wordnet"
    seed: int = 1
    corpus: Corpus = field(default_factory=Corpus)
    tokens: Tokens = field(default_factory=Tokens)
    encoder: Encoder = field(default_factory=Encoder)
    clusters: Clusters = field(default_factory=Clusters)
    start: Start = field(default_factory=Start)
    head: Head = field(default_factory=Head)
    rewiring: Rewiring = field(default_factory=Rewiring)
    auxiliary: Auxiliary = field(default_factory=Auxiliary)
    train: Train = field(default_factory=Train)
    evaluate: Evaluate = field(default_factory=Evaluate)
    memory: Memory = field(default_factory=Memory)
    tracking: Tracking = field(default_factory=Tracking)

    @property
    def raw_folder(self) -> Path:
        """Where the raw files of the chosen preset lie."""
        return Path("data/raw") / self.preset


FAN_IN_LIMIT = 512  # of the kernels; config.py imports no torch

_CHOICES = {
    "corpus.format": ("wordnet", "debian", "xc_json", "xc_sparse", "xc_raw", "parquet", "synthetic"),
    "corpus.task": ("near", "relations"),
    "encoder.pooling": ("mean", "cls", "cls_layers"),
    "start.source": ("data", "random"),
    "head.kind": ("fixed_fan_in", "dense", "bottleneck", "head_tail"),
    "head.activation": ("linear", "relu"),
    "head.loss": ("bce", "squared_hinge"),
    "head.dtype": ("fp32", "bf16", "fp8"),
    "head.rounding": ("stochastic", "kahan"),
    "head.backend": ("auto", "reference", "torch", "cpu", "triton"),
    "rewiring.method": ("none", "set", "rigl"),
    "rewiring.prune": ("fraction", "global", "threshold"),
    "train.encoder_moments": ("fp32", "bf16"),
    "train.precision": ("auto", "fp32", "bf16"),
}

# key: lowest and highest value, both allowed
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**31 - 1),
    "corpus.labels": (2, 10**9),
    "corpus.documents": (2, 10**9),
    "corpus.test_documents": (1, 10**9),
    "corpus.labels_per_document": (2, 1000),
    "tokens.max_length": (3, 8192),
    "encoder.layers": (1, 1000),
    "encoder.dropout": (0, 0.99),
    "encoder.hidden_dropout": (0, 0.99),
    "encoder.embed_documents": (100, 10**9),
    "clusters.meta_labels": (2, 10**7),
    "start.rounds": (1, 100),
    "start.spread": (1e-3, 1e3),
    "start.label_texts": (0, 100),
    "head.fan_in": (1, 10**6),
    "head.lexical": (0, 10**6),
    "head.profiles": (0, 512),
    "head.group": (1, 1024),
    "head.bottleneck": (1, 10**6),
    "head.dense_share": (0, 0.5),
    "head.intermediate": (0, 10**7),
    "rewiring.amount": (1e-9, 1e6),
    "rewiring.interval": (1, 10**9),
    "rewiring.end_fraction": (0, 1),
    "rewiring.recode_at": (0, 1),
    "rewiring.refit_epochs": (0, 1000),
    "rewiring.exchange": (0, 1),
    "auxiliary.weight": (0, 1),
    "auxiliary.cutoff": (0, 10**6),
    "train.epochs": (1e-6, 10**6),
    "train.max_steps": (1, 10**12),
    "train.batch": (1, 10**6),
    "train.accumulation": (1, 10**6),
    "train.encoder_lr": (0, 10),
    "train.head_lr": (0, 1e4),
    "train.meta_lr": (0, 1e4),
    "train.encoder_weight_decay": (0, 10),
    "train.head_weight_decay": (0, 10),
    "train.momentum": (0, 0.9999),
    "train.warmup": (0, 10**9),
    "train.log_every": (1, 10**9),
    "train.validate_every": (0, 10**9),
    "train.validation_documents": (0, 10**9),
    "train.checkpoint_every": (0, 10**9),
    "train.processes": (1, 10**4),
    "evaluate.documents": (1, 10**12),
    "evaluate.propensity_a": (0, 10),
    "evaluate.propensity_b": (0, 100),
    "evaluate.head_frequency": (1, 10**9),
    "evaluate.tail_frequency": (0, 10**9),
    "evaluate.bootstrap": (0, 10**6),
    "evaluate.batch": (1, 10**6),
    "memory.steps": (1, 1000),
}


def load_config(path: str | Path = "params.yaml", presets: str | Path | None = None) -> Config:
    """Read, merge and check params.yaml and its preset (`presets/<preset>.yaml` beside it).

    Raises InputError for a missing file, an unknown key, a wrong type or an impossible value, naming the key and the fix.
    """
    path = Path(path)
    params = _read(path, "create it or run from the project's root")
    preset = params.get("preset") or Config.preset
    folder = Path(presets) if presets is not None else path.parent / "presets"
    names = sorted(p.stem for p in folder.glob("*.yaml"))
    if preset not in names:
        raise InputError(f"preset: {preset!r} is not one of {', '.join(names)}; choose one or add {folder / f'{preset}.yaml'}")
    merged = OmegaConf.structured(Config)
    for source, values in ((folder / f"{preset}.yaml", _read(folder / f"{preset}.yaml", "")), (path, params)):
        for key, value in values.items():
            if is_dataclass(getattr(Config(), key, None)) and value is not None and not isinstance(value, dict):
                raise InputError(f"{source}: {key} is a section of settings, but holds {value!r}; write its settings below it")
        try:
            merged = OmegaConf.merge(merged, _without_nulls(values))
        except OmegaConfBaseException as error:
            raise InputError(_explain(source, error)) from None
    config: Config = OmegaConf.to_object(merged)  # type: ignore[assignment]
    check(config)
    return config


def _read(path: Path, advice: str) -> dict[str, Any]:
    try:
        loaded = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except FileNotFoundError:
        raise InputError(f"{path} is missing; {advice}") from None
    except Exception as error:  # the YAML parser's own errors carry the line
        raise InputError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: expected sections of settings, found {type(loaded).__name__}")
    return {str(key): value for key, value in loaded.items()}


def _without_nulls(values: dict[str, Any]) -> dict[str, Any]:
    kept = {key: _without_nulls(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value is not None}


def _explain(source: Path, error: OmegaConfBaseException) -> str:
    key = error.full_key or error.key
    first = str(error).splitlines()[0]
    if "not in" in first:
        section = str(key).rpartition(".")[0]
        known = _settings(Config() if not section else getattr(Config(), section, Config()))
        return f"{source}: {key} is not a setting; the settings there are: {', '.join(known)}"
    return f"{source}: {key}: {first}"


def _settings(section: Any) -> list[str]:
    return list(vars(section))


def _get(config: Config, key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = getattr(value, part)
    return value


def check(config: Config) -> None:
    """Raise InputError for a value that cannot work, alone or beside the others; everything wrong is named at once."""
    wrong = []
    for key, choices in _CHOICES.items():
        if _get(config, key) not in choices:
            wrong.append(f"{key}: {_get(config, key)!r} is not one of {', '.join(choices)}")
    for key, (low, high) in _RANGES.items():
        value = _get(config, key)
        if value is not None and not low <= value <= high:  # NaN fails too
            wrong.append(f"{key}: {value} is outside {low:g} to {high:g}")
    if not wrong:
        wrong = _conflicts(config)
    if wrong:
        raise InputError("params.yaml: " + "\n  ".join(wrong))


def _conflicts(config: Config) -> list[str]:
    head, rewiring, auxiliary, train = config.head, config.rewiring, config.auxiliary, config.train
    wrong = []
    sparse = head.sparse
    words = head.lexical if sparse else 0
    if head.intermediate and sparse and head.fan_in - words > head.intermediate:
        wrong.append(
            f"head.fan_in: {head.fan_in - words} is above the {head.intermediate} features of "
            "head.intermediate; lower the one or raise the other"
        )
    if words >= head.fan_in:
        wrong.append(f"head.lexical: {words} of head.fan_in {head.fan_in} leave no feature of the encoder; lower it")
    if words and config.start.source != "data":
        wrong.append("head.lexical: words are chosen by the start from data; set start.source to data, or head.lexical to 0")
    if sparse and head.fan_in > FAN_IN_LIMIT:
        wrong.append(f"head.fan_in: {head.fan_in} is above {FAN_IN_LIMIT}, the most that the kernels take; lower it")
    if not sparse and rewiring.method != "none":
        wrong.append(
            f"rewiring.method: {rewiring.method} needs head.kind fixed_fan_in or head_tail, but it is {head.kind}; "
            "set rewiring.method to none"
        )
    if head.kind != "fixed_fan_in" and head.group != 1:
        wrong.append(f"head.group: {head.group} is for head.kind fixed_fan_in, but it is {head.kind}; set head.group to 1")
    if head.kind == "bottleneck" and head.dtype != "fp32":
        wrong.append(f"head.dtype: {head.dtype} is not for head.kind bottleneck; set head.dtype to fp32")
    if sparse and head.intermediate == head.fan_in - words and rewiring.method != "none":
        wrong.append("rewiring.method: nothing to rewire when head.fan_in equals head.intermediate; set it to none")
    if rewiring.method != "none" and rewiring.prune != "threshold" and rewiring.amount >= 1:
        wrong.append(f"rewiring.amount: a fraction must be below 1, found {rewiring.amount}; use 0.1 to 0.3")
    if config.start.source == "data" and head.intermediate and head.activation != "linear":
        wrong.append("start.source: a start from data needs head.activation linear; set that, or start.source to random")
    if rewiring.recode_at and head.intermediate and head.activation != "linear":
        wrong.append("rewiring.recode_at: recoding needs head.activation linear; set that, or rewiring.recode_at to 0")
    if auxiliary.enabled and train.epochs is not None and auxiliary.cutoff > train.epochs:
        wrong.append(
            f"auxiliary.cutoff: {auxiliary.cutoff} epochs is after the end of training (train.epochs {train.epochs}); lower it"
        )
    if config.evaluate.tail_frequency >= config.evaluate.head_frequency:
        wrong.append("evaluate.tail_frequency must be below evaluate.head_frequency")
    if train.device != "auto" and train.device.split(":")[0] not in ("cpu", "cuda"):
        wrong.append(f"train.device: {train.device!r} is not auto, cpu, cuda or cuda:N")
    if train.processes > 1 and ":" in train.device:
        wrong.append(f"train.device: {train.device} is one device, but train.processes is {train.processes}; set it to cuda")
    if any(labels < 1 for labels in config.memory.scale_labels):
        wrong.append("memory.scale_labels: every entry must be at least 1")
    return wrong


if __name__ == "__main__":
    try:
        print(OmegaConf.to_yaml(OmegaConf.structured(load_config())), end="")
    except InputError as problem:
        sys.exit(f"error: {problem}")

"""The training loop: encoder by AdamW, head by its own fused step, rewiring, the auxiliary objective, resumable anywhere.

The state after optimiser step s depends on the settings, the data and s alone, so a run that was killed and goes on from a
checkpoint ends with exactly the numbers of an unbroken one (same device, threads, ranks and library versions).

Ranks (`fanin.ranks`) share a batch's documents and the head's labels: features are gathered, every rank makes the head's
step on its labels, the gradients of features come back summed, and those of the encoder are summed before its update.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from fanin.checkpoint import (
    Checkpoint,
    adopt_optimizer_tensors,
    clear_checkpoints,
    empty_optimizer_tensors,
    last_good,
    of_prefix,
    optimizer_tensors,
    resume,
    save_checkpoint,
    with_prefix,
)
from fanin.config import Config
from fanin.data.batches import Batch, Batches
from fanin.data.tokens import TokenSet
from fanin.faults import Signals, finite
from fanin.files import InputError, sources_digest
from fanin.metrics import csr, match, precision
from fanin.model import Classifier
from fanin.objectives import AuxiliaryObjective, Positives
from fanin.optim import adamw, limit_outliers, parameters_of, set_learning_rate, warmup_cosine
from fanin.retrieval import rank
from fanin.rewiring import Schedule
from fanin.seeds import seed_of

Log = Callable[[dict[str, float], int], None]
PATIENCE = 10  # steps in a row that may be lost to NaN or infinite values before the run stops
_SAID = 20  # skipped batches that are reported one by one


class Trainer:
    """Trains `classifier` in place on rows of a token set.

    train_rows, validation_rows: ascending rows of `tokens`; meta: [L] the meta-label of each label id, or None without the
    auxiliary objective; recode: what recodes a classifier, and returns figures about it, or None where
    rewiring.recode_at is 0; checkpoints: the folder for the running state; fingerprint: names settings and data, so that a
    checkpoint of another run is never taken up; log: called with (metrics, step); between: called after each step.
    Where the classifier is shared by ranks, each has a trainer of the same arguments, and all run at the same time.
    """

    def __init__(
        self,
        config: Config,
        classifier: Classifier,
        tokens: TokenSet,
        train_rows: np.ndarray,
        validation_rows: np.ndarray,
        *,
        pad_id: int,
        meta: np.ndarray | None = None,
        recode: Callable[[Classifier], dict[str, float]] | None = None,
        checkpoints: Path = Path("checkpoints"),
        fingerprint: str = "",
        log: Log = lambda metrics, step: None,
        between: Callable[[], None] = lambda: None,
    ) -> None:
        settings = config.train
        self.config, self.settings, self.classifier, self.ranks = config, settings, classifier, classifier.ranks
        if settings.batch < self.ranks.size:
            raise InputError(
                f"train.batch: {settings.batch} documents cannot be shared by {self.ranks.size} processes; use fewer"
            )
        self.tokens, self.validation_rows = tokens, validation_rows
        self.checkpoints, self.fingerprint, self.log, self.between = checkpoints, fingerprint, log, between
        order = classifier.label_order
        self.batches = Batches(tokens, train_rows, settings.batch, config.seed, pad_id, classifier.label_rows, self.ranks)
        steps_per_epoch = len(self.batches) / settings.accumulation
        self.total = settings.total_steps(len(self.batches))
        self.schedule = Schedule(
            method=config.rewiring.method,
            prune=config.rewiring.prune,
            amount=config.rewiring.amount,
            interval=config.rewiring.interval,
            end_step=int(config.rewiring.end_fraction * self.total),
        )
        self.recode = recode
        self.recode_step = max(round(config.rewiring.recode_at * self.total), 1)
        self.auxiliary: AuxiliaryObjective | None = None
        self.cutoff_step = min(round(config.auxiliary.cutoff * steps_per_epoch), self.total) if config.auxiliary.enabled else 0
        if self.cutoff_step:
            if meta is None:
                raise InputError("auxiliary.enabled: needs the meta-labels of the clusters stage; run it (dvc repro clusters)")
            of_row = torch.from_numpy(np.asarray(meta if order is None else meta[order], dtype=np.int64))
            self.auxiliary = AuxiliaryObjective(classifier.encoder.width, of_row, config.auxiliary.weight, self.cutoff_step)
            self.auxiliary.to(classifier.device)
        self.optimizer = self._optimizer()
        classifier.prepare_training()
        self.step = self.documents = 0
        self.skipped = self._lost = 0  # micro-batches in all; steps in a row until now
        self.seconds = 0.0
        self.curves: dict[str, list[dict[str, float]]] = {"train": [], "validation": [], "rewiring": [], "recoding": []}
        self.resumed_from: int | None = None
        self._stop: int | None = None

    def _optimizer(self) -> torch.optim.Optimizer:
        lr = self.settings.encoder_lr
        groups: list[tuple[torch.nn.Module | None, float]] = [
            (self.classifier.encoder, lr),
            (self.classifier.intermediate, lr),
        ]
        if self.auxiliary is not None:
            groups.append((self.auxiliary, self.settings.meta_lr))  # last, so that dropping it moves no other group
        return adamw(groups, self.settings.encoder_weight_decay, self.settings.encoder_moments, self.config.seed)

    # the loop -----------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Train to the end, from the newest whole checkpoint of this run if there is one; checkpoints stay until `clear`.

        SIGINT and SIGTERM are taken at the next step's end: a checkpoint is written, then the signal goes its usual way.
        Raises InputError where step after step meets NaN or infinite values.
        """
        self._resume()
        self.classifier.train()
        began, before = time.monotonic(), self.seconds
        stream = self._stream(self.step * self.settings.accumulation)
        saved: Path | None = None
        with Signals(self._on_signal), self._progress() as bar:
            while self.step < self.total:
                metrics = self._train_step(stream)
                self.between()
                self.seconds = before + time.monotonic() - began
                bar.update()
                if metrics:
                    bar.set_postfix_str(f"loss {metrics['loss']:.2f}, {metrics['documents_per_second']:.0f} documents/s")
                if self.recode is not None and self.step == self.recode_step:
                    self._record("recoding", self._recoded(self.recode))
                if self.ranks.size > 1:  # all stop at the same step
                    self._stop = int(self.ranks.most([self._stop or 0])[0]) or None
                if self._due(self.settings.validate_every) or (self.step == self.total and self.settings.validate_every):
                    self._validate(bar)
                self.seconds = before + time.monotonic() - began
                if self._stop is not None or (self._due(self.settings.checkpoint_every) and self.step < self.total):
                    saved = self.save()
                if self._stop is not None:
                    break
        if self._stop is not None:
            kept = (
                f"the checkpoint is in {self.checkpoints}" if saved else f"this step is not kept; {last_good(self.checkpoints)}"
            )
            if self.ranks.leads:
                print(f"stopped at step {self.step} of {self.total}; {kept}", file=sys.stderr)
            signal.raise_signal(self._stop)
            raise KeyboardInterrupt
        self.classifier.finish_training()
        self.classifier.eval()

    def clear(self) -> None:
        """Remove the checkpoints; to be called when the results are on disk."""
        clear_checkpoints(self.checkpoints, self.ranks)

    def _recoded(self, recode: Callable[[Classifier], dict[str, float]]) -> dict[str, float]:
        try:
            return recode(self.classifier)
        except (InputError, FloatingPointError) as error:
            raise InputError(
                f"step {self.step}: rows cannot be coded anew from what the encoder makes of its documents by now: {error}; if "
                f"the start was whole, lower train.encoder_lr ({self.settings.encoder_lr}); {last_good(self.checkpoints)}"
            ) from error

    def _due(self, every: int) -> bool:
        return every > 0 and self.step % every == 0

    def _stream(self, micro: int) -> Iterator[Batch]:
        """Micro-batches from number `micro` on, over epoch after epoch."""
        epoch, skip = divmod(micro, len(self.batches))
        while True:
            yield from self.batches.epoch(epoch, skip)
            epoch, skip = epoch + 1, 0

    def _train_step(self, stream: Iterator[Batch]) -> dict[str, float]:
        """One optimiser step; its metrics where they are due, of all ranks together.

        A micro-batch whose embedding is not finite is left out. Where the encoder's gradient or the loss is not finite,
        the encoder is not stepped. Both depend on the step alone, so a resumed run does the same.
        """
        settings, classifier, auxiliary, ranks = self.settings, self.classifier, self.auxiliary, self.ranks
        factor = warmup_cosine(self.step, settings.warmup, self.total)
        coefficient = auxiliary.coefficient(self.step) if auxiliary is not None else 0.0
        logged = (self.step + 1) % settings.log_every == 0 or self.step + 1 == self.total
        main_loss, meta_loss, documents, taken = 0.0, 0.0, 0, 0
        reason = ""
        for micro in range(settings.accumulation):
            batch, positives, own = self._take(stream)
            count, number = len(batch.rows), self.step * settings.accumulation + micro
            self.documents += count
            share = 1 / (settings.accumulation * count)  # the loss is a mean over documents
            torch.manual_seed(seed_of(self.config.seed, number, ranks.rank))  # for dropout
            embedding = classifier.embed(batch.ids, batch.mask) if len(batch.ids) else None
            features = classifier.project(embedding) if embedding is not None else None
            read = classifier.join(features, batch.ids, batch.mask) if features is not None else self._nothing()
            everyone = ranks.gather(read, count)
            try:
                dx, loss = classifier.head.step(
                    everyone,
                    positives,
                    lr=settings.head_lr * factor,
                    momentum=settings.momentum,
                    weight_decay=settings.head_weight_decay,
                    scale=(1 - coefficient) * share,
                    seed=self.config.seed + number,
                    want_loss=logged,
                )
            except FloatingPointError as error:  # the head is as it was
                reason = f"the encoder's output is not finite ({error}; rows {batch.rows[:3].tolist()}... of train.arrow)"
                self._skip(1, reason)
                continue
            dx = ranks.scatter_sum(dx.mul_((1 - coefficient) * share))
            inner = classifier.head.inner
            classifier.step_profiles(read, dx[:, inner:], settings.head_lr * factor)
            outer = dx[:, :inner]
            lengths = torch.linalg.vector_norm(outer, dim=1)
            limit_outliers(outer, lengths, ranks.gather(lengths, count))
            if features is not None:
                outputs: list[Tensor] = [features]
                gradients: list[Tensor | None] = [outer]
                if auxiliary is not None:
                    meta = auxiliary(embedding, own)
                    outputs.append(meta * (coefficient * share))
                    gradients.append(None)
                    meta_loss += meta.item() if logged else 0.0
                torch.autograd.backward(outputs, gradients)
            last, taken, documents = (everyone, positives), taken + 1, documents + count
            main_loss += loss.item() if loss is not None else 0.0
        if ranks.size > 1 and taken:
            self._sum_gradients()
            main_loss, meta_loss = ranks.total([main_loss, meta_loss]) if logged else (0.0, 0.0)
        if taken and not math.isfinite(main_loss + meta_loss):
            reason = f"the loss is {main_loss + meta_loss}"
        elif taken:  # then what was left out does not lose the step
            reason = "" if self._gradient_is_finite() else "the encoder's gradient is not finite"
        if taken and reason:
            self._skip(taken, reason)
        self._lost = self._lost + 1 if reason else 0
        if not self._lost:
            set_learning_rate(self.optimizer, factor)
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if self._lost >= PATIENCE:
            raise InputError(
                f"step {self.step}: {PATIENCE} steps in a row met NaN or infinite values, the last one because {reason}; lower "
                f"train.encoder_lr ({settings.encoder_lr}) or train.head_lr ({settings.head_lr}), with which training starts "
                f"from the beginning; {last_good(self.checkpoints)}"
            )
        if self.schedule.due(self.step) and not self._lost:
            moved = classifier.head.rewire(self.schedule, self.step, self.config.seed, *last, ranks)
            self._record("rewiring", moved | {"share": moved["moved"] / max(moved["entries"], 1)})
        if auxiliary is not None and self.step >= self.cutoff_step:
            self._drop_auxiliary()
        if not logged or self._lost:
            return {}
        metrics = {"loss": main_loss / documents, "lambda": coefficient, "encoder_lr": settings.encoder_lr * factor}
        metrics |= {"head_lr": settings.head_lr * factor, "meta_loss": meta_loss / documents}
        metrics["documents_per_second"] = self.documents / max(self.seconds, 1e-9) if self.seconds else 0.0
        self._record("train", metrics)
        return metrics

    def _take(self, stream: Iterator[Batch]) -> tuple[Batch, Positives, Positives]:
        """The next batch on the classifier's device; its positives of this rank's labels, and of this rank's documents."""
        batch, head, device = next(stream), self.classifier.head, self.classifier.device
        moved = batch.to(device)
        if self.ranks.size == 1:
            return moved, moved.positives, moved.positives
        positives = batch.positives.between(head.first, head.first + head.labels)
        own = batch.positives.of_documents(*self.ranks.share(len(batch.rows)))
        return moved, positives.to(device), own.to(device)

    def _nothing(self) -> Tensor:
        """What the head reads of no document: a last batch can be smaller than the number of ranks."""
        return torch.empty(0, self.classifier.head.width, device=self.classifier.device)

    def _sum_gradients(self) -> None:
        """Give every rank the sum of all ranks' gradients, in place."""
        parameters = parameters_of(self.optimizer)
        used = self.ranks.most([parameter.grad is not None for parameter in parameters])
        for parameter, anywhere in zip(parameters, used, strict=True):
            if anywhere and parameter.grad is None:  # no document was this rank's
                parameter.grad = torch.zeros_like(parameter)
        self.ranks.sum_(parameter.grad for parameter in parameters if parameter.grad is not None)

    def _gradient_is_finite(self) -> bool:
        gradients = [parameter.grad for parameter in parameters_of(self.optimizer) if parameter.grad is not None]
        return bool(torch.nn.utils.get_total_norm(gradients).isfinite())

    def _skip(self, batches: int, reason: str) -> None:
        """Count micro-batches that the encoder does not learn from."""
        self.skipped += batches
        if self.skipped <= _SAID and self.ranks.leads:
            tqdm.write(f"step {self.step + 1}: {batches} batch(es) skipped, {self.skipped} so far: {reason}", file=sys.stderr)
        self.log({"skipped_batches": self.skipped}, self.step + 1)

    def _drop_auxiliary(self) -> None:
        """Free the branch: its weights, gradients and optimiser state."""
        if self.auxiliary is None:
            return
        own = {id(parameter) for parameter in self.auxiliary.parameters()}
        for group in self.optimizer.param_groups:
            for parameter in group["params"]:
                if id(parameter) in own:
                    self.optimizer.state.pop(parameter, None)
        self.optimizer.param_groups[:] = [g for g in self.optimizer.param_groups if id(g["params"][0]) not in own]
        self.auxiliary = None

    @torch.no_grad()
    def _validate(self, bar: tqdm) -> None:
        if not len(self.validation_rows):
            return
        self.classifier.eval()
        ranked, _ = rank(self.classifier, self.tokens, self.validation_rows, min(5, self.classifier.labels), 256)
        found = precision(match(ranked, *csr(self.tokens.labels(self.validation_rows))))
        self._record("validation", found)
        if self.ranks.leads:
            said = ", ".join(f"{key} {value:.1f}" for key, value in found.items())
            bar.write(f"step {self.step}: validation {said}", file=sys.stderr)
        self.classifier.train()

    def _record(self, curve: str, values: dict[str, float]) -> None:
        self.curves[curve].append({"step": self.step, **values})
        prefix = "" if curve == "train" else f"{curve}/"
        self.log({prefix + key: value for key, value in values.items()}, self.step)

    def _progress(self) -> tqdm:
        interval = 0.2 if sys.stderr.isatty() else 10
        silent = not self.ranks.leads
        return tqdm(total=self.total, initial=self.step, unit="step", desc="train", mininterval=interval, disable=silent)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._stop = number

    # state --------------------------------------------------------------------------------------------------------

    def save(self) -> Path | None:
        """Write a checkpoint of the present step, if it is a good one and the disk takes it; else warn, and return None."""
        tensors = with_prefix("classifier", dict(self.classifier.state_dict()))
        if self.auxiliary is not None:
            tensors |= with_prefix("auxiliary", dict(self.auxiliary.state_dict()))
        tensors |= with_prefix("optimizer", optimizer_tensors(self.optimizer))
        if self._lost or self.ranks.most([not finite(tensors.values())])[0]:
            self._warn("training meets NaN or infinite values; a later step may be whole again")
            return None
        state = {
            "fingerprint": self.fingerprint,
            "documents": self.documents,
            "skipped": self.skipped,
            "seconds": self.seconds,
            "curves": self.curves,
            "precision": str(self.classifier.precision).removeprefix("torch."),
            "code": sources_digest(),
        }
        try:
            return save_checkpoint(self.checkpoints, self.step, tensors, state, self._places(), self.ranks)
        except (InputError, OSError) as error:  # hours of training are worth more than one checkpoint
            self._warn(f"{error}; training goes on")
            return None

    def _places(self) -> dict[str, tuple[int, int]]:
        """Where this rank's part of head and order lies in the whole, by the names of a checkpoint."""
        if self.ranks.size == 1:
            return {}
        places = self.classifier.places().items()
        return {f"classifier.{name if name == 'order' else f'head.{name}'}": place for name, place in places}

    def _warn(self, problem: str) -> None:
        if not self.ranks.leads:
            return
        text = f"warning: step {self.step}: no checkpoint is written: {problem}; {last_good(self.checkpoints)}"
        tqdm.write(text, file=sys.stderr)

    def _resume(self) -> None:
        checkpoint = resume(self.checkpoints, self.fingerprint, self._restore, self.ranks)
        if checkpoint is None:
            return
        self.resumed_from = self.step
        if self.ranks.leads:
            other = checkpoint.state.get("code") != sources_digest()
            told = "; warning: fanin's sources have changed since, part of the result is of those before" if other else ""
            print(f"resuming at step {self.step} of {self.total}{told}", file=sys.stderr)

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Take up a checkpoint. Where that raises Damaged, another one can still be taken up."""
        state = checkpoint.state
        targets = with_prefix("classifier", dict(self.classifier.state_dict()))
        if self.auxiliary is not None and state["step"] < self.cutoff_step:
            targets |= with_prefix("auxiliary", dict(self.auxiliary.state_dict()))
        moments = empty_optimizer_tensors(self.optimizer, of_prefix("optimizer", checkpoint.entries))
        checkpoint.read(targets | with_prefix("optimizer", moments), self._places())

        self.step, self.documents, self.seconds = state["step"], state["documents"], state["seconds"]
        self.skipped, self.curves = state["skipped"], state["curves"]
        if self.step >= self.cutoff_step:
            self._drop_auxiliary()
        self.classifier.precision = getattr(torch, state["precision"])
        adopt_optimizer_tensors(self.optimizer, moments)

"""Training run: loop over the iterations, checkpoints, evaluations, and resuming."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from dcnops.adapters.torch.spatial_support import OffsetObserver

from ..config import Config
from ..data import AspectRatioBatches, Batch, CocoDataset, check_categories, load_batches, worker_errors
from ..errors import Interrupted, UserError, cannot_write, number_of, os_problem
from ..json_files import write_json
from ..model import (
    build_detector,
    config_of,
    load_backbone,
    load_checkpoint,
    load_initial_detector,
    restore_model,
    save_checkpoint,
)
from ..predict import AMP_TYPES
from .distributed import gather_lists, is_main, rank, world_size
from .evaluation import (
    SUMMARY,
    TITLES,
    Kind,
    Metrics,
    coco_metrics,
    detect,
    evaluated_kinds,
    metrics_table,
    write_results,
)
from .history import History
from .interruption import StopRequests
from .progress import Progress
from .trainer import Step, Trainer, build_trainer

CHECKPOINT, MODEL, BEST = "checkpoint.pth", "model.pth", "best.pth"
CONFIG, HISTORY = "config.json", "history.jsonl"
NO_HISTORY = {"sums": {}, "count": 0, "lr": 0.0}  # in checkpoints of earlier versions
RESUME_HINT = "the same command with --resume goes on from there"
# Options that a resumed run may change, as they do not affect finished iterations.
CHANGEABLE = [
    *(("training", name) for name in ("epochs", "lr_steps", "workers", "save_every", "log_offsets_every")),
    *(("training", name) for name in ("evaluate_every", "patience")),
    *(("network", name) for name in ("rpn_candidates_test", "proposals_test")),
    *(("network", name) for name in ("score_threshold", "detection_nms", "max_detections")),
]

Resume = bool | Literal["auto"]


def train(
    model: nn.Module,
    config: Config,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    out: Path,
    device: torch.device,
    *,
    resume: Resume = False,
    hint: str = RESUME_HINT,
) -> Metrics | None:
    """Train a detector from `build_detector` in place; in several processes inside `session` under `torchrun`.

    All random numbers depend on the seed, the iteration and the process only. On the CPU, a resumed run therefore
    yields exactly the parameters of an uninterrupted one, for any number of data-loading processes.

    Parameters
    ----------
    model : nn.Module
    config : Config
        Configuration of the model and of the training.
    train_set, val_set : CocoDataset
        Without `val_set` there is no evaluation.
    out : Path
        Output folder: ``checkpoint.pth`` (every `save_every` iterations and after each epoch), ``model.pth`` (at the
        end, for prediction), ``best.pth`` (the model of the best evaluation so far, if there are several),
        ``config.json``, ``history.jsonl`` (see `History`), ``metrics.json`` and the detections of the last evaluation,
        and ``tensorboard/``.
    device : torch.device
    resume : bool or "auto"
        Continue from ``checkpoint.pth``, which replaces the model's parameters; ``auto``: if there is one. Otherwise
        `out` must not hold a run.
    hint : str
        Advice for the user after an interruption.

    Returns
    -------
    Metrics or None
        Metrics of the last evaluation, in the main process.

    Raises
    ------
    Interrupted
        SIGINT, SIGTERM, SIGUSR1 or SIGHUP was received. A checkpoint is saved first, unless a second signal asks to
        stop at once.
    """
    options = config.training
    if val_set is not None:
        check_categories(train_set.categories, val_set.categories, "the validation data")
        if not val_set.counted:
            raise UserError("the validation data have no annotations to evaluate on")
        if val_set.boxes_only:
            raise UserError("the validation data have no segmentations; train on boxes alone with --detector faster")
    elif options.patience:
        raise UserError(f"training.patience={options.patience} needs validation data")
    batches = AspectRatioBatches(
        train_set.sizes,
        options.images,
        seed=options.seed,
        group=options.group_aspect_ratios,
        rank=rank(),
        world_size=world_size(),
    )
    model.to(device)
    trainer = build_trainer(model, config, device, len(batches))
    history = History(out / HISTORY, best_kind(config), len(batches))
    requests = StopRequests(f"interrupted; the last checkpoint is in {out}: {hint}")
    run = _Run(config, model, train_set, val_set, out, device, trainer, history, requests, len(batches), hint)
    with ExitStack() as stack:
        first = run.open(resumes(out, resume))
        stack.enter_context(worker_errors())
        stack.enter_context(requests)
        if is_main():
            run.progress = stack.enter_context(
                Progress(out / "tensorboard", device, first=first, total=run.total, per_epoch=len(batches))
            )
            run.introduce(first)
        if not run.catch_up(first):
            loader = stack.enter_context(closing(load_batches(train_set, batches, config, device, first)))
            for done, batch in enumerate(loader, first + 1):
                if run.iteration(done, batch):
                    break
    trainer.finish()
    return run.metrics


def build_and_train(
    config: Config,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    out: Path,
    device: torch.device,
    *,
    weights: str = "none",
    initial: Mapping[str, Any] | None = None,
    resume: Resume = False,
    hint: str = RESUME_HINT,
) -> Metrics | None:
    """Build a detector, load its first weights and train it (see `train`).

    These are a whole detector, `initial` (see `read_initial_detector`), or `weights` of the backbone (see
    `load_backbone`).
    """
    torch.manual_seed(config.training.seed)
    resume = resumes(out, resume)
    model = build_detector(config.network, len(train_set.categories))
    if initial and not resume:
        for line in load_initial_detector(model, initial, train_set.categories):
            if is_main():
                print(line, file=sys.stderr)
    elif weights != "none" and not resume:
        load_backbone(model, weights, config.network.backbone)
    return train(model, config, train_set, val_set, out, device, resume=resume, hint=hint)


def resumes(out: Path, resume: Resume) -> bool:
    """Return True if a run continues from a checkpoint; all processes follow the main one."""
    if resume == "auto":
        return gather_lists([(out / CHECKPOINT).exists()])[0]
    return resume


def best_kind(config: Config) -> Kind:
    """Return the kind of average precision that chooses the best checkpoint."""
    if config.training.best_by == "auto":
        return evaluated_kinds(config.network)[-1]
    return "segm" if config.training.best_by == "mask" else "bbox"


@dataclass
class _Run:
    """State of a run, and what happens after an iteration and after an epoch."""

    config: Config
    model: nn.Module
    train_set: CocoDataset
    val_set: CocoDataset | None
    out: Path
    device: torch.device
    trainer: Trainer
    history: History
    requests: StopRequests
    per_epoch: int
    hint: str
    progress: Progress | None = None  # in the main process
    metrics: Metrics | None = None  # of the last evaluation, in the main process

    @property
    def total(self) -> int:
        return self.config.training.epochs * self.per_epoch

    def open(self, resume: bool) -> int:
        """Create the folder of a new run or restore an earlier one; return the number of finished iterations."""
        path = self.out / CHECKPOINT
        first = 0
        if resume:
            first = _resume(path, self)
            if first > self.total:
                epochs = self.config.training.epochs
                raise UserError(f"{path} is of iteration {first}, beyond the {self.total} of training.epochs={epochs}")
        else:
            _create_folder(self.out)
            self.history.clear()
        if is_main():
            try:
                write_json(self.out / CONFIG, self.config.to_dict(), indent=2)
            except OSError as error:
                raise cannot_write(self.out / CONFIG, error) from None
        return first

    def introduce(self, first: int) -> None:
        assert self.progress
        options = self.config.training
        self.progress.say(
            f"{number_of(len(self.train_set), 'image')}, {number_of(options.epochs, 'epoch')} of "
            f"{number_of(self.per_epoch, 'iteration')} with {number_of(options.images * world_size(), 'image')}"
            + (f"; iteration {first} is done" if first else "")
        )
        if not first and 3 * options.warmup_iterations > self.total:
            self.progress.say(
                f"the learning rate rises over {options.warmup_iterations} of {number_of(self.total, 'iteration')}: "
                "set training.warmup_iterations lower or training.epochs higher"
            )

    def catch_up(self, first: int) -> bool:
        """Do what an earlier run did not do after its last iteration; return True if nothing is left to do."""
        if first == 0 or first % self.per_epoch:
            return False
        entry = self.history.entry(first)
        missing = entry is None or (self._is_due(first) and not entry["metrics"])
        if missing or first == self.total or self._is_stale():
            return self.end_epoch(first)
        return False

    def iteration(self, done: int, batch: Batch) -> bool:
        """Run iteration number `done`, counted from 1; return True if it is the last."""
        options, progress = self.config.training, self.progress
        observer = None
        if progress and options.log_offsets_every and done % options.log_offsets_every == 0:
            observer = OffsetObserver(self.model)
        step = self.trainer.step(batch, done - 1, self.requests.received, observer)
        if step.not_finite:
            raise _not_finite(done, batch, step, self.train_set)
        self.history.add(done, step.losses, step.lr)
        at_end = done % self.per_epoch == 0
        # First, because after SIGHUP there is no terminal to write to.
        if at_end or step.stop or done % options.save_every == 0:
            self.save(CHECKPOINT, done, resumable=True)
        if progress and observer:
            progress.offsets(done, observer.statistics())
        if progress:
            progress.iteration(done, step.losses, step.lr, step.gradient_norm)
        if step.stop:
            where = f"stopped after iteration {done} of {self.total}, which is saved in {self.out / CHECKPOINT}"
            raise Interrupted(step.stop, f"{where}: {self.hint}")
        return at_end and self.end_epoch(done)

    def end_epoch(self, done: int) -> bool:
        """Evaluate if due, record the epoch and keep the best model; return True if the run is over."""
        last = done == self.total or self._is_stale()
        if last:
            self.save(MODEL, done)
        if self.val_set is not None and (last or self._is_due(done)):
            with self.requests.at_once(), self.trainer.averaged():
                self.metrics = self._evaluate(done)
            # First the model: a run that is killed in between evaluates again.
            if self.metrics and self.config.training.evaluate_every and self.history.improved(self.metrics):
                self.save(BEST, done)
            self.history.record(done, self.metrics)
        else:
            self.history.record(done, None)
        if not last and self._is_stale():
            last = True
            self.save(MODEL, done)
        if self.progress and self._is_stale():
            value, epoch = self.history.best()
            self.progress.say(
                f"the {TITLES[best_kind(self.config)]} AP has been best after epoch {epoch} ({value:.3f}), "
                f"{number_of(self.history.without_improvement(), 'evaluation')} ago (training.patience): "
                f"{self.out / BEST} is the model of that epoch"
            )
        return last

    def save(self, name: str, done: int, *, resumable: bool = False) -> None:
        """Write a checkpoint in the main process; `resumable` adds the state of the training."""
        if not is_main():
            return
        state = {}
        if resumable:
            state = {**_size_of(self.train_set), **self.trainer.state(), "history": self.history.state()}
        with self.trainer.averaged():
            save_checkpoint(self.out / name, self.model, self.config, self.train_set.categories, done, state)

    def _evaluate(self, done: int) -> Metrics | None:
        """Evaluate; in the main process print and write the metrics."""
        assert self.val_set is not None
        # One image at a time, as the padding of a batch would affect the detections.
        results = detect(
            self.model,
            self.val_set,
            self.device,
            workers=self.config.training.workers,
            progress=sys.stderr.isatty(),
            amp_dtype=AMP_TYPES[self.config.training.amp],
        )
        if self.progress is None:
            return None
        metrics = coco_metrics(self.val_set.coco, results, self.val_set.image_ids, evaluated_kinds(self.config.network))
        write_results(self.out, results, metrics, self.val_set.categories)
        self.progress.say(f"\n{metrics_table(metrics, self.val_set.categories)}\n")
        for kind, scores in metrics.items():
            self.progress.scalars(done, {f"{kind}/{name}": getattr(scores, name) for name in SUMMARY})
        self.progress.resume_clock()
        return metrics

    def _is_due(self, done: int) -> bool:
        every = self.config.training.evaluate_every
        return self.val_set is not None and every > 0 and done // self.per_epoch % every == 0

    def _is_stale(self) -> bool:
        patience = self.config.training.patience
        return patience > 0 and self.history.without_improvement() >= patience


def _create_folder(out: Path) -> None:
    """Create the folder of a new run."""
    if (out / CHECKPOINT).exists():
        raise UserError(f"{out / CHECKPOINT} exists: go on with --resume, or give --out another folder")
    if (out / MODEL).exists():
        raise UserError(f"{out / MODEL} exists, without a {CHECKPOINT} to go on from: give --out another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({os_problem(error)})") from None


def _resume(path: Path, run: _Run) -> int:
    """Restore the state in a checkpoint and return the number of finished iterations."""
    content = load_checkpoint(path)
    now, then = run.config.to_dict(), config_of(content, path).to_dict()
    for section, values in now.items():
        for name, value in values.items():
            before = then[section][name]
            if value != before and (section, name) not in CHANGEABLE:
                changeable = ", ".join(f"{section}.{name}" for section, name in CHANGEABLE)
                raise UserError(
                    f"{path}: cannot be resumed with {section}.{name}={value!r}, as it was trained with {before!r}; "
                    f"only {changeable} may change"
                )
    check_categories(content["categories"], run.train_set.categories, "the data to resume with")
    for name, number in _size_of(run.train_set).items():
        if content.get(name) != number:
            raise UserError(f"{path}: cannot be resumed with {number} {name}, as it had {content.get(name)}")
    iteration: int = content["iteration"]
    restore_model(run.model, content["model"], path)
    try:
        run.trainer.load_state(content)
        run.history.restore(content.get("history", NO_HISTORY), iteration)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: cannot be resumed, its state of the optimiser does not fit the network") from None
    return iteration


def _size_of(train_set: CocoDataset) -> dict[str, int]:
    """Return the numbers that must not change when a run is resumed."""
    return {"images": len(train_set), "processes": world_size()}


def _not_finite(done: int, batch: Batch, step: Step, train_set: CocoDataset) -> UserError:
    """Build the error that all processes raise, with the images of the processes concerned."""
    names = ", ".join(str(train_set.path(index)) for index in batch.indices)
    finite = all(map(math.isfinite, step.losses.values()))
    losses = ", ".join(f"{name} {value:.4g}" for name, value in step.losses.items())
    reports = gather_lists([(finite, f"{losses} for {names}")])
    finite = all(report[0] for report in reports)
    details = "; ".join(text for its_finite, text in reports if its_finite == finite)
    return UserError(
        f"iteration {done}: the {'gradient' if finite else 'loss'} is not finite ({details}); this iteration changed "
        "nothing, and a new run with a smaller training.lr or with training.clip_norm may get further"
    )

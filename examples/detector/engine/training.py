"""Training loop."""

from __future__ import annotations

import inspect
import math
import sys
import warnings
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from dcnops.adapters.torch import param_groups
from dcnops.adapters.torch.spatial_support import OffsetObserver

from ..config import Config, TrainingConfig
from ..data import AspectRatioBatches, Batch, CocoDataset, check_categories, load_batches, worker_errors
from ..errors import UserError
from ..model import (
    MimickingDetector,
    build_detector,
    config_of,
    load_backbone,
    load_checkpoint,
    restore_model,
    save_checkpoint,
    tensor_problem,
)
from ..predict import AMP_TYPES
from .distributed import gather_lists, is_main, rank, world_size
from .evaluation import SUMMARY, Metrics, coco_metrics, detect, evaluated_kinds, metrics_table, write_results
from .interruption import NUMBERS, Interrupted, StopRequests
from .progress import Progress

CHECKPOINT, MODEL = "checkpoint.pth", "model.pth"
HINT = "the same command with --resume goes on from there"
# Largest number of consecutive float16 iterations without a step; each halves the loss scale, initially 65536.
MOST_SKIPPED = 30
# torch 2.15 renamed broadcast_buffers.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
# Options that a resumed run may change, as they do not affect finished iterations.
CHANGEABLE = [("training", name) for name in ("epochs", "workers", "save_every", "evaluate_every", "log_offsets_every")]


def train(
    model: nn.Module,
    config: Config,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    out: Path,
    device: torch.device,
    *,
    resume: bool = False,
    hint: str = HINT,
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
        end, for prediction), ``metrics.json`` and the detections of the last evaluation, and ``tensorboard/``.
    device : torch.device
    resume : bool
        Continue from ``checkpoint.pth``, which replaces the model's parameters. Otherwise `out` must not hold a run.
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
    batches = AspectRatioBatches(
        train_set.sizes,
        options.batch_size,
        seed=options.seed,
        group=options.group_aspect_ratios,
        rank=rank(),
        world_size=world_size(),
    )
    total = options.epochs * len(batches)
    run = {"images": len(train_set), "processes": world_size()}
    first = 0
    model.to(device)
    trainer = build_trainer(model, config, device, len(batches))
    if resume:
        first = _resume(out / CHECKPOINT, model, trainer, config, train_set, run)
        if first > total:
            raise UserError(
                f"{out / CHECKPOINT} is of iteration {first}, beyond the {total} of training.epochs={options.epochs}"
            )
    else:
        _create_folder(out)

    def save(name: str, done: int, extra: dict[str, Any] | None = None) -> None:
        if is_main():
            save_checkpoint(out / name, model, config, train_set.categories, done, extra)

    with ExitStack() as stack:
        stack.enter_context(worker_errors())
        requests = stack.enter_context(StopRequests(f"interrupted; the last checkpoint is in {out}: {hint}"))
        loader = stack.enter_context(closing(load_batches(train_set, batches, options, device, first)))
        progress = None
        if is_main():
            progress = stack.enter_context(
                Progress(out / "tensorboard", device, first=first, total=total, per_epoch=len(batches))
            )
            progress.say(
                f"{len(train_set)} images, {options.epochs} epochs of {len(batches)} iterations with "
                f"{options.batch_size * world_size()} images" + (f"; iteration {first} is done" if first else "")
            )
            if 3 * options.warmup_iterations > total:
                progress.say(
                    f"the learning rate rises over {options.warmup_iterations} of {total} iterations: set "
                    "training.warmup_iterations lower or training.epochs higher"
                )

        for done, batch in enumerate(loader, first + 1):
            observer = None
            if progress and options.log_offsets_every and done % options.log_offsets_every == 0:
                observer = OffsetObserver(model)
            step = trainer.step(batch, done - 1, requests.received, observer)
            if step.not_finite:
                raise _not_finite(done, batch, step, train_set)
            epoch, rest = divmod(done, len(batches))
            # First, because after SIGHUP there is no terminal to write to.
            if rest == 0 or step.stop or done % options.save_every == 0:
                save(CHECKPOINT, done, {**run, **trainer.state()})
            if progress and observer:
                progress.offsets(done, observer.statistics())
            if progress:
                progress.iteration(done, step.losses, step.lr, step.gradient_norm)
            if step.stop:
                raise Interrupted(
                    step.stop,
                    f"stopped after iteration {done} of {total}, which is saved in {out / CHECKPOINT}: {hint}",
                )
            if (
                val_set is not None
                and rest == 0
                and done < total
                and options.evaluate_every
                and epoch % options.evaluate_every == 0
            ):
                with requests.at_once():
                    _evaluate(model, config, val_set, out, device, progress, done)
        save(MODEL, total)
        if val_set is None:
            return None
        with requests.at_once():
            return _evaluate(model, config, val_set, out, device, progress, total)


def build_and_train(
    config: Config,
    train_set: CocoDataset,
    val_set: CocoDataset | None,
    out: Path,
    device: torch.device,
    *,
    weights: str = "none",
    resume: bool = False,
    hint: str = HINT,
) -> Metrics | None:
    """Build a detector, load the `weights` of its backbone (see `load_backbone`) and train it (see `train`)."""
    torch.manual_seed(config.training.seed)
    model = build_detector(config.network, len(train_set.categories))
    if weights != "none" and not resume:
        load_backbone(model, weights, config.network.backbone)
    return train(model, config, train_set, val_set, out, device, resume=resume, hint=hint)


def learning_rate_factor(config: TrainingConfig, iteration: int, iterations_per_epoch: int) -> float:
    """Return the learning rate factor of an iteration, counted from 0: warm-up and steps."""
    factor: float = 0.1 ** sum(iteration >= step * iterations_per_epoch for step in config.lr_steps)
    if iteration < config.warmup_iterations:
        factor *= config.warmup_factor + (1 - config.warmup_factor) * iteration / config.warmup_iterations
    return factor


class Step(NamedTuple):
    """Result of an iteration."""

    losses: dict[str, float]  # means over the processes; of this process if not finite
    gradient_norm: float
    lr: float
    not_finite: bool  # if so, the iteration has changed nothing
    stop: int  # signal that any process has received, or 0


class Trainer:
    """Model, optimiser, and loss scaler for float16."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, device: torch.device, iterations_per_epoch: int
    ) -> None:
        self.model = model.train()
        self.config = config
        self.device = device
        self.iterations_per_epoch = iterations_per_epoch
        self.lr = config.lr * config.batch_size * world_size() / config.lr_batch
        with warnings.catch_warnings():  # regular presets have no branches
            warnings.filterwarnings("ignore", "param_groups recognises no offset branch in the model")
            groups = param_groups(model, self.lr, config.offset_lr_mult, roi_offset_lr_mult=config.roi_offset_lr_mult)
        self.lrs = [group["lr"] for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = _optimizer(groups, config)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.skipped = 0  # consecutive iterations without a step
        # The buffers belong to frozen BatchNorm and are constant.
        self.parallel = DistributedDataParallel(model, **NO_BUFFERS) if world_size() > 1 else model

    def step(self, batch: Batch, iteration: int, stop: int = 0, observer: OffsetObserver | None = None) -> Step:
        """Run iteration `iteration`, counted from 0; skip the update if the loss is not finite.

        `stop` is the signal that this process has received, or 0. `observer` records the offsets of the forward pass.
        """
        seed = np.random.SeedSequence((self.config.seed, iteration, rank())).generate_state(1)
        torch.manual_seed(int(seed[0]))
        factor = learning_rate_factor(self.config, iteration, self.iterations_per_epoch)
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            group["lr"] = lr * factor

        flags = torch.tensor([stop == number for number in NUMBERS], device=self.device)
        dtype = AMP_TYPES[self.config.amp]
        with torch.autocast(self.device.type, dtype, enabled=dtype is not None), observer or nullcontext():
            losses: dict[str, Tensor] = self.parallel(batch.images, batch.targets)
        values = torch.stack([value.float() for value in losses.values()])
        loss = values.sum()
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_norm:
            clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)

        wrong = ~loss.isfinite()
        if not self.scaler.is_enabled():  # the scaler skips such a step itself and lowers the scale
            wrong |= ~norm.isfinite()
        # A single exchange between the processes per iteration.
        shared = torch.cat([flags, wrong[None], values.detach()])
        if world_size() > 1:
            dist.all_reduce(shared)
        numbers = torch.cat([shared, norm[None]]).tolist()
        received, (not_finite, *sums, norm_value) = numbers[: len(flags)], numbers[len(flags) :]
        self.skipped = 0 if math.isfinite(norm_value) else self.skipped + 1
        if not_finite or self.skipped > MOST_SKIPPED:
            sums = values.tolist()
        else:
            sums = [value / world_size() for value in sums]
            self.scaler.step(self.optimizer)
            self.scaler.update()
        return Step(
            dict(zip(losses, sums)),
            norm_value,
            self.lr * factor,
            bool(not_finite) or self.skipped > MOST_SKIPPED,
            next((number for number, count in zip(NUMBERS, received) if count), 0),
        )

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds in addition to the model."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if isinstance(self.model, MimickingDetector):
            state["crop_classifier"] = self.model.classifier.state_dict()
        return state

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore the result of `state`."""
        own, saved = self.optimizer.state_dict()["param_groups"], content["optimizer"]
        if [group["params"] for group in saved["param_groups"]] != [group["params"] for group in own]:
            raise ValueError("the parameters are other ones")
        for index, values in saved["state"].items():
            for value in values.values():
                # Adam's number of steps is a tensor without axes.
                own_value = value if value.ndim == 0 else self.parameters[index]
                if tensor_problem(value, own_value):
                    raise ValueError(f"the state of parameter {index} is wrong")
        if not all(isinstance(value, (int, float)) and 0 <= value < math.inf for value in content["scaler"].values()):
            raise ValueError("the scale of the loss is wrong")
        # The options of the groups are those of the configuration.
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        self.scaler.load_state_dict(content["scaler"])
        if isinstance(self.model, MimickingDetector):
            own_values = self.model.classifier.state_dict()
            if any(tensor_problem(value, own_values[name]) for name, value in content["crop_classifier"].items()):
                raise ValueError("the classifier of the crops is wrong")
            self.model.classifier.load_state_dict(content["crop_classifier"])


def build_trainer(model: nn.Module, config: Config, device: torch.device, iterations_per_epoch: int) -> Trainer:
    """Build the trainer of a detector on its device, with feature mimicking if configured."""
    mimics = config.mimics()
    model = MimickingDetector(model, mimics) if mimics else model
    return Trainer(model, config.resolve_training(), device, iterations_per_epoch)


def _optimizer(groups: list[dict[str, Any]], config: TrainingConfig) -> torch.optim.Optimizer:
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)
    return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay)


def _create_folder(out: Path) -> None:
    """Create the folder of a new run."""
    for name in (CHECKPOINT, MODEL):
        if (out / name).exists():
            raise UserError(f"{out / name} exists: go on with --resume, or give --out another folder")
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: cannot be made a folder ({error.strerror})") from None


def _resume(
    path: Path, model: nn.Module, trainer: Trainer, config: Config, train_set: CocoDataset, run: dict[str, int]
) -> int:
    """Restore the state in a checkpoint and return the number of finished iterations."""
    content = load_checkpoint(path)
    now, then = config.to_dict(), config_of(content, path).to_dict()
    for section, values in now.items():
        for name, value in values.items():
            before = then[section][name]
            if value != before and (section, name) not in CHANGEABLE:
                changeable = ", ".join(f"{section}.{name}" for section, name in CHANGEABLE)
                raise UserError(
                    f"{path}: cannot be resumed with {section}.{name}={value!r}, as it was trained with {before!r}; "
                    f"only {changeable} may change"
                )
    check_categories(content["categories"], train_set.categories, "the data to resume with")
    for name, number in run.items():
        if content.get(name) != number:
            raise UserError(f"{path}: cannot be resumed with {number} {name}, as it had {content.get(name)}")
    restore_model(model, content["model"], path)
    try:
        trainer.load_state(content)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError):
        raise UserError(f"{path}: cannot be resumed, its state of the optimiser does not fit the network") from None
    iteration: int = content["iteration"]
    return iteration


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


def _evaluate(
    model: nn.Module,
    config: Config,
    val_set: CocoDataset,
    out: Path,
    device: torch.device,
    progress: Progress | None,
    done: int,
) -> Metrics | None:
    """Evaluate; in the main process print and write the metrics."""
    # One image at a time, as the padding of a batch would affect the detections.
    results = detect(
        model,
        val_set,
        device,
        workers=config.training.workers,
        progress=sys.stderr.isatty(),
        amp_dtype=AMP_TYPES[config.training.amp],
    )
    if progress is None:
        return None
    metrics = coco_metrics(val_set.coco, results, val_set.image_ids, evaluated_kinds(config.network))
    write_results(out, results, metrics, val_set.categories)
    progress.say(f"\n{metrics_table(metrics, val_set.categories)}\n")
    for kind, scores in metrics.items():
        progress.scalars(done, {f"{kind}/{name}": getattr(scores, name) for name in SUMMARY})
    progress.resume_clock()
    return metrics

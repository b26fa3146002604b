"""Iterations of the training: learning rate, losses, gradients, optimiser, and the average of the parameters."""

from __future__ import annotations

import inspect
import math
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
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
from ..data import Batch
from ..model import MimickingDetector, tensor_problem
from ..predict import AMP_TYPES
from .distributed import rank, world_size
from .interruption import NUMBERS

# Largest number of consecutive float16 iterations without a step; each halves the loss scale, initially 65536.
MOST_SKIPPED = 30
# torch 2.15 renamed broadcast_buffers.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
NO_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}


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
    """Model, optimiser, loss scaler for float16, and moving average of the parameters."""

    def __init__(
        self, model: nn.Module, config: TrainingConfig, device: torch.device, iterations_per_epoch: int
    ) -> None:
        self.model = model.train()
        self.config = config
        self.device = device
        self.iterations_per_epoch = iterations_per_epoch
        self.lr = config.lr * config.images * world_size() / config.lr_batch
        groups = _groups(model, self.lr, config)
        self.lrs = [group["lr"] for group in groups]
        self.parameters = [parameter for group in groups for parameter in group["params"]]
        self.optimizer = _optimizer(groups, config, device)
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "float16")
        self.skipped = 0  # consecutive iterations without a step
        # The buffers belong to frozen BatchNorm and are constant.
        self.parallel = (
            DistributedDataParallel(model, gradient_as_bucket_view=True, **NO_BUFFERS) if world_size() > 1 else model
        )
        # After the parallel model has sent the parameters of the first process to the others.
        detector = model.detector if isinstance(model, MimickingDetector) else model
        trained = [(name, value) for name, value in detector.named_parameters() if value.requires_grad and config.ema]
        self.trained = dict(trained)
        self.average = {name: value.detach().clone() for name, value in trained}

    def step(self, batch: Batch, iteration: int, stop: int = 0, observer: OffsetObserver | None = None) -> Step:
        """Run iteration `iteration`, counted from 0; skip the update if the loss is not finite.

        `stop` is the signal that this process has received, or 0. `observer` records the offsets of the last forward
        pass.
        """
        seed = np.random.SeedSequence((self.config.seed, iteration, rank())).generate_state(1)
        torch.manual_seed(int(seed[0]))
        factor = learning_rate_factor(self.config, iteration, self.iterations_per_epoch)
        for group, lr in zip(self.optimizer.param_groups, self.lrs):
            group["lr"] = lr * factor

        flags = torch.tensor([stop == number for number in NUMBERS], device=self.device)
        names, values = self._accumulate_gradients(batch, observer)
        self.scaler.unscale_(self.optimizer)
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        norm = get_total_norm(gradients)
        if self.config.clip_norm:
            clip_grads_with_norm_(self.parameters, self.config.clip_norm, norm)

        wrong = ~values.sum().isfinite()
        if not self.scaler.is_enabled():  # the scaler skips such a step itself and lowers the scale
            wrong |= ~norm.isfinite()
        # A single exchange between the processes per iteration.
        shared = torch.cat([flags, wrong[None], values])
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
            self._update_average(iteration)
        return Step(
            dict(zip(names, sums)),
            norm_value,
            self.lr * factor,
            bool(not_finite) or self.skipped > MOST_SKIPPED,
            next((number for number, count in zip(NUMBERS, received) if count), 0),
        )

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Exchange the parameters and their moving average in a context, if there is one."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    def finish(self) -> None:
        """Replace the parameters by their moving average, if there is one."""
        self._exchange()
        self.average = {}

    def state(self) -> dict[str, Any]:
        """Return the state that a checkpoint holds in addition to the model, which has its `averaged` parameters."""
        state = {"optimizer": self.optimizer.state_dict(), "scaler": self.scaler.state_dict()}
        if isinstance(self.model, MimickingDetector):
            state["crop_classifier"] = self.model.classifier.state_dict()
        if self.average:
            state["trained"] = {name: parameter.detach() for name, parameter in self.trained.items()}
        return state

    def load_state(self, content: dict[str, Any]) -> None:
        """Restore the result of `state` after the model of the checkpoint."""
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
        if any(tensor_problem(content["trained"][name], value) for name, value in self.average.items()):
            raise ValueError("the trained parameters are wrong")
        # The options of the groups are those of the configuration.
        self.optimizer.load_state_dict({"state": saved["state"], "param_groups": own})
        self.scaler.load_state_dict(content["scaler"])
        if isinstance(self.model, MimickingDetector):
            own_values = self.model.classifier.state_dict()
            if any(tensor_problem(value, own_values[name]) for name, value in content["crop_classifier"].items()):
                raise ValueError("the classifier of the crops is wrong")
            self.model.classifier.load_state_dict(content["crop_classifier"])
        with torch.no_grad():
            for name, average in self.average.items():
                average.copy_(self.trained[name])
                self.trained[name].copy_(content["trained"][name])

    def _accumulate_gradients(self, batch: Batch, observer: OffsetObserver | None) -> tuple[list[str], Tensor]:
        """Compute the gradient of the mean loss of all parts of a batch; return the names and values of the losses."""
        self.optimizer.zero_grad()
        dtype = AMP_TYPES[self.config.amp]
        size = -(-len(batch.images) // self.config.accumulate)
        starts = range(0, len(batch.images), size)
        means = []
        for start in starts:
            part, last = slice(start, start + size), start == starts[-1]
            # Only the last part exchanges the gradients between the processes.
            waiting: AbstractContextManager[Any] = nullcontext()
            if isinstance(self.parallel, DistributedDataParallel) and not last:
                waiting = self.parallel.no_sync()
            watching = observer if observer and last else nullcontext()
            with waiting:
                with torch.autocast(self.device.type, dtype, enabled=dtype is not None), watching:
                    losses: dict[str, Tensor] = self.parallel(batch.images[part], batch.targets[part])
                values = torch.stack([value.float() for value in losses.values()])
                if len(starts) > 1:
                    values = values / len(starts)
                self.scaler.scale(values.sum()).backward()
            means.append(values.detach())
        return list(losses), means[0] if len(means) == 1 else torch.stack(means).sum(0)

    def _update_average(self, iteration: int) -> None:
        if self.average:
            # At first the average is short, as it would remember the initial parameters for too long.
            decay = min(self.config.ema, (1 + iteration) / (10 + iteration))
            with torch.no_grad():
                torch._foreach_lerp_(list(self.average.values()), list(self.trained.values()), 1 - decay)

    def _exchange(self) -> None:
        for name, average in self.average.items():
            parameter = self.trained[name]
            parameter.data, average.data = average.data, parameter.data


def build_trainer(model: nn.Module, config: Config, device: torch.device, iterations_per_epoch: int) -> Trainer:
    """Build the trainer of a detector on its device, with feature mimicking if configured."""
    mimics = config.mimics()
    model.transform.train_sizes = config.training.min_sizes  # type: ignore[union-attr]
    model = MimickingDetector(model, mimics) if mimics else model
    return Trainer(model, config.resolve_training(), device, iterations_per_epoch)


def _groups(model: nn.Module, lr: float, config: TrainingConfig) -> list[dict[str, Any]]:
    """Divide the parameters into groups with their learning rates, and separate biases if these have other options."""
    with warnings.catch_warnings():  # regular presets have no branches
        warnings.filterwarnings("ignore", "param_groups recognises no offset branch in the model")
        groups = param_groups(model, lr, config.offset_lr_mult, roi_offset_lr_mult=config.roi_offset_lr_mult)
    if config.bias_lr_mult == 1 and config.bias_weight_decay == config.weight_decay:
        return groups
    biases = {parameter for name, parameter in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    separate = []
    for group in groups:
        of_biases = {**group, "lr": group["lr"] * config.bias_lr_mult, "weight_decay": config.bias_weight_decay}
        of_biases["params"] = [parameter for parameter in group["params"] if parameter in biases]
        others = [parameter for parameter in group["params"] if parameter not in biases]
        separate += [{**group, "params": others}, of_biases]
    return [group for group in separate if group["params"]]


def _optimizer(groups: list[dict[str, Any]], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    common: dict[str, Any] = {"weight_decay": config.weight_decay}
    if device.type == "cuda":
        common["fused"] = True  # one kernel for many parameters
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, betas=(config.momentum, 0.999), **common)
    return torch.optim.SGD(groups, momentum=config.momentum, **common)

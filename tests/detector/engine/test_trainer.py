"""Iterations of the training: accumulation, moving average, options of the optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dcnops.detector.config import Config
from dcnops.detector.data import Batch
from dcnops.detector.engine import Trainer
from dcnops.detector.engine.trainer import _groups, _optimizer

CPU = torch.device("cpu")


class Line(nn.Module):
    """Losses linear in the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.calls: list[int] = []

    def forward(self, images, targets):
        assert len(images) == len(targets)
        self.calls.append(len(images))
        values = self.layer(torch.stack([image.mean((1, 2)) for image in images]))
        return {"loss_a": values.mean(), "loss_b": 2 * (values**2).mean()}


def trainer(*assignments: str) -> Trainer:
    torch.manual_seed(0)
    options = ["training.warmup_iterations=0", "training.lr=0.1", "training.lr_batch=4", *assignments]
    return Trainer(Line(), Config().set(options).resolve_training(), CPU, 100)


def batch(seed: int, size: int = 4) -> Batch:
    generator = torch.Generator().manual_seed(seed)
    return Batch(list(range(size)), list(torch.rand(size, 3, 4, 4, generator=generator)), [{}] * size)


@pytest.mark.parametrize("amp", ["none", "bfloat16"])
def test_accumulated_gradients_are_those_of_the_whole_batch(amp):
    whole = trainer("training.batch_size=4", f"training.amp={amp}")
    parts = trainer("training.batch_size=1", "training.accumulate=4", f"training.amp={amp}")
    assert whole.lr == parts.lr
    for iteration in range(3):
        one, other = whole.step(batch(iteration), iteration), parts.step(batch(iteration), iteration)
        assert other.losses == pytest.approx(one.losses, rel=5e-2 if amp == "bfloat16" else 1e-5)
    tolerance = {"rtol": 2e-2, "atol": 5e-3} if amp == "bfloat16" else {}
    torch.testing.assert_close(parts.model.layer.weight, whole.model.layer.weight, **tolerance)
    assert whole.model.calls == [4] * 3 and parts.model.calls == [1] * 12


def test_moving_average():
    averaging = trainer("training.ema=0.15")
    expected = averaging.model.layer.weight.detach().clone()
    for iteration in range(3):
        averaging.step(batch(iteration), iteration)
        decay = min(0.15, (1 + iteration) / (10 + iteration))
        expected = decay * expected + (1 - decay) * averaging.model.layer.weight.detach()
    trained = averaging.model.layer.weight.detach().clone()
    with averaging.averaged():
        torch.testing.assert_close(averaging.model.layer.weight.detach(), expected)
        saved = {name: value.clone() for name, value in averaging.model.state_dict().items()}
    assert torch.equal(averaging.model.layer.weight, trained) and not torch.allclose(trained, expected)

    # A checkpoint has the average as the model.
    other = trainer("training.ema=0.15")
    other.model.load_state_dict(saved)
    other.load_state(copy.deepcopy(averaging.state()))
    for one in (averaging, other):
        one.step(batch(9), 9)
        one.finish()
    assert torch.equal(other.model.layer.weight, averaging.model.layer.weight)
    content = averaging.state()
    assert "trained" not in content  # nothing is left to exchange
    with pytest.raises(KeyError):
        trainer("training.ema=0.15").load_state(content)


def test_learning_rate_and_decay_of_biases():
    groups = trainer("training.bias_lr_mult=2", "training.bias_weight_decay=0").optimizer.param_groups
    assert [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups] == [
        (pytest.approx(0.05), 1e-4, 1),
        (pytest.approx(0.1), 0, 1),
    ]
    (same,) = trainer().optimizer.param_groups
    assert same["weight_decay"] == 1e-4 and len(same["params"]) == 2


@pytest.mark.parametrize("name", ["sgd", "adamw"])
def test_optimisers_are_fused_on_a_gpu(name):
    config = Config().set([f"training.optimizer={name}"]).resolve_training()
    for device, fused in (("cuda", True), ("cpu", None)):
        optimizer = _optimizer(_groups(Line(), 0.1, config), config, torch.device(device))
        assert optimizer.defaults["fused"] is fused

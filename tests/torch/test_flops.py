"""Floating-point operations in `torch.utils.flop_counter`."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d
from torch.utils.flop_counter import FlopCounterMode

from dcnops.adapters.torch import deform_conv2d

IMAGE, WEIGHT = torch.rand(2, 4, 8, 9), torch.rand(6, 4, 3, 3)
OFFSET = torch.zeros(2, 18, 4, 5)


def deformable(image: Tensor, weight: Tensor) -> Tensor:
    return deform_conv2d(image, OFFSET, weight, stride=2, padding=1)


def regular(image: Tensor, weight: Tensor) -> Tensor:
    return conv2d(image, weight, stride=2, padding=1)


@pytest.mark.parametrize("needs", [(), (0,), (1,), (0, 1)])
def test_forward_and_backward_count_as_those_of_a_regular_convolution(needs: tuple[int, ...]):
    counts = []
    for function in (deformable, regular):
        arguments = [tensor.clone().requires_grad_(i in needs) for i, tensor in enumerate((IMAGE, WEIGHT))]
        with FlopCounterMode(display=False) as forward:
            output = function(*arguments)
        with FlopCounterMode(display=False) as backward:
            if needs:
                output.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0


def test_counter_that_is_imported_later(monkeypatch: pytest.MonkeyPatch):
    """Also in inference mode, which skips the kernels of autograd."""
    monkeypatch.delitem(sys.modules, "torch.utils.flop_counter")
    monkeypatch.setattr(torch.utils, "flop_counter", torch.utils.flop_counter)  # the import replaces it
    deformable(IMAGE, WEIGHT)
    assert "torch.utils.flop_counter" not in sys.modules
    later = importlib.import_module("torch.utils.flop_counter")
    with later.FlopCounterMode(display=False) as counter, torch.inference_mode():
        deformable(IMAGE, WEIGHT)
    assert counter.get_total_flops() == 2 * IMAGE.shape[0] * 20 * WEIGHT.numel()

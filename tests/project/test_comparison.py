"""Statements about torchvision in the README's comparison table, and the tests that the table names."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from dcnops.adapters import torch as ours

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
TABLE = README.partition("## Comparison with other libraries")[2].partition("\n## ")[0]


def tensors(dtype: torch.dtype = torch.float64) -> list[Tensor]:
    torch.manual_seed(0)
    shapes = ((1, 2, 6, 6), (1, 18, 6, 6), (2, 2, 3, 3))
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for shape in shapes]


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = torchvision.ops.DeformConv2d(2, 2, 3, padding=1)

    def forward(self, image: Tensor, offset: Tensor) -> Tensor:
        return self.conv(image, offset)


def test_arrays_of_other_libraries() -> None:
    arrays = [tensor.numpy() for tensor in tensors()]
    with pytest.raises((TypeError, AttributeError, RuntimeError)):
        torchvision.ops.deform_conv2d(*arrays, padding=1)


def test_roi_pooling() -> None:
    assert not [name for name in dir(torchvision.ops) if "deform" in name.lower() and "roi" in name.lower()]


def test_attention_and_aggregation() -> None:
    names = [name.lower() for name in dir(torchvision.ops)]
    assert not [name for name in names if any(part in name for part in ("attn", "attention", "dcn", "aggregat"))]


def test_bfloat16() -> None:
    with pytest.raises(RuntimeError, match="BFloat16"):
        torchvision.ops.deform_conv2d(*tensors(torch.bfloat16), padding=1)
    assert ours.deform_conv2d(*tensors(torch.bfloat16), padding=1).isfinite().all()


def test_coordinates_of_float16_data() -> None:
    """A sample between two pixels beyond 2048, where float16 represents integers only."""
    image = (torch.arange(3000) % 2).half().reshape(1, 1, 1, -1)
    weight = torch.ones(1, 1, 1, 1, dtype=torch.float16)
    offset = torch.zeros(1, 2, 1, 3000, dtype=torch.float16)
    offset[:, 1] = 0.25
    expected = 0.25  # even pixels are 0, odd pixels are 1
    assert float(ours.deform_conv2d(image, offset, weight)[0, 0, 0, 2500]) == expected
    assert float(torchvision.ops.deform_conv2d(image, offset, weight)[0, 0, 0, 2500]) != expected


def test_second_gradients() -> None:
    image, offset, weight = tensors()
    image.requires_grad_()
    result = torchvision.ops.deform_conv2d(image, offset, weight, padding=1).square().sum()
    (gradient,) = torch.autograd.grad(result, image, create_graph=True)
    with pytest.raises(RuntimeError, match="double backwards"):
        torch.autograd.grad(gradient.sum(), image)


def test_offset_gradients_at_the_border() -> None:
    found = []
    for library in (torchvision.ops, ours):
        image, offset, weight = tensors()
        offset = torch.zeros_like(offset).requires_grad_()
        library.deform_conv2d(image, offset, weight, padding=1).sum().backward()
        found.append(offset.grad[0, 0, 0, 1])  # dy of the tap at row -1, in the first row
    assert found[0] != 0 and found[1] == 0


def test_padding_on_one_side() -> None:
    image, offset, weight = tensors()
    with pytest.raises((TypeError, RuntimeError, ValueError)):
        torchvision.ops.deform_conv2d(image, offset[..., :5, :], weight, padding=((1, 0), (1, 1)))
    assert ours.deform_conv2d(image, offset[..., :5, :], weight, padding=((1, 0), (1, 1))).shape == (1, 2, 5, 6)


@pytest.mark.slow
def test_compilation() -> None:
    image, offset, _ = tensors(torch.float32)
    compiled = torch.compile(Layer(), fullgraph=True, backend="eager")
    assert compiled(image, offset).shape == (1, 2, 6, 6)


@pytest.mark.slow
def test_onnx() -> None:
    image, offset, _ = tensors(torch.float32)
    program = torch.onnx.export(Layer().eval(), (image, offset))
    assert "DeformConv" in {node.op_type for node in program.model.graph}


def test_named_tests_exist() -> None:
    names = set(re.findall(r"`(\w+/\w+)`", TABLE))
    assert len(names) > 8
    for name in names:
        path = ROOT / "tests" / name
        assert path.with_suffix(".py").exists() or list(path.glob("test_*.py")), name

"""Export of deformable attention and aggregation to ONNX: `GridSample`, with equal results in onnxruntime."""

from __future__ import annotations

from collections import Counter

import onnxruntime
import pytest
import torch
from torch import Tensor
from torch.export import Dim

from dcnops.adapters.torch import deform_aggregate, ms_deform_attn, onnx

pytestmark = pytest.mark.slow


class Model(torch.nn.Module):
    """All forms of the operations. `wide` is float64 where onnxruntime has a CPU kernel for it."""

    def __init__(self, wide: torch.dtype) -> None:
        super().__init__()
        self.wide = wide

    def forward(
        self, first: Tensor, second: Tensor, locations: Tensor, weights: Tensor, shapes: Tensor, packed: Tensor
    ) -> list[Tensor]:
        maps = (first, second)
        value = torch.cat([features.flatten(2) for features in maps], dim=2).transpose(1, 2).unflatten(2, (2, -1))
        flat = locations.flatten(3, 4)[:, :, :, :5], weights.flatten(3)[:, :, :, :5]
        image = first.permute(0, 2, 3, 1)
        numbers = {"groups": 2, "kernel_size": (3, 1), "padding": (1, 0), "offset_scale": 0.7}
        return [
            ms_deform_attn(value, [features.shape[2:] for features in maps], locations, weights),
            ms_deform_attn(value, shapes, locations, weights, points=3),
            ms_deform_attn(value.half(), shapes, *flat, points=(3, 2)).float(),
            deform_aggregate(image, packed, **numbers),
            deform_aggregate(image, packed[..., :12], packed[..., 12:18], **numbers),
            deform_aggregate(image.to(self.wide), packed[..., :16].to(self.wide), remove_center=True, **numbers),
            deform_aggregate(image, packed[:, ::2, :, :8], groups=2, kernel_size=1, stride=(2, 1)),
        ]


def inputs(N: int, Lq: int, h: int, w: int) -> tuple[Tensor, ...]:
    maps = torch.rand(N, 6, h, w), torch.rand(N, 6, h // 2, w + 3)
    locations = torch.rand(N, Lq, 2, 2, 3, 2) * 1.6 - 0.3
    locations[0, 0, 0, 0, 0, 0] = float("inf")
    locations[0, 0, 0, 1, 1] = -1e30
    shapes = torch.tensor([features.shape[2:] for features in maps])
    return *maps, locations, torch.randn(N, Lq, 2, 2, 3), shapes, torch.randn(N, h, w, 24)


@pytest.mark.slow
@pytest.mark.parametrize("opset", [pytest.param(19, marks=pytest.mark.exhaustive), 20])
def test_models_run_in_onnxruntime_for_all_sizes(opset: int):
    model = Model(torch.float64 if opset >= 20 else torch.float32).eval()
    rows = {0: Dim.AUTO, 2: Dim.AUTO, 3: Dim.AUTO}
    dynamic = (
        rows,
        rows,
        {0: Dim.AUTO, 1: Dim.AUTO},
        {0: Dim.AUTO, 1: Dim.AUTO},
        None,
        dict.fromkeys(range(3), Dim.AUTO),
    )
    program = onnx.export(model, inputs(5, 11, 14, 9), opset_version=opset, dynamic_shapes=dynamic, verbose=False)
    assert {node.domain for node in program.model.graph} == {""}
    assert Counter(node.op_type for node in program.model.graph)["GridSample"] == 3 * 2 + 4
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for sizes in ((5, 11, 14, 9), (2, 3, 6, 20)):
        arguments = inputs(*sizes)
        feeds = {node.name: tensor.numpy() for node, tensor in zip(session.get_inputs(), arguments)}
        for actual, expected in zip(session.run(None, feeds), model(*arguments), strict=True):
            torch.testing.assert_close(torch.from_numpy(actual), expected, rtol=1e-3, atol=1e-4)

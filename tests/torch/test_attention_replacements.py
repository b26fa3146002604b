"""Replacements for the multi-scale deformable attention of Deformable DETR, mmcv and transformers."""

from __future__ import annotations

import inspect
import sys
from typing import Any

import pytest
import torch
from torch import Tensor

from dcnops import ArgumentError
from dcnops.adapters.torch import MSDeformAttn, deformable_detr, mmcv_ops, transformers_attention
from tests.torch.attention_reference import SHAPES, attention_by_grid_sample, attention_tensors

SHAPES_TENSOR = torch.tensor(SHAPES)
STARTS = torch.tensor([0, 24])


def grid_sample_form(value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    return attention_by_grid_sample(value, SHAPES, locations.flatten(3, 4), weights.flatten(3), (3, 3))


def tensors() -> tuple[Tensor, Tensor, Tensor]:
    """Return values, locations [N, Lq, M, L, P, 2] and weights [N, Lq, M, L, P]."""
    value, locations, weights = (tensor.detach() for tensor in attention_tensors(points=(3, 3)))
    return (
        value.requires_grad_(),
        locations.unflatten(3, (2, 3)).requires_grad_(),
        weights.unflatten(3, (2, 3)).requires_grad_(),
    )


def test_functions():
    value, locations, weights = tensors()
    expected = grid_sample_form(value, locations, weights)
    arguments = (value, SHAPES_TENSOR, STARTS, locations, weights, 64)
    for output in (
        deformable_detr.MSDeformAttnFunction.apply(*arguments),
        deformable_detr.ms_deform_attn_forward(*arguments),
        deformable_detr.ms_deform_attn_core_pytorch(value, SHAPES_TENSOR, locations, weights),
        mmcv_ops.MultiScaleDeformableAttnFunction.apply(*arguments),
        mmcv_ops.multi_scale_deformable_attn_pytorch(value, SHAPES_TENSOR, locations, weights),
    ):
        torch.testing.assert_close(output, expected)
    grad_out = torch.randn_like(expected)
    gradients = deformable_detr.ms_deform_attn_backward(*arguments[:5], grad_out, 64)
    torch.testing.assert_close(tuple(gradients), torch.autograd.grad(expected, (value, locations, weights), grad_out))
    # Under autocast, the extension is called with values in 16 bits and locations in 32.
    half = deformable_detr.ms_deform_attn_backward(
        value.half(), SHAPES_TENSOR, STARTS, locations.float(), weights.half(), grad_out.half()
    )
    assert [gradient.dtype for gradient in half] == [torch.float16, torch.float32, torch.float16]
    for gradient, wanted in zip(half, gradients):
        torch.testing.assert_close(gradient.double(), wanted, rtol=0.03, atol=0.03)


def test_the_module_takes_the_place_of_the_extension(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "MultiScaleDeformableAttention", deformable_detr)
    import MultiScaleDeformableAttention as extension  # type: ignore[import-not-found]

    assert extension.ms_deform_attn_forward is deformable_detr.ms_deform_attn_forward


def test_layers_agree():
    """All layers have the same parameters and compute the same."""
    ours = MSDeformAttn(16, n_levels=2, n_heads=4, n_points=3)
    theirs = deformable_detr.MSDeformAttn(16, 2, 4, 3)
    mmcv = mmcv_ops.MultiScaleDeformableAttention(16, 4, 2, 3, dropout=0.0)
    for parameter in ours.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    for layer in (theirs, mmcv):
        layer.load_state_dict(ours.state_dict())
    query, position, value = torch.randn(2, 5, 16), torch.randn(2, 5, 16), torch.randn(2, 30, 16)
    reference, padding = torch.rand(2, 5, 2, 4), torch.rand(2, 30) < 0.3
    expected = ours(query + position, reference, value, SHAPES, padding)
    assert torch.equal(theirs(query + position, reference, value, SHAPES_TENSOR, STARTS, padding), expected)
    keywords = {"reference_points": reference, "spatial_shapes": SHAPES_TENSOR, "level_start_index": STARTS}
    actual = mmcv(
        query.transpose(0, 1), None, value.transpose(0, 1), None, position.transpose(0, 1), padding, **keywords
    )
    torch.testing.assert_close(actual.transpose(0, 1), expected + query)
    mmcv.batch_first = True
    identity = torch.randn(2, 5, 16)
    torch.testing.assert_close(mmcv(query, None, value, identity, position, padding, **keywords), expected + identity)
    with pytest.raises(ArgumentError, match="reference_points and spatial_shapes must be given, got None"):
        mmcv(query)
    with pytest.raises(ArgumentError, match="embed_dims must be a positive multiple of num_heads=3"):
        mmcv_ops.MultiScaleDeformableAttention(16, 3)


def test_projects_can_initialise_the_layers_again():
    theirs, mmcv = deformable_detr.MSDeformAttn(16, 2, 4, 3), mmcv_ops.MultiScaleDeformableAttention(16, 4, 2, 3)
    bias = theirs.sampling_offsets.bias.clone()
    for layer, initialise in ((theirs, theirs._reset_parameters), (mmcv, mmcv.init_weights)):
        for parameter in layer.parameters():
            torch.nn.init.constant_(parameter, 9)
        initialise()
        assert torch.equal(layer.sampling_offsets.bias, bias) and not layer.attention_weights.weight.any()
    narrow = mmcv_ops.MultiScaleDeformableAttention(16, 4, value_proj_ratio=0.5)
    assert (narrow.value_proj.out_features, narrow.output_proj.in_features) == (8, 8)


# The names and interfaces of transformers 5, with `grid_sample`.


class MultiScaleDeformableAttention(torch.nn.Module):
    def forward(
        self, value, value_spatial_shapes, value_spatial_shapes_list, level_start_index, sampling_locations,
        attention_weights, im2col_step,
    ):  # fmt: skip
        return grid_sample_form(value, sampling_locations, attention_weights)


def multi_scale_deformable_attention(value, value_spatial_shapes, sampling_locations, attention_weights):
    return grid_sample_form(value, sampling_locations, attention_weights)


def multi_scale_deformable_attention_v2(
    value, value_spatial_shapes, sampling_locations, attention_weights, num_points_list, method="default"
):
    assert method == "discrete", "replaced otherwise"
    return value.sum()


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = MultiScaleDeformableAttention()
        self.ms_deformable_attn_core = multi_scale_deformable_attention_v2


def test_models_of_transformers(monkeypatch: pytest.MonkeyPatch):
    module = sys.modules[__name__]
    for name in ("multi_scale_deformable_attention", "multi_scale_deformable_attention_v2"):
        monkeypatch.setattr(module, name, getattr(module, name))  # restored at the end
    value, locations, weights = tensors()
    expected, model = grid_sample_form(value, locations, weights), Model()
    arguments = (value, SHAPES_TENSOR, SHAPES, STARTS, locations, weights, 64)
    torch.testing.assert_close(transformers_attention.MultiScaleDeformableAttention()(*arguments), expected)
    calls: list[Any] = []
    original = transformers_attention.ms_deform_attn
    monkeypatch.setattr(
        transformers_attention, "ms_deform_attn", lambda *a, **k: calls.append(k.get("points")) or original(*a, **k)
    )
    for _ in range(2):  # the second time changes nothing
        transformers_attention.replace_attention(model)
    flat = locations.flatten(3, 4)[..., :5, :], weights.flatten(3)[..., :5]
    for output, wanted in (
        (model.attention(*arguments), expected),
        (multi_scale_deformable_attention(value, SHAPES, locations, weights), expected),
        *(
            (function(value, SHAPES, *flat, [3, 2]), attention_by_grid_sample(value, SHAPES, *flat, (3, 2)))
            for function in (multi_scale_deformable_attention_v2, model.ms_deformable_attn_core)
        ),
    ):
        torch.testing.assert_close(output, wanted)
    assert calls == [None, None, [3, 2], [3, 2]]
    assert torch.equal(model.ms_deformable_attn_core(value, SHAPES, *flat, [3, 2], "discrete"), value.sum())
    unknown = type("Unknown", (torch.nn.Identity,), {"__module__": "not.imported"})()
    for other in (torch.nn.Linear(1, 1).eval(), unknown):
        with pytest.raises(ArgumentError, match="model must have a multi-scale deformable attention of transformers"):
            transformers_attention.replace_attention(other)


def test_the_layer_meets_the_rules_of_the_package_kernels():
    """No constructor and no members except two flags, and `forward` takes what the replaced one takes."""
    layer = transformers_attention.LAYER.load()
    assert layer is transformers_attention.MultiScaleDeformableAttention
    assert layer.__init__ is torch.nn.Module.__init__
    assert set(dir(layer)) - set(dir(torch.nn.Module)) == {"can_torch_compile", "has_backward"}
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (layer, MultiScaleDeformableAttention))
    assert [(p.name, p.kind) for p in ours.values()] == [(p.name, p.kind) for p in theirs.values()]
    same = transformers_attention.InstalledLayer("MultiScaleDeformableAttention")
    assert same in {transformers_attention.LAYER: layer}  # its cache is a dictionary

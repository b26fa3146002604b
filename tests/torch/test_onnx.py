"""Export to ONNX: standard operators, and equal results in onnxruntime and in the reference evaluator of onnx."""

from __future__ import annotations

from collections import Counter
from typing import Any

import ml_dtypes
import numpy as np
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from dcnops import ArgumentError
from dcnops.adapters.torch import ModulatedDeformConv2dPack, ModulatedDeformRoIPoolPack, convert_to_deformable, onnx
from tests.cases import Case, assert_close, make_conv, make_roi_pool
from tests.torch.tensors import call, tensors_of, to_numpy, to_tensor

pytestmark = pytest.mark.slow


def with_offsets(case: Case, *values: float) -> Case:
    """Replace offsets at evenly spaced positions by `values`."""
    offset = case.offset.copy()
    offset.reshape(-1)[np.linspace(0, offset.size - 1, len(values)).astype(int)] = values
    return case.with_arrays(offset=offset)


def with_regions(case: Case, *rows: list[float]) -> Case:
    rois = case.rois.copy()
    rois[: len(rows)] = rows
    return case.with_arrays(rois=rois)


ASYMMETRIC = ((2, 0), (1, 3))
CONV = {
    "v1": make_conv(H=4, W=4, mask=False),
    "v2": make_conv(H=4, W=4, N=2),
    "no bias": make_conv(H=4, W=4, bias=False, mask=False, padding=0),
    "groups": make_conv(H=4, W=4, N=2, G=2, D=2, spread=3.0, seed=1),
    "depthwise": make_conv(H=4, W=4, G=4, D=4, seed=2),
    "groups apart": make_conv(H=4, W=4, C=8, O=8, G=2, D=4, bias=False, seed=3),
    "geometry": make_conv(H=9, W=7, kernel=(3, 2), stride=(2, 1), padding=ASYMMETRIC, dilation=(1, 2), seed=4),
    "outside": make_conv(H=4, W=4, spread=20.0, seed=5),
    "float64": make_conv(H=4, W=4, N=2, D=2, padding=ASYMMETRIC, dtype="float64", seed=6),
    "float16": make_conv(H=4, W=4, N=2, D=2, dtype="float16", seed=7),
    "float16, float32 offsets": make_conv(
        C=1, H=2, W=200, O=1, kernel=(1, 1), padding=0, dtype="float16", offset_dtype="float32", seed=8
    ),
    "bfloat16": make_conv(H=4, W=4, dtype="bfloat16", seed=9),
}
ROI_POOL = {
    "RoIAlign": make_roi_pool(offset=False, mask=False),
    "RoIAlign, adaptive": make_roi_pool(offset=False, mask=False, sampling_ratio=0, seed=1),
    "RoIAlign, float64": make_roi_pool(offset=False, mask=False, spatial_scale=0.3, dtype="float64", seed=2),
    "RoIAlign, float16": make_roi_pool(offset=False, dtype="float16", rois_dtype="float16", seed=3),
    "mask": make_roi_pool(offset=False, sampling_ratio=0, seed=4),
    "offset": make_roi_pool(mask=False, sampling_ratio=1, seed=5),
    "offset and mask": make_roi_pool(spatial_scale=0.3, sampling_ratio=3, gamma=1.0, seed=6),
    "float64": make_roi_pool(spatial_scale=0.3, dtype="float64", seed=7),
    "float16": make_roi_pool(dtype="float16", offset_dtype="float32", seed=8),
    "bfloat16": make_roi_pool(dtype="bfloat16", seed=9),
    "one pixel": make_roi_pool(H=1, W=1, seed=10),
    "NaN and infinite offsets": with_offsets(make_roi_pool(seed=11), np.nan, np.inf, -np.inf, 1e30),
    "regions that are not finite": with_regions(
        make_roi_pool(seed=12), [0, np.nan, 0, 4, 4], [1, 0, 0, np.inf, 4], [0, 2, -np.inf, 4, 4]
    ),
}


class Calls(torch.nn.Module):
    """Calls of several cases, exported together because one export takes seconds."""

    def __init__(self, cases: list[Case]) -> None:
        super().__init__()
        self.cases = cases

    def inputs(self) -> tuple[torch.Tensor, ...]:
        return tuple(
            to_tensor(value)
            for case in self.cases
            for value in case.arguments().values()
            if isinstance(value, np.ndarray)
        )

    def forward(self, *inputs: torch.Tensor) -> list[torch.Tensor]:
        rest = iter(inputs)
        return [
            call(case, {k: next(rest) if isinstance(v, np.ndarray) else v for k, v in case.arguments().items()})
            for case in self.cases
        ]


def export(model: torch.nn.Module, inputs: tuple[torch.Tensor, ...], **options: Any) -> torch.onnx.ONNXProgram:
    return onnx.export(model.eval(), inputs, verbose=False, **options)


def count_operators(program: torch.onnx.ONNXProgram) -> Counter[str]:
    """Count the nodes by operator, and check that all operators are standard ONNX."""
    assert set(program.model.opset_imports) == {""}
    assert not program.model.functions
    assert {node.domain for node in program.model.graph} == {""}
    return Counter(node.op_type for node in program.model.graph)


def evaluate(program: torch.onnx.ONNXProgram, inputs: tuple[torch.Tensor, ...]) -> list[np.ndarray]:
    """Run the reference evaluator of onnx."""
    evaluator = ReferenceEvaluator(program.model_proto)
    arrays = [t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if t.dtype == torch.bfloat16 else t.numpy()
              for t in inputs]  # fmt: skip
    with np.errstate(all="ignore"):
        return evaluator.run(None, dict(zip(evaluator.input_names, arrays)))


def check(case: Case, output: Any, dtype: str | None = None, slack: float = 1.0) -> None:
    expected = call(case, tensors_of(case))
    if isinstance(output, torch.Tensor):
        assert output.dtype == expected.dtype
        output = to_numpy(output)
    assert_close(output, to_numpy(expected), dtype or case.dtype, slack=slack)


@pytest.fixture(scope="module")
def convolutions() -> tuple[Calls, torch.onnx.ONNXProgram]:
    calls = Calls(list(CONV.values()))
    return calls, export(calls, calls.inputs())


@pytest.fixture(scope="module")
def poolings() -> tuple[Calls, torch.onnx.ONNXProgram]:
    calls = Calls(list(ROI_POOL.values()))
    return calls, export(calls, calls.inputs())


@pytest.fixture(scope="module")
def in_onnxruntime(convolutions: Any, poolings: Any) -> dict[str, list[torch.Tensor]]:
    return {calls.cases[0].operation: program(*calls.inputs()) for calls, program in (convolutions, poolings)}


@pytest.fixture(scope="module")
def in_reference(convolutions: Any, poolings: Any) -> dict[str, list[np.ndarray]]:
    return {calls.cases[0].operation: evaluate(program, calls.inputs()) for calls, program in (convolutions, poolings)}


@pytest.mark.parametrize("name", CONV)
def test_convolution(name: str, in_onnxruntime: Any, in_reference: Any):
    case, index = CONV[name], list(CONV).index(name)
    check(case, in_onnxruntime["deform_conv2d"][index])
    # The evaluator samples in single precision, and sums channels in the dtype of the data.
    dtype = "float32" if case.dtype == "float64" else case.dtype
    check(case, in_reference["deform_conv2d"][index], dtype, slack=2)


@pytest.mark.parametrize("name", ROI_POOL)
def test_pooling(name: str, in_onnxruntime: Any, in_reference: Any):
    case, index = ROI_POOL[name], list(ROI_POOL).index(name)
    check(case, in_onnxruntime["deform_roi_pool"][index])
    check(case, in_reference["deform_roi_pool"][index])


def test_a_convolution_is_one_node(convolutions: Any):
    calls, program = convolutions
    assert count_operators(program).keys() == {"DeformConv", "Cast"}
    assert count_operators(program)["DeformConv"] == len(calls.cases)
    nodes = [node for node in program.model.graph if node.op_type == "DeformConv"]
    attributes = {
        name: {attribute.name: attribute.value for attribute in node.attributes.values()}
        for name, node in zip(CONV, nodes)
    }
    assert attributes["geometry"] == {
        "group": 1,
        "offset_group": 1,
        "kernel_shape": (3, 2),
        "strides": (2, 1),
        "pads": (2, 1, 0, 3),
        "dilations": (1, 2),
    }
    assert (attributes["groups apart"]["group"], attributes["groups apart"]["offset_group"]) == (2, 4)
    types = {name: node.inputs[0].dtype.name for name, node in zip(CONV, nodes)}
    assert types == dict.fromkeys(CONV, "FLOAT") | {"float64": "DOUBLE", "float16": "FLOAT16"}


def test_pooling_without_offsets_is_roi_align(poolings: Any):
    calls, program = poolings
    assert count_operators(program)["RoiAlign"] == sum(case.offset is None for case in calls.cases)


def test_cases_that_the_reference_evaluator_cannot_run():
    cases = [
        with_offsets(make_conv(seed=10), np.inf, -np.inf, 3e38, -3e38, 1e10),
        make_conv(H=1, W=1, seed=11),
        make_conv(N=0),
    ]
    calls = Calls(cases)
    for case, output in zip(cases, export(calls, calls.inputs())(*calls.inputs())):
        check(case, output)


class Net(torch.nn.Module):
    """Network with plain, converted and deformable convolutions and deformable RoI pooling."""

    def __init__(self) -> None:
        super().__init__()
        conv = torch.nn.Conv2d
        self.body = torch.nn.Sequential(
            conv(3, 8, 3, stride=2, padding=1), torch.nn.ReLU(), conv(8, 8, 3, padding=1, groups=2), torch.nn.ReLU()
        )
        self.layer = ModulatedDeformConv2dPack(8, 4, 3, padding=2, dilation=2, deform_groups=2)
        self.pool = ModulatedDeformRoIPoolPack(3, output_channels=4, deform_fc_channels=16, spatial_scale=0.5)
        convert_to_deformable(self.body, "2", modulated=False)
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            torch.nn.init.normal_(parameter, std=0.2, generator=generator)

    def forward(self, image: torch.Tensor, rois: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features = self.layer(self.body(image))
        return features, self.pool(features, rois)


def net_inputs(N: int, H: int, W: int, R: int) -> tuple[torch.Tensor, torch.Tensor]:
    random = np.random.default_rng(N)
    image = random.standard_normal((N, 3, H, W))
    rois = np.concatenate([random.integers(0, N, (R, 1)), random.uniform(0, H, (R, 4))], axis=1)
    return torch.tensor(image, dtype=torch.float32), torch.tensor(rois, dtype=torch.float32)


def test_direct_export_of_a_network_with_dynamic_sizes(tmp_path: Any):
    model, path = Net().eval(), tmp_path / "net.onnx"
    program = torch.onnx.export(
        model,
        net_inputs(2, 16, 20, 3),
        path,
        dynamo=True,
        opset_version=19,
        custom_translation_table=onnx.translation_table(),
        dynamic_shapes=({0: "batch", 2: "height", 3: "width"}, {0: "regions"}),
        input_names=["image", "rois"],
        verbose=False,
    )
    assert count_operators(program)["DeformConv"] == 2
    session = onnxruntime.InferenceSession(path)
    for sizes in ((2, 16, 20, 3), (1, 16, 20, 0), (3, 33, 18, 7)):
        inputs = net_inputs(*sizes)
        outputs = session.run(None, {"image": inputs[0].numpy(), "rois": inputs[1].numpy()})
        with torch.no_grad():
            for output, expected in zip(outputs, model(*inputs)):
                assert_close(output, expected.double().numpy(), "float32", slack=10)


def test_export_of_an_exported_program():
    model, inputs = Net().eval(), net_inputs(2, 16, 20, 3)
    program = onnx.export(torch.export.export(model, inputs), verbose=False)
    for output, expected in zip(program(*inputs), model(*inputs)):
        assert_close(output.numpy(), expected.detach().double().numpy(), "float32", slack=10)


def test_adaptive_sampling_with_offsets_is_rejected():
    calls = Calls([make_roi_pool(sampling_ratio=0)])
    message = r"sampling_ratio must be positive to export .* got 0: .* Export with sampling_ratio=2"
    with pytest.raises(ArgumentError, match=message):
        export(calls, calls.inputs())


def test_old_opsets_are_rejected():
    calls = Calls([make_conv()])
    with pytest.raises(ArgumentError, match="opset_version must be at least 19, the first with DeformConv, got 18"):
        export(calls, calls.inputs(), opset_version=18)
    with pytest.raises(torch.onnx.OnnxExporterError, match=r"opset_version must be at least 19, .* got 18"):
        torch.onnx.export(
            calls,
            calls.inputs(),
            dynamo=True,
            opset_version=18,
            custom_translation_table=onnx.translation_table(),
            verbose=False,
        )

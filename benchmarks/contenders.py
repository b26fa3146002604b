"""Contenders of convolution and RoI pooling, and conversion of a case's arrays to their libraries.

Those of attention and aggregation are in `benchmarks.weighted_samples`. To add a contender, add it to `conv_contenders`
or `pool_contenders` and its name to `columns` of the operation.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.operations import MODULATED, OURS, PEER, PLAIN, Arrays, Case, Contender

if TYPE_CHECKING:
    import torch

POOLING = {"spatial_scale": 1 / 16, "sampling_ratio": 2, "gamma": 0.1}
"""Settings of RoI pooling: a feature map of stride 16, two samples per bin and axis."""

ON_DEVICE: dict[str, Callable[[Any], Any]] = {}
"""Conversion of NumPy arrays for dcnops, by device other than CPU and GPU. A rehearsal adds its own."""

# Errors are below 1e-5 in float32; those of a wrong implementation are of order 1. In 16 bits, the limits are a few
# roundings. A plain float32 convolution may use Winograd's algorithm. Torchvision sums in float16.
_CONV_TOLERANCE = {"float32": 2e-5, "float16": 6e-3, "bfloat16": 2e-2}
_PLAIN_TOLERANCE = {**_CONV_TOLERANCE, "float32": 2e-4}
_POOL_TOLERANCE = {**_CONV_TOLERANCE, "float32": 5e-5}
_PEER_FLOAT16_TOLERANCE = 2e-2
_TF32_TOLERANCE = 5e-3

_CONV_ARGUMENTS = ("input", "offset", "weight", "bias", "mask")


def conv_contenders(case: Case) -> list[Contender]:
    def tolerance(by_dtype: dict[str, float]) -> float:
        return _TF32_TOLERANCE if case.products == "tf32" else by_dtype[case.dtype]

    images = frozenset({"input", "offset", "mask", "grad_out", "output"})
    options = {"padding": 1, "precision": case.products}
    if case.device == "cuda":
        ours = partial(prepare_tensors, "deform_conv2d", images, options)
    else:
        ours = partial(_prepare_arrays, "deform_conv2d", images, options)
    half = case.dtype == "float16"
    peer = Contender(
        PEER,
        _prepare_torchvision_conv,
        tolerance({**_CONV_TOLERANCE, "float16": _PEER_FLOAT16_TOLERANCE}),
        # Coordinates rounded to float16 are often exactly -1, where torchvision's offset gradient is known to differ.
        unchecked=frozenset({"offset"}) if half else frozenset(),
        coordinates="float16" if half else "float32",
    )
    return [
        Contender(OURS, ours, tolerance(_CONV_TOLERANCE)),
        *([peer] if case.dtype != "bfloat16" else []),  # torchvision has no bfloat16
        Contender(PLAIN, _prepare_plain_conv, tolerance(_PLAIN_TOLERANCE), effective_inputs=_without_deformation),
    ]


def pool_contenders(case: Case) -> list[Contender]:
    options = {"output_size": case.shape[-1], **POOLING}
    if case.device == "cuda":
        # The output for tensors, and therefore its gradient, is contiguous.
        ours = partial(prepare_tensors, "deform_roi_pool", frozenset({"input"}), options)
    else:
        ours = partial(_prepare_arrays, "deform_roi_pool", frozenset({"input", "grad_out", "output"}), options)
    peer = Contender(
        PEER,
        _prepare_roi_align,
        _PEER_FLOAT16_TOLERANCE if case.dtype == "float16" else _POOL_TOLERANCE[case.dtype],
        effective_inputs=_without_offsets,
        coordinates=case.dtype,
    )
    return [
        Contender(
            OURS,
            lambda case, arrays, direction: ours(case, _without_offsets(arrays), direction),
            _POOL_TOLERANCE[case.dtype],
            effective_inputs=_without_offsets,
        ),
        *([peer] if case.dtype != "bfloat16" else []),
        Contender(MODULATED, ours, _POOL_TOLERANCE[case.dtype]),
    ]


def _without_deformation(arrays: Arrays) -> Arrays:
    """Return arrays for which the deformable convolution equals the plain one."""
    return {**arrays, "offset": np.zeros_like(arrays["offset"]), "mask": np.ones_like(arrays["mask"])}


def _without_offsets(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in ("offset", "mask")}


def prepare_tensors(
    operation: str, images: frozenset[str], options: dict[str, Any], case: Case, arrays: Arrays, direction: str
) -> Callable[[], Any]:
    """Prepare a call of dcnops on tensors; those named in `images` have the memory format of the case."""
    from dcnops.adapters import torch as adapter

    tensors = layer_tensors(case, arrays, arrays, images if case.layout == "NHWC" else ())
    grad_out, constants = tensors.pop("grad_out"), {}
    if "rois" in tensors:
        constants["rois"] = tensors.pop("rois")
    call = prepare_torch(partial(getattr(adapter, operation), **constants, **options), tensors, grad_out, direction)
    return deterministic_if_wanted(call, case, direction)


def deterministic_if_wanted(call: Callable[[], Any], case: Case, direction: str) -> Callable[[], Any]:
    """Return the call, or one that computes gradients with torch's deterministic algorithms if the case wants that."""
    import torch

    if direction == "forward" or not case.deterministic:
        return call

    settings: Any = torch.utils.deterministic

    def deterministic_call() -> Any:
        # Torch would fill the memory of the gradients before the kernels write them.
        fills, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
        torch.use_deterministic_algorithms(True)
        try:
            return call()
        finally:
            torch.use_deterministic_algorithms(False)
            settings.fill_uninitialized_memory = fills

    return deterministic_call


def _prepare_arrays(
    operation: str, images: frozenset[str], options: dict[str, Any], case: Case, arrays: Arrays, direction: str
) -> Callable[[], Any]:
    """Prepare a call of dcnops on arrays; those named in `images` have the layout of the case."""
    import dcnops

    nhwc = images if case.layout == "NHWC" else frozenset()

    def to_device(name: str, array: np.ndarray) -> Any:
        array = np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if name in nhwc else array
        if case.device == "cpu":
            return array
        from dcnops.adapters.torch.arrays import as_array

        return ON_DEVICE[case.device](as_array(to_torch(case, name, array)))

    def to_nchw(name: str, array: Any) -> Any:
        return array.transpose(0, 3, 1, 2) if name in nhwc else array

    if operation == "deform_conv2d":
        # As in a layer, the offsets are a part of the output of one convolution.
        channels = arrays["offset"].shape[1]
        arrays = {**arrays, "offset": np.concatenate([arrays["offset"], arrays["mask"]], axis=1)}
    arguments = {name: to_device(name, array) for name, array in arrays.items()} | options | {"layout": case.layout}
    if operation == "deform_conv2d":
        branch = arguments["offset"]
        arguments["offset"] = branch[..., :channels] if "offset" in nhwc else branch[:, :channels]
    if direction == "forward":
        del arguments["grad_out"]
        function = getattr(dcnops, operation)
        return lambda: to_nchw("output", function(**arguments))
    function = partial(getattr(dcnops, f"{operation}_backward"), deterministic=case.deterministic)

    def backward() -> dict[str, Any]:
        gradients = function(**arguments)._asdict()
        return {name: to_nchw(name, gradient) for name, gradient in gradients.items() if gradient is not None}

    return backward


def _prepare_torchvision_conv(case: Case, arrays: Arrays, direction: str) -> Callable[[], Any]:
    from torchvision.ops import deform_conv2d

    tensors = layer_tensors(case, arrays, _CONV_ARGUMENTS)
    grad_out = to_torch(case, "grad_out", arrays["grad_out"])
    return prepare_torch(partial(deform_conv2d, padding=1), tensors, grad_out, direction)


def _prepare_plain_conv(case: Case, arrays: Arrays, direction: str) -> Callable[[], Any]:
    import torch

    def tensor(name: str) -> torch.Tensor:
        found = to_torch(case, name, arrays[name])
        on_gpu = case.device != "cpu" and found.ndim == 4
        return found.contiguous(memory_format=torch.channels_last) if on_gpu else found

    tensors = {name: tensor(name) for name in ("input", "weight", "bias")}
    return prepare_torch(
        partial(torch.nn.functional.conv2d, padding=1, groups=case.groups), tensors, tensor("grad_out"), direction
    )


def _prepare_roi_align(case: Case, arrays: Arrays, direction: str) -> Callable[[], Any]:
    from torchvision.ops import roi_align

    function = partial(
        roi_align,
        boxes=to_torch(case, "boxes", arrays["rois"]),
        output_size=case.shape[-1],
        spatial_scale=POOLING["spatial_scale"],
        sampling_ratio=POOLING["sampling_ratio"],
        aligned=True,
    )
    tensors = {"input": to_torch(case, "input", arrays["input"])}
    return prepare_torch(function, tensors, to_torch(case, "grad_out", arrays["grad_out"]), direction)


def layer_tensors(
    case: Case, arrays: Arrays, names: Iterable[str], channels_last: Iterable[str] = ()
) -> dict[str, torch.Tensor]:
    """Return tensors as a layer has them: the offsets of a convolution are a part of the output of its branch.

    The mask, which a layer computes from the other part, is a tensor of its own.
    """
    import torch

    def arranged(name: str, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.contiguous(memory_format=torch.channels_last) if name in channels_last else tensor

    tensors = {name: arranged(name, to_torch(case, name, arrays[name])) for name in names}
    if "weight" in tensors:
        channels = [tensors[name].shape[1] for name in ("offset", "mask")]
        branch = arranged("offset", torch.cat([tensors["offset"], tensors["mask"]], dim=1))
        tensors["offset"] = branch.split(channels, dim=1)[0]
    return tensors


def prepare_torch(
    function: Callable[..., Any], tensors: dict[str, torch.Tensor], grad_out: torch.Tensor, direction: str
) -> Callable[[], Any]:
    """Prepare `function` on tensors without gradients, or the gradients alone after one forward pass."""
    import torch

    if direction == "forward":
        return lambda: function(**tensors)
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    # Twice: our calls of a new signature take another path than later ones, and so do their backward passes.
    for _ in range(2):
        output = function(**leaves)

    def backward() -> dict[str, Any]:
        gradients = torch.autograd.grad(output, list(leaves.values()), grad_out, retain_graph=True)
        return dict(zip(leaves, gradients, strict=True))

    return backward


def rounded(array: np.ndarray, dtype: str) -> np.ndarray:
    """Return the nearest values that `dtype` can represent, in float32."""
    if dtype == "float32":
        return array
    import torch

    return torch.from_numpy(array).to(getattr(torch, dtype)).float().numpy()


def to_torch(case: Case, name: str, array: np.ndarray) -> torch.Tensor:
    """Return an argument as a tensor on the device of the case, in its dtype."""
    import torch

    device = "cuda" if case.device == "cuda" else "cpu"
    # Detectors keep regions in float32, also with 16-bit features.
    return torch.from_numpy(array).to(device, torch.float32 if name == "rois" else getattr(torch, case.dtype))


def to_numpy(result: Any) -> np.ndarray:
    """Return a result of any library as a NumPy array, float32 or wider."""
    if isinstance(result, np.ndarray):
        return np.asarray(result, np.result_type(result.dtype, np.float32))
    if not hasattr(result, "detach"):
        from dcnops.adapters.torch.arrays import as_tensor

        result = as_tensor(result)
    return np.asarray(result.detach().float().cpu())

"""RoIAlign and modulated deformable RoI pooling of one feature map of stride 16, two samples a bin and axis."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from benchmarks.contenders import OURS, PEER, Arrays, Case, Contender, Operation
from benchmarks.deform_roi_pool_float64 import GAMMA, SAMPLING_RATIO, SPATIAL_SCALE, evaluate, positions
from benchmarks.libraries import rounded, to_nhwc, to_ours, to_torch, torch_backward, torch_forward

MODULATED = "dcnops modulated"
"""With offset and mask. Without them the operation is RoIAlign, which torchvision has too."""

# Errors of float32 stay below 1e-5 here, the last bit of a position; those of a wrong implementation are of order 1.
# Some roundings of the type for 16 bits; torchvision's float16 weights are float16 and it adds up the gradients of
# overlapping regions in float16.
_TOLERANCE = {"float32": 5e-5, "float16": 6e-3, "bfloat16": 2e-2}
_PEER_TOLERANCE = {"float32": 5e-5, "float16": 2e-2}

_NEAREST = 1e-3


def _inputs(case: Case) -> Arrays:
    C, H, W, R, P = case.shape
    random = np.random.default_rng(0)

    def normal(*shape: int) -> np.ndarray:
        return rounded(random.standard_normal(shape, np.float32), case.dtype)

    arrays = {
        "input": normal(1, C, H, W),
        "rois": _proposals(random, R, H / SPATIAL_SCALE, W / SPATIAL_SCALE),
        "offset": normal(R, 2, P, P),
        "mask": rounded(random.random((R, P, P), np.float32), case.dtype),
        # By far the largest; uniform numbers are drawn much faster.
        "grad_out": rounded(random.random((R, C, P, P), np.float32) - np.float32(0.5), case.dtype),
    }
    # At whole pixels the offset gradient jumps, and the last bit of a position would decide.
    while (near := _near_whole_pixels(arrays)).any():
        arrays["offset"] = rounded(arrays["offset"] + np.float32(0.125) * near, case.dtype)
    return arrays


def _proposals(random: np.random.Generator, R: int, height: float, width: float) -> np.ndarray:
    """Regions of many sizes and aspect ratios with centres all over the image, some of them across its border."""
    size = (height * width) ** 0.5 * np.exp(random.uniform(np.log(1 / 40), np.log(1 / 2), R))
    stretch = np.exp(random.uniform(-0.6, 0.6, R))
    half = np.stack([size * stretch, size / stretch], axis=1) / 2
    centre = random.random((R, 2)) * [width, height]
    return np.concatenate([np.zeros((R, 1)), centre - half, centre + half], axis=1).astype(np.float32)


def _near_whole_pixels(arrays: Arrays) -> np.ndarray:
    """Which offsets bring a sample of their bin there."""
    (rows, _), (columns, _) = positions(arrays)
    return np.stack([(np.abs(at - at.round()) < _NEAREST).any(axis=-1) for at in (columns, rows)], axis=1)


def _contenders(case: Case) -> list[Contender]:
    found = [
        Contender(OURS, _align_forward, _align_backward, _TOLERANCE[case.dtype], sees=_without_offsets),
        Contender(MODULATED, _ours_forward, _ours_backward, _TOLERANCE[case.dtype]),
    ]
    # Torchvision has no bfloat16, and computes positions in the dtype of the data.
    if case.dtype in _PEER_TOLERANCE:
        peer = Contender(
            PEER,
            _peer_forward,
            _peer_backward,
            _PEER_TOLERANCE[case.dtype],
            sees=_without_offsets,
            coordinates=case.dtype,
        )
        found.insert(1, peer)
    return found


def _without_offsets(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name not in ("offset", "mask")}


def _align_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return _ours_forward(case, _without_offsets(arrays))


def _align_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    return _ours_backward(case, _without_offsets(arrays))


def _ours_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    import dcnops

    arguments = _arguments(case, arrays)
    del arguments["grad_out"]
    return lambda: _nchw(case, dcnops.deform_roi_pool(**arguments))


def _ours_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    import dcnops

    arguments = _arguments(case, arrays)

    def backward() -> dict[str, Any]:
        gradients = dcnops.deform_roi_pool_backward(**arguments, deterministic=case.deterministic)._asdict()
        return {
            name: _nchw(case, gradient) if name == "input" else gradient
            for name, gradient in gradients.items()
            if gradient is not None
        }

    return backward


def _arguments(case: Case, arrays: Arrays) -> dict[str, Any]:
    # Detectors keep regions in float32 beside features of 16 bits.
    if case.layout == "NHWC":
        arrays = {**arrays, **{name: to_nhwc(arrays[name]) for name in ("input", "grad_out")}}
    on_device = {name: to_ours(case, array, "float32" if name == "rois" else None) for name, array in arrays.items()}
    return {
        "layout": case.layout,
        **on_device,
        "output_size": case.shape[-1],
        "spatial_scale": SPATIAL_SCALE,
        "sampling_ratio": SAMPLING_RATIO,
        "gamma": GAMMA,
    }


def _nchw(case: Case, images: Any) -> Any:
    """A view."""
    return images.transpose(0, 3, 1, 2) if case.layout == "NHWC" else images


def _peer_forward(case: Case, arrays: Arrays) -> Callable[[], Any]:
    return torch_forward(_peer_call(case, arrays), {"input": to_torch(case, arrays["input"])})


def _peer_backward(case: Case, arrays: Arrays) -> Callable[[], dict[str, Any]]:
    tensors = {"input": to_torch(case, arrays["input"])}
    return torch_backward(_peer_call(case, arrays), tensors, to_torch(case, arrays["grad_out"]))


def _peer_call(case: Case, arrays: Arrays) -> Callable[..., Any]:
    from torchvision.ops import roi_align

    rois = to_torch(case, arrays["rois"])
    return lambda input: roi_align(
        input, rois, case.shape[-1], SPATIAL_SCALE, sampling_ratio=SAMPLING_RATIO, aligned=True
    )


_GPU_VARIANTS = [
    {"dtype": "float16"},
    {},
    {"deterministic": True},
    {"dtype": "bfloat16"},
    {"dtype": "float16", "layout": "NHWC"},
]

OPERATION = Operation(
    name="deform_roi_pool",
    sizes="C x H x W x R x P=Q",
    shapes=((256, 50, 84, 512, 7), (256, 50, 84, 512, 14), (1024, 50, 84, 512, 7), (1024, 50, 84, 512, 14)),
    variants={
        "cpu": [{}],
        **dict.fromkeys(("cuda", "rehearsal"), _GPU_VARIANTS),
    },
    # The batch is the regions, of one image.
    per_image=frozenset(),
    inputs=_inputs,
    contenders=_contenders,
    evaluate=evaluate,
    columns=(OURS, PEER, MODULATED),
    ratios=((PEER, OURS),),
    with_memory=(OURS, PEER, MODULATED),
)

"""All specialisations of the kernels that plans can launch, and the facts that Python and CUDA share."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from dcnops._arguments import MAX_LEVELS
from dcnops._backends.cpu.deform_roi_pool_loops import MAX_SAMPLES
from dcnops._backends.cuda import kernel_constants
from dcnops._backends.cuda.heuristics import FusedTiles
from dcnops._backends.cuda.kernel_source import Macros
from dcnops._backends.cuda.plans.array_jobs import ArrayJobsParams, ArrayTask
from dcnops._backends.cuda.plans.deform_attention_backward import DeformAttentionBackwardParams
from dcnops._backends.cuda.plans.deform_attention_forward import DeformAttentionForwardParams
from dcnops._backends.cuda.plans.deform_attention_grad_value import DeformAttentionGradValueParams
from dcnops._backends.cuda.plans.deform_conv2d_backward import DeformConvBackwardParams, gradient_sample_bytes
from dcnops._backends.cuda.plans.deform_conv2d_columns import DeformConvColumnsParams
from dcnops._backends.cuda.plans.deform_conv2d_common import column_sample_bytes
from dcnops._backends.cuda.plans.deform_conv2d_fused import DeformConvFusedParams, fused_macros
from dcnops._backends.cuda.plans.deform_roi_pool_backward import DeformRoIPoolBackwardParams
from dcnops._backends.cuda.plans.deform_roi_pool_forward import DeformRoIPoolForwardParams
from dcnops._backends.cuda.plans.deform_roi_pool_grad_input import DeformRoIPoolGradInputParams
from dcnops._dtypes import DTYPES

UNITS: dict[str, tuple[type[ctypes.Structure], tuple[str, ...]]] = {
    "array_jobs": (ArrayJobsParams, ("run_array_jobs",)),
    "deform_conv2d_columns": (DeformConvColumnsParams, ("deform_conv2d_columns",)),
    "deform_conv2d_fused": (DeformConvFusedParams, ("deform_conv2d_fused", "deform_conv2d_add_splits")),
    "deform_conv2d_backward": (
        DeformConvBackwardParams,
        (
            "deform_conv2d_prepare",
            "deform_conv2d_fill_lists",
            "deform_conv2d_gather_input",
            "deform_conv2d_gather_input_in_order",
            "deform_conv2d_scatter_input",
            "deform_conv2d_grad_samples",
        ),
    ),
    "deform_roi_pool_forward": (DeformRoIPoolForwardParams, ("deform_roi_pool_forward",)),
    "deform_roi_pool_backward": (DeformRoIPoolBackwardParams, ("deform_roi_pool_backward",)),
    "deform_roi_pool_grad_input": (
        DeformRoIPoolGradInputParams,
        ("deform_roi_pool_region_bounds", "deform_roi_pool_grad_input"),
    ),
    "deform_attention_forward": (DeformAttentionForwardParams, ("deform_attention_forward",)),
    "deform_attention_backward": (DeformAttentionBackwardParams, ("deform_attention_backward",)),
    "deform_attention_grad_value": (
        DeformAttentionGradValueParams,
        ("deform_attention_mark_strips", "deform_attention_grad_value"),
    ),
}

# C++ expressions and the values that Python takes them for.
SHARED_CONSTANTS: dict[str, dict[str, int]] = {
    "array_jobs": {
        "kThreads": kernel_constants.THREADS,
        "kWarp": kernel_constants.WARP,
        "kMaxArrayJobs": kernel_constants.MAX_ARRAY_JOBS,
        "kSumTileChannels": kernel_constants.SUM_TILE_CHANNELS,
        "kFillTileElements": kernel_constants.FILL_TILE_ELEMENTS,
        "kWideTileElements": kernel_constants.WIDE_TILE_ELEMENTS,
        "TransposeTile<Half>::kSide": kernel_constants.TRANSPOSE_TILE_SIDE[2],
        "TransposeTile<float>::kSide": kernel_constants.TRANSPOSE_TILE_SIDE[4],
        "TransposeTile<double>::kSide": kernel_constants.TRANSPOSE_TILE_SIDE[8],
        "TransposeTile<float>::kSide * TransposeTile<float>::kPitch * 4": kernel_constants.ARRAY_JOBS_SHARED_BYTES,
        **{f"k{task.name.title().replace('_', '')}": task for task in ArrayTask},
    },
    "deform_conv2d_fused": {
        "kTileRows": kernel_constants.FUSED_TILE_ROWS,
        "kSlice": kernel_constants.FUSED_SLICE_OUTPUTS,
        "kRowBytes": kernel_constants.FUSED_STEP_BYTES,
    },
    "deform_conv2d_backward": {
        "kBandRows": kernel_constants.BAND_ROWS,
        "kListsPerThread": kernel_constants.LISTS_PER_THREAD,
        "sizeof(ListPart)": kernel_constants.LIST_PART_BYTES,
        "sizeof(ListEntry) / sizeof(Sum)": 2,
        "sizeof(ListCounters) / sizeof(int)": 2,
    },
    "deform_roi_pool_forward": {
        "kMaxSamples": MAX_SAMPLES,
        "sizeof(WarpPixels) / sizeof(Sum)": kernel_constants.ROI_WARP_PIXELS,
    },
    "deform_roi_pool_backward": {"sizeof(BinDots) / sizeof(Sum)": kernel_constants.ROI_BIN_DOTS},
    "deform_roi_pool_grad_input": {
        "kStripPadding": kernel_constants.STRIP_PADDING,
        "sizeof(RegionBounds) / sizeof(int)": kernel_constants.ROI_BOUNDS_INTS,
    },
    "deform_attention_forward": {
        "kMaxLevels": MAX_LEVELS,
        "sizeof(Level)": kernel_constants.ATTENTION_LEVEL_BYTES,
        "kPointsPerLane": kernel_constants.ATTENTION_POINTS_PER_LANE,
    },
    "deform_attention_backward": {"sizeof(SampleDots) / sizeof(Sum)": 4},
}


@dataclass(frozen=True)
class Specialisation:
    """A unit and its macros: one compilation."""

    unit: str
    macros_items: tuple[tuple[str, str | int], ...]
    least_architecture: int = 0
    most_architecture: int = 999
    most_registers: int = 128

    def is_for(self, architecture: int) -> bool:
        return self.least_architecture <= architecture <= self.most_architecture

    @property
    def macros(self) -> Macros:
        return dict(self.macros_items)

    def __str__(self) -> str:
        macros = self.macros
        parts = [self.unit, str(macros["DCN_SUFFIX"])]
        if "DCN_PRODUCT" in macros:
            parts += [str(macros["DCN_PRODUCT"]), f"outputs{macros['DCN_OUTPUTS']}"]
        if "DCN_VEC" in macros:
            parts += [f"vec{macros['DCN_VEC']}", f"offset-{macros['DCN_OFFSET_SCALAR']}"]
        return "-".join(parts)


def specialisations() -> Iterator[Specialisation]:
    for dtype, (_, suffix, scalar, itemsize, _) in DTYPES.items():
        common: dict[str, str | int] = {"DCN_SUFFIX": suffix, "DCN_SCALAR": scalar}
        yield Specialisation("array_jobs", tuple(common.items()))
        for offset_scalar in dict.fromkeys((scalar, scalar if dtype == "float64" else "float")):
            vector = kernel_constants.VECTOR_BYTES // itemsize
            while vector:
                macros = {**common, "DCN_OFFSET_SCALAR": offset_scalar, "DCN_VEC": vector}
                for operation, role in (("deform_roi_pool", "input"), ("deform_attention", "value")):
                    for part in ("forward", "backward", f"grad_{role}"):
                        yield Specialisation(f"{operation}_{part}", tuple(macros.items()))
                macros["DCN_SAMPLE_BYTES"] = column_sample_bytes(dtype)
                yield Specialisation("deform_conv2d_columns", tuple(macros.items()))
                macros["DCN_SAMPLE_BYTES"] = gradient_sample_bytes(dtype)
                yield Specialisation("deform_conv2d_backward", tuple(macros.items()))
                vector //= 2

    for dtype, offset_dtype, tiles in fused_tiles():
        # A thread can have at most 255 registers, even if a multiprocessor runs a single block.
        registers = 65536 // (tiles.blocks * tiles.threads)
        macros = dict(fused_macros(dtype, offset_dtype, tiles))
        most = 90 if tiles.by_warpgroups else 999
        least = 90 if tiles.by_warpgroups else 80
        yield Specialisation("deform_conv2d_fused", tuple(macros.items()), least, most, min(registers, 255))


def fused_tiles() -> Iterator[tuple[str, str, FusedTiles]]:
    """Yield (data type, offset type, tiles) of the fused kernel."""
    for suffix, dtype in {"f16": "float16", "bf16": "bfloat16", "tf32": "float32"}.items():
        for offset_dtype in dict.fromkeys((dtype, "float32")):
            for product in ("TensorProduct", "WarpgroupProduct"):
                for outputs, blocks in ((64, 2), (128, 2), (256, 1)):
                    yield dtype, offset_dtype, FusedTiles(product, suffix, outputs, blocks)
    yield "float32", "float32", FusedTiles("SplitTensorProduct", "3xtf32", 64, 1)
    for outputs in (64, 128):
        yield "float32", "float32", FusedTiles("FmaProduct", "f32", outputs, 1)


def constant_assertions(specialisation: Specialisation) -> str:
    """Return C++ that compiles only if each shared constant has the value that the plans assume."""
    values = dict(SHARED_CONSTANTS.get(specialisation.unit, {}))
    if specialisation.unit == "deform_conv2d_fused":
        values |= {f"{tiles.product}<Scalar, {tiles.outputs}>::kThreads": tiles.threads for *_, tiles in fused_tiles()}
    sum_bytes = 8 if specialisation.macros["DCN_SUFFIX"] == "f64" else 4
    if specialisation.unit in ("deform_roi_pool_grad_input", "deform_attention_grad_value"):
        values["kStrip"] = kernel_constants.strip_pixels(sum_bytes, int(specialisation.macros["DCN_VEC"]))
    if specialisation.unit == "deform_attention_forward":
        values["sizeof(PointSample)"] = kernel_constants.attention_point_bytes(sum_bytes)
    return "".join(f'static_assert({name} == {value}, "{name}");\n' for name, value in values.items())


def struct_assertions(struct: type[ctypes.Structure]) -> str:
    """Return C++ that compiles only if its structs have the sizes and offsets of `struct` and of the structs in it."""
    name = struct.__name__
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size of {name}");\n']
    for field, kind, *_ in struct._fields_:
        offset = getattr(struct, field).offset
        lines.append(f'static_assert(OFFSET_OF({name}, {field}) == {offset}, "{name}.{field}");\n')
        element = getattr(kind, "_type_", kind)
        if isinstance(element, type) and issubclass(element, ctypes.Structure):
            lines.append(struct_assertions(element))
    return "".join(lines)

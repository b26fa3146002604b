"""Every specialisation of every kernel that the launch plans can ask for."""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

from dcnops._backends.cuda.constants import VECTOR_BYTES
from dcnops._backends.cuda.engine import Macros
from dcnops._backends.cuda.heuristics import FusedTiles
from dcnops._backends.cuda.plans.array_jobs import ArrayJob, ArrayJobsParams, RowRange
from dcnops._backends.cuda.plans.deform_conv2d_backward import DeformConvBackwardParams, gradient_sample_bytes
from dcnops._backends.cuda.plans.deform_conv2d_common import column_sample_bytes
from dcnops._backends.cuda.plans.deform_conv2d_forward import (
    DeformConvColumnsParams,
    DeformConvFusedParams,
    fused_macros,
)
from dcnops._backends.cuda.plans.deform_roi_pool import (
    DeformRoIPoolBackwardParams,
    DeformRoIPoolBins,
    DeformRoIPoolForwardParams,
    DeformRoIPoolGradInputParams,
)
from dcnops._dtypes import DTYPES
from dcnops._geometry import DeformConvSizes, DeformRoIPoolSizes

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
}

STRUCTS = (
    RowRange,
    DeformConvSizes,
    DeformRoIPoolSizes,
    ArrayJob,
    ArrayJobsParams,
    DeformConvColumnsParams,
    DeformConvFusedParams,
    DeformConvBackwardParams,
    DeformRoIPoolBins,
    DeformRoIPoolForwardParams,
    DeformRoIPoolBackwardParams,
    DeformRoIPoolGradInputParams,
)


@dataclass(frozen=True)
class Specialisation:
    """One compilation: a unit and its macros."""

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
            vector = VECTOR_BYTES // itemsize
            while vector:
                macros = {**common, "DCN_OFFSET_SCALAR": offset_scalar, "DCN_VEC": vector}
                for part in ("forward", "backward", "grad_input"):
                    yield Specialisation(f"deform_roi_pool_{part}", tuple(macros.items()))
                macros["DCN_SAMPLE_BYTES"] = column_sample_bytes(dtype)
                yield Specialisation("deform_conv2d_columns", tuple(macros.items()))
                macros["DCN_SAMPLE_BYTES"] = gradient_sample_bytes(dtype)
                yield Specialisation("deform_conv2d_backward", tuple(macros.items()))
                vector //= 2

    for dtype, offset_dtype, tiles in fused_tiles():
        # A kernel that has a multiprocessor to itself may use all the registers that a thread can have.
        registers = 65536 // (tiles.blocks * tiles.threads)
        macros = dict(fused_macros(dtype, offset_dtype, tiles))
        most = 90 if tiles.by_warpgroups else 999
        least = 90 if tiles.by_warpgroups else 80
        yield Specialisation("deform_conv2d_fused", tuple(macros.items()), least, most, min(registers, 255))


def fused_tiles() -> Iterator[tuple[str, str, FusedTiles]]:
    """Element types of data and offsets, and tiles, of the fused kernel."""
    for suffix, dtype in {"f16": "float16", "bf16": "bfloat16", "tf32": "float32"}.items():
        for offset_dtype in dict.fromkeys((dtype, "float32")):
            for product in ("TensorProduct", "WarpgroupProduct"):
                for outputs, blocks in ((64, 2), (128, 2), (256, 1)):
                    yield dtype, offset_dtype, FusedTiles(product, suffix, outputs, blocks)
    yield "float32", "float32", FusedTiles("SplitTensorProduct", "3xtf32", 64, 1)
    for outputs in (64, 128):
        yield "float32", "float32", FusedTiles("FmaProduct", "f32", outputs, 1)


def layout_assertions(struct: type[ctypes.Structure]) -> str:
    """C++ that compiles only if its struct of the same name has the layout of `struct`."""
    name = struct.__name__
    lines = [f'static_assert(sizeof({name}) == {ctypes.sizeof(struct)}, "size of {name}");']
    for field in struct._fields_:
        offset = getattr(struct, field[0]).offset
        lines.append(f'static_assert(OFFSET_OF({name}, {field[0]}) == {offset}, "{name}.{field[0]}");')
    return "\n".join(lines) + "\n"

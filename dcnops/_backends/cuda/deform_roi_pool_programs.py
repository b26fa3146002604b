"""Prepared calls of deformable RoI pooling: recorded programs that leave the number of regions open.

The number of regions changes from call to call. Apart from the shapes of arrays, it only decides one launch, that of
the pooling kernel. A program is therefore recorded for one region, and each call fills in its number of regions.

A deterministic gradient of the input is not prepared, because its scratch memory and its further launches depend on the
number of regions too.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.plans.deform_roi_pool_backward import DeformRoIPoolBackwardParams, backward_tiling
from dcnops._backends.cuda.plans.deform_roi_pool_common import RoIPoolKernels, Tiling
from dcnops._backends.cuda.plans.deform_roi_pool_forward import DeformRoIPoolForwardParams, forward_tiling
from dcnops._backends.cuda.programs import ArrayForm, Launch, Program, Recorder, SignatureCache
from dcnops._shapes import DeformRoIPoolGeometry

Issue: TypeAlias = Callable[[Sequence[int], int, int], None]
"""Issues a program for addresses as `programs.Issue` does, on a stream, for a number of regions."""

_POOLING = {
    plans.deform_roi_pool: (DeformRoIPoolForwardParams, forward_tiling),
    plans.deform_roi_pool_backward: (DeformRoIPoolBackwardParams, backward_tiling),
}
"""Parameters and tiling of the pooling kernel of each plan."""


@dataclass(frozen=True)
class RoIPoolProgram:
    """The launches of one signature.

    Attributes
    ----------
    one_region : Program
        The program for one region.
    names : tuple of str, optional
        Names of its results; None for a single one.
    pooling : int
        Its step that depends on the number of regions.
    tiling : Tiling
        The tiles of that step.
    """

    one_region: Program
    names: tuple[str, ...] | None
    pooling: int
    tiling: Tiling

    def fill_in(self, params: Any, regions: int) -> tuple[int, int]:
        """Fill a number of regions into a buffer of parameter structs; return the blocks and their shared memory."""
        step: Any = self.one_region.steps[self.pooling]
        struct = step.kind.from_buffer(params, step.params)
        struct.bins.size.R = regions
        struct.tile_bins, blocks, shared_bytes = self.tiling.of_regions(regions)
        return blocks, shared_bytes

    def results(self, regions: int) -> tuple[ArrayForm, ...]:
        """Return the forms of the results."""
        forms = self.one_region.results
        return tuple(
            form if name == "input" else form._replace(shape=(regions, *form.shape[1:]))
            for name, form in zip(self.names or ("output",), forms)
        )

    def for_regions(self, regions: int) -> Program:
        """Return the program for a number of regions."""
        params, steps = self.one_region.params.copy(), [*self.one_region.steps]
        blocks, shared_bytes = self.fill_in(params, regions)
        step = steps[self.pooling]
        assert isinstance(step, Launch)
        pooling = step._replace(grid=blocks, shared_bytes=shared_bytes)
        steps[self.pooling : self.pooling + 1] = [pooling] if blocks else []
        return replace(self.one_region, steps=tuple(steps), params=params, results=self.results(regions))


class RoIPoolCall(NamedTuple):
    """A program, its scratch memory and the function that issues it."""

    program: RoIPoolProgram
    scratch_bytes: int
    issue: Issue

    @property
    def nbytes(self) -> int:
        """Approximate host memory."""
        return self.program.one_region.nbytes

    def run(self, engine: Engine, stream: int, arrays: Sequence[Any | None], regions: int) -> Any:
        """Issue the program for arrays of the engine's library; return what its plan would return."""
        results = [form.empty(engine) for form in self.program.results(regions)]
        scratch = engine.empty((self.scratch_bytes,), engine.xp.uint8)
        given = [array for array in arrays if array is not None]
        self.issue([0, *(engine.pointer(array) or 0 for array in (*given, *results, scratch))], stream, regions)
        names = self.program.names
        return results[0] if names is None else dict(zip(names, results))


class RoIPoolPrograms:
    """Runs the plans of RoI pooling on an engine, prepared if their signature was seen before.

    Parameters
    ----------
    engine : Engine
    prepare : callable
        Returns a function that issues a `RoIPoolProgram` of the current device.
    stream : callable
        Returns the handle of the current stream.
    """

    def __init__(
        self, engine: Engine, prepare: Callable[[RoIPoolProgram], Issue], stream: Callable[[], int] = int
    ) -> None:
        self._engine, self._prepare, self._stream = engine, prepare, stream
        self._recorder = Recorder(engine)
        self._recording = threading.Lock()
        self.calls: SignatureCache[RoIPoolCall] = SignatureCache()

    def run(
        self, plan: Callable[..., Any], geometry: DeformRoIPoolGeometry, arrays: Sequence[Any], *options: Hashable
    ) -> Any:
        """Return ``plan(engine, geometry, *arrays, *options)``, prepared where possible.

        The last four of `arrays` are input, rois, offset and mask. The backward plan must have a gradient to compute,
        and not that of the input deterministically.
        """
        engine, one_region = self._engine, replace(geometry, R=1)
        forms = [None if array is None else ArrayForm.of(engine, array) for array in arrays]
        kinds = tuple(None if form is None else (form.dtype, form.channels_last) for form in forms)
        key = (plan, one_region, kinds, options, engine.device.id)
        call = self.calls.get(key)
        if all(form is None or form.aligned for form in forms):
            if call is None:
                call = self.calls.add(key, lambda: self.record(plan, one_region, forms, options))
            if call is not None:
                return call.run(engine, self._stream(), arrays, geometry.R)
        self.calls.see(key)
        return plan(engine, geometry, *arrays, *options)

    def record(
        self,
        plan: Callable[..., Any],
        geometry: DeformRoIPoolGeometry,
        forms: Sequence[ArrayForm | None],
        options: tuple[Hashable, ...],
    ) -> RoIPoolCall:
        """Record a plan for the current device; see `run`. The regions in `geometry` and `forms` are ignored."""
        geometry, input = replace(geometry, R=1), len(forms) - 4
        forms = [
            form if form is None or i == input else form._replace(shape=(1, *form.shape[1:]), aligned=True)
            for i, form in enumerate(forms)
        ]
        with self._recording:
            program, names = self._recorder.record(plan, geometry, forms, options)
        kind, tiling = _POOLING[plan]
        pooling = [isinstance(step, Launch) and step.kind is kind for step in program.steps].index(True)
        kernels = RoIPoolKernels.of(self._engine, geometry, forms[input], *forms[-2:])
        prepared = RoIPoolProgram(program, names, pooling, tiling(kernels, geometry))
        return RoIPoolCall(prepared, program.scratch_bytes, self._prepare(prepared))

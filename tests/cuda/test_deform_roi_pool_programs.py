"""Prepared calls of RoI pooling give what their plans give, bit for bit, for any number of regions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from dcnops._backends.cuda import plans
from dcnops._backends.cuda.deform_roi_pool_programs import RoIPoolPrograms
from dcnops._backends.cuda.engine import Engine
from dcnops._backends.cuda.programs import ArrayForm, Fill, Launch, Program, Recorder
from dcnops._shapes import DeformRoIPoolGeometry
from tests.cases import RoIPoolCase, make_roi_pool
from tests.conftest import EmulatedRunner
from tests.cuda.emulator.host_engine import HOPPER, matmul, prepare_roi_pool_program
from tests.cuda.runners import channels_last_of

REGIONS = (5, 3, 0, 1, 70, 3)
NEEDS = ({"input"}, {"offset"}, {"mask"}, {"input", "offset", "mask"})


def cases(channels_last: bool, **options: Any) -> list[RoIPoolCase]:
    """Cases of one signature."""
    made = [make_roi_pool(**{"C": 8, **options}, R=R, seed=R) for R in REGIONS]
    if not channels_last:
        return made
    return [
        case.with_arrays(input=channels_last_of(case.input), grad_out=channels_last_of(case.grad_out)) for case in made
    ]


@pytest.mark.slow
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("offset, mask", [(False, False), (True, False), (True, True)])
def test_a_prepared_call_gives_the_same_bits(channels_last: bool, offset: bool, mask: bool):
    runner = EmulatedRunner()
    programs = RoIPoolPrograms(runner.engine, prepare_roi_pool_program)
    for case in cases(channels_last, offset=offset, mask=mask):
        arrays = runner._arrays(case)
        output = programs.run(plans.deform_roi_pool, case.geometry(), arrays, channels_last)
        wanted = plans.deform_roi_pool(runner.engine, case.geometry(), *arrays, channels_last)
        np.testing.assert_array_equal(output, wanted)
        assert output.strides == wanted.strides
        arrays, needs = [case.grad_out, *arrays], frozenset(case.needs)
        gradients = programs.run(plans.deform_roi_pool_backward, case.geometry(), arrays, needs)
        expected = runner.backward(case)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            np.testing.assert_array_equal(gradient, expected[name])
            assert gradient.strides == expected[name].strides
    # An empty gradient is contiguous in every memory order, which is a signature seen once.
    assert len(programs.calls) == 2


def record(plan: Any, forms: list[ArrayForm | None], R: int, *options: Any) -> tuple[Program, Program]:
    """The program of a plan for R regions, and the one that is filled in; nothing is compiled or run."""
    forms = [form and (form if form.shape[0] == 2 else form._replace(shape=(R, *form.shape[1:]))) for form in forms]
    input, rois, offset, mask = forms[-4:]
    assert input and rois
    size = (offset or ArrayForm((R, 2, 7, 7), None, False)).shape[2:]
    geometry = DeformRoIPoolGeometry.of(input, rois, offset, mask, size, 0.25, 2, 0.1)
    engine = Engine(np, lambda *_: lambda *_: None, matmul, lambda: HOPPER, lambda array: 0)
    programs = RoIPoolPrograms(engine, lambda program: lambda *_: None)
    call = programs.record(plan, replace(geometry, R=1), forms, options)
    return Recorder(engine).record(plan, geometry, forms, options)[0], call.program.for_regions(R)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("samples", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (7, 7), (9, 8)])
def test_a_program_that_is_filled_in_is_the_one_of_that_number(
    size: tuple[int, int], samples: bool, channels_last: bool, dtype: str
):
    kind, last = np.dtype(dtype), channels_last
    forms = [
        ArrayForm((2, 256, 50, 84), kind, last),
        ArrayForm((0, 5), np.promote_types(kind, np.float32), False),
        ArrayForm((0, 2, *size), kind, False) if samples else None,
        ArrayForm((0, *size), kind, False) if samples else None,
    ]
    grad_out = ArrayForm((0, 256, *size), kind, last and size != (1, 1))
    for R in (1, 3, 100, 512, 5000):
        passes = [(plans.deform_roi_pool, forms, ())]
        for needs in NEEDS if samples else NEEDS[:1]:
            passes.append((plans.deform_roi_pool_backward, [grad_out, *forms], (frozenset(needs),)))
        for plan, given, options in passes:
            recorded, filled = record(plan, given, R, *options)
            assert filled.steps == recorded.steps
            assert filled.params.tobytes() == recorded.params.tobytes()
            assert filled.results == recorded.results
            assert filled.scratch_bytes == recorded.scratch_bytes
            launches, fills = (sum(isinstance(step, k) for step in filled.steps) for k in (Launch, Fill))
            assert launches <= 3 and fills <= 1 and launches + fills == len(filled.steps)

"""Comparison of every contender with results in float64, on the same inputs that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from benchmarks.contenders import to_numpy
from benchmarks.operations import Arrays, Case, Contender, Operation


def check(operation: Operation, case: Case, arrays: Arrays, contenders: list[Contender]) -> dict[str, dict[str, float]]:
    """Return errors by contender and result, relative to the largest magnitude of the exact result.

    Float64 results exist for the first image only. In a larger batch, the first and the last image are compared with
    the contender's results for that image alone, of which those for the first have been compared with float64.
    """
    errors = {}
    for contender in contenders:
        single = replace(case, N=1, products="ieee", layout="NCHW", deterministic=False)
        exact = _expected(operation, single, contender.effective_inputs, contender.coordinates)
        errors[contender.name] = _errors(_results(operation, contender, case, arrays, 0), exact)
        if case.N > 1:
            batch = _batch_errors(operation, case, arrays, contender)
            errors[contender.name].update({f"{name}, batch": error for name, error in batch.items()})
    return errors


@lru_cache(maxsize=12)
def _expected(
    operation: Operation, case: Case, effective_inputs: Callable[[Arrays], Arrays], coordinates: str
) -> Arrays:
    """Return float64 results, cached because all batches of a case begin with the same image."""
    device = "cuda" if case.device == "cuda" else "cpu"
    return operation.expected(effective_inputs(operation.inputs(case)), coordinates, device)


def _results(
    operation: Operation, contender: Contender, case: Case, arrays: Arrays, image: int | None = None
) -> dict[str, np.ndarray]:
    """Return the results of the batch, or those of one image alone."""
    if image is not None:
        case = replace(case, N=1)
        arrays = {
            name: array[image : image + 1] if name in operation.per_image else array for name, array in arrays.items()
        }
    results = {
        "output": contender.prepare(case, arrays, "forward")(),
        **contender.prepare(case, arrays, "backward")(),
    }
    return {name: to_numpy(array) for name, array in results.items() if name not in contender.unchecked}


def _batch_errors(operation: Operation, case: Case, arrays: Arrays, contender: Contender) -> dict[str, float]:
    """Compare the first and the last image; results summed over the batch only if it has two images."""
    batch = _results(operation, contender, case, arrays)
    alone = [_results(operation, contender, case, arrays, image) for image in (0, case.N - 1)]
    ends, expected = {}, {}
    for name, array in batch.items():
        if name in operation.per_image:
            ends[name] = array[[0, -1]]
            expected[name] = np.concatenate([image[name] for image in alone])
        elif case.N == 2:
            ends[name] = array
            expected[name] = np.sum([image[name] for image in alone], axis=0, dtype=np.float64)
    return _errors(ends, expected)


def _errors(results: Arrays, expected: Arrays) -> dict[str, float]:
    errors = {}
    for name, array in results.items():
        error = np.inf
        if array.shape == expected[name].shape:
            exact = expected[name]
            # Slice by slice: allocating the difference of large arrays takes longer than computing it.
            difference = np.max([np.abs(a - b).max() for a, b in zip(array, exact, strict=True)])
            error = difference / max(exact.max(), -exact.min())
        # NaN would pass every limit.
        errors[name] = float(np.nan_to_num(error, nan=np.inf, posinf=np.inf))
    return errors

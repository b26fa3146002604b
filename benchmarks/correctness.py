"""No speed without a green check: results of this very run's inputs against the float64 evaluation."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import numpy as np

from benchmarks.contenders import Arrays, Case, Contender, Operation
from benchmarks.libraries import to_numpy


def check(operation: Operation, case: Case, arrays: Arrays, contenders: list[Contender]) -> dict[str, dict[str, float]]:
    """Errors by contender and result, each relative to the largest magnitude of the exact result.

    The exact evaluation takes the first image. Of a larger batch, the first and the last image are held against the
    contender's own results for them alone, the first of which is the one that was checked.
    """
    errors = {}
    for contender in contenders:
        single = replace(case, N=1, products="ieee", layout="NCHW", deterministic=False)
        expected = _exact(operation, single, contender.sees, contender.coordinates)
        errors[contender.name] = _errors(
            _results(contender, replace(case, N=1), _image(operation, arrays, 0)), expected
        )
        if case.N > 1:
            batch = _batch_errors(operation, case, arrays, contender)
            errors[contender.name].update({f"{name}, batch": error for name, error in batch.items()})
    return errors


@lru_cache(maxsize=12)
def _exact(operation: Operation, case: Case, sees: Callable[[Arrays], Arrays], coordinates: str) -> Arrays:
    """Kept for the batches of a case: they begin with the same image."""
    return operation.evaluate(sees(operation.inputs(case)), coordinates, "cuda" if case.device == "cuda" else "cpu")


def _image(operation: Operation, arrays: Arrays, n: int) -> Arrays:
    return {name: array[n : n + 1] if name in operation.per_image else array for name, array in arrays.items()}


def _results(contender: Contender, case: Case, arrays: Arrays) -> dict[str, np.ndarray]:
    results = {"output": contender.forward(case, arrays)(), **contender.backward(case, arrays)()}
    return {name: to_numpy(array) for name, array in results.items() if name not in contender.unchecked}


def _batch_errors(operation: Operation, case: Case, arrays: Arrays, contender: Contender) -> dict[str, float]:
    """What belongs to an image is compared for the first and the last; sums over the batch where it is of two."""
    batch = _results(contender, case, arrays)
    picked = {n: _results(contender, replace(case, N=1), _image(operation, arrays, n)) for n in (0, case.N - 1)}
    expected = {
        name: np.concatenate([image[name] for image in picked.values()])
        if name in operation.per_image
        else np.sum([image[name] for image in picked.values()], axis=0, dtype=np.float64)
        for name in batch
        if name in operation.per_image or case.N == 2
    }
    ends = {
        name: array[[0, -1]] if name in operation.per_image else array
        for name, array in batch.items()
        if name in expected
    }
    return _errors(ends, expected)


def _errors(results: Arrays, expected: Arrays) -> dict[str, float]:
    errors = {}
    for name, array in results.items():
        error = np.inf
        if array.shape == expected[name].shape:
            exact = expected[name]
            # One slice after the other: the difference of large arrays takes longer to allocate than to compute.
            difference = np.max([np.abs(a - b).max() for a, b in zip(array, exact, strict=True)])
            error = difference / max(exact.max(), -exact.min())
        # NaN is above no limit.
        errors[name] = float(np.nan_to_num(error, nan=np.inf, posinf=np.inf))
    return errors

"""No speed without a green check: results of this very run's inputs against the float64 evaluation."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import numpy as np

from benchmarks.contenders import Arrays, Case, Contender, Operation

__all__ = ["check"]


def check(operation: Operation, case: Case, arrays: Arrays, contenders: list[Contender]) -> dict[str, dict[str, float]]:
    """Errors by contender and result, each relative to the largest magnitude of the exact result.

    The exact evaluation takes the first image. A larger batch is held against the contender's own results for its
    images one by one, the first of which is the one that was checked.
    """
    first = _image(operation, arrays, 0)

    @lru_cache
    def exact(sees: Callable[[Arrays], Arrays], coordinates: str) -> Arrays:
        return operation.evaluate(sees(first), coordinates)

    errors = {}
    for contender in contenders:
        results = _results(contender, case, first)
        expected = exact(contender.sees, contender.coordinates)
        errors[contender.name] = _errors(results, expected)
        if case.N > 1:
            batch = _errors(_results(contender, case, arrays), _one_by_one(operation, case, arrays, contender))
            for name, error in batch.items():
                errors[contender.name][f"{name}, batch"] = error
    return errors


def _image(operation: Operation, arrays: Arrays, n: int) -> Arrays:
    return {name: array[n : n + 1] if name in operation.PER_IMAGE else array for name, array in arrays.items()}


def _results(contender: Contender, case: Case, arrays: Arrays) -> dict[str, np.ndarray]:
    output = contender.forward(case, arrays)()
    gradients = contender.backward(case, arrays)()
    results = {"output": output, **gradients}
    return {name: contender.to_numpy(array) for name, array in results.items() if name not in contender.unchecked}


def _one_by_one(operation: Operation, case: Case, arrays: Arrays, contender: Contender) -> Arrays:
    images = [_results(contender, case, _image(operation, arrays, n)) for n in range(case.N)]
    return {
        name: np.concatenate([image[name] for image in images])
        if name in operation.PER_IMAGE
        else np.sum([image[name] for image in images], axis=0, dtype=np.float64)
        for name in images[0]
    }


def _errors(results: Arrays, expected: Arrays) -> dict[str, float]:
    errors = {}
    for name, array in results.items():
        if array.shape != expected[name].shape:
            errors[name] = float("inf")
            continue
        difference = float(np.abs(array - expected[name]).max() / np.abs(expected[name]).max())
        # A comparison with NaN is false: let it fail every tolerance.
        errors[name] = float("inf") if np.isnan(difference) else difference
    return errors

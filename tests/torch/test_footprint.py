"""A call leaves its tensors and the state of the process as they were, and uses as many threads as torch says."""

from __future__ import annotations

import os
import random
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import dcnops
from dcnops._backends.cpu import threads
from dcnops.adapters.torch import deform_conv2d, deform_roi_pool
from dcnops.adapters.torch.arrays import as_array

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def arguments(dtype: torch.dtype) -> dict[str, Tensor]:
    """Return tensors of several memory formats that require gradients, except for the regions."""
    shapes = {
        "input": (1, 4, 7, 6),
        "offset": (1, 18, 7, 6),
        "weight": (3, 4, 3, 3),
        "bias": (3,),
        "mask": (1, 9, 7, 6),
        "shift": (2, 2, 2, 2),
        "modulation": (2, 2, 2),
    }
    tensors = {name: torch.randn(shape).to(dtype) for name, shape in shapes.items()}
    tensors["input"] = tensors["input"].contiguous(memory_format=torch.channels_last)
    tensors["weight"] = tensors["weight"].transpose(2, 3)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return {**tensors, "rois": torch.tensor([[0.0, 1, 1, 5, 5], [0, 0, 2, 3, 4]])}


def call(input: Tensor, offset: Tensor, weight: Tensor, bias: Tensor, mask: Tensor, **pooling: Tensor) -> None:
    """Run both operations forward and backward."""
    outputs = [
        deform_conv2d(input, offset, weight, bias, padding=1, mask=mask),
        deform_roi_pool(input, pooling["rois"], pooling["shift"], pooling["modulation"], output_size=2),
    ]
    sum(output.sum() for output in outputs).backward()


def state_of_tensors(tensors: dict[str, Tensor]) -> list[Any]:
    return [
        (
            tensor._version,
            tensor.shape,
            tensor.stride(),
            tensor.data_ptr(),
            tensor.untyped_storage().nbytes(),
            tensor.untyped_storage().resizable(),
            tensor.requires_grad,
            tensor.tolist(),
        )
        for tensor in tensors.values()
    ]


def state_of_process() -> dict[str, Any]:
    return {
        "environment": dict(os.environ),
        "warning filters": list(warnings.filters),
        "random": random.getstate(),
        "random of NumPy": str(np.random.get_state()),  # noqa: NPY002
        "random of torch": torch.get_rng_state().tolist(),
        "error state": np.geterr(),
        "threads": (dcnops.get_num_threads(), torch.get_num_threads(), torch.get_num_interop_threads()),
        "threads of a call": getattr(dcnops._threads._LOCAL, "threads", 0),
        "precision": (torch.get_float32_matmul_precision(), torch.backends.cuda.matmul.allow_tf32),
        "modes": (torch.is_grad_enabled(), torch.are_deterministic_algorithms_enabled(), torch.get_default_dtype()),
    }


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_call_leaves_everything_as_it_was(dtype: torch.dtype):
    tensors = arguments(dtype)
    call(**tensors)  # imports and compiles
    for tensor in tensors.values():
        tensor.grad = None
    process, before = state_of_process(), state_of_tensors(tensors)
    assert all(state[5] for state in before)
    call(**tensors)
    assert state_of_tensors(tensors) == before
    assert state_of_process() == process


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3),
        torch.randn(4, 6)[::2, 1::2],
        torch.randn(1).expand(3),
        torch.randn(0, 3),
        torch.tensor(2.0),
        torch.randn(3, dtype=torch.complex64).conj().imag,
        *(torch.randn(2, 3).to(dtype) for dtype in DTYPES),
    ],
    ids=lambda tensor: f"{tensor.dtype}{list(tensor.shape)}",
)
def test_arrays_share_memory_and_keep_it(tensor: Tensor):
    expected = tensor.detach().clone().double().numpy()
    array = as_array(tensor)
    assert array.flags.writeable and tensor.untyped_storage().resizable()
    assert array.ctypes.data == tensor.data_ptr() or tensor.is_neg() or not array.size
    del tensor
    np.testing.assert_array_equal(array.astype(np.float64), expected)


@pytest.fixture
def helpers(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Record the helper threads that each loop asks for."""
    asked: list[int] = []
    run = threads._POOL.run

    def record(work: Any, helpers: int) -> None:
        asked.append(helpers)
        run(work, helpers)

    monkeypatch.setattr(threads._POOL, "run", record)
    before = torch.get_num_threads()
    yield asked
    torch.set_num_threads(before)


@pytest.mark.parametrize("number", [1, 3])
def test_a_call_uses_as_many_threads_as_torch(helpers: list[int], number: int):
    input, offset, weight = torch.randn(1, 32, 20, 20), torch.zeros(1, 18, 20, 20), torch.randn(16, 32, 3, 3)
    rois = torch.tensor([[0.0, 1, 1, 15, 15]])
    torch.set_num_threads(number)
    deform_conv2d(input.requires_grad_(), offset, weight, padding=1).sum().backward()
    deform_roi_pool(input, rois, output_size=7).sum().backward()
    assert max(helpers, default=0) == number - 1
    helpers.clear()
    arrays = [tensor.detach().numpy() for tensor in (input, offset, weight)]
    dcnops.deform_conv2d(*arrays, padding=1)
    assert max(helpers, default=0) == dcnops.get_num_threads() - 1

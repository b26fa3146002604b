"""Parity with the operation of torchvision on random cases: outputs and gradients."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchvision.ops import deform_conv2d

from tests.cases import ConvCase, assert_close, away_from_kinks, conv_cases


@given(case=conv_cases(dtypes=("float32", "float64"), max_batch=3, symmetric=True), seed=st.integers(0, 2**32 - 1))
def test_outputs_and_gradients(run, case: ConvCase, seed: int):
    # Avoid integer coordinates: the offset gradient of torchvision lacks the box test, which matters at exactly -1, and
    # torchvision sums coordinates in a different order, which matters next to any kink.
    case = away_from_kinks(case, seed)
    tensors = {name: torch.from_numpy(getattr(case, name)).requires_grad_() for name in case.needs}
    output = deform_conv2d(**tensors, **{name: getattr(case, name) for name in case.parameters})
    assert_close(run.forward(case), output.detach().numpy().astype(np.float64), case.dtype, slack=4)
    output.backward(torch.from_numpy(case.grad_out))
    for name, gradient in run.backward(case).items():
        theirs = tensors[name].grad
        assert theirs is not None
        assert_close(gradient, theirs.numpy().astype(np.float64), case.dtype, name, slack=4)

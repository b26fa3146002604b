"""Small calls of every kernel for compute-sanitizer: `compute-sanitizer python -m tests.cuda.sanitizer_cases`.

Memory is not pooled, so that the sanitizer knows the end of every array.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator

from tests.cases import Case, assert_close, make_aggregate, make_attention, make_conv, make_roi_pool
from tests.conftest import EmulatedRunner, GpuRunner, Runner


def _cases() -> Iterator[tuple[str, Case]]:
    for dtype in ("float16", "float32"):
        yield f"fused, {dtype}", make_conv(N=1, C=64, O=72, H=9, W=7, dtype=dtype, seed=1)
    yield "columns", make_conv(N=2, C=12, O=6, H=6, W=5, G=2, D=3, seed=2)
    yield "lists", make_conv(N=1, C=32, O=4, H=7, W=6, spread=4.0, seed=3)
    yield "RoI pooling", make_roi_pool(C=16, R=6, seed=4)
    yield "RoI pooling in 16 bits", make_roi_pool(C=24, R=4, sampling_ratio=0, dtype="float16", seed=5)
    yield "attention", make_attention(N=2, M=3, D=32, Lq=9, points=(3, 6), spread=0.6, seed=6)
    yield "aggregation in 16 bits", make_aggregate(G=3, D=24, packed=True, dtype="float16", seed=7)


def main() -> int:
    runners: dict[str, Runner]
    if "--rehearse" in sys.argv:
        runners = {"default": EmulatedRunner(), "deterministic": EmulatedRunner(deterministic=True)}
    else:
        import cupy

        cupy.cuda.set_allocator(None)
        runners = {"default": GpuRunner(), "deterministic": GpuRunner(deterministic=True)}
    for name, case in _cases():
        expected, expected_gradients = case.expected(), case.expected_gradients()
        for mode, runner in runners.items():
            assert_close(runner.forward(case), expected, case.dtype)
            gradients = runner.backward(case)
            for argument in case.needs:
                assert_close(gradients[argument], expected_gradients[argument], case.dtype, argument)
            print(f"{name}, {mode}: correct", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Runs the shipped CUDA sources under pytest, on a machine without a GPU.

`host_engine` is a `dcnops._backends.cuda.engine.Engine` over NumPy: the launch plans and kernels are the library's, the
kernels compiled by the host compiler and their threads run as fibers. What it catches, and the rules a kernel must obey
for that, stand in `host_compiler.py`.
"""

from tests.cuda.emulator.host_compiler import HostCompiler, HostKernel, KernelFault
from tests.cuda.emulator.host_engine import HOPPER, HostArrays, host_engine, matmul
from tests.cuda.emulator.sanitizers import is_sanitized, run_sanitized

__all__ = [
    "HOPPER",
    "HostArrays",
    "HostCompiler",
    "HostKernel",
    "KernelFault",
    "host_engine",
    "is_sanitized",
    "matmul",
    "run_sanitized",
]

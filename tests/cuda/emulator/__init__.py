"""Emulator that runs the shipped CUDA sources without a GPU, see README.md."""

from tests.cuda.emulator.host_compiler import HostCompiler, HostKernel, KernelFault
from tests.cuda.emulator.host_engine import HOPPER, HostArrays, host_engine, matmul
from tests.cuda.emulator.sanitizers import is_sanitized, reports_of_each, run_each, run_sanitized

__all__ = [
    "HOPPER",
    "HostArrays",
    "HostCompiler",
    "HostKernel",
    "KernelFault",
    "host_engine",
    "is_sanitized",
    "matmul",
    "reports_of_each",
    "run_each",
    "run_sanitized",
]

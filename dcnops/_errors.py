"""Exceptions of the library; each message names the argument, what it needs and what it got."""


class DcnError(RuntimeError):
    """Base class of all exceptions that dcnops raises itself. PyTorch's operators raise a `RuntimeError` too."""


class ShapeError(DcnError, ValueError):
    """An array has the wrong rank or the wrong size."""


class ArgumentError(DcnError, ValueError):
    """A parameter (stride, padding, output_size, needs, ...) or a value in an array is invalid."""


class DtypeError(DcnError, TypeError):
    """An argument is not a NumPy or CuPy array, or its dtype is not supported."""


class DeviceError(DcnError, ValueError):
    """The arrays of one call belong to different libraries or devices."""


class KernelCompileError(DcnError):
    """A CUDA kernel failed to compile; the message contains the compiler's log."""

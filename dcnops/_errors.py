"""The exceptions of the library: each names the argument, what it needs and what it got."""


class DcnError(Exception):
    """Base class of every exception that dcnops raises on purpose."""


class ShapeError(DcnError, ValueError):
    """An array has the wrong rank or the wrong size."""


class ArgumentError(DcnError, ValueError):
    """A parameter (stride, padding, output_size, needs, ...) or a value in an array has no meaning."""


class DtypeError(DcnError, TypeError):
    """An argument is not an array of a supported library, or its dtype is not supported."""


class DeviceError(DcnError, ValueError):
    """Arrays of one call live in different libraries or on different devices."""


class KernelCompileError(DcnError, RuntimeError):
    """A CUDA kernel could not be compiled; the message carries the compiler's log."""

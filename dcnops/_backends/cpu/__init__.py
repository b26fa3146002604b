"""NumPy arrays: compiled loops on the CPU's cores."""

from dcnops._backends.cpu.deform_conv2d import deform_conv2d, deform_conv2d_backward

__all__ = ["deform_conv2d", "deform_conv2d_backward"]

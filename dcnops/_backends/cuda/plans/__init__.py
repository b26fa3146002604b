"""Which kernels run, in which order, with which grid and scratch memory, against an `Engine`.

The plans know no array library: CuPy executes them on a GPU, the tests execute them on a CPU. Inside, everything is
channels-last, and work goes through in chunks whose scratch memory stays in the L2 cache of a GPU.
"""

from dcnops._backends.cuda.plans.deform_conv2d_backward import deform_conv2d_backward
from dcnops._backends.cuda.plans.deform_conv2d_forward import deform_conv2d
from dcnops._backends.cuda.plans.deform_roi_pool import deform_roi_pool, deform_roi_pool_backward

__all__ = ["deform_conv2d", "deform_conv2d_backward", "deform_roi_pool", "deform_roi_pool_backward"]

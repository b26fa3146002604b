"""Launch plans: which kernels run, in which order, with which grid and scratch memory, on an `Engine`.

The plans do not depend on an array library: CuPy runs them on a GPU, the tests run them on a CPU. Internally, arrays
are channels-last, and work is cut into chunks so that scratch memory stays in the L2 cache of a GPU. A plan is a
function of an immutable key that holds everything but addresses, so engines cache it.
"""

from dcnops._backends.cuda.plans.deform_attention_backward import deform_aggregate_backward, ms_deform_attn_backward
from dcnops._backends.cuda.plans.deform_attention_forward import deform_aggregate, ms_deform_attn
from dcnops._backends.cuda.plans.deform_conv2d_backward import deform_conv2d_backward
from dcnops._backends.cuda.plans.deform_conv2d_forward import deform_conv2d
from dcnops._backends.cuda.plans.deform_roi_pool_backward import deform_roi_pool_backward
from dcnops._backends.cuda.plans.deform_roi_pool_forward import deform_roi_pool

__all__ = [
    "deform_aggregate",
    "deform_aggregate_backward",
    "deform_conv2d",
    "deform_conv2d_backward",
    "deform_roi_pool",
    "deform_roi_pool_backward",
    "ms_deform_attn",
    "ms_deform_attn_backward",
]

"""Deformable convolution and its gradients in compiled JAX code: `python examples/quickstart_jax.py`."""

import sys

try:
    import jax
    import jax.numpy as jnp
except ImportError:
    sys.exit("This example needs JAX: pip install 'dcnops[jax]'.")

from dcnops.adapters.jax import deform_conv2d, deform_roi_pool

N, C, H, W, O, K = 1, 8, 32, 48, 16, 9
keys = jax.random.split(jax.random.key(0), 4)
image = jax.random.normal(keys[0], (N, C, H, W))
weight = jax.random.normal(keys[1], (O, C, 3, 3)) / (K * C) ** 0.5

# Channels 2k and 2k + 1 of offset move tap k of the kernel: first dy (pixels down), then dx (pixels to the right).
# Taps are in row-major order: channels 8 and 9 belong to the centre of a 3x3 kernel. Channel k of mask weights tap k.
sampling = {
    "offset": jax.random.normal(keys[2], (N, 2 * K, H, W)),
    "mask": jax.random.uniform(keys[3], (N, K, H, W)),
}


@jax.jit
@jax.value_and_grad
def loss(sampling):
    output = deform_conv2d(image, weight=weight, padding=1, **sampling)
    return jnp.mean(output**2)


before, gradients = loss(sampling)
for name, gradient in gradients.items():
    print(f"gradient of {name:6}: {gradient.shape}")
after, _ = loss(sampling | {"offset": sampling["offset"] - 100 * gradients["offset"]})
print(f"mean square of the output {before:.4f}, after a gradient step on the offsets {after:.4f}")

rois = jnp.array([[0, 4, 4, 20, 12], [0, 10, 2, 40, 30]], jnp.float32)
print(f"pooled regions: {deform_roi_pool(image, rois, output_size=(7, 7)).shape}")

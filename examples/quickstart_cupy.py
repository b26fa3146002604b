"""Deformable convolution and its gradients on CuPy arrays on a GPU: `python examples/quickstart_cupy.py`."""

import sys

try:
    import cupy
except ImportError:
    sys.exit("This example needs CuPy: pip install 'dcnops[cuda13]' (or 'dcnops[cuda12]' for a driver of CUDA 12).")
if not cupy.is_available():
    sys.exit("This example needs an NVIDIA GPU with a driver for CUDA 12 or 13; quickstart_numpy.py runs without one.")

import dcnops

N, C, H, W, O, K = 4, 64, 100, 168, 64, 9
random = cupy.random.default_rng(0)
image = random.standard_normal((N, C, H, W), cupy.float32)
weight = random.standard_normal((O, C, 3, 3), cupy.float32) / (K * C) ** 0.5

# Channels 2k and 2k + 1 of offset move tap k of the kernel: first dy (pixels down), then dx (pixels to the right).
# Taps are in row-major order: channels 8 and 9 belong to the centre of a 3x3 kernel. Channel k of mask weights tap k.
offset = random.standard_normal((N, 2 * K, H, W), cupy.float32)
mask = random.random((N, K, H, W), cupy.float32)

output = dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask)
print(f"output {output.shape} {output.dtype} on GPU {output.device.id}")

loss = cupy.mean(output**2)
gradients = dcnops.deform_conv2d_backward(2 * output / output.size, image, offset, weight, padding=1, mask=mask)
for name, gradient in gradients._asdict().items():
    print(f"gradient of {name:6}: {None if gradient is None else gradient.shape}")

offset -= 1000 * gradients.offset
better = cupy.mean(dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask) ** 2)
print(f"mean square of the output {float(loss):.4f}, after a gradient step on the offsets {float(better):.4f}")

half = dcnops.deform_conv2d(*(array.astype(cupy.float16) for array in (image, offset, weight)), padding=1)
print(f"output in {half.dtype} without a mask: {half.shape}")

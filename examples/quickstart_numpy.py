"""Deformable convolution and its gradients on NumPy arrays: `python examples/quickstart_numpy.py`."""

import numpy as np

import dcnops

N, C, H, W, O, K = 1, 8, 32, 48, 16, 9
random = np.random.default_rng(0)
image = random.standard_normal((N, C, H, W), np.float32)
weight = random.standard_normal((O, C, 3, 3), np.float32) / np.float32(np.sqrt(K * C))

# Channels 2k and 2k + 1 of offset move tap k of the kernel: first dy (pixels down), then dx (pixels to the right).
# Taps are in row-major order: channels 8 and 9 belong to the centre of a 3x3 kernel. Channel k of mask weights tap k.
offset = np.zeros((N, 2 * K, H, W), np.float32)
mask = np.ones((N, K, H, W), np.float32)

plain = dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask)
print(f"output {plain.shape}: zero offsets and a mask of ones make a regular convolution")

offset[:, 1::2] = 2
moved = dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask)
same = np.allclose(moved[..., 1:-3], plain[..., 3:-1], atol=1e-5)
print(f"every tap two pixels to the right gives the same output two pixels further left: {same}")

offset = random.standard_normal(offset.shape, np.float32)
mask = random.random(mask.shape, np.float32)
output = dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask)
loss = np.mean(output**2)
gradients = dcnops.deform_conv2d_backward(2 * output / output.size, image, offset, weight, padding=1, mask=mask)
for name, gradient in gradients._asdict().items():
    print(f"gradient of {name:6}: {None if gradient is None else gradient.shape}")

offset -= 100 * gradients.offset
better = np.mean(dcnops.deform_conv2d(image, offset, weight, padding=1, mask=mask) ** 2)
print(f"mean square of the output {loss:.4f}, after a gradient step on the offsets {better:.4f}")

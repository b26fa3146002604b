"""Deformable convolution in PyTorch, learning the position of a sample: `python examples/quickstart_torch.py`.

Needs PyTorch. Runs on a GPU if there is one, which also needs CuPy, and on the CPU otherwise.
"""

import sys

try:
    import torch
except ImportError:
    sys.exit("This example needs PyTorch: pip install 'dcnops[torch]'.")

from torch.nn.functional import avg_pool2d, mse_loss

from dcnops.adapters.torch import ModulatedDeformConv2dPack, deform_conv2d

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
image = 9 * avg_pool2d(torch.randn(4, 1, 48, 48, device=device), 9, 1, 4)  # smooth spots
target = torch.roll(image, shifts=(2, -3), dims=(2, 3))  # moved 2 rows down and 3 columns left

# A single tap. Its offset (dy, dx) is a learned parameter that all pixels share.
shift = torch.zeros(2, device=device, requires_grad=True)
weight = torch.ones(1, 1, 1, 1, device=device)
optimizer = torch.optim.Adam([shift], lr=0.1)
for step in range(101):
    output = deform_conv2d(image, shift[None, :, None, None].expand(4, 2, 48, 48), weight)
    loss = mse_loss(output[..., 6:-6, 6:-6], target[..., 6:-6, 6:-6])
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        dy, dx = shift.tolist()
        print(f"step {step:3d}: error {loss.item():.4f}, offset {dy:+.2f} rows, {dx:+.2f} columns")
print("true offset: -2 rows, +3 columns")

# As a layer of a network: a branch predicts offsets and masks from the features. It is initialised to zero, which makes
# the layer a regular convolution multiplied by 1/2.
layer = ModulatedDeformConv2dPack(1, 8, kernel_size=3, padding=1).to(device)
features = layer(image)
features.square().mean().backward()
print(f"layer output {tuple(features.shape)}, gradient of the branch {layer.conv_offset.weight.grad.norm():.3f}")

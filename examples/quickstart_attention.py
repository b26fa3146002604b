"""Multi-scale deformable attention in PyTorch, learning where to look: `python examples/quickstart_attention.py`.

Needs PyTorch. Runs on a GPU if there is one, which also needs CuPy, and on the CPU otherwise.
"""

import sys

try:
    import torch
except ImportError:
    sys.exit("This example needs PyTorch: pip install 'dcnops[torch]'.")

from torch.nn.functional import avg_pool2d, mse_loss

from dcnops.adapters.torch import MSDeformAttn, ms_deform_attn

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"

# Two feature maps of one image, with 16 channels: pixels row by row, one map after the other, and one head.
fine = 9 * avg_pool2d(torch.randn(1, 16, 32, 48, device=device), 9, 1, 4)
maps = (fine, avg_pool2d(fine, 2))
shapes = [(32, 48), (16, 24)]
value = torch.cat([features.flatten(2) for features in maps], dim=2).transpose(1, 2).unsqueeze(2)  # (1, S, 1, 16)

# One query with one sampling point on each map. What it must see is at (0.6, 0.4) of the image.
weights = torch.full((1, 1, 1, 2, 1), 0.5, device=device)
goal = torch.tensor([0.6, 0.4], device=device)
seen = ms_deform_attn(value, shapes, goal.expand(1, 1, 1, 2, 1, 2), weights)
location = torch.full((2,), 0.5, device=device, requires_grad=True)  # starts at the center
optimizer = torch.optim.Adam([location], lr=0.01)
for step in range(101):
    loss = mse_loss(ms_deform_attn(value, shapes, location.expand(1, 1, 1, 2, 1, 2), weights), seen)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if step % 25 == 0:
        x, y = location.tolist()
        print(f"step {step:3d}: error {loss.item():.4f}, location ({x:.3f}, {y:.3f})")
print("true location: (0.600, 0.400)")

# As a layer of a network, which predicts the sampling points and their weights: each head has three points on the fine
# map and five on the coarse one. Every query starts from a reference point.
layer = MSDeformAttn(d_model=16, n_levels=2, n_heads=4, n_points=[3, 5]).to(device)
query, reference_points = torch.randn(1, 100, 16, device=device), torch.rand(1, 100, 1, 2, device=device)
output = layer(query, reference_points, value.flatten(2), shapes)
output.square().mean().backward()
print(f"layer output {tuple(output.shape)}, gradient of the offsets {layer.sampling_offsets.weight.grad.norm():.4f}")

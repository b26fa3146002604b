"""Train a small network with and without deformable convolutions and compare them: `python examples/train_small.py`.

The task is to label each pixel of a drawn flower with the number of its petals. The flowers are rotated, scaled,
stretched and bent, so the pixels that reveal the number are at a different position in each flower. The script needs
PyTorch; it needs no GPU and no data.
"""

import argparse
import math
import sys
import time

try:
    import torch
except ImportError:
    sys.exit("This example needs PyTorch: pip install 'dcnops[torch]'.")

from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from dcnops.adapters.torch import ModulatedDeformConv2dPack

SIZE = 48  # pixels of an image along each side
STRIDE = 4  # of the network, which predicts one label for 4x4 pixels
PETALS = (3, 4, 5)  # label 1, 2, 3; the background is 0


def draw_flowers(count: int, random: torch.Generator) -> tuple[Tensor, Tensor]:
    """Return noisy images [N, 1, H, W] of one flower each, and their labels [N, H/4, W/4]."""

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, 1, 1, generator=random)

    label = torch.randint(1, len(PETALS) + 1, (count, 1, 1), generator=random)
    petals = torch.tensor(PETALS)[label - 1]
    y, x = torch.meshgrid(torch.arange(SIZE), torch.arange(SIZE), indexing="ij")
    y, x = y - uniform(0.35 * SIZE, 0.65 * SIZE), x - uniform(0.35 * SIZE, 0.65 * SIZE)  # position
    angle = uniform(0, 2 * math.pi)
    y, x = angle.cos() * y - angle.sin() * x, angle.sin() * y + angle.cos() * x  # direction of the stretch
    size, stretch = uniform(8, 18), uniform(1, 1.8).sqrt()
    y, x = y / size * stretch, x / size / stretch
    y = y + uniform(-0.4, 0.4) * x**2  # bend
    petal_angle = petals * (torch.atan2(y, x) + uniform(0, 2 * math.pi))
    inside = torch.hypot(y, x) < 0.7 + 0.3 * petal_angle.cos()
    image = inside + 0.1 * torch.randn(count, SIZE, SIZE, generator=random)
    labels = torch.where(inside, label, 0)
    return image[:, None], labels[:, STRIDE // 2 :: STRIDE, STRIDE // 2 :: STRIDE]


def build_network(deformable: bool) -> nn.Sequential:
    """Return a network that ends in two regular or two deformable 3x3 convolutions and a classifier for each pixel.

    The regular network has more channels, to make up for the parameters of the offset branches.
    """
    width = 24 if deformable else 32
    conv = ModulatedDeformConv2dPack if deformable else nn.Conv2d
    layers = [nn.Conv2d(1, width, 5, stride=2, padding=2), nn.Conv2d(width, width, 3, stride=2, padding=1)]
    layers += [conv(width, width, 3, padding=1) for _ in range(2)]
    blocks = [nn.Sequential(layer, nn.BatchNorm2d(width), nn.ReLU()) for layer in layers]
    return nn.Sequential(*blocks, nn.Conv2d(width, len(PETALS) + 1, 1))


def train(network: nn.Module, steps: int, seed: int) -> None:
    """Minimise the cross entropy on newly drawn flowers."""
    random = torch.Generator().manual_seed(seed)
    class_weight = torch.tensor([0.2] + [1.0] * len(PETALS))  # most pixels are background
    optimizer = torch.optim.Adam(network.parameters(), lr=0.005)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.005, total_steps=steps)
    for _ in range(steps):
        images, labels = draw_flowers(32, random)
        loss = cross_entropy(network(images), labels, class_weight)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def accuracy(network: nn.Module, seed: int) -> float:
    """Return the share of flower pixels with the correct label, in per cent, for 500 new flowers."""
    images, labels = draw_flowers(500, torch.Generator().manual_seed(1_000_000 + seed))
    correct = network.eval()(images).argmax(dim=1) == labels
    return 100 * correct[labels > 0].float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=200, help="training steps of each network; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="seed of the weights and images; default: %(default)s")
    options = parser.parse_args()
    for name, value, low, high in (("steps", options.steps, 1, 10**6), ("seed", options.seed, 0, 2**62)):
        if not low <= value <= high:
            parser.error(f"--{name} must be between {low} and {high}, got {value!s:.60}")
    results = {}
    for name in ("regular", "deformable"):
        torch.manual_seed(options.seed)
        network = build_network(deformable=name == "deformable")
        begin = time.perf_counter()
        train(network, options.steps, options.seed)
        results[name] = accuracy(network, options.seed)
        size = sum(parameter.numel() for parameter in network.parameters())
        seconds = time.perf_counter() - begin
        print(f"{name:10}  {size} parameters  {seconds:3.0f} s  accuracy {results[name]:.1f} %")
    print(f"gain of the deformable network: {results['deformable'] - results['regular']:+.1f} points")


if __name__ == "__main__":
    main()

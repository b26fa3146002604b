"""The figures of spatial support from checkpoints."""

from __future__ import annotations

import dataclasses
import io
import shutil

import matplotlib.image
import pytest
import torch

from dcnops.adapters.torch.spatial_support import plots
from dcnops.detector.__main__ import main
from dcnops.detector.config import Config
from dcnops.detector.data import Category, write_synthetic
from dcnops.detector.model import build_detector, save_checkpoint
from dcnops.detector.predict import draw_spatial_support
from dcnops.detector.spatial_support_view import SpatialSupportView
from tests.detector.configurations import assignments

pytestmark = pytest.mark.slow

SMALL = assignments(network="backbone=small detector=mask min_size=64 max_size=64")
CATEGORIES = [Category(1, "club"), Category(3, "ring")]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    paths = {}
    for preset in ("regular", "dcnv2"):
        torch.manual_seed(0)
        config = Config().set([*SMALL, f"network.preset={preset}"])
        model = build_detector(config.network, 2)
        paths[preset] = folder / preset / "model.pth"
        paths[preset].parent.mkdir()
        save_checkpoint(paths[preset], model, config, CATEGORIES, 0)
    return paths


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_synthetic(folder, train=1, val=1, size=80, deformation=1, seed=0)
    return folder / "images" / "val_000000.jpg"


@pytest.mark.parametrize("figure", ["1", "2"])
def test_figures(figure, checkpoints, image, tmp_path, capsys):
    command = ["spatial-support", "--checkpoint", *map(str, checkpoints.values()), "--image", str(image)]
    command += ["--out", str(tmp_path), "--device", "cpu", "--budget", "10", "--figure", figure]
    nodes = ["--node", "20,30", "--node", "70,5"]
    if figure == "2":
        (tmp_path.parent / "names.txt").write_text("hammer\nhoop\n")
        nodes = ["--roi", "10,10,50,60", "--category", "hoop", "--categories", str(tmp_path.parent / "names.txt")]
    assert main([*command, *nodes]) == 0
    names = {f"{image.stem}-figure{figure}.png", f"{image.stem}-offsets-dcnv2.png"}  # the other has no offsets
    assert {path.name for path in tmp_path.iterdir()} == names
    assert capsys.readouterr().out.split() == [str(tmp_path / name) for name in sorted(names)]
    pixels = matplotlib.image.imread(tmp_path / f"{image.stem}-figure{figure}.png")
    assert pixels.shape[1] > 100 and pixels[..., :3].std() > 0.05


def test_nodes_are_where_the_image_says(image):
    """In an image that the network enlarges and pads."""
    config = Config().set([*SMALL[:2], "network.min_size=120", "network.max_size=200", "network.preset=regular"])
    torch.manual_seed(0)
    network = build_detector(config.network, 2)
    figure = draw_spatial_support(
        {"a network": network}, torch.rand(3, 60, 90), ["club", "ring"], SpatialSupportView(node=((45, 30),), budget=10)
    )
    panel = figure.axes[0]
    assert panel.get_title() == "x 45, y 30"
    # 120x180 pixels are padded to 128x192; conv5 has a pixel at each multiple of 32.
    assert panel.get_xlim() == (-0.5, 191.5)
    assert [axes.get_ylabel() for axes in figure.axes] == [
        "effective sampling points",
        "effective receptive field",
        "saliency region, error ≤ 10%",
    ]
    cross = panel.patches[0]
    assert (cross.get_x() + cross.get_width() / 2, cross.get_y() + cross.get_height() / 2) == (96, 64)


def test_regions_of_the_background_and_of_categories():
    config = Config().set([*SMALL, "network.preset=dcnv2", "network.score_threshold=1"])  # nothing is an object
    torch.manual_seed(1)
    network = build_detector(config.network, 2)
    view = SpatialSupportView(figure=2, budget=10)
    view_of_region = dataclasses.replace(view, roi=((5, 5, 30, 40),))
    odd = "$\\frac{$\ud800"  # no formula, and no text that can be drawn
    for roi, category, title in (((), None, "background"), (((5, 5, 30, 40),), odd, r"$\frac{$\ud800")):
        chosen = dataclasses.replace(view, roi=roi, category=category)
        figure = draw_spatial_support({odd: network}, torch.rand(3, 64, 64), ["club", odd], chosen)
        assert figure.axes[0].get_title() == title
        figure.savefig(io.BytesIO())
    for label, title in enumerate(("background", "club")):
        with torch.no_grad():
            network.roi_heads.box_predictor.cls_score.bias[label] += 1000 * (1 + label)
        figure = draw_spatial_support({"a": network}, torch.rand(3, 64, 64), ["club", odd], view_of_region)
        assert figure.axes[0].get_title() == title


def test_nodes_of_regions(monkeypatch):
    """Bins show their effect on a score; the other views are of all features, or of the score on request."""
    seen = {}

    def recording(name):
        function = getattr(plots, name)

        def record(network, image, node, **options):
            seen[name] = node
            return function(network, image, node, **options)

        return record

    for name in ("effective_bin_locations", "effective_receptive_field", "error_bounded_saliency_region"):
        monkeypatch.setattr(plots, name, recording(name))
    network = build_detector(Config().set([*SMALL, "network.preset=dcnv2"]).network, 2)
    view = SpatialSupportView(figure=2, roi=((5, 5, 30, 40),), category="ring", budget=10)
    for part in ("features", "class"):
        draw_spatial_support(
            {"network": network}, torch.rand(3, 64, 64), ["club", "ring"], dataclasses.replace(view, part=part)
        )
        bins, field, region = seen.values()
        assert bins == ([5, 5, 30, 40], 2, "class")
        assert field == region == (([5, 5, 30, 40], None, "features") if part == "features" else bins)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--node", "500,3"], "--node must be in the image of 80x80 pixels, got 500,3"),
        (["--node", "5"], "must be 2 numbers with commas between them, got '5'"),
        (["--roi", "1,2,3,4"], "figure 1 is of pixels (--node), figure 2 of regions (--roi)"),
        (["--figure", "2", "--roi", "5,5,5,9"], "--roi must be x1,y1,x2,y2 with x1 < x2 and y1 < y2"),
        (
            ["--figure", "2", "--roi", "1,2,30,40", "--category", "cube"],
            "--category must be one of club, ring, got 'cube'",
        ),
        (["--layer", "backbone.nothing", "--node", "1,1"], "node must name a layer of the model"),
        (["--layer", "backbone", "--node", "1,1"], "gives OrderedDict"),
    ],
)
def test_mistakes(arguments, message, checkpoints, image, tmp_path, capsys):
    command = ["spatial-support", "--checkpoint", str(checkpoints["dcnv2"]), "--image", str(image)]
    assert main([*command, "--out", str(tmp_path), "--device", "cpu", "--budget", "10", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_networks_must_fit_each_other(checkpoints, image, tmp_path, capsys):
    copy = tmp_path / "other" / "model.pth"
    copy.parent.mkdir()
    shutil.copy(checkpoints["regular"], copy)
    both = ["--checkpoint", str(checkpoints["regular"]), str(copy)]
    command = ["spatial-support", "--image", str(image), "--out", str(tmp_path), "--device", "cpu"]
    command += ["--budget", "10", "--node", "9,9"]
    assert main([*command, *both]) == 0
    assert main([*command, "--checkpoint", str(copy), str(copy), str(copy)]) == 2
    assert "networks with the same preset must lie in different folders" in capsys.readouterr().err

"""Costs of the presets: exact increments, and every cell of the paper's Table 1."""

from __future__ import annotations

import json
import re

import pytest
import torch

from dcnops.detector.config import Config
from dcnops.detector.model import Count, cost_rows, cost_table, count, flops
from dcnops.detector.model.flops import count_presets
from dcnops.detector.presets import PRESETS, Preset

pytestmark = pytest.mark.slow

INCREMENTS = {
    "dconv-c5": (248_886, 1_045_094_400, 261_273_600),
    "dconv-c4c5": (497_826, 2_090_188_800, 1_306_368_000),
    "dconv-c3c5": (580_842, 3_475_353_600, 2_691_532_800),
    "dcnv1": (1_478_296, 2_274_406_400, 1_490_585_600),
    "dconv-c3c5-dpool": (1_810_252, 4_704_665_600, 3_920_844_800),
    "dcnv2": (14_917_618, 19_257_190_400, 18_081_459_200),
}
# Bounds of the paper's `regular` rows before rounding, derived from its other rows: Mi parameters, Gi multiply-adds.
BASELINES = {"faster": ((51.250, 51.275), (196.768, 196.777)), "mask": ((39.524, 39.540), (303.498, 303.507))}


@pytest.fixture(scope="module")
def counts():
    by_detector = {
        detector: count_presets(Config().set([f"network.detector={detector}"]).network) for detector in BASELINES
    }
    return by_detector.__getitem__


@pytest.mark.parametrize("detector", BASELINES)
@pytest.mark.parametrize("preset", INCREMENTS)
def test_increments(counts, detector, preset):
    parameters, macs = INCREMENTS[preset][0], INCREMENTS[preset][1 + (detector == "mask")]
    regular, counted = counts(detector)["regular"], counts(detector)[preset]
    assert (counted.parameters - regular.parameters, counted.macs - regular.macs) == (parameters, macs)


@pytest.mark.parametrize("detector", BASELINES)
@pytest.mark.parametrize("preset", PRESETS)
def test_printed_cells(counts, detector, preset):
    printed = getattr(PRESETS[preset], detector)
    if printed is None:
        assert (detector, preset) == ("mask", "regular-roipool")
        return
    regular, counted = counts(detector)["regular"], counts(detector)[preset]
    for baselines, cell, unit, more in zip(
        BASELINES[detector],
        printed,
        (2**20, 2**30),
        (counted.parameters - regular.parameters, counted.macs - regular.macs),
        strict=True,
    ):
        margin = 1e-3  # the bounds are rounded too
        for baseline in (baselines[0] + margin, baselines[1] - margin):
            assert round(baseline + more / unit, 1) == cell


def test_pooling_and_mimicking_cost_nothing_more(counts):
    for detector in BASELINES:
        assert counts(detector)["regular-roipool"] == counts(detector)["regular"]
        assert counts(detector)["dcnv2-mimic"] == counts(detector)["dcnv2"]


def test_count_of_a_whole_network():
    """The regular Faster R-CNN with ResNet-50 for 80 categories."""
    counted = count(Config().set(["network.preset=regular"]).network)
    resnet50 = 25_557_032 - 53_120 - (2048 * 1000 + 1000)  # torchvision's count less BatchNorm and classifier
    neck = 2048 * 256 + 256
    rpn = 1024 * 1024 * 9 + 1024 + (1024 + 1) * 15 * 5
    head = (12544 + 1) * 1024 + (1024 + 1) * 1024 + (1024 + 1) * 81 * 5
    assert counted.parameters == resnet50 + neck + rpn + head


def test_separate_branches_cost_parameters_only(counts):
    """One branch per level, as in other implementations, and deformable pooling of the masks."""
    shared = counts("mask")["dcnv2"]
    branch = 12544 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 147 + 147
    own = count(Config().set(["network.detector=mask", "network.share_branch=false"]).network)
    assert own == Count(shared.parameters + 3 * branch, shared.macs)
    masks = count(Config().set(["network.detector=mask", "network.deform_mask_pool=true"]).network)
    mask_branch = 4 * 12544 * 1024 + 1024 + 1024 * 1024 + 1024 + 1024 * 4 * 147 + 4 * 147
    assert masks.parameters == shared.parameters + mask_branch
    assert masks.macs == shared.macs + 100 * (mask_branch - 2 * 1024 - 4 * 147)


def test_table_and_rows(monkeypatch):
    some = ["regular", "dconv-c3c5", "dcnv2-mimic"]
    monkeypatch.setattr(flops, "PRESETS", {preset: PRESETS[preset] for preset in some})
    network = Config().set(["network.backbone=resnet101"]).network
    rows = json.loads(json.dumps(cost_rows(network)))
    assert [row["preset"] for row in rows] == some
    assert rows[-1]["paper"] is None  # the paper has ResNet-50 only
    # 30 deformable convolutions; the first four and the last three are those of ResNet-50.
    assert rows[1]["increment"]["parameters"] == 580_842 + 17 * (18 * 9 * 256 + 18)
    table = cost_table(Config().network)
    assert "14,917,618" in table and "65.5" in table and len(table.splitlines()) == 3 + len(some)


def test_a_new_preset_needs_no_printed_costs(monkeypatch):
    monkeypatch.setitem(PRESETS, "mine", Preset("modulated", ("layer4",), "deformable"))
    monkeypatch.setattr(flops, "PRESETS", {preset: PRESETS[preset] for preset in ("regular", "mine")})
    network = Config().set(["network.preset=mine"]).network
    row = next(row for row in cost_rows(network) if row["preset"] == "mine")
    assert row["paper"] is None and row["increment"]["parameters"] > 0
    assert re.search(r"^mine +[\d.]+ +- ", cost_table(network), re.MULTILINE)


def test_nothing_is_computed():
    state = torch.random.get_rng_state()
    count(Config().network)
    assert torch.equal(torch.random.get_rng_state(), state)

"""Checkpoints: round trips, invalid files, interrupted saves."""

from __future__ import annotations

import os
import pickle
import re
import signal
import traceback
from pathlib import Path

import pytest
import torch

from dcnops.detector.config import Config
from dcnops.detector.data import Category
from dcnops.detector.errors import UserError
from dcnops.detector.model import (
    build_detector,
    load_checkpoint,
    load_detector,
    restore_model,
    save_checkpoint,
)
from dcnops.detector.model import checkpoint as checkpoint_module
from tests.detector.configurations import assignments

SMALL = "backbone=small min_size=48 max_size=64 anchor_sizes=16,32 neck_channels=8 head_channels=16 proposals_test=20"
CONFIG = Config().set(assignments(network=SMALL))
CATEGORIES = [Category(3, "Ä cat"), Category(7, "dog")]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    model = build_detector(CONFIG.network, len(CATEGORIES))
    # With the default weights there would be no detections to compare.
    torch.nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.5)
    return model


@pytest.fixture
def path(model, tmp_path):
    save_checkpoint(tmp_path / "model.pth", model, CONFIG, CATEGORIES, 5)
    return tmp_path / "model.pth"


def refused(path: Path, pattern: str, function=load_checkpoint) -> None:
    with pytest.raises(UserError, match=pattern) as raised:
        function(path)
    message = str(raised.value)
    assert message.startswith(str(path)) and "\n" not in message and len(message) < 300


def test_round_trip(model, path):
    loaded, config, categories = load_detector(path, CPU)
    assert config == CONFIG and categories == CATEGORIES and not loaded.training
    image = torch.rand(3, 48, 60)
    model.eval()
    with torch.no_grad():
        (found,), (expected,) = loaded([image]), model([image])
    assert len(expected["scores"]) > 0
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert list(path.parent.iterdir()) == [path]


def test_options_of_testing_can_be_changed(path):
    loaded, config, _ = load_detector(path, CPU, ["network.max_detections=3"])
    assert config.network.max_detections == 3 and loaded.roi_heads.detections_per_img == 3
    with pytest.raises(UserError, match=r"network\.nothing"):
        load_detector(path, CPU, ["network.nothing=3"])
    refused(
        path, "does not fit the configured network", lambda path: load_detector(path, CPU, ["network.preset=dcnv1"])
    )


def test_entries_for_resuming(model, tmp_path):
    path = tmp_path / "checkpoint.pth"
    save_checkpoint(path, model, CONFIG, CATEGORIES, 9, {"optimizer": {"state": {0: torch.ones(2)}}, "images": 8})
    content = load_checkpoint(path)
    assert content["format"] == 1 and content["iteration"] == 9 and content["images"] == 8
    assert content["categories"] == CATEGORIES and content["config"] == CONFIG.to_dict()
    assert torch.equal(content["optimizer"]["state"][0], torch.ones(2))


def test_invalid_files(model, path, tmp_path):
    refused(tmp_path / "absent.pth", "there is no such checkpoint")
    refused(tmp_path, "is a folder: give a checkpoint in it")
    complete = path.read_bytes()
    damaged = tmp_path / "damaged.pth"
    for content in (b"", b"text", pickle.dumps({"format": 1}), complete[: len(complete) // 2], complete[:-100]):
        damaged.write_bytes(content)
        refused(damaged, "not a checkpoint of this program, or only a part")
    torch.save([1, 2], damaged)
    refused(damaged, "has no format number")
    torch.save(model.state_dict(), damaged)
    refused(damaged, "has no format number")
    good = load_checkpoint(path) | {"categories": [[1, "a"], [2, "b"]]}
    for change, pattern in (
        ({"format": 2}, "format 2, this program reads 1"),
        ({"model": [1]}, "'model' is missing or no dict"),
        ({"iteration": None}, "'iteration' is missing or no int"),
        ({"categories": [[1]]}, r"category \[1\] is not \[id, name\]"),
        ({"categories": [["a", 1]]}, "is not"),
        ({"categories": [[1, "a"], [1, "b"]]}, "several categories with the same id"),
        ({"iteration": -1}, "its iteration is -1"),
        ({"iteration": True}, "its iteration is True"),
    ):
        torch.save(good | change, damaged)
        refused(damaged, pattern)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Validating sparse tensor")
def test_a_checkpoint_that_does_not_fit(model, path, tmp_path):
    changed = tmp_path / "changed.pth"
    good = load_checkpoint(path) | {"categories": [[1, "a"], [2, "b"]]}
    state = good["model"]
    first = next(iter(state))
    for change, pattern in (
        ({"categories": [[1, "a"], [2, "b"], [3, "c"]]}, r"cls_score\.weight has the shape \[3, 16\], but \[4, 16\]"),
        ({"model": {name: value for name, value in state.items() if name != first}}, f"{first} is missing in the"),
        ({"model": state | {"more": torch.ones(1)}}, "more is unknown to the network"),
        ({"model": state | {first: 5}}, f"{first} has the shape"),
        ({"model": state | {first: state[first].int()}}, f"{first} has the data type torch.int32"),
        ({"model": state | {first: state[first].to(torch.complex64)}}, f"{first} has the data type torch.complex64"),
        ({"model": state | {first: state[first].to_sparse()}}, f"{first} is not a dense tensor"),
        ({"model": state | {first: state[first].double() + 1e300}}, f"{first} has values that are not finite"),
        ({"model": state | {1: torch.ones(1)}}, "1 is unknown"),
        ({"config": {"network": {"preset": "dcnv3"}}}, "configuration that this program cannot use, network.preset"),
        ({"config": {"network": 5}}, "configuration that this program cannot use"),
    ):
        torch.save(good | change, changed)
        refused(changed, pattern, lambda path: load_detector(path, CPU))
    with pytest.raises(UserError, match=r"^x.pth: does not fit .*cls_score.weight has the shape \[3, 16\]"):
        restore_model(build_detector(CONFIG.network, 4), state, Path("x.pth"))


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 4096])
def test_damage_is_found_by_the_checksums(path, place, size):
    data = bytearray(path.read_bytes())
    start = int(place * len(data))
    data[start : start + size] = bytes(255 - value for value in data[start : start + size])
    path.write_bytes(data)
    refused(path, "is damaged")


def test_a_link_in_place_of_the_partial_file_is_not_followed(model, path):
    precious = path.with_name("precious")
    precious.write_text("text")
    path.with_name(".model.pth.partial").symlink_to(precious)
    save_checkpoint(path, model, CONFIG, CATEGORIES, 6)
    assert precious.read_text() == "text" and load_checkpoint(path)["iteration"] == 6


class Malicious:
    def __init__(self, victim: Path) -> None:
        self.victim = victim

    def __reduce__(self):
        return os.mkdir, (str(self.victim),)


def test_weights_that_are_not_finite_are_refused(path):
    content = torch.load(path, weights_only=True)
    content["model"]["roi_heads.box_head.fc6.weight"][3, 4] = float("nan")
    torch.save(content, path)
    refused(path, r"fc6\.weight has values that are not finite", lambda file: load_detector(file, CPU))


def test_a_checkpoint_cannot_run_code(path, tmp_path):
    victim, bad = tmp_path / "victim", tmp_path / "bad.pth"
    content = load_checkpoint(path)
    for more in ({"optimizer": Malicious(victim)}, {"config": Malicious(victim)}, {"path": Path("a")}):
        torch.save(content | more, bad)
        refused(bad, "is refused, as a checkpoint holds tensors", lambda path: load_detector(path, CPU))
    bad.write_bytes(pickle.dumps(Malicious(victim)))
    refused(bad, "is not a checkpoint")
    assert not victim.exists()


def test_a_save_that_fails_leaves_the_old_file(model, path, monkeypatch):
    before = path.read_bytes()

    def disk_full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_module.os, "fsync", disk_full)
    with pytest.raises(UserError, match=rf"^{re.escape(str(path))}: cannot be written \(disk full: No space left"):
        save_checkpoint(path, model, CONFIG, CATEGORIES, 6)
    monkeypatch.undo()
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]
    with pytest.raises(UserError, match="cannot be written"):
        save_checkpoint(path / "model.pth", model, CONFIG, CATEGORIES, 6)


def test_a_killed_save_leaves_the_old_file(model, path):
    before = path.read_bytes()
    process = os.fork()
    if process == 0:
        checkpoint_module.os.fsync = lambda descriptor: os.kill(os.getpid(), signal.SIGKILL)
        try:
            save_checkpoint(path, torch.nn.Linear(2, 2), Config(), [], 6)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert path.read_bytes() == before
    assert len(list(path.parent.iterdir())) == 2
    # What is left over is replaced by the next save.
    save_checkpoint(path, model, CONFIG, CATEGORIES, 6)
    assert load_checkpoint(path)["iteration"] == 6 and list(path.parent.iterdir()) == [path]

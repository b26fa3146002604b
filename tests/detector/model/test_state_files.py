"""Files with tensors of this and other programs: formats, and that nothing in them is executed."""

from __future__ import annotations

import collections
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dcnops.detector.errors import UserError
from dcnops.detector.model.state_files import Unread, read_file

WEIGHT = torch.arange(6.0).reshape(2, 3)


class Log:
    """Object of a class that a reader does not know."""

    def __init__(self) -> None:
        self.lines = ["epoch 1"]


class Attack:
    """Pickle that creates a folder when it is loaded."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (self.folder,)


def write(path: Path, content: dict[str, Any], kind: str) -> None:
    if kind == "torch":
        torch.save(content, path)
    elif kind == "legacy torch":
        torch.save(content, path, _use_new_zipfile_serialization=False)
    elif kind == "safetensors":
        save_file(content, path)
    elif kind == "npz":
        np.savez(path, **{name: value.numpy() for name, value in content.items()})
    else:
        arrays = {name: value.numpy() if isinstance(value, torch.Tensor) else value for name, value in content.items()}
        path.write_bytes(pickle.dumps(arrays, protocol=2))


@pytest.mark.parametrize(
    ("kind", "suffix"),
    [
        ("torch", ".pth"),
        ("legacy torch", ".pth"),
        ("safetensors", ".safetensors"),
        ("npz", ".npz"),
        ("pickle of arrays", ".pkl"),
    ],
)
def test_formats(kind, suffix, tmp_path):
    path = tmp_path / f"weights{suffix}"
    write(path, {"weight": WEIGHT}, kind)
    loaded = read_file(path)
    assert set(loaded) == {"weight"} and torch.equal(loaded["weight"], WEIGHT)


@pytest.mark.parametrize("kind", ["torch", "legacy torch"])
def test_objects_that_torch_does_not_know_are_not_read(kind, tmp_path):
    path = tmp_path / "weights.pth"
    state = collections.OrderedDict(weight=WEIGHT)
    write(path, {"state_dict": state, "meta": {"epoch": 12, "log": Log()}}, kind)
    loaded = read_file(path)
    assert torch.equal(loaded["state_dict"]["weight"], WEIGHT)
    assert loaded["meta"]["epoch"] == 12
    assert type(loaded["meta"]["log"]) is Unread


@pytest.mark.parametrize("kind", ["torch", "legacy torch", "pickle of arrays"])
def test_nothing_in_a_file_is_executed(kind, tmp_path):
    path, folder = tmp_path / "weights.pth", tmp_path / "made"
    write(path, {"weight": WEIGHT, "attack": Attack(folder)}, kind)
    try:
        assert type(read_file(path)["attack"]) is Unread
    except UserError as error:
        assert "without running code from it" in str(error)
    assert not folder.exists()
    if kind == "pickle of arrays":  # the file does attack a program that trusts it
        pickle.loads(path.read_bytes())
        assert folder.exists()


def test_damaged_and_missing_files(tmp_path):
    path = tmp_path / "weights.pth"
    with pytest.raises(UserError, match="there is no file of weights"):
        read_file(path)
    torch.save({"weight": torch.zeros(1000)}, path)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is damaged"):
        read_file(path)

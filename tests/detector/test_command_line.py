"""Commands: their output and their error messages."""

from __future__ import annotations

import dataclasses
import gc
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
import torch
from PIL import Image

from dcnops.detector.__main__ import main
from dcnops.detector.command_options import COMMANDS
from dcnops.detector.commands import RUN
from dcnops.detector.config import Config
from dcnops.detector.data import Category
from dcnops.detector.errors import UserError
from dcnops.detector.model import build_detector, flops, load_checkpoint, save_checkpoint
from dcnops.detector.presets import PRESETS
from tests.detector.configurations import assignments
from tests.detector.model.foreign_detectors import MMDETECTION, detector

pytestmark = pytest.mark.slow

TINY = assignments(
    network="min_size=64 max_size=64 anchor_sizes=8,16,32,48,64 roi_batch=16 proposals_train=50 proposals_test=20 "
    "score_threshold=0"
)
QUICK = assignments(training="epochs=1 workers=0 warmup_iterations=0 lr=0.001")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    assert main(["synth", str(folder), "--train", "4", "--val", "3", "--size", "64"]) == 0
    return folder


@pytest.fixture(scope="module")
def run(data):
    """Mask R-CNN after two iterations of training."""
    out = data.parent / "run"
    command = ["train", "--data", str(data), "--out", str(out), "--preset", "dcnv2", "--detector", "mask"]
    assert main([*command, "--backbone", "small", "--device", "cpu", "--set", *TINY, *QUICK]) == 0
    return out


@pytest.fixture
def fails(capsys):
    """Run a command that must fail with one line of text, and return it."""

    def command(*arguments: object) -> str:
        capsys.readouterr()
        assert main([str(argument) for argument in arguments]) == 2
        printed = capsys.readouterr()
        assert printed.out == ""
        assert printed.err.startswith("error: ")
        assert printed.err.count("\n") == 1
        return printed.err

    return command


def test_train_writes_a_run(run):
    assert {"checkpoint.pth", "model.pth", "metrics.json", "tensorboard"} <= {path.name for path in run.iterdir()}
    content = load_checkpoint(run / "model.pth")
    assert content["config"]["network"]["preset"] == "dcnv2"
    assert content["iteration"] == 2
    metrics = json.loads((run / "metrics.json").read_text())
    assert set(metrics) == {"bbox", "segm"}


def test_evaluate_gives_the_numbers_of_training(run, data, tmp_path, capsys):
    checkpoint = str(run / "model.pth")
    assert main(["evaluate", "--checkpoint", checkpoint, "--data", str(data), "--out", str(tmp_path)]) == 0
    assert "AP50" in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text()) == json.loads((run / "metrics.json").read_text())
    annotations = data / "annotations" / "instances_val.json"
    again = tmp_path / "again"
    results = ["--results", str(tmp_path / "detections_segm.json"), "--annotations", str(annotations)]
    assert main(["evaluate", *results, "--out", str(again)]) == 0
    segm = json.loads((again / "metrics.json").read_text())["segm"]
    assert segm == json.loads((run / "metrics.json").read_text())["segm"]


def copy_data(data: Path, folder: Path) -> tuple[Path, Path]:
    """Copy a data set; return the folder of its annotations and that of its images."""
    shutil.copytree(data, folder)
    return folder / "annotations", folder / "images"


def test_evaluate_without_annotations_or_images(run, data, fails, tmp_path, capsys):
    """Detections in test images are only written; missing images need an option; boxes alone evaluate boxes."""
    annotations, images = copy_data(data, tmp_path / "data")
    evaluate = ["evaluate", "--checkpoint", str(run / "model.pth"), "--data", str(tmp_path / "data"), "--device", "cpu"]
    content = json.loads((annotations / "instances_val.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (annotations / "instances_val.json").write_text(json.dumps(content))
    assert main([*evaluate, "--out", str(tmp_path / "boxes")]) == 0
    assert "masks are not evaluated, as no annotation has a segmentation" in capsys.readouterr().err
    written = json.loads((tmp_path / "boxes" / "metrics.json").read_text())
    assert written == {"bbox": json.loads((run / "metrics.json").read_text())["bbox"]}

    del content["annotations"]
    (annotations / "image_info_test.json").write_text(json.dumps(content))
    evaluate += ["--split", "test"]
    assert "there are no annotations, so --out is needed" in fails(*evaluate)
    assert main([*evaluate, "--out", str(tmp_path / "test")]) == 0
    assert "no metrics, as there are no annotations" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "test").iterdir()} == {"detections_bbox.json", "detections_segm.json"}
    for kind in ("bbox", "segm"):
        written, expected = (folder / f"detections_{kind}.json" for folder in (tmp_path / "test", run))
        assert written.read_text() == expected.read_text()
    results = ["evaluate", "--results", tmp_path / "test" / "detections_bbox.json", "--annotations"]
    assert "no annotations to evaluate detections with" in fails(*results, annotations / "image_info_test.json")

    name = content["images"][0]["file_name"]
    (images / name).unlink()
    evaluate[evaluate.index("test")] = "val"
    message = fails(*evaluate)
    assert f"left out 1 missing picture, e.g. {name}: all images are needed, or --allow-missing" in message
    assert main([*evaluate, "--allow-missing"]) == 0


def test_train_on_several_files_and_without_validation(run, data, fails, tmp_path, capsys):
    """The second file has the ids of the first."""
    annotations, images = copy_data(data, tmp_path / "data")
    (annotations / "instances_val.json").rename(annotations / "more.json")
    train = ["train", "--device", "cpu", "--backbone", "small", "--set", *TINY, *QUICK]
    files = ["--train-annotations", str(annotations / "instances_train.json"), str(annotations / "more.json")]
    assert main([*train, "--out", str(tmp_path / "a"), *files, "--train-images", str(images)]) == 0
    assert load_checkpoint(tmp_path / "a" / "checkpoint.pth")["images"] == 7
    assert "numbered the 7 images 1, 2, ..., as the files use the same ids" in capsys.readouterr().err
    folders = ["--train-images", *[images] * 3]
    message = fails(*train, "--out", "b", *files, *folders)
    assert "must name one folder or 2, one for each of --train-annotations, got 3" in message

    assert main([*train, "--out", str(tmp_path / "c"), "--data", str(tmp_path / "data")]) == 0
    assert "no validation data, so the training goes without evaluation" in capsys.readouterr().err
    assert not (tmp_path / "c" / "metrics.json").exists()

    content = json.loads((annotations / "more.json").read_text())
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    (annotations / "instances_val.json").write_text(json.dumps(content))
    train += ["--detector", "mask", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "d")]
    assert main(train) == 2
    assert "no segmentations; train on boxes alone with --detector faster" in capsys.readouterr().err
    del content["annotations"]
    (annotations / "instances_val.json").write_text(json.dumps(content))
    assert main(train) == 2
    assert "the validation data have no annotations to evaluate on" in capsys.readouterr().err
    assert not (tmp_path / "d").exists()


def test_predict_from_the_checkpoint_alone(run, data, tmp_path, capsys):
    images = sorted((data / "images").glob("val_*"))
    command = ["predict", str(data / "images" / "val_*"), "--checkpoint", str(run / "model.pth")]
    assert main([*command, "--out", str(tmp_path), "--threshold", "0", "--set", "network.max_detections=2"]) == 0
    written = json.loads((tmp_path / "predictions.json").read_text())
    assert [Path(item["file_name"]) for item in written["images"]] == images
    assert 0 < len(written["detections"]) <= 2 * len(images)
    for item in written["images"]:
        assert Image.open(tmp_path / item["picture"]).width >= 64
    again = tmp_path / "again"
    command += ["--out", str(again), "--threshold", "0", "--batch-size", "2", "--no-pictures"]
    assert main([*command, "--set", "network.max_detections=2", "training.workers=1"]) == 0
    assert [path.name for path in again.iterdir()] == ["predictions.json"]
    assert len(json.loads((again / "predictions.json").read_text())["detections"]) == len(written["detections"])
    capsys.readouterr()
    for threshold, lowest, option in (("0.5", "0.9", "--set network.score_threshold"), ("0.9", "0.5", "--threshold")):
        command += ["--threshold", threshold, "--set", f"network.score_threshold={lowest}"]
        assert main(command) == 0
        assert f"0 detections (scores from 0.9; lower {option} for more)" in capsys.readouterr().out


def test_a_run_from_the_configuration_of_another(run, data, fails, tmp_path):
    """`--resume auto` starts, then goes on."""
    command = ["train", "--data", str(data), "--out", str(tmp_path / "out"), "--config", str(run / "config.json")]
    command += ["--device", "cpu", "--resume", "auto", "--set"]
    for epochs in (1, 2):
        assert main([*command, f"training.epochs={epochs}"]) == 0
        assert load_checkpoint(tmp_path / "out" / "model.pth")["iteration"] == 2 * epochs
    written, original = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "out", run))
    assert written["training"].pop("epochs") == 2 and original["training"].pop("epochs") == 1
    assert written == original

    (tmp_path / "bad.json").write_text('{"network": {"colour": 1}}')
    for name, message in (
        ("bad.json", r"bad.json: network.colour: there is no such option"),
        ("none.json", "none.json"),
    ):
        assert message in fails("train", "--data", data, "--out", tmp_path / "new", "--config", tmp_path / name)
    assert "invalid choice: 'maybe'" in fails("train", "--data", data, "--out", tmp_path, "--resume", "maybe")


def test_resume_trains_on(run, data):
    command = ["train", "--data", str(data), "--out", str(run), "--preset", "dcnv2", "--detector", "mask"]
    command += ["--backbone", "small", "--device", "cpu", "--resume", "--set", *TINY, *QUICK]
    assert main([*command, "training.epochs=2"]) == 0
    assert load_checkpoint(run / "model.pth")["iteration"] == 4


def test_flops(capsys, monkeypatch):
    presets = {preset: PRESETS[preset] for preset in ("regular", "dcnv2", "dcnv2-mimic")}
    monkeypatch.setattr(flops, "PRESETS", presets)  # others are slow, and counted in model/test_flops.py
    assert main(["flops"]) == 0
    assert capsys.readouterr().out.count("14,917,618") == 4
    assert main(["flops", "--json", "--set", "network.backbone=small", "network.deform_groups=4"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [(row["detector"], row["preset"]) for row in rows] == list(itertools.product(("faster", "mask"), presets))
    assert main(["flops", "--json", "--set", "network.backbone=small", "network.detector=mask"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {(row["detector"], row["backbone"]) for row in rows} == {("mask", "small")}


def test_help_names_every_command_and_option(capsys):
    expected = {name: [item.name for item in dataclasses.fields(kind)] for name, kind in COMMANDS.items()}
    assert set(RUN) == set(COMMANDS)
    for command, names in (([], COMMANDS), *(([name], names) for name, names in expected.items())):
        with pytest.raises(SystemExit) as caught:
            main([*command, "--help"])
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(name.replace("_", "-") in printed for name in names)
        assert ("training.momentum=0.9" in printed) == (command == ["train"])


def test_wrong_commands(fails, data, tmp_path):
    out = tmp_path / "out"
    assert "invalid choice: 'fit'" in fails("fit")
    assert "the following arguments are required" in fails()
    assert "unrecognized arguments: --epoch" in fails("train", "--data", data, "--out", out, "--epoch")
    assert "there is no such option" in fails("train", "--data", data, "--out", out, "--set", "network.depth=50")
    preset = fails("train", "--data", data, "--out", out, "--preset", "dcnv3")
    assert "network.preset must be one of regular-roipool, regular" in preset
    assert "the data are missing: --data FOLDER" in fails("train", "--out", out)
    assert "argument format: invalid choice: 'coco' (choose from " in fails("import", "coco", data, out)
    assert "go together" in fails("train", "--train-annotations", "a.json", "--out", out)
    assert "--device" in fails("train", "--data", data, "--out", out, "--device", "tpu", "--backbone", "small")
    for number in ("0", "a"):
        message = fails("evaluate", "--data", data, "--checkpoint", "x", "--batch-size", number)
        assert "must be a whole number between 1 and 4096" in message
    for share in ("7", "nan", "high"):
        message = fails("predict", "a.png", "--checkpoint", "x", "--out", out, "--threshold", share)
        assert "must be a number between 0 and 1" in message
    assert "must name a file or folder" in fails("train", "--data", data, "--out", "")
    assert "deform_groups=3" in fails("flops", "--set", "network.deform_groups=3")
    assert "exists already" in fails("synth", data)
    file = data / "annotations" / "instances_val.json"
    assert "cannot be made a folder" in fails("evaluate", "--data", data, "--checkpoint", "x", "--out", file)
    assert "not allowed with" in fails("evaluate", "--data", data, "--checkpoint", "x", "--results", "y")
    assert "must be a whole number between 32 and 4096, got '8'" in fails("synth", out, "--size", "8")
    assert len(fails("synth", out, "--train", "9" * 10_000)) < 200
    assert not out.exists()


def test_missing_files(fails, run, data, tmp_path):
    out, nothing = tmp_path / "out", tmp_path / "nothing"
    assert str(nothing) in fails("train", "--data", nothing, "--out", out)
    assert "weights" in fails("train", "--data", data, "--out", out, "--weights", tmp_path / "none.pth")
    assert "no such checkpoint" in fails("evaluate", "--checkpoint", nothing, "--data", data)
    assert "no such checkpoint" in fails("predict", data / "images", "--checkpoint", nothing, "--out", out)
    assert "nothing" in fails("predict", nothing, "--checkpoint", run / "model.pth", "--out", out)
    assert "checkpoint" in fails("train", "--data", data, "--out", out, "--backbone", "small", "--resume")
    assert not out.exists() or not any(out.iterdir())


def test_paths_that_are_too_long(fails, data, run, tmp_path):
    name = "a" * 300
    checkpoint = run / "model.pth"
    assert name in fails("train", "--data", tmp_path / name, "--out", tmp_path)
    assert name in fails("train", "--data", data, "--out", tmp_path / name, "--backbone", "small", "--device", "cpu")
    assert name in fails("train", "--data", data, "--out", tmp_path, "--weights", f"{name}.pth", "--device", "cpu")
    assert name in fails("predict", name, "--checkpoint", checkpoint, "--out", tmp_path)
    assert name in fails("predict", data / "images", "--checkpoint", name, "--out", tmp_path)
    assert name in fails("evaluate", "--results", name, "--data", data)
    assert name in fails("synth", tmp_path / name)


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device", "out/table.md"), "out/table.md: disk full: No space left on device"),
        (OSError(28, "No space left on device"), "output: disk full: No space left on device"),
        (OSError(30, "Read-only file system", "out"), "out: Read-only file system"),
        (
            ModuleNotFoundError(name="tensorboard.compat"),
            "the package tensorboard is missing: pip install 'dcnops[detector]'",
        ),
        (ModuleNotFoundError(name="onnxscript"), "the package onnxscript is missing: pip install 'dcnops[onnx]'"),
        (UserError("red \x1b[31m\n"), r"red \x1b[31m\n"),
    ],
)
def test_errors_of_the_environment(fails, monkeypatch, error, message):
    def fail(options: object) -> None:
        raise error

    monkeypatch.setitem(RUN, "flops", fail)
    monkeypatch.setenv("RANK", "")
    assert fails("flops") == f"error: {message}\n"


def test_processes_report_a_common_error_once(fails, monkeypatch, capsys):
    def fail(options: object) -> None:
        error = UserError("common")
        error.reported = True
        raise error

    monkeypatch.setattr("dcnops.detector.__main__.GRACE", 0)
    monkeypatch.setitem(RUN, "flops", fail)
    assert main(["flops"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert "invalid choice: 'fit'" in fails("fit")  # a cluster may export the variable for a single process
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "id")  # torchrun
    assert main(["fit"]) == 2 and capsys.readouterr().err == ""
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert "invalid choice: 'fit'" in fails("fit")


def test_names_that_stdout_cannot_encode(tmp_path, monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, "ascii"))
    assert main(["synth", str(tmp_path / "ö"), "--train", "0", "--val", "0"]) == 0
    assert written.getvalue().startswith(b"0 + 0 images in ") and rb"\xf6" in written.getvalue()


def run_code(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command, folder = [sys.executable, "-c", code], Path(__file__).parents[2]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=folder, env={**os.environ, **environment}
    )


def test_a_missing_package_is_named(tmp_path):
    code = """
import runpy, sys
sys.modules["torch"] = sys.modules["orjson"] = None
sys.argv[1:] = [{!r}]
runpy.run_module("dcnops.detector", run_name="__main__")
"""
    done = run_code(code.format("flops"))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: the package torch is missing: pip install 'dcnops[detector]'\n"
    assert run_code(code.format("--help")).returncode == 0


def test_help_and_wrong_options_import_no_large_package():
    """Such imports take seconds."""
    commands = ["--help", "train --help", "fit", "train --out x --preset y", "predict a --checkpoint b"]
    commands += ["evaluate --checkpoint x --set network.gamma=wide", "flops --backbone vgg", "demo --device tpu"]
    commands += ["ablate --variants y", "predict a --checkpoint b --out c --threshold 2"]
    code = f"""
import runpy, sys
for command in {commands}:
    sys.argv[1:] = command.split()
    try:
        runpy.run_module("examples.detector", run_name="__main__")
    except SystemExit as error:
        assert error.code == (0 if "--help" in command else 2), command
print(*sys.modules)
"""
    done = run_code(code)
    imported = set(done.stdout.splitlines()[-1].split())
    assert "argparse" in imported and not {"numpy", "torch", "torchvision", "matplotlib", "pycocotools"} & imported
    assert "usage: python -m examples.detector train" in done.stdout
    assert done.stderr.count("error: ") == done.stderr.count("\n") == len(commands) - 2
    done = run_code("from dcnops.detector.__main__ import main; main()")  # the console script
    assert "(dcnops-detector --help tells more)" in done.stderr


def test_categories_of_a_checkpoint_and_of_the_data(fails, data, tmp_path):
    wrong = tmp_path / "wrong.pth"
    config = Config().set(["network.backbone=small", *TINY])
    model = build_detector(config.network, 2)
    save_checkpoint(wrong, model, config, [Category(1, "cat"), Category(2, "dog")], 0)
    message = fails("evaluate", "--checkpoint", wrong, "--data", data)
    assert "must have the detector's 2 categories (1 cat, 2 dog)" in message


def test_checkpoints_of_other_projects(fails, data, tmp_path, capsys):
    """A file without names of categories, for prediction and for evaluation."""
    checkpoint, names = tmp_path / "mmdetection.pth", tmp_path / "names.txt"
    torch.save({"state_dict": detector(MMDETECTION, categories=5, masks=False)}, checkpoint)
    options = ["--checkpoint", str(checkpoint), "--set", *TINY[:2], "network.proposals_test=5"]
    images = str(data / "images" / "val_*")
    names.write_text("club\ndumbbell\nsquare\nring\ntripod\n")
    command = ["predict", images, "--out", str(tmp_path / "out"), "--threshold", "0", "--no-pictures", *options]
    assert main([*command, "network.score_threshold=0", "--categories", str(names)]) == 0
    line = capsys.readouterr().err
    assert "5 categories, with names that are not in the file (numbers unless --categories gives them): " in line
    written = json.loads((tmp_path / "out" / "predictions.json").read_text())
    assert written["categories"][2] == {"id": 3, "name": "square"} and written["detections"]
    assert main(["evaluate", "--data", str(data), *options]) == 0  # in the order of the ids
    assert "AP50" in capsys.readouterr().out
    assert "--categories goes with --checkpoint" in fails("evaluate", "--results", "x.json", "--categories", names)


def test_training_from_a_detector(run, data, fails, tmp_path, capsys):
    """The file sets the network; here with the same categories."""
    out = tmp_path / "out"
    command = ["train", "--data", str(data), "--weights", str(run / "model.pth"), "--device", "cpu", "--set", *QUICK]
    assert main([*command, "training.lr=0", "--out", str(out)]) == 0
    assert "parameters used" in capsys.readouterr().err
    first, second = (load_checkpoint(folder / "model.pth") for folder in (run, out))
    assert second["config"]["network"] == first["config"]["network"]
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    message = fails(*command, "network.aligned=false", "--out", out)
    assert f"--weights {run / 'model.pth'} sets the network: network.aligned=false needs" in message


def test_imports_are_not_searched_for_garbage(monkeypatch):
    """It would take a fifth of the start-up. Programs that call `main` have their own policy."""
    collecting = []

    class Commands(ModuleType):
        @property
        def RUN(self) -> dict[str, Callable[[object], None]]:
            collecting.append(gc.isenabled())
            return {"flops": lambda options: collecting.append(gc.isenabled())}

    monkeypatch.setitem(sys.modules, "dcnops.detector.commands", Commands("commands"))
    monkeypatch.setattr(gc, "freeze", Mock())
    monkeypatch.setattr(sys, "argv", ["dcnops-detector", "flops"])
    monkeypatch.setenv("MPLBACKEND", "agg")
    assert main() == main(["flops"]) == 0
    assert collecting == [False, True, True, True] and gc.freeze.call_count == 1


def test_as_a_program():
    command = [sys.executable, "-m", "dcnops.detector", "evaluate", "--checkpoint", "x", "--set", "network.gamma=wide"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2])
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


def test_environment_of_a_program():
    code = """
import os, runpy, sys
sys.argv[1:] = ["--help"]
try:
    runpy.run_module("dcnops.detector", run_name="__main__")
finally:
    print(os.environ["MPLBACKEND"], os.environ["OMP_WAIT_POLICY"], file=sys.stderr)
"""
    assert run_code(code, MPLBACKEND="module://a_backend_of_notebooks").stderr == "agg PASSIVE\n"
    assert run_code(code, OMP_WAIT_POLICY="ACTIVE").stderr == "agg ACTIVE\n"

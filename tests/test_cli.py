"""The command, as a person runs it: exit codes, one line for every mistake, JSON alone where JSON is asked for."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from test_training import shapes_folder  # noqa: F401  (a fixture)

from segvit.cli import COMMANDS, EXAMPLES, main

TINY = ["--backbone", "vit_tiny_patch16_224", "--pretrained", "false", "--crop", "[32,32]", "--batch_size", "2"]


@pytest.fixture(scope="module")
def checkpoint(shapes_folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("run")
    assert main(["train", str(shapes_folder), *TINY, "--steps", "3", "--out", str(out)]) == 0
    return out / "best"


def test_train_prints_miou_and_the_checkpoint(shapes_folder, tmp_path, capsys):  # noqa: F811
    config = tmp_path / "config.yaml"
    config.write_text(
        f"data: {shapes_folder}\nsteps: 50\nlr: 0.001\nout: {tmp_path / 'run'}\nprecision: no\npretrained: false\n"
    )
    rest = [a for a in TINY if a not in ("--pretrained", "false")]
    assert main(["train", "--config", str(config), *rest, "--steps", "2"]) == 0
    miou, path = capsys.readouterr().out.strip().splitlines()
    assert miou.startswith("mIoU 0.")
    assert path == str(tmp_path / "run" / "best")


def test_two_processes_train_together(shapes_folder, tmp_path):  # noqa: F811
    launch = ["torch.distributed.run", "--nproc_per_node=2", "--standalone", "-m", "segvit"]
    arguments = ["train", str(shapes_folder), *TINY, "--steps", "4", "--out", str(tmp_path / "run")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, "-m", *launch, *arguments]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.count("mIoU 0.") == 1
    assert (tmp_path / "run" / "best" / "model.safetensors").is_file()


def test_evaluate(checkpoint, shapes_folder, capsys):  # noqa: F811
    assert main(["evaluate", str(checkpoint), str(shapes_folder / "val"), "--json"]) == 0
    scores = json.loads(capsys.readouterr().out)
    assert 0 <= scores["miou"] <= 1
    assert scores["images"] == 4
    assert set(scores["iou"]) == {"background", "disc", "square", "triangle", "ring", "cross"}
    assert main(["evaluate", str(checkpoint), str(shapes_folder / "val"), "--mode", "slide", "--flip", "true"]) == 0
    assert "mIoU 0." in capsys.readouterr().out


def test_predict_files_and_folders(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "photo.png"
    Image.fromarray(np.zeros((33, 71), np.uint8)).save(other)
    out = tmp_path / "out"
    images = [str(shapes_folder / "val" / "images"), str(other)]
    assert main(["predict", str(checkpoint), *images, "--out", str(out)]) == 0
    assert "5 label maps and overlays" in capsys.readouterr().out
    assert np.asarray(Image.open(out / "photo.png")).shape == (33, 71)
    assert Image.open(out / "photo_overlay.png").width > 71


def test_models_json_is_one_list_and_nothing_else():
    run = subprocess.run(
        [sys.executable, "-m", "segvit", "models", "--json"], capture_output=True, text=True, check=True, timeout=120
    )
    rows = json.loads(run.stdout)
    assert len(rows) >= 15
    for row in rows:
        assert {"name", "published", "gmac", "params_m", "image_size", "num_classes", "licence"} <= set(row)
    assert sum(row["published"] for row in rows) == 7


def test_env_and_version(capsys):
    assert main(["env"]) == 0
    assert "segvit._C" in capsys.readouterr().out
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("segvit 0.")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example(command, capsys):
    assert main([command, "--help"]) == 0
    assert " ".join(EXAMPLES[command].split()) in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ([], 2, "expected"),
        (["paint"], 2, "invalid choice"),
        (["train"], 2, "required"),
        (["train", "DATA", "--steps", "many"], 2, "steps"),
        (["train", "DATA", "--wings", "2"], 2, "wings"),
        (["train", "nowhere"], 1, "nowhere/classes.txt: no such file"),
        (["train", "nowhere", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "DATA", "--backbone", "vit_tini_patch16_224"], 1, "near: vit_tiny_patch16_224"),
        (["train", "DATA", *TINY, "--crop", "[32]"], 1, "crop must be an int or (height, width)"),
        (["train", "DATA", *TINY, "--shrink", "v9"], 1, "shrink must be"),
        (["evaluate", "nowhere", "DATA/val"], 1, "nowhere"),
        (["evaluate", "DATA", "DATA/val"], 1, "no checkpoint there"),
        (["predict", "CHECKPOINT", "nowhere.jpg"], 1, "nowhere.jpg: no such file or folder"),
        (["predict", "CHECKPOINT", "DATA"], 1, "no images in this folder"),
        (["predict", "CHECKPOINT", "DATA/classes.txt"], 1, "not a readable image"),
        (["predict", "CHECKPOINT", "DATA/val/images", "DATA/train/images"], 1, "would overwrite each other"),
        (
            ["predict", "CHECKPOINT", "DATA/val/images", "--crop", "[32,32]"],
            1,
            "--crop and --stride go with --mode slide",
        ),
        (["predict", "runs/typo", "DATA/val/images"], 1, "runs/typo: no checkpoint there"),
        (["predict", "CHECKPOINT", "DATA/val/labels", "--out", "DATA/val/labels"], 1, "would be overwritten"),
        (["train", "DATA", *TINY, "--pretrained", "DATA/classes.txt"], 1, "cannot load"),
        (["train", "DATA", *TINY, "--steps", "0"], 1, "steps and batch_size must be at least 1"),
        (["predict", "CHECKPOINT", "DATA/val/images", "--mode", "tiles"], 1, "mode must be one of whole, slide"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, message, checkpoint, shapes_folder, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    places = {"DATA": str(shapes_folder), "CHECKPOINT": str(checkpoint)}
    for word, place in places.items():
        arguments = [place + a[len(word) :] if a == word or a.startswith(word + "/") else a for a in arguments]
    assert main(arguments) == code
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, captured.err
    assert message in lines[0]
    assert "Traceback" not in captured.err + captured.out
    assert not captured.out

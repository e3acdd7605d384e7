import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import segvit
from segvit.checkpoints import step_folders
from segvit.data import Shapes
from segvit.models import list_models
from segvit.runs import _stop_signals, train_folder

TINY = {"backbone": "vit_tiny_patch16_224", "pretrained": False, "crop": 32, "batch_size": 2}


@pytest.fixture(scope="session")
def shapes_folder(tmp_path_factory):
    """The embedded data set as files: train (12) and val (4), 48×64."""
    root = tmp_path_factory.mktemp("shapes")
    for part, count, seed in (("train", 12, 1), ("val", 4, 2)):
        for name in ("images", "labels"):
            (root / part / name).mkdir(parents=True)
        data = Shapes(count, 64, seed=seed)
        for i in range(count):
            image, labels = data[i]
            Image.fromarray(image.permute(1, 2, 0).numpy()[:48]).save(root / part / "images" / f"{i}.jpg")
            Image.fromarray(labels.numpy()[:48].astype(np.uint8)).save(root / part / "labels" / f"{i}.png")
    (root / "classes.txt").write_text("\n".join(Shapes.classes))
    return root


def train(data, out, **options):
    return train_folder(str(data), str(out), **(TINY | {"steps": 4} | options))


def log(run):
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def weights(run):
    return segvit.SegViT.from_pretrained(step_folders(run)[-1]).state_dict()


def test_training_on_a_folder_writes_checkpoints_and_a_log(shapes_folder, tmp_path):
    run = tmp_path / "run"
    result = train(shapes_folder, run, steps=12, validate_every=4)
    assert log(run) == json.loads(json.dumps(result["records"]))
    assert [r["step"] for r in log(run) if "miou" in r] == [4, 8, 12]
    assert result["miou"] == max(r["miou"] for r in log(run) if "miou" in r)
    best = segvit.SegViT.from_pretrained(result["checkpoint"])
    assert best.class_names == list(Shapes.classes)
    assert best.image_size == (32, 32)
    assert [path.name for path in step_folders(run)] == ["step_00000008", "step_00000012"]
    assert sorted(path.name for path in run.iterdir()) == ["best", "log.jsonl", "step_00000008", "step_00000012"]


@pytest.mark.parametrize("stage", ["before validation", "after validation"])
def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(shapes_folder, tmp_path, monkeypatch, stage):
    options = {"steps": 6, "validate_every": 2, "lr": 1e-3}
    whole, run = tmp_path / "whole", tmp_path / "run"
    result = train(shapes_folder, whole, **options)
    train(shapes_folder, run, **options)
    for folder in step_folders(run)[1:]:  # as if killed around the validation of step 4
        shutil.rmtree(folder)
    cut = log(run)[: 1 if stage == "before validation" else 2]
    (run / "log.jsonl").write_text("".join(json.dumps(r) + "\n" for r in cut) + '{"step": 5, "los')
    again = train(shapes_folder, run, **options, resume=True)
    assert again["miou"] == result["miou"]
    columns = ("step", "loss", "lr", "miou")
    assert [[r[c] for c in columns] for r in log(run)] == [[r[c] for c in columns] for r in log(whole)]
    ours, theirs = weights(run), weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    assert train(shapes_folder, run, **options, resume=True)["records"] == []  # nothing left to do


def test_resuming_says_what_is_different(shapes_folder, tmp_path, capsys):
    train(shapes_folder, tmp_path / "run", steps=2, resume=True)  # nothing to go on from yet
    train(shapes_folder, tmp_path / "run", steps=3, lr=5e-5, resume=True)
    said = capsys.readouterr().err
    assert "resuming with steps 3, which was 2" in said
    assert "resuming with lr 5e-05, which was 0.0001" in said
    assert [r["step"] for r in log(tmp_path / "run")] == [1, 2, 3]


def test_a_run_is_not_trained_over(shapes_folder, tmp_path):
    run = tmp_path / "run"
    train(shapes_folder, run)
    before = sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*"))
    with pytest.raises(ValueError, match="run holds a run already: --resume goes on with it, --overwrite starts anew"):
        train(shapes_folder, run)
    with pytest.raises(ValueError, match="resume goes on with a run, overwrite removes it"):
        train(shapes_folder, run, resume=True, overwrite=True)
    with pytest.raises(ValueError, match="shrink must be"):  # nothing is removed before everything fits
        train(shapes_folder, run, overwrite=True, shrink="v9")
    assert sorted((path, path.stat().st_mtime_ns) for path in run.rglob("*")) == before
    train(shapes_folder, run, steps=3, overwrite=True)
    assert [path.name for path in step_folders(run)] == ["step_00000002", "step_00000003"]


def test_images_without_a_val_part_are_split(shapes_folder, tmp_path, capsys):
    train(shapes_folder / "train", tmp_path / "run", val_fraction=0.25)
    assert "no val part: 3 of 12 images are held out" in capsys.readouterr().err
    assert len((tmp_path / "run" / "val.csv").read_text().splitlines()) == 4


def test_bad_data_stops_before_training(shapes_folder, tmp_path):
    root = tmp_path / "data"
    shutil.copytree(shapes_folder, root)
    path = root / "train" / "images" / "3.jpg"
    path.write_bytes(path.read_bytes()[:500])
    Image.new("L", (9, 9)).save(root / "val" / "labels" / "1.png")
    with pytest.raises(ValueError, match=r"train: .*3\.jpg: not a readable image .*\(and 1 more: segvit check-data"):
        train(root, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())
    (root / "classes.txt").write_text("background\nobject\n")
    for part in ("train", "val"):
        for path in (root / part / "labels").iterdir():
            Image.fromarray(np.eye(48, 64, dtype=np.uint8) * 255).save(path)
    (root / "train" / "images" / "3.jpg").unlink()
    with pytest.raises(ValueError, match="labels are 0 and 255: a binary mask"):
        train(root, tmp_path / "run")
    assert 0 <= train(root, tmp_path / "run", steps=1, label_map={255: 1})["miou"] <= 1


def test_a_loss_that_breaks_down_names_files_and_the_last_good_checkpoint(shapes_folder, tmp_path, monkeypatch):
    steps, forward = [], segvit.ATMLoss.forward

    def broken(self, *args):
        steps.append(1)
        terms = forward(self, *args)
        return terms._replace(total=terms.total * float("nan")) if len(steps) == 3 else terms

    monkeypatch.setattr(segvit.ATMLoss, "forward", broken)
    with pytest.raises(
        FloatingPointError, match=r"since step 3; .*train/images/\d+\.jpg.*; the last checkpoint is .*step_00000002"
    ):
        train(shapes_folder, tmp_path / "run", steps=200, validate_every=2)
    assert all(torch.isfinite(value).all() for value in weights(tmp_path / "run").values())


def test_ctrl_c_keeps_a_checkpoint_to_go_on_from(shapes_folder, tmp_path, monkeypatch):
    steps = []

    def interrupted(self, labels=None, *args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, labels, *args)

    forward = segvit.ATMLoss.forward
    monkeypatch.setattr(segvit.ATMLoss, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3; the last checkpoint is .*step_00000003"):
        train(shapes_folder, tmp_path / "run", steps=20)
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    train(shapes_folder, tmp_path / "run", steps=4, resume=True)
    assert len(steps) == 4


def test_a_second_ctrl_c_stops_at_once():
    with _stop_signals() as stopped:
        assert not stopped()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stopped()
        with pytest.raises(KeyboardInterrupt, match="at once"):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_model_goes_on_with_other_classes(shapes_folder, tmp_path, capsys):
    train(shapes_folder, tmp_path / "first")
    root = tmp_path / "data"
    shutil.copytree(shapes_folder, root)
    (root / "classes.txt").write_text("background\ndisc\nsquare\ntriangle\nring\nplus\nminus\n")
    train(root, tmp_path / "second", model=str(tmp_path / "first"), lr=0.0, steps=1, crop=None)
    assert "5 of 7 classes are kept; new: plus, minus; dropped: cross" in capsys.readouterr().err
    old, new = (segvit.SegViT.from_pretrained(tmp_path / run / "best") for run in ("first", "second"))
    assert torch.equal(new.decoder.queries[:5], old.decoder.queries[:5])
    assert (new.num_classes, new.image_size) == (7, (32, 32))
    with pytest.raises(ValueError, match="was trained on other classes; to go on with new ones, name it as --model"):
        train(root, tmp_path / "first", resume=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"validate_every": -1}, ValueError, "validate_every must be at least 1"),
        ({"scale": [2.0, 1.0]}, ValueError, "scale must be"),
        ({"model": "nowhere/at/all"}, FileNotFoundError, "no checkpoint there"),
        ({"mode": "tiles", "steps": 1}, ValueError, "mode must be one of whole, slide, auto"),
        ({"out": "/proc/nothing/here"}, PermissionError, "/proc/nothing/here: cannot write there"),
        ({"out": __file__}, ValueError, "is a file; choose another folder"),
    ],
)
def test_what_does_not_fit_is_said(options, error, message, shapes_folder, tmp_path):
    with pytest.raises(error, match=message):
        train_folder(str(shapes_folder), **(TINY | {"out": str(tmp_path / "run"), "steps": 4} | options))


def test_recipes_are_arguments_of_training():
    recipes = sorted(Path(segvit.__file__).parent.glob("recipes/*.yaml"))
    published = {info.name: info for info in list_models() if info.published}
    assert {path.stem for path in recipes} == {*published, "custom"}
    for path in recipes:
        options = yaml.safe_load(path.read_text())
        assert set(options) <= set(train_folder.__annotations__)
        if path.stem in published:
            info = published[path.stem]
            assert (options["model"], options["crop"]) == (info.name, info.image_size[0])
            assert options["batch_size"] == 16
            assert path.read_text().splitlines()[1].startswith("# segvit train ")
            assert f"--config {path.stem}" in path.read_text().splitlines()[1]

"""The command, as a person runs it: exit codes, one line for every mistake, JSON alone where JSON is asked for."""

import json
import os
import shlex
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from test_convert import official_case
from test_runs import shapes_folder  # noqa: F401  (a fixture)

import segvit
import segvit.explanation
from segvit.cli import main
from segvit.commands import COMMANDS, EXAMPLES, RECIPES

TINY = ["--backbone", "test_vit", "--pretrained", "false", "--crop", "[32,32]", "--batch_size", "2"]


@pytest.fixture(scope="module")
def checkpoint(shapes_folder, tmp_path_factory):  # noqa: F811
    out = tmp_path_factory.mktemp("run")
    assert main(["train", str(shapes_folder), *TINY, "--steps", "3", "--out", str(out)]) == 0
    return out


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
    assert main(["train", "--config", str(config), *rest, "--steps", "3", "--resume"]) == 0
    assert "resuming with steps 3, which was 2" in capsys.readouterr().err


def test_recipes_are_configurations_by_name(shapes_folder, tmp_path, capsys, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    for option in (["--config", "custom"], ["--config=custom"]):
        assert main(["train", str(shapes_folder), *option, *TINY, "--steps", "1", "--overwrite"]) == 0
    for recipe in (path.stem for path in RECIPES.glob("*.yaml")):
        assert main(["train", "nowhere", "--config", recipe, "--out", "new"]) == 1
        assert "nowhere" in capsys.readouterr().err


def test_the_command_line_overrides_a_recipe_wherever_it_stands(shapes_folder, capsys):  # noqa: F811
    for arguments in (["--steps", "7", "--config", "custom"], ["--config=custom", "--steps", "7"]):
        assert main(["train", *arguments, str(shapes_folder), "--print_config"]) == 0
        assert yaml.safe_load(capsys.readouterr().out)["steps"] == 7


def test_a_flag_may_stand_before_anything(shapes_folder, capsys):  # noqa: F811
    for flag in (["--resume"], ["--resume", "true"], ["--resume=true"]):
        assert main(["train", *flag, str(shapes_folder), "--print_config"]) == 0
        written = yaml.safe_load(capsys.readouterr().out)
        assert (written["resume"], written["data"]) == (True, str(shapes_folder))


def test_a_part_that_is_missing_is_not_replaced_by_another(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    table = tmp_path / "data.csv"
    rows = [f"{shapes_folder}/train/images/{i}.jpg,{shapes_folder}/train/labels/{i}.png,train" for i in range(3)]
    table.write_text("image,label,part\n" + "\n".join(rows) + "\n")
    assert main(["evaluate", str(checkpoint), str(table)]) == 1
    assert "no row has the part val" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(shapes_folder), "--part", "tset"]) == 1
    assert "no folder tset/images" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), str(shapes_folder / "val"), "--json"]) == 0
    assert "has no parts: all 4 images" in capsys.readouterr().err


def value_of_discs(folder) -> dict:
    """Share, pixels and images of label 1 in the training part."""
    maps = [np.asarray(Image.open(path)) for path in (folder / "train" / "labels").iterdir()]
    pixels = sum(int((labels == 1).sum()) for labels in maps)
    total = sum(labels.size for labels in maps)
    return {"share": pixels / total, "pixels": pixels, "images": sum(bool((labels == 1).any()) for labels in maps)}


def test_check_data(shapes_folder, tmp_path, capsys):  # noqa: F811
    picture = tmp_path / "check.png"
    assert main(["check-data", str(shapes_folder), "--picture", str(picture)]) == 0
    out = capsys.readouterr().out
    assert "train: 12 images, 64x48 (12); channels RGB (12)" in out
    assert "val: 4 images" in out
    assert Image.open(picture).width > 720
    assert main(["check-data", str(shapes_folder / "val"), "--json"]) == 0
    value = json.loads(capsys.readouterr().out)
    assert value["ok"] is True
    assert [part["images"] for part in value["parts"]] == [4]
    assert main(["check-data", str(shapes_folder), "--json", "--label_map", "{0: 255}"]) == 0
    assert json.loads(capsys.readouterr().out)["parts"][0]["classes"]["background"]["pixels"] == 0
    assert main(["check-data", "--reduce_zero_label", str(shapes_folder), "--json"]) == 0
    shifted = json.loads(capsys.readouterr().out)["parts"][0]["classes"]
    assert shifted["background"] == value_of_discs(shapes_folder)
    names = tmp_path / "two.txt"
    names.write_text("background\ndisc\n")
    assert main(["check-data", str(shapes_folder), "--json", "--classes", str(names)]) == 1
    captured = capsys.readouterr()
    assert json.loads(captured.out)["ok"] is False
    assert "the data has problems that training would refuse" in captured.err


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
    assert (scores["images"], scores["left_out"]) == (4, 0)
    assert set(scores["iou"]) == {"background", "disc", "square", "triangle", "ring", "cross"}
    assert set(scores["absent"]) == {name for name, iou in scores["iou"].items() if iou is None}
    assert main(["evaluate", str(checkpoint), str(shapes_folder), "--json"]) == 0  # a whole data set: its val part
    assert json.loads(capsys.readouterr().out) == scores
    assert main(["evaluate", str(checkpoint), str(shapes_folder / "val"), "--mode", "slide", "--flip"]) == 0
    assert "mIoU 0." in capsys.readouterr().out
    assert main(["evaluate", str(checkpoint), str(shapes_folder), "--part", "train", "--short_side", "32"]) == 0
    assert "on 12 images" in capsys.readouterr().out
    data = str(shapes_folder / "val")
    assert main(["evaluate", str(checkpoint), data, "--boundary", "0.05", "--protocol", "paper", "--json"]) == 0
    edges = json.loads(capsys.readouterr().out)
    assert edges.pop("boundary_miou") < scores["miou"]
    assert set(edges.pop("boundary_iou")) == set(scores["iou"])
    assert edges == scores  # the image's own size: both protocols are one
    assert main(["evaluate", str(checkpoint), data, "--boundary", "0.05", "--prune", "0.001"]) == 0
    table = capsys.readouterr().out
    assert "b.IoU" in table
    assert "boundary mIoU 0." in table
    assert main(["evaluate", str(checkpoint), data, "--boundary", "0"]) == 1
    assert "--boundary must be a share of the image's diagonal" in capsys.readouterr().err
    assert main(["evaluate", str(checkpoint), data, "--prune", "1.5"]) == 1
    assert "prune must be a probability in [0, 1), got 1.5" in capsys.readouterr().err


def test_evaluate_writes_a_report(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    report = tmp_path / "new" / "report.html"
    arguments = ["evaluate", str(checkpoint), str(shapes_folder), "--report", str(report), "--workers", "1"]
    assert main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    scores = json.loads(captured.out)
    assert str(report) in captured.err
    text = report.read_text(encoding="utf-8")
    assert f"<b>{scores['miou']:.4f}</b>" in text
    assert text.count('src="data:image/') == 4 * 4
    for said in (checkpoint, shapes_folder / "val" / "images" / "3.jpg", "part val", segvit.__version__):
        assert str(said) in text
    assert shlex.join(["segvit", *arguments, "--json"]) in text
    assert main([*arguments, "--flip"]) == 0  # a report may be written anew
    assert capsys.readouterr().out.splitlines()[-1] == str(report)
    assert "flip True" in report.read_text(encoding="utf-8")


def test_unreadable_images_are_left_out_of_an_evaluation_where_asked(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    root, report = tmp_path / "data", tmp_path / "r.html"
    shutil.copytree(shapes_folder, root)
    (root / "val" / "images" / "2.jpg").write_bytes(b"no image")
    arguments = ["evaluate", str(checkpoint), str(root), "--json"]
    for workers in ("0", "1"):
        assert main([*arguments, "--workers", workers]) == 1
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith(f"segvit: error: {root}/val/images/2.jpg: not a readable image")
        assert not captured.out
    assert main([*arguments, "--skip_unreadable", "--report", str(report)]) == 0
    captured = capsys.readouterr()
    value = json.loads(captured.out)
    assert (value["images"], value["left_out"]) == (3, 1)
    assert f"left out: {root}/val/images/2.jpg: not a readable image" in captured.err
    assert "1 of 4 images are left out" in captured.err
    assert "<b>1</b><span>left out</span>" in report.read_text(encoding="utf-8")
    assert main([*arguments[:-1], "--skip_unreadable"]) == 0
    assert "on 3 images" in capsys.readouterr().out


def test_evaluation_reads_labels_as_training_did(shapes_folder, tmp_path, capsys):  # noqa: F811
    root = tmp_path / "binary"
    shutil.copytree(shapes_folder, root)
    (root / "classes.txt").write_text("background\nobject\n")
    for path in root.glob("*/labels/*.png"):
        Image.fromarray(((np.asarray(Image.open(path)) > 0) * 255).astype(np.uint8)).save(path)
    run, options = tmp_path / "run", ["--label_map", "{255: 1}"]
    training = ["train", str(root), *TINY, "--steps", "2", "--short_side", "40", "--out", str(run)]
    assert main([*training, *options]) == 0
    assert main(["evaluate", str(run), str(root), *options, "--short_side", "40", "--json"]) == 0
    want = json.loads(capsys.readouterr().out.split("best\n")[1])
    assert want["iou"]["object"] is not None
    assert main(["evaluate", str(run), str(root), "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out) == want
    assert "labels are read as in training: label_map {'255': 1}" in captured.err


def test_evaluating_on_other_classes_is_refused(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    names = tmp_path / "names.txt"
    arguments = ["evaluate", str(checkpoint), str(shapes_folder), "--classes", str(names)]
    for text, message in (
        ("background\ndisc\n", "the model has 6 classes, the data 2"),
        (
            "background\nsquare\ndisc\ntriangle\nring\ncross\n",
            "class 1 is 'disc' to the model, but 'square' in the data",
        ),
    ):
        names.write_text(text)
        assert main(arguments) == 1
        assert message in capsys.readouterr().err


def test_predict_files_and_folders(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    other = tmp_path / "photo.png"
    Image.fromarray(np.zeros((33, 71), np.uint8)).save(other)
    out = tmp_path / "out"
    images = [str(shapes_folder / "val" / "images"), str(other), str(other)]  # a file that is named twice counts once
    assert main(["predict", str(checkpoint), *images, "--out", str(out)]) == 0
    assert "5 label maps and overlays" in capsys.readouterr().out
    assert np.asarray(Image.open(out / "photo.png")).shape == (33, 71)
    assert Image.open(out / "photo_overlay.png").width > 71


def test_predict_explains(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    image, out = str(shapes_folder / "val" / "images" / "0.jpg"), tmp_path / "out"
    arguments = ["predict", str(checkpoint), image, "--out", str(out)]
    assert main([*arguments, "--explain"]) == 0
    assert "1 label maps, overlays and explanations" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["0.png", "0_explain.png", "0_overlay.png"]
    page = Image.open(out / "0_explain.png")
    options = ["--explain", "--point", "[60, 3]", "--explain_classes", "[disc, 3, ring, cross, square, 0]"]
    assert main([*arguments, *options]) == 0
    assert Image.open(out / "0_explain.png").height > page.height + 100  # the table of the pixel
    other = tmp_path / "0_explain.jpg"  # whose labels are out/0_explain.png
    shutil.copy(image, other)
    before = (out / "0_explain.png").read_bytes()
    assert main([*arguments[:3], str(other), *arguments[3:], "--explain"]) == 1
    assert "their predictions would overwrite each other" in capsys.readouterr().err
    assert (out / "0_explain.png").read_bytes() == before
    assert main([*arguments[:3], str(other), *arguments[3:]]) == 0


def test_a_large_photo_is_explained_at_the_size_that_is_still_taken_whole(checkpoint, tmp_path, monkeypatch):
    seen = []
    watched = segvit.explanation.Explanation.picture

    def picture(self, *args, **kwargs):
        seen.append((self.seen, tuple(self.labels.shape)))
        return watched(self, *args, **kwargs)

    monkeypatch.setattr(segvit.explanation.Explanation, "picture", picture)
    Image.new("RGB", (300, 200)).save(tmp_path / "a.png")  # the model's windows have 32x32 pixels
    arguments = ["predict", str(checkpoint), str(tmp_path / "a.png"), "--out", str(tmp_path / "out"), "--explain"]
    for options in ([], ["--mode", "whole"], ["--short_side", "40"], ["--crop", "64"], ["--mode", "slide"]):
        assert main([*arguments, *options]) == 0
    shrunk = (52, 78)
    assert seen == [(size, (200, 300)) for size in (shrunk, (200, 300), (40, 60), (104, 156), shrunk)]


def test_a_point_of_a_photo_that_is_predicted_in_windows_is_explained_by_one(checkpoint, tmp_path, monkeypatch):
    """And the page says how far it is from the label map, which it would otherwise seem to explain."""
    seen = []
    watched = segvit.explanation.Explanation.picture

    def picture(self, side=240, point=None, note=""):
        seen.append((self, point, note))
        return watched(self, side, point, note)

    monkeypatch.setattr(segvit.explanation.Explanation, "picture", picture)
    pixels = np.random.default_rng(0).integers(0, 255, (200, 300, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")  # the model's windows have 32x32 pixels
    arguments = ["predict", str(checkpoint), str(tmp_path / "a.png"), "--explain"]
    for out, options in (("b", ["--point", "[299, 100]"]), ("c", ["--point", "[0, 199]", "--short_side", "100"])):
        assert main([*arguments, "--out", str(tmp_path / out), *options]) == 0
    (right, right_point, _), (left, left_point, _) = seen
    assert (right.window, right_point, right.seen) == ((84, 268, 32, 32), (16, 31), (32, 32))
    assert (left.window, left_point, left.seen) == ((136, 0, 64, 64), (63, 0), (32, 32))
    model = segvit.SegViT.from_pretrained(checkpoint)
    window = np.ascontiguousarray(pixels[84:116, 268:300])
    assert torch.equal(right.labels, segvit.predict(model, window)[0])
    for out, (explanation, (y, x), note) in zip("bc", seen):
        top, left, height, width = explanation.window
        with Image.open(tmp_path / out / "a.png") as image:
            labels = np.asarray(image)[top : top + height, left : left + width]
        share = 100 * (explanation.labels.numpy() == labels).mean()
        says = (
            f"{share:.1f} % of these labels are those of the label map, which was made in another way; at the circle "
        )
        assert note == ("" if share == 100 else f"{says}that one says {model.class_names[labels[y, x]]}.")


def test_without_a_val_part_what_training_held_out_is_evaluated(shapes_folder, tmp_path, capsys):  # noqa: F811
    shutil.copytree(shapes_folder / "train", tmp_path / "data" / "train")
    shutil.copy(shapes_folder / "classes.txt", tmp_path / "data")
    run, data = tmp_path / "run", str(tmp_path / "data")
    assert main(["train", data, *TINY, "--steps", "1", "--val_fraction", "0.25", "--out", str(run)]) == 0
    capsys.readouterr()
    assert main(["evaluate", str(run), data, "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["images"] == 3
    assert f"no val part: the images that training held out ({run / 'held_out.csv'})" in captured.err
    assert main(["evaluate", str(run), data, "--part", "train", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["images"] == 12


def test_unreadable_images_are_left_out_of_a_prediction_and_said(checkpoint, shapes_folder, tmp_path, capsys):  # noqa: F811
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.new("L", (40, 30)).save(folder / "a.png")
    (folder / "b.jpg").write_bytes(b"no image")
    Image.new("RGBA", (1, 1)).save(folder / "c.png")
    out = tmp_path / "out"
    assert main(["predict", str(checkpoint), str(folder), "--out", str(out)]) == 1
    captured = capsys.readouterr()
    assert "2 label maps and overlays" in captured.out
    assert "1 of 3 images left out: " in captured.err
    assert "b.jpg: not a readable image" in captured.err
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "a_overlay.png", "c.png", "c_overlay.png"]
    assert Image.open(out / "c.png").size == (1, 1)


def test_convert(tmp_path, capsys):
    state, config = official_case()
    torch.save({"state_dict": state, "meta": {"epoch": 1}}, tmp_path / "a.pth")
    (tmp_path / "config.json").write_text(json.dumps(config))
    arguments = ["convert", str(tmp_path / "a.pth"), str(tmp_path / "out"), "--config", str(tmp_path / "config.json")]
    assert main(arguments) == 0
    assert "3 classes, 32x32 pixels" in capsys.readouterr().out
    segvit.SegViT.from_pretrained(tmp_path / "out")
    assert main(arguments) == 1
    assert "out exists already" in capsys.readouterr().err


def test_models_json_is_one_list_and_nothing_else(capfd):
    assert main(["models", "--json"]) == 0
    rows = json.loads(capfd.readouterr().out)
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
        (["train", "nowhere"], 1, "nowhere: no such folder"),
        (["train", "nowhere", "--config", "nowhere.yaml"], 2, "nowhere.yaml"),
        (["train", "DATA", "--backbone", "vit_tini_patch16_224"], 1, "near: vit_tiny_patch16_224"),
        (["train", "DATA", *TINY, "--crop", "[32]"], 1, "crop must be an int or (height, width)"),
        (["train", "DATA", *TINY, "--shrink", "v9"], 1, "shrink must be"),
        (["evaluate", "nowhere", "DATA/val"], 1, "nowhere"),
        (
            ["train", "DATA", *TINY, "--config", "no_such_recipe"],
            2,
            "recipes that come with segvit: custom, gpu_12gb, gpu_24gb",
        ),
        (["train", "DATA", *TINY, "--label_map", "{0: 77}"], 1, "0 goes to 77, which is neither a class"),
        (["train", "DATA", *TINY, "--layout", "voc"], 1, "layout must be one of folder, ade20k"),
        (["train", "DATA", *TINY, "--out", "DATA/classes.txt"], 1, "is a file; choose another folder"),
        (["check-data", "nowhere"], 1, "nowhere: no such folder"),
        (
            ["check-data", "DATA/train/images", "--classes", "DATA/classes.txt"],
            1,
            "no folder train/images or images/train",
        ),
        (["check-data", "DATA", "--picture", "DATA/val/images/0.jpg"], 1, "is a file of this data set"),
        (["train", "DATA", *TINY, "--crop", "96,128"], 2, '--crop cannot be 96,128; lists are written "[1, 2]"'),
        (["train", "DATA", *TINY, "--label_map", "{#d9a282: 0}"], 2, "--label_map cannot be {#d9a282: 0}"),
        (["train", "DATA", *TINY, "--stpes", "4"], 2, "unrecognized arguments: --stpes 4; near: --steps"),
        (["train", "DATA", *TINY, "--precision", "fp8"], 1, "precision must be no, bf16 or fp16, got 'fp8'"),
        (["train", "DATA", *TINY, "--model", "segvit_larg"], 1, "there is no model 'segvit_larg'; near: segvit_large"),
        (["evaluate", "CHECKPOINT", "DATA", "--device", "cuda"], 1, "there is no GPU that PyTorch can use"),
        (["predict", "CHECKPOINT", "DATA/val/images", "--out", "/proc/x"], 1, "/proc/x: cannot write there"),
        (["convert", "nowhere.pth", "out"], 1, "nowhere.pth: no such file"),
        (["convert", "DATA/classes.txt", "out"], 1, "classes.txt: not a readable checkpoint"),
        (["evaluate", "DATA", "DATA/val"], 1, "no checkpoint there"),
        (["evaluate", "CHECKPOINT", "DATA", "--report", "/proc/x/r.html"], 1, "/proc/x/r.html: cannot write there"),
        (["evaluate", "CHECKPOINT", "DATA", "--report", "DATA/val"], 1, "DATA/val is a folder; name a file"),
        (["evaluate", "CHECKPOINT", "DATA", "--report", "DATA/train/images/0.jpg"], 1, "would be overwritten"),
        (["evaluate", "CHECKPOINT", "DATA", "--report", "DATA/classes.txt"], 1, "would be overwritten"),
        (["evaluate", "CHECKPOINT", "DATA", "--workers", "-1"], 1, "workers must be at least 0, got -1"),
        (["predict", "CHECKPOINT", "nowhere.jpg"], 1, "nowhere.jpg: no such file or folder"),
        (["predict", "CHECKPOINT", "DATA"], 1, "no images in this folder"),
        (["predict", "CHECKPOINT", "DATA/classes.txt"], 1, "1 of 1 images left out: DATA/classes.txt: not a readable"),
        (["predict", "CHECKPOINT", "DATA/val/images", "DATA/train/images"], 1, "would overwrite each other"),
        (
            ["predict", "CHECKPOINT", "DATA/val/images", "--mode", "whole", "--crop", "[32,32]"],
            1,
            "--crop and --stride go with --mode slide or auto",
        ),
        (["predict", "runs/typo", "DATA/val/images"], 1, "runs/typo: no checkpoint there"),
        (["predict", "CHECKPOINT", "DATA/val/labels", "--out", "DATA/val/labels"], 1, "would be overwritten"),
        (["train", "DATA", *TINY, "--pretrained", "DATA/classes.txt"], 1, "cannot load"),
        (["train", "DATA", *TINY, "--steps", "0"], 1, "steps must be at least 1"),
        (["predict", "CHECKPOINT", "DATA/val/images", "--explain", "--point", "[3, 4]"], 1, "and there are 4"),
        (
            ["predict", "CHECKPOINT", "DATA/val/images/0.jpg", "--explain", "--point", "[64, 4]"],
            1,
            "x 64, y 4 is outside the image, which is 64 wide and 48 high",
        ),
        (["predict", "CHECKPOINT", "DATA/val/images/0.jpg", "--point", "[3, 4]"], 1, "go with --explain"),
        (
            ["predict", "CHECKPOINT", "DATA/val/images/0.jpg", "--explain", "--point", "[3]"],
            1,
            'a pixel "[x, y]", got [3]',
        ),
        (
            ["predict", "CHECKPOINT", "DATA/val/images", "--explain", "--explain_classes", "[disk]"],
            1,
            "classes: 'disk' is neither a class of the model nor a number from 0 to 5; near: disc",
        ),
        (["curves", "nowhere"], 1, "nowhere: no such folder"),
        (["curves", "DATA"], 1, "DATA: no log.jsonl in this folder"),
        (["curves", "CHECKPOINT", "--out", "curves.jpg"], 1, "name a file for --out that ends in .png"),
        (["predict", "CHECKPOINT", "DATA/val/images", "--mode", "tiles"], 1, "mode must be one of whole, slide, auto"),
    ],
)
def test_mistakes_end_in_one_line(arguments, code, message, checkpoint, shapes_folder, tmp_path, monkeypatch, capfd):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    (tmp_path / "runs").mkdir()
    places = {"DATA": str(shapes_folder), "CHECKPOINT": str(checkpoint)}
    for word, place in places.items():
        arguments = [place + a[len(word) :] if a == word or a.startswith(word + "/") else a for a in arguments]
    assert main(arguments) == code
    captured = capfd.readouterr()
    lines = [line for line in captured.err.splitlines() if line.strip() and "%|" not in line]
    assert len(lines) == 1, captured.err
    assert message in lines[0].replace(str(shapes_folder), "DATA")
    assert "Traceback" not in captured.err + captured.out
    assert not captured.out

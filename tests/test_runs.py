import json
import os
import shutil
import signal
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import segvit
from segvit.checkpoints import load_state, step_folders
from segvit.data import Shapes
from segvit.data.layouts import find_pairs
from segvit.metrics import Scores
from segvit.models import list_models
from segvit.resume import stop_signals
from segvit.runs import train_folder

NO_SCORES = (0.5, 0.5, 0.5, [], [], [])
TINY = {"backbone": "test_vit", "pretrained": False, "crop": 32, "batch_size": 2}


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
    drawn = ["curves.png"] if find_spec("matplotlib") else []
    written = ["best", *drawn, "log.jsonl", "step_00000008", "step_00000012"]
    assert sorted(path.name for path in run.iterdir()) == written


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
    assert "images_a_step" not in said
    assert [r["step"] for r in log(tmp_path / "run")] == [2, 3]
    train(shapes_folder, tmp_path / "run", steps=3, lr=5e-5, total_batch=4, resume=True)
    assert "resuming with images_a_step 4, which was 2" in capsys.readouterr().err
    train(shapes_folder, tmp_path / "frozen", steps=1, freeze_backbone=True, layer_decay=0.8)
    assert "the backbone is frozen, so drop_path and layer_decay do nothing" in capsys.readouterr().err


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
    assert [path.name for path in step_folders(run)] == ["step_00000003"]
    for folder in step_folders(run):
        shutil.rmtree(folder)
    with pytest.raises(ValueError, match=r"run has no step checkpoint to go on from: --model .*run with another --out"):
        train(shapes_folder, run, resume=True)
    assert (run / "best" / "config.json").is_file()


def test_nothing_but_a_runs_own_files_is_removed(shapes_folder, tmp_path):
    run = tmp_path / "run"
    for name in ("step_1/notes.txt", "step_00000007/notes.txt", "val.csv", "best/notes.txt"):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_text("mine")
    (run / "best" / "notes.txt").rename(run / "notes.txt")
    (run / "best").rmdir()
    train(shapes_folder, run, steps=2)
    train(shapes_folder, run, steps=1, overwrite=True)
    mine = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file() and path.read_bytes() == b"mine"}
    assert mine == {"step_1/notes.txt", "step_00000007/notes.txt", "val.csv", "notes.txt"}


def test_a_best_model_that_was_lost_is_written_again(shapes_folder, tmp_path):
    run = tmp_path / "run"
    train(shapes_folder, run, steps=2)
    shutil.rmtree(run / "best")
    assert 0 <= train(shapes_folder, run, steps=3, resume=True)["miou"] <= 1
    assert (run / "best" / "config.json").is_file()
    (run / "best").rename(run / ".best.old")  # as if killed between two renames
    train(shapes_folder, run, steps=3, resume=True)
    assert (run / "best" / "config.json").is_file()


def test_a_run_goes_on_with_its_own_model_and_what_changes_takes_effect(shapes_folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    train(Path(shapes_folder), run, steps=2)
    for name, value in (
        ("shrink", "v1"),
        ("drop_path", 0.3),
        ("freeze_backbone", True),
        ("backbone", "vit_tiny_patch16_224"),
    ):
        with pytest.raises(
            ValueError, match=f"a run goes on with its own model: {name} was .*, and cannot become {value}"
        ):
            train(shapes_folder, run, **{name: value}, resume=True)
    used, step = [], torch.optim.AdamW.step
    monkeypatch.setattr(
        torch.optim.AdamW,
        "step",
        lambda self, closure=None: (used.append([g["weight_decay"] for g in self.param_groups]), step(self))[1],
    )
    train(shapes_folder, run, steps=3, weight_decay=0.5, resume=True)
    assert used[-1] == [0.5, 0.0, 0.5]  # before, loading a state takes an empty step


def test_images_without_a_val_part_are_split_once(shapes_folder, tmp_path, capsys, monkeypatch):
    train(shapes_folder / "train", tmp_path / "run", val_fraction=0.25)
    assert "no val part: 3 of 12 images are held out" in capsys.readouterr().err
    table = tmp_path / "run" / "held_out.csv"
    held = find_pairs(table)
    assert len(held) == 3
    more = tmp_path / "data"
    shutil.copytree(shapes_folder / "train", more)
    (more / "classes.txt").write_text("\n".join(Shapes.classes))
    train(more, tmp_path / "other", val_fraction=0.25)
    before = (tmp_path / "other" / "held_out.csv").read_text()
    for name in ("images", "labels"):  # a new image changes what a new split would hold out
        source = next((more / name).glob("0.*"))
        shutil.copy(source, source.with_stem("new"))
    seen = []
    monkeypatch.setattr(
        "segvit.runs.evaluate", lambda model, data, *rest, **options: seen.append(data.pairs) or Scores(*NO_SCORES)
    )
    train(more, tmp_path / "other", val_fraction=0.25, steps=5, resume=True)
    assert (tmp_path / "other" / "held_out.csv").read_text() == before
    assert seen == [find_pairs(tmp_path / "other" / "held_out.csv")]


def test_a_run_does_not_go_on_with_a_copy_of_its_data(shapes_folder, tmp_path):
    """Its held-out images would be trained on: they are known by their paths."""
    train(shapes_folder / "train", tmp_path / "run", val_fraction=0.25, steps=2)
    shutil.copytree(shapes_folder / "train", tmp_path / "copy")
    shutil.copy(shapes_folder / "classes.txt", tmp_path / "copy")
    with pytest.raises(ValueError, match=r"held_out.csv names 3 validation images, of which 0 are in .*copy: a run"):
        train(tmp_path / "copy", tmp_path / "run", val_fraction=0.25, steps=4, resume=True)


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


@pytest.mark.parametrize(
    "options",
    [{"steps": 5, "validate_every": 4}, {"steps": 5, "validate_every": 3}, {"steps": 3, "validate_every": 9}],
    ids=["between validations", "at a validation", "at the end"],
)
def test_ctrl_c_keeps_a_checkpoint_to_go_on_from(shapes_folder, tmp_path, monkeypatch, options):
    steps, before = [], signal.getsignal(signal.SIGINT)

    def interrupted(self, labels=None, *args):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return forward(self, labels, *args)

    forward = segvit.ATMLoss.forward
    monkeypatch.setattr(segvit.ATMLoss, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"stopped at step 3; the last checkpoint is .*step_00000003"):
        train(shapes_folder, tmp_path / "run", **options)
    assert len(steps) == 3
    assert signal.getsignal(signal.SIGINT) is before  # as it was: shells ignore it for jobs in the background
    assert segvit.checkpoints.load_model(tmp_path / "run").num_classes == 6  # even before the first validation
    result = train(shapes_folder, tmp_path / "run", **options, resume=True)
    assert len(steps) == options["steps"]
    train(shapes_folder, tmp_path / "whole", **options)
    columns = ("step", "loss", "lr", "miou")
    runs = [
        [[r.get(c) for c in columns] for r in log(tmp_path / name) if r["step"] != 3 or "miou" in r]
        for name in ("run", "whole")
    ]
    assert runs[0] == runs[1]
    assert 0 <= result["miou"] <= 1


def test_ctrl_c_in_a_validation_leaves_it(shapes_folder, tmp_path, monkeypatch, capsys):
    seen, predict = [], segvit.predict

    def interrupted(*args, **kwargs):
        seen.append(1)
        if len(seen) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return predict(*args, **kwargs)

    monkeypatch.setattr("segvit.evaluation.predict", interrupted)
    with pytest.raises(
        KeyboardInterrupt, match=r"stopped during an evaluation; the last checkpoint is .*step_00000004"
    ):
        train(shapes_folder, tmp_path / "run")
    assert len(seen) == 2
    assert "Ctrl-C again stops at once" in capsys.readouterr().err
    assert 0 <= train(shapes_folder, tmp_path / "run", resume=True)["miou"] <= 1
    assert [r["step"] for r in log(tmp_path / "run")] == [4]


def test_a_second_ctrl_c_stops_at_once():
    with stop_signals() as stopped:
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


def test_total_batch_is_made_of_parts(shapes_folder, tmp_path, monkeypatch):
    sizes, forward = [], segvit.SegViT.forward
    monkeypatch.setattr(segvit.SegViT, "forward", lambda self, x: (sizes.append(len(x)), forward(self, x))[1])
    monkeypatch.setattr("segvit.runs.evaluate", lambda *_, **__: Scores(*NO_SCORES))
    train(shapes_folder, tmp_path / "parts", steps=2, batch_size=2, total_batch=5)
    assert sizes == [2, 2, 1] * 2


def test_the_best_model_is_the_average_of_the_weights(shapes_folder, tmp_path):
    run = tmp_path / "run"
    train(shapes_folder, run, steps=4, lr=1e-2, ema=0.5, validate_every=4)
    state = load_state(step_folders(run)[-1])
    best = segvit.SegViT.from_pretrained(run / "best")
    assert all(torch.equal(p, state["ema"][name]) for name, p in best.named_parameters())
    assert not torch.equal(best.decoder.queries, weights(run)["decoder.queries"])


def test_a_deterministic_run_asks_torch_for_it_and_leaves_it_as_it_was(shapes_folder, tmp_path, monkeypatch):
    seen, forward = [], segvit.SegViT.forward

    def watched(self, images):
        seen.append(torch.are_deterministic_algorithms_enabled())
        return forward(self, images)

    monkeypatch.setattr(segvit.SegViT, "forward", watched)
    train(shapes_folder, tmp_path / "run", steps=2, deterministic=True)
    assert seen
    assert all(seen)
    assert not torch.are_deterministic_algorithms_enabled()


def test_precision_is_what_accelerate_launch_says(shapes_folder, tmp_path, monkeypatch):
    import accelerate

    seen, prepare = [], accelerate.Accelerator.prepare

    def watched(self, *things):
        seen.append((self.mixed_precision, self.gradient_accumulation_steps))
        return prepare(self, *things)

    monkeypatch.setattr(accelerate.Accelerator, "prepare", watched)
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")  # total_batch does that
    train(shapes_folder, tmp_path / "run", steps=1)
    train(shapes_folder, tmp_path / "other", steps=1, precision="no")
    assert {seen[0], seen[-1]} == {("bf16", 1), ("no", 1)}


def test_a_tracker_that_fails_ends_no_training(shapes_folder, tmp_path, monkeypatch, capsys):
    import accelerate

    def failing(self, values, step):
        raise KeyError("the server is gone")

    monkeypatch.setattr(accelerate.Accelerator, "log", failing)
    train(shapes_folder, tmp_path / "run", steps=20, validate_every=10, trackers="tensorboard")
    assert len(log(tmp_path / "run")) == 2
    assert capsys.readouterr().err.count("tensorboard: a record is lost") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_records_reach_tensorboard(shapes_folder, tmp_path, workers):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = tmp_path / "run"
    train(shapes_folder, run, steps=20, validate_every=10, trackers="tensorboard", workers=workers)
    events = EventAccumulator(str(next(run.rglob("events.*")).parent)).Reload()
    for name in ("loss", "miou", "waiting", "lr"):
        found = {event.step: event.value for event in events.Scalars(name)}
        assert found == pytest.approx({r["step"]: r[name] for r in log(run)})


def test_a_run_on_wandb_goes_on_as_the_same_run(shapes_folder, tmp_path, monkeypatch):
    import accelerate

    started, logged = [], []
    monkeypatch.setattr("segvit.runs.find_spec", lambda name: name)
    monkeypatch.setattr("accelerate.accelerator.filter_trackers", lambda *_: [])
    monkeypatch.setattr(accelerate.Accelerator, "init_trackers", lambda self, *args: started.append(args))
    monkeypatch.setattr(accelerate.Accelerator, "log", lambda self, values, step: logged.append(step))
    for resume in (False, True):
        train(shapes_folder, tmp_path / "run", steps=4 if resume else 2, trackers=["wandb"], resume=resume)
    first, second = (arguments[2]["wandb"] for arguments in started)
    assert first == second
    assert first["resume"] == "allow"
    assert len(first["id"]) == 8
    assert started[0][0] == "segvit"
    assert started[0][1]["steps"] == 2
    assert logged == [2, 4]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"steps": 0}, ValueError, "steps must be at least 1"),
        ({"checkpoint_every": 0}, ValueError, "checkpoint_every must be at least 1"),
        ({"total_batch": 0}, ValueError, "total_batch must be a multiple of the number of processes"),
        ({"precision": "fp8"}, ValueError, "precision must be no, bf16 or fp16, got 'fp8'"),
        ({"compile": "yes"}, ValueError, "compile must be no, model or step, got 'yes'"),
        ({"ema": 1.5}, ValueError, "ema must be between 0 and 1, as 0.999, got 1.5"),
        ({"trackers": "neptune"}, ValueError, "trackers must be tensorboard, wandb or mlflow, got 'neptune'"),
        ({"trackers": ["mlflow"]}, ValueError, "the tracker mlflow is not installed: pip install mlflow"),
        ({"keep": 0}, ValueError, "keep must be at least 1"),
        ({"validate_every": -1}, ValueError, "validate_every must be at least 1"),
        ({"scale": [2.0, 1.0]}, ValueError, "scale must be"),
        ({"model": "nowhere/at/all"}, FileNotFoundError, "no checkpoint there"),
        ({"mode": "tiles"}, ValueError, "mode must be one of whole, slide, auto"),
        ({"stride": 40}, ValueError, "stride must not exceed crop_size"),
        ({"out": "/proc/nothing/here"}, PermissionError, "/proc/nothing/here: cannot write there"),
        ({"out": __file__}, ValueError, "is a file; choose another folder"),
    ],
)
def test_what_does_not_fit_is_said(options, error, message, shapes_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("segvit.runs.fit", None)  # said before training
    monkeypatch.setattr("segvit.runs.find_spec", lambda name: None)
    with pytest.raises(error, match=message):
        train_folder(str(shapes_folder), **(TINY | {"out": str(tmp_path / "run"), "steps": 4} | options))


def test_recipes_are_arguments_of_training():
    recipes = sorted(Path(segvit.__file__).parent.glob("recipes/*.yaml"))
    published = {info.name: info for info in list_models() if info.published}
    cards = {"gpu_8gb", "gpu_12gb", "gpu_24gb", "gpu_80gb"}
    assert {path.stem for path in recipes} == {*published, *cards, "custom"}
    for path in recipes:
        options = yaml.safe_load(path.read_text())
        assert set(options) <= set(train_folder.__annotations__)
        if path.stem in published:
            info = published[path.stem]
            assert (options["model"], options["crop"]) == (info.name, info.image_size[0])
            assert options["batch_size"] == options["total_batch"] == 16
        assert path.read_text().splitlines()[1].startswith("# segvit train ")
        assert f"--config {path.stem}" in path.read_text().splitlines()[1]

"""A training run at the shell: data, checks, model, checkpoints, and going on where one stopped."""

import difflib
import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from segvit.checkpoints import (
    keep_newest,
    load_model,
    load_state,
    make_folder,
    restore,
    save_checkpoint,
    step_folders,
    with_classes,
)
from segvit.data.check import check_data, judge
from segvit.data.dataset import SegmentationDataset
from segvit.data.layouts import find_pairs, has_part, open_data, split_pairs, write_table
from segvit.data.moments import input_options
from segvit.data.transforms import TrainTransform
from segvit.inference import plan_prediction
from segvit.losses import ATMLoss
from segvit.metrics import Scores
from segvit.models import SegViT, create_model, list_models
from segvit.models.segvit import as_pair
from segvit.training import evaluate, fit

LABEL_OPTIONS = ("layout", "ignore_index", "label_map", "reduce_zero_label", "short_side")  # evaluation needs them too
HELD_OUT = "held_out.csv"  # validation images of a run whose data has no val part


def train_folder(
    data: str,
    out: str = "runs/segvit",
    layout: str = "folder",
    classes: str | None = None,
    ignore_index: int = 255,
    label_map: dict[int | str, int] | None = None,
    reduce_zero_label: bool = False,
    val_fraction: float = 0.1,
    check: bool = True,
    channels: int = 3,
    model: str | None = None,
    backbone: str = "vit_base_patch16_384.augreg_in21k_ft_in1k",
    pretrained: bool | str = True,
    shrink: str | None = None,
    edge_budget: float | None = None,
    drop_path: float | None = None,
    freeze_backbone: bool = False,
    activation_checkpointing: bool = False,
    crop: int | list[int] | None = None,
    short_side: int | None = None,
    scale: list[float] = [0.5, 2.0],  # noqa: B006  (never changed; a tuple would not read from YAML as it is shown)
    steps: int = 20000,
    batch_size: int = 8,
    lr: float = 1e-4,
    decoder_lr: float = 10.0,
    weight_decay: float = 0.01,
    warmup: int | None = None,
    power: float = 1.0,
    clip: float = 35.0,
    ignored: str = "masked",
    precision: str | bool = "no",
    validate_every: int | None = None,
    mode: str = "auto",
    stride: int | list[int] | None = None,
    keep: int = 2,
    resume: bool = False,
    overwrite: bool = False,
    workers: int | None = None,
    seed: int = 0,
) -> dict:
    """Train on the data's train part, validate on its val part at full size, keep the best and the newest checkpoints.

    Writes OUT/best (safetensors + config.json), OUT/step_… (the same, and training.pt to go on from), OUT/log.jsonl
    (one record a line), and OUT/held_out.csv where validation images were held out.

    Args:
        data: folder with train/images, train/labels, val/… and classes.txt; or a CSV file.
        out: folder for checkpoints and the log.
        layout: folder, ade20k, cocostuff10k, cocostuff164k, pascal_voc, pascal_voc_aug, pascal_context_59,
            pascal_context_60, cityscapes or camvid.
        classes: file of class names, one a line; DATA/classes.txt by default.
        ignore_index: label of pixels without a truth.
        label_map: label in the files to class number (or ignore_index), such as {255: 1} or {"#804080": 0}.
        reduce_zero_label: 0 is no class but ignored, and label k means class k−1.
        val_fraction: share of the images that is held out where the data has no val part.
        check: read all files first, and refuse what would ruin the training.
        channels: of the images. A new model for other than 3, or for files of more than 8 bits, is given the training
            images' own mean and std; a saved model has its own.
        model: a name of `segvit models`, or a saved model to go on from (class rows of known names are kept).
        backbone: a timm ViT, where no model is named.
        pretrained: true (weights of the backbone from the Hub), false, or a weights file.
        shrink: v1 (the paper's) saves 40 percent of the multiply-adds, light half of them, edge (which keeps tokens at
            the edges of objects) 43 percent.
        edge_budget: with edge, the share of the tokens that stays beside the even grid; 0.125 by default.
        drop_path: stochastic depth of the backbone; the model's own, or 0.1.
        freeze_backbone: train the decoder alone.
        activation_checkpointing: less memory, more time.
        crop: training crop, one side or [height, width]; the model's size, or 512.
        short_side: resize images to this short side first, also in validation; as they are by default.
        scale: random resizing from, to.
        steps: optimizer steps.
        batch_size: images a step and process.
        lr: learning rate of the backbone.
        decoder_lr: factor of lr for the decoder.
        weight_decay: not for the backbone's norms.
        warmup: steps; a twentieth by default.
        power: of the polynomial decay.
        clip: largest norm of the gradients.
        ignored: masked leaves ignored pixels out of the masks' loss; negative counts them as the official code does.
        precision: no (float32), bf16 or fp16.
        validate_every: steps between validations and checkpoints; a tenth of the run, at least 200, by default.
        mode: of validation, whole, slide (windows of the crop) or auto (slide where images are large).
        stride: of validation windows.
        keep: how many of the newest checkpoints to keep, beside the best.
        resume: go on from the newest checkpoint in OUT, if there is one.
        overwrite: start anew although OUT has checkpoints, which are removed.
        workers: processes that load data; by default none without a GPU, else up to 8.
        seed: of weights, data order and augmentation.

    Returns:
        miou of the best validation, checkpoint (its folder), records (see fit), main_process.

    Raises:
        RuntimeError: Accelerate is not installed.
        ValueError, FileNotFoundError: data or arguments that do not fit, named.
    """
    options = json.loads(json.dumps(locals(), default=str))
    try:
        from accelerate import Accelerator
        from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, set_seed
    except ImportError as error:
        raise RuntimeError("training needs Accelerate: pip install 'segvit[train]'") from error
    _check_options(steps, batch_size, keep, validate_every, scale, precision)
    set_seed(seed)
    precision = {"False": "no"}.get(str(precision), precision)  # YAML reads no as false
    patient = InitProcessGroupKwargs(timeout=timedelta(hours=2))  # one process checks the data, the others wait
    accelerator = Accelerator(mixed_precision=precision, kwargs_handlers=[patient])
    main, run = accelerator.is_main_process, Path(out)
    newest = _newest(run, resume, overwrite)
    state = None if newest is None else load_state(newest)
    if state is not None:
        _compare_options(state["options"], options, main)
    held = run / HELD_OUT if newest is not None else None
    train, val, split = _parts(data, layout, classes, ignore_index, label_map, reduce_zero_label, val_fraction, held)
    train.channels = channels
    network, size = _model(
        model,
        train.classes,
        crop,
        newest,
        backbone,
        lambda: input_options(train),
        pretrained={"true": True, "false": False}.get(str(pretrained).lower(), pretrained),
        shrink=shrink,
        edge_budget=edge_budget,
        drop_path=drop_path,
        freeze_backbone=freeze_backbone,
        activation_checkpointing=activation_checkpointing,
    )
    if channels not in (3, len(network.mean)):
        raise ValueError(f"channels: {model or newest} takes {len(network.mean)}, not {channels}")
    train.channels = val.channels = len(network.mean)
    mean, std = network.mean.tolist(), network.std.tolist()
    evaluation = {"mode": mode, "short_side": short_side}
    evaluation |= {} if mode == "whole" else {"crop_size": size, "stride": stride}
    plan_prediction(network, **evaluation)
    accelerator.wait_for_everyone()  # all have looked at the folder, before anybody writes to it
    problem = [None]
    if main:
        make_folder(run)
        problem = [_refusal(data, train, val) if check and newest is None else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    train.transform = TrainTransform(size, mean, std, ignore_index, scale, short_side)
    labels = {name: options[name] for name in LABEL_OPTIONS}
    best = {"miou": None, "checkpoint": str(run / "best")}
    if state is not None:
        best["miou"] = _go_on(run, state, accelerator)
    elif main:
        for path in _own(run):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if split:
            write_table(run / HELD_OUT, val.pairs)
            share = f"{len(val)} of {len(train) + len(val)} images are held out"
            print(f"no val part: {share}, and named in {run / HELD_OUT}", file=sys.stderr)

    def checkpoint(training: dict) -> None:
        if main:
            save_checkpoint(network, run / f"step_{training['step']:08d}", training | {"options": options}, labels)
            keep_newest(run, keep)

    def validate(step: int) -> Scores:
        alone = accelerator.num_processes == 1  # else all must leave together
        scores = evaluate(network, val, ignore_index, main, stopped if alone else lambda: False, **evaluation)
        if best["miou"] is None or not scores.miou <= best["miou"]:
            best["miou"] = scores.miou
            if main:
                save_checkpoint(network, run / "best", labels=labels)
        accelerator.wait_for_everyone()
        return scores

    with _stop_signals() as stopped, _last_good(run, main):
        records = fit(
            network,
            ATMLoss(len(train.classes), ignore_index, ignored),
            train,
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            decoder_lr=decoder_lr,
            warmup=steps // 20 if warmup is None else warmup,
            power=power,
            clip=clip,
            workers=_workers(accelerator.num_processes) if workers is None else workers,
            seed=seed,
            accelerator=accelerator,
            log=run / "log.jsonl" if main else None,
            validate=validate,
            validate_every=validate_every or max(steps // 10, 200),
            checkpoint=checkpoint,
            state=state,
            stopped=stopped,
        )
    return best | {"records": records, "main_process": main}


def _check_options(
    steps: int, batch_size: int, keep: int, validate_every: int | None, scale: Sequence[float], precision: str | bool
) -> None:
    if str(precision) not in ("no", "False", "bf16", "fp16"):
        raise ValueError(f"precision must be no, bf16 or fp16, got {precision!r}")
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("keep", keep),
        ("validate_every", validate_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be [from, to], got {list(scale)}")


def _own(run: Path) -> list[Path]:
    """What a run wrote to its folder; nothing else in there is ever touched."""
    folders = [path for path in (run / "best", *run.glob("step_*")) if (path / "config.json").is_file()]
    return folders + [path for path in (run / "log.jsonl", run / HELD_OUT) if path.is_file()]


def _newest(run: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; refuses to train over a run unless told to."""
    if resume and overwrite:
        raise ValueError("resume goes on with a run, overwrite removes it: choose one")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; choose another folder for --out")
    if _own(run) and not (resume or overwrite):
        raise ValueError(
            f"{run} holds a run already: --resume goes on with it, --overwrite starts anew, or change --out"
        )
    found = step_folders(run)
    if resume and not found and (run / "best").exists():
        raise ValueError(
            f"{run} has no step checkpoint to go on from: --model {run} with another --out starts from its best model"
        )
    return found[-1] if found and resume else None


def _parts(
    data: str,
    layout: str,
    classes: str | None,
    ignore_index: int,
    label_map,
    reduce_zero_label: bool,
    fraction: float,
    held: Path | None,
) -> tuple[SegmentationDataset, SegmentationDataset, bool]:
    """Data of training and of validation, and whether the latter was split off; `held` has an earlier split."""
    options = (layout, classes, ignore_index, label_map, reduce_zero_label)
    whole = None if not has_part(data, "train", layout) and has_part(data, None, layout) else "train"
    train = open_data(data, whole, *options)
    if whole and has_part(data, "val", layout):
        return train, open_data(data, "val", *options), False
    if held is not None and held.is_file():
        val = find_pairs(held)
        images = {image for image, _ in val}
        return train.subset([pair for pair in train.pairs if pair[0].resolve() not in images]), train.subset(val), True
    kept, split = split_pairs(train.pairs, fraction)
    return train.subset(kept), train.subset(split), True


def _model(
    name: str | None,
    classes: list[str],
    crop,
    newest: Path | None,
    backbone: str,
    inputs: Callable[[], dict],
    **arguments,
) -> tuple[SegViT, tuple[int, int]]:
    """The model to train, and the crop; `inputs` gives arguments that a new model needs for these images."""
    crop = as_pair("crop", crop)
    known = {"num_classes": len(classes), "class_names": classes}
    given = {key: value for key, value in arguments.items() if value is not None}
    memory = {key: given[key] for key in ("activation_checkpointing", "freeze_backbone")}
    if newest is not None:
        model = load_model(newest)
        if model.class_names != classes:
            raise ValueError(f"{newest} was trained on other classes; to go on with new ones, name it as --model")
        model.backbone.activation_checkpointing = memory["activation_checkpointing"]
    elif name is None:
        model = SegViT(backbone, image_size=crop or (512, 512), **known, **inputs(), **given)
    elif name in {info.name for info in list_models()}:
        model = create_model(name, **known, **({"image_size": crop} if crop else {}), **inputs(), **given)
    else:
        near = difflib.get_close_matches(name, [info.name for info in list_models()], n=2)
        if near and not Path(name).exists():
            raise ValueError(f"there is no model {name!r}; near: {', '.join(near)}")
        drop_path = {"drop_path": given["drop_path"]} if "drop_path" in given else {}
        model, said = with_classes(load_model(name), classes, **memory, **drop_path)
        print(f"{name}: {said}", file=sys.stderr)
        if crop not in (None, model.image_size):
            print(f"windows of predict and evaluate stay {model.image_size} unless --crop says so", file=sys.stderr)
    return model, crop or model.image_size


def _refusal(data: str, train: SegmentationDataset, val: SegmentationDataset) -> str | None:
    """Read all files; hints are printed, and what would ruin the training is returned."""
    reports = [check_data(train, "train"), check_data(val, "val")]
    judge(*reports)
    for report in reports:
        for hint in report.hints:
            print(f"{report.part}: {hint}", file=sys.stderr)
    problems = [f"{report.part}: {problem}" for report in reports for problem in report.problems]
    more = f" (and {len(problems) - 1} more: segvit check-data {data})" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else None


def _read_log(path: Path) -> list[dict]:
    """Whole lines of a log; the last one may have been cut off."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _go_on(run: Path, state: dict, accelerator) -> float | None:
    """Cut from the log what came after the checkpoint, or was not validated yet; returns the best mIoU until then."""
    records = _read_log(run / "log.jsonl")
    accelerator.wait_for_everyone()  # all have read the log
    step = state["step"]
    records = [r for r in records if r["step"] < step or (r["step"] == step and "miou" in r)]
    if records and records[-1]["step"] == step:
        del state["record"]
    if accelerator.is_main_process:
        restore(run / "best")
        (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    accelerator.wait_for_everyone()
    if not (run / "best" / "config.json").is_file():
        return None  # whatever comes next is the best there is
    return max((record["miou"] for record in records if record.get("miou") is not None), default=None)


def _compare_options(old: dict, new: dict, main: bool) -> None:
    """Going on with other options is allowed, and said; but not with another model."""
    elsewhere = (
        "data",
        "out",
        "resume",
        "overwrite",
        "check",
        "workers",
        "keep",
        "activation_checkpointing",
        "pretrained",
        "channels",  # the model's own, or refused
    )
    for name, value in new.items():
        if name in elsewhere or old.get(name) == value:
            continue
        if name in ("model", "backbone", "shrink", "edge_budget", "drop_path", "freeze_backbone"):
            raise ValueError(f"a run goes on with its own model: {name} was {old.get(name)}, and cannot become {value}")
        if main:
            print(f"resuming with {name} {value}, which was {old.get(name)}", file=sys.stderr)


@contextmanager
def _last_good(run: Path, main: bool) -> Iterator[None]:
    """Say with what stops a training where it can go on."""
    try:
        yield
    except (FloatingPointError, KeyboardInterrupt) as error:
        if not main:
            raise
        kept = step_folders(run)
        where = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        raise type(error)(f"{error}; {where}") from error


@contextmanager
def _stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or SIGTERM) asks to stop after the step; a second one stops at once."""
    asked = threading.Event()

    def handle(number, frame):
        if asked.is_set():
            raise KeyboardInterrupt("stopped at once")
        asked.set()
        print("\nstopping after this step; Ctrl-C again stops at once", file=sys.stderr)

    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return
    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked.is_set
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _workers(processes: int) -> int:
    return min(8, (os.cpu_count() or 1) // processes) if torch.cuda.is_available() else 0

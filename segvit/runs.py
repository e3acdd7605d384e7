"""A training run at the shell: data, checks, model, checkpoints, and going on where one stopped."""

import json
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from segvit.checkpoints import keep_newest, load_model, load_state, save_checkpoint, step_folders, with_classes
from segvit.data.check import check_data, compare_parts
from segvit.data.dataset import SegmentationDataset
from segvit.data.layouts import has_part, open_data, split_pairs, write_table
from segvit.data.transforms import TrainTransform
from segvit.losses import ATMLoss
from segvit.metrics import Scores
from segvit.models import SegViT, create_model, list_models
from segvit.models.segvit import as_pair
from segvit.training import evaluate, fit


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
    model: str | None = None,
    backbone: str = "vit_base_patch16_384.augreg_in21k_ft_in1k",
    pretrained: bool | str = True,
    shrink: str | None = None,
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
    (one record a line), and OUT/val.csv where validation images were held out.

    Args:
        data: folder with train/images, train/labels, val/… and classes.txt; or a CSV file.
        out: folder for checkpoints and the log.
        layout: folder, ade20k, cocostuff10k, pascal_context_59, pascal_context_60, cityscapes or camvid.
        classes: file of class names, one a line; DATA/classes.txt by default.
        ignore_index: label of pixels without a truth.
        label_map: label in the files to class number (or ignore_index), such as {255: 1} or {"#804080": 0}.
        reduce_zero_label: 0 is no class but ignored, and label k means class k−1.
        val_fraction: share of the images that is held out where the data has no val part.
        check: read all files first, and refuse what would ruin the training.
        model: a name of `segvit models`, or a saved model to go on from (class rows of known names are kept).
        backbone: a timm ViT, where no model is named.
        pretrained: true (weights of the backbone from the Hub), false, or a weights file.
        shrink: v1 saves about 40 percent of the multiply-adds.
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
        validate_every: steps between validations and checkpoints; a tenth of the run by default.
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
    options = dict(locals())
    try:
        from accelerate import Accelerator
        from accelerate.utils import broadcast_object_list, set_seed
    except ImportError as error:
        raise RuntimeError("training needs Accelerate: pip install 'segvit[train]'") from error
    _check_options(steps, batch_size, keep, validate_every, scale)
    set_seed(seed)
    accelerator = Accelerator(mixed_precision={"False": "no"}.get(str(precision), precision))  # YAML reads no as false
    main, run = accelerator.is_main_process, Path(out)
    newest = _newest(run, resume, overwrite)
    accelerator.wait_for_everyone()  # before anybody writes to the folder
    train, val, held_out = _parts(data, layout, classes, ignore_index, label_map, reduce_zero_label, val_fraction)
    network, size = _model(
        model,
        train.classes,
        crop,
        newest,
        backbone,
        pretrained={"true": True, "false": False}.get(str(pretrained).lower(), pretrained),
        shrink=shrink,
        drop_path=drop_path,
        freeze_backbone=freeze_backbone,
        activation_checkpointing=activation_checkpointing,
    )
    state, best = None, {"miou": None, "checkpoint": str(run / "best")}
    if main:
        _make_folder(run)
    problem = [_refusal(data, train, val) if check and newest is None and main else None]
    if accelerator.num_processes > 1:
        broadcast_object_list(problem)
    if problem[0]:
        raise ValueError(problem[0])
    if newest is not None:
        state, records = load_state(newest), _read_log(run / "log.jsonl")
        accelerator.wait_for_everyone()  # all have read the log
        records = _until(records, state)
        best["miou"] = max((r["miou"] for r in records if r.get("miou") is not None), default=None)
        if main:
            _say_changes(state["options"], options)
            (run / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    elif main:
        _clear(run)
        if held_out:
            write_table(run / "val.csv", val.pairs)
            print(
                f"no val part: {len(val)} of {len(train) + len(val)} images are held out, {run / 'val.csv'}",
                file=sys.stderr,
            )
    mean, std = network.mean.tolist(), network.std.tolist()
    train.transform = TrainTransform(size, mean, std, ignore_index, scale, short_side)
    evaluation = {"mode": mode, "short_side": short_side}
    evaluation |= {} if mode == "whole" else {"crop_size": size, "stride": stride}

    def checkpoint(training: dict) -> None:
        if main:
            save_checkpoint(network, run / f"step_{training['step']:08d}", training | {"options": options})
            keep_newest(run, keep)

    def validate(step: int) -> Scores:
        scores = evaluate(network, val, ignore_index, progress=main, **evaluation)
        if best["miou"] is None or not scores.miou <= best["miou"]:
            best["miou"] = scores.miou
            if main:
                save_checkpoint(network, run / "best")
        accelerator.wait_for_everyone()
        return scores

    with _stop_signals() as stopped, _last_good(run):
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
            validate_every=validate_every or max(steps // 10, 1),
            checkpoint=checkpoint,
            state=state,
            stopped=stopped,
        )
    return best | {"records": records, "main_process": main}


def _check_options(steps: int, batch_size: int, keep: int, validate_every: int | None, scale: Sequence[float]) -> None:
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


def _newest(run: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; refuses to train over a run unless told to."""
    if resume and overwrite:
        raise ValueError("resume goes on with a run, overwrite removes it: choose one")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; choose another folder for --out")
    found = step_folders(run)
    if (found or (run / "best").exists()) and not (resume or overwrite):
        raise ValueError(
            f"{run} holds a run already: --resume goes on with it, --overwrite starts anew, or change --out"
        )
    return found[-1] if found and resume else None


def _parts(
    data: str, layout: str, classes: str | None, ignore_index: int, label_map, reduce_zero_label: bool, fraction: float
) -> tuple[SegmentationDataset, SegmentationDataset, bool]:
    """Data of training and of validation, and whether the latter was held out of the former."""
    options = (layout, classes, ignore_index, label_map, reduce_zero_label)
    whole = None if not has_part(data, "train", layout) and has_part(data, None, layout) else "train"
    train = open_data(data, whole, *options)
    if whole and has_part(data, "val", layout):
        return train, open_data(data, "val", *options), False
    kept, held = split_pairs(train.pairs, fraction)
    return train.subset(kept), train.subset(held), True


def _model(
    name: str | None, classes: list[str], crop, newest: Path | None, backbone: str, **arguments
) -> tuple[SegViT, tuple[int, int]]:
    """The model to train, and the crop."""
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
        model = SegViT(backbone, image_size=crop or (512, 512), **known, **given)
    elif name in {info.name for info in list_models()}:
        model = create_model(name, **known, **({"image_size": crop} if crop else {}), **given)
    else:
        drop_path = {"drop_path": given["drop_path"]} if "drop_path" in given else {}
        model, said = with_classes(load_model(name), classes, **memory, **drop_path)
        print(f"{name}: {said}", file=sys.stderr)
    return model, crop or model.image_size


def _refusal(data: str, train: SegmentationDataset, val: SegmentationDataset) -> str | None:
    """Read all files; hints are printed, and what would ruin the training is returned."""
    reports = [check_data(train, "train"), check_data(val, "val")]
    compare_parts(*reports)
    for report in reports:
        for hint in report.hints:
            print(f"{report.part}: {hint}", file=sys.stderr)
    problems = [f"{report.part}: {problem}" for report in reports for problem in report.problems]
    more = f" (and {len(problems) - 1} more: segvit check-data {data})" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else None


def _clear(run: Path) -> None:
    """An empty run: no checkpoints, no log."""
    for folder in (run / "best", *run.glob("step_*")):
        shutil.rmtree(folder, ignore_errors=True)
    for name in ("log.jsonl", "val.csv"):
        (run / name).unlink(missing_ok=True)


def _make_folder(run: Path) -> None:
    try:
        run.mkdir(parents=True, exist_ok=True)
        (run / ".writable").write_text("")
        (run / ".writable").unlink()
    except OSError as error:
        raise PermissionError(f"{run}: cannot write there ({error.strerror}); change --out") from error


def _read_log(path: Path) -> list[dict]:
    """Whole lines of a log; the last one may have been cut off."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def _until(records: list[dict], state: dict) -> list[dict]:
    """What a run logged until the checkpoint that it goes on from."""
    records = [record for record in records if record["step"] <= state["step"]]
    if records and records[-1]["step"] == state["step"]:
        state.pop("record", None)  # logged, and so validated, already
    return records


def _say_changes(old: dict, new: dict) -> None:
    """Going on with other options is allowed, and said."""
    elsewhere = ("data", "out", "resume", "overwrite", "check", "workers", "keep", "activation_checkpointing")
    for name, value in new.items():
        if name not in elsewhere and old.get(name) != value:
            print(f"resuming with {name} {value}, which was {old.get(name)}", file=sys.stderr)


@contextmanager
def _last_good(run: Path) -> Iterator[None]:
    """Say with what stops a training where it can go on."""
    try:
        yield
    except (FloatingPointError, KeyboardInterrupt) as error:
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

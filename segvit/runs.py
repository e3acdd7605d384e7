"""A training run at the shell: data, checks, model, checkpoints, and going on where one stopped."""

import difflib
import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from segvit.checkpoints import (
    LOG,
    clean,
    keep_newest,
    load_model,
    load_state,
    make_folder,
    remove_checkpoint,
    save_checkpoint,
)
from segvit.classes import other_classes
from segvit.curves import redrawn
from segvit.data.check import refusal
from segvit.data.dataset import SegmentationDataset
from segvit.data.layouts import find_pairs, has_part, open_data, split_pairs, write_table
from segvit.data.moments import input_options
from segvit.data.stream import default_workers
from segvit.data.transforms import TrainTransform
from segvit.evaluation import evaluate
from segvit.inference import plan_prediction
from segvit.losses import ATMLoss
from segvit.metrics import Scores
from segvit.models import SegViT, create_model, list_models
from segvit.models.segvit import as_pair
from segvit.precision import PRECISIONS
from segvit.resume import HELD_OUT, compare_options, go_on, last_good, newest, own_files, stop_signals
from segvit.training import COMPILE, fit

LABEL_OPTIONS = ("layout", "ignore_index", "label_map", "reduce_zero_label", "short_side")  # evaluation needs them too
TRACKERS = ("tensorboard", "wandb", "mlflow")


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
    add_classes: bool = False,
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
    total_batch: int | None = None,
    lr: float = 1e-4,
    decoder_lr: float = 10.0,
    layer_decay: float | None = None,
    weight_decay: float = 0.01,
    warmup: int | None = None,
    power: float = 1.0,
    clip: float = 35.0,
    ema: float | None = None,
    ignored: str = "masked",
    precision: str | bool | None = None,
    compile: str | bool = "no",
    fsdp: bool = False,
    deterministic: bool = False,
    validate_every: int | None = None,
    checkpoint_every: int | None = None,
    mode: str = "auto",
    stride: int | list[int] | None = None,
    keep: int = 2,
    resume: bool = False,
    overwrite: bool = False,
    strict: bool = False,
    trackers: str | list[str] | None = None,
    workers: int | None = None,
    seed: int = 0,
) -> dict:
    """Train on the data's train part, validate on its val part at full size, keep the best and the newest checkpoints.

    Writes OUT/best (safetensors + config.json), OUT/step_… (the same, and training.pt to go on from), OUT/log.jsonl
    (one record a line), OUT/curves.png (drawn from it after every validation, with Matplotlib), and OUT/held_out.csv
    where validation images were held out.

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
        add_classes: the data's classes are those of the saved model and, after them, new ones, which alone learn: what
            the model knows stays as it is (see segvit.add_classes). Without it all learn (of a model with added classes
            the newest), and old classes are forgotten that the data does not show.
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
        batch_size: images that go through the model at once, in each process; a step, unless total_batch is larger.
        total_batch: images a step, of all processes together; gradients of parts of batch_size images are added up.
        lr: learning rate of the backbone.
        decoder_lr: factor of lr for the decoder.
        layer_decay: each block of the backbone learns at this factor of the block above it; 0.65 to 0.9 is usual. None:
            all alike, as in the paper.
        weight_decay: not for the backbone's norms.
        warmup: steps; a twentieth by default.
        power: of the polynomial decay.
        clip: largest norm of the gradients.
        ema: decay of a moving average of the weights, 0.999 say, which is validated and kept as the best then.
        ignored: masked leaves ignored pixels out of the masks' loss; negative counts them as the official code does.
        precision: no (float32), bf16 or fp16; by default what `accelerate launch` says, else no.
        compile: no; model (torch.compile, goes with everything); or step: all of a training step at once, on a GPU as a
            CUDA graph (one process, no fp16, batches in one piece).
        fsdp: spread weights, gradients and optimizer state over the processes (FSDP2), for large models.
        deterministic: the same numbers every time on a GPU, too, by slower algorithms where need be.
        validate_every: steps between validations; a tenth of the run, at least 200, by default.
        checkpoint_every: steps between checkpoints to go on from; there is one before every validation anyway.
        mode: of validation, whole, slide (windows of the crop) or auto (slide where images are large).
        stride: of validation windows.
        keep: how many of the newest checkpoints to keep, beside the best.
        resume: go on from the newest checkpoint in OUT, if there is one.
        overwrite: start anew although OUT has checkpoints, which are removed.
        strict: stop at a file that cannot be read; else it is left out, said and counted.
        trackers: tensorboard, wandb or mlflow (or a list of them), which must be installed; beside OUT/log.jsonl.
        workers: processes that load data; by default one for each CPU core that a process has, at most 8 (without a GPU
            at most 1).
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
        from accelerate.state import AcceleratorState
        from accelerate.utils import patch_environment, set_seed
    except ImportError as error:
        raise RuntimeError("training needs Accelerate: pip install 'segvit[train]'") from error
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no") if precision is None else precision
    precision, compile = ("no" if name is False else name for name in (precision, compile))  # YAML reads no as false
    options |= {"precision": precision, "compile": compile}
    trackers = [trackers] if isinstance(trackers, str) else list(trackers or [])
    _check_options(steps, batch_size, keep, validate_every, checkpoint_every, scale, precision, compile, ema, trackers)
    fsdp = fsdp or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"  # accelerate launch --use_fsdp
    set_seed(seed)
    AcceleratorState._reset_state()  # of an earlier run in this Python, whose precision it would insist on
    own = {"ACCELERATE_USE_FSDP": "false", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"}  # ours: exact, and on a CPU
    with patch_environment(**own):
        accelerator = Accelerator(
            mixed_precision=precision, log_with=trackers or None, project_dir=out, cpu=_only_cpu()
        )
    step_batch, micro_batch = _batches(batch_size, total_batch, accelerator.num_processes)
    options["images_a_step"] = step_batch * accelerator.num_processes
    main, run = accelerator.is_main_process, Path(out)
    found = newest(run, resume, overwrite)
    state = None if found is None else load_state(found)
    if state is not None:
        compare_options(state["options"], options, main)
    held = run / HELD_OUT if found is not None else None
    train, val, split = _parts(data, layout, classes, ignore_index, label_map, reduce_zero_label, val_fraction, held)
    train.channels = channels
    network, size = _model(
        model,
        train.classes,
        crop,
        found,
        backbone,
        lambda: input_options(train),
        add_classes,
        pretrained={"true": True, "false": False}.get(str(pretrained).lower(), pretrained),
        shrink=shrink,
        edge_budget=edge_budget,
        drop_path=drop_path,
        freeze_backbone=freeze_backbone,
        activation_checkpointing=activation_checkpointing,
    )
    if channels not in (3, len(network.mean)):
        raise ValueError(f"channels: {model or found} takes {len(network.mean)}, not {channels}")
    train.channels = val.channels = len(network.mean)
    if network.backbone.frozen and main and (drop_path or layer_decay):
        print("the backbone is frozen, so drop_path and layer_decay do nothing", file=sys.stderr)
    mean, std = network.mean.tolist(), network.std.tolist()
    evaluation = {"mode": mode, "short_side": short_side}
    evaluation |= {} if mode == "whole" else {"crop_size": size, "stride": stride}
    plan_prediction(network, **evaluation)
    accelerator.wait_for_everyone()  # all have looked at the folder, before anybody writes to it
    if main:
        make_folder(run)
        clean(run)
    judged = data, train, val, network.learned_classes, ignored == "negative"
    problem = _from_main(accelerator, lambda: refusal(*judged) if check and found is None else None)
    if problem:
        raise ValueError(problem)
    train.transform = TrainTransform(size, mean, std, ignore_index, scale, short_side)
    labels = {name: options[name] for name in LABEL_OPTIONS}
    best = {"miou": None, "checkpoint": str(run / "best")}
    if state is not None:
        best["miou"] = go_on(run, state, accelerator)
    elif main:
        for path in own_files(run):
            remove_checkpoint(path) if path.is_dir() else path.unlink()
        if split:
            write_table(run / HELD_OUT, val.pairs)
            share = f"{len(val)} of {len(train) + len(val)} images are held out"
            print(f"no val part: {share}, and named in {run / HELD_OUT}", file=sys.stderr)

    share = accelerator.process_index, accelerator.num_processes
    workers = default_workers(share[1]) if workers is None else workers
    run_id = secrets.token_hex(4) if state is None else state["run_id"]
    tellers = [_tracking(accelerator, trackers, options, run_id, out), redrawn(run) if main else None]

    def track(record: dict) -> None:
        for tell in filter(None, tellers):
            tell(record)

    def checkpoint(training: dict, weights: dict[str, Tensor]) -> None:
        if main:
            more = {"options": options, "run_id": run_id}
            save_checkpoint(network, run / f"step_{training['step']:08d}", training | more, labels, weights)
            keep_newest(run, keep)

    def validate(step: int, evaluated: nn.Module) -> Scores:
        alone = accelerator.num_processes == 1  # else all must leave together
        reading = {"workers": workers, "strict": strict, "processes": share}
        asked = stopped if alone else lambda: False
        scores = evaluate(evaluated, val, ignore_index, main, asked, **reading, **evaluation)
        if best["miou"] is None or not scores.miou <= best["miou"]:
            best["miou"] = scores.miou
            if main:
                save_checkpoint(evaluated, run / "best", labels=labels)
        accelerator.wait_for_everyone()
        return scores

    with stop_signals() as stopped, last_good(run), _deterministic(deterministic), _finished(accelerator):
        records = fit(
            network,
            ATMLoss(len(train.classes), ignore_index, ignored, learned=network.learned_classes),
            train,
            steps=steps,
            batch_size=step_batch,
            micro_batch=micro_batch,
            lr=lr,
            weight_decay=weight_decay,
            decoder_lr=decoder_lr,
            layer_decay=layer_decay,
            warmup=steps // 20 if warmup is None else warmup,
            power=power,
            clip=clip,
            ema=ema,
            compile=compile,
            fsdp=fsdp,
            workers=workers,
            strict=strict,
            seed=seed,
            accelerator=accelerator,
            log=run / LOG if main else None,
            track=track,
            validate=validate,
            validate_every=validate_every or max(steps // 10, 200),
            checkpoint=checkpoint,
            checkpoint_every=checkpoint_every,
            state=state,
            stopped=stopped,
        )
    return best | {"records": records, "main_process": main}


def _only_cpu() -> bool:
    """Several processes need to be told that there is no GPU for them."""
    return not torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) > 1


def _batches(batch_size: int, total: int | None, processes: int) -> tuple[int, int | None]:
    """Images a step and process, and how many of them go through the model at once (None: all)."""
    if total is None:
        return batch_size, None
    if total < 1 or total % processes:
        raise ValueError(f"total_batch must be a multiple of the number of processes ({processes}), got {total}")
    own = total // processes
    return own, batch_size if batch_size < own else None


def _from_main(accelerator, call: Callable[[], str | None]) -> str | None:
    """What the main process finds, however long it takes; the others wait for it."""
    if accelerator.num_processes == 1:
        return call()
    patient = dist.new_group(timeout=timedelta(days=1), backend="gloo")
    found = [call() if accelerator.is_main_process else None]
    dist.broadcast_object_list(found, group=patient)
    dist.destroy_process_group(patient)
    return found[0]


def _tracking(accelerator, trackers: list[str], options: dict, run_id: str, out: str) -> Callable[[dict], None] | None:
    """Hands records to Accelerate's trackers."""
    if not trackers:
        return None
    plain = {name: value if isinstance(value, int | float | str) else str(value) for name, value in options.items()}
    try:
        accelerator.init_trackers("segvit", plain, {"wandb": {"id": run_id, "resume": "allow"}})
    except Exception as error:  # each tracker has its own
        raise RuntimeError(f"{', '.join(trackers)}: cannot start tracking ({error})") from error
    failed = []

    def track(record: dict) -> None:
        try:
            accelerator.log({name: value for name, value in record.items() if name != "step"}, step=record["step"])
        except Exception as error:  # no reason to end a training, whose log has it all
            if not failed:
                print(f"{', '.join(trackers)}: a record is lost ({error}); {out}/log.jsonl has all", file=sys.stderr)
            failed.append(error)

    return track


@contextmanager
def _finished(accelerator) -> Iterator[None]:
    """Trackers write what they hold back, however the training ends."""
    try:
        yield
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()


@contextmanager
def _deterministic(wanted: bool) -> Iterator[None]:
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS asks for it
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def _check_options(
    steps: int,
    batch_size: int,
    keep: int,
    validate_every: int | None,
    checkpoint_every: int | None,
    scale: Sequence[float],
    precision: str,
    compile: str,
    ema: float | None,
    trackers: list[str],
) -> None:
    for name, value, allowed in (("precision", precision, (*PRECISIONS,)), ("compile", compile, COMPILE)):
        if value not in allowed:
            raise ValueError(f"{name} must be {', '.join(allowed[:-1])} or {allowed[-1]}, got {value!r}")
    for name, value in (
        ("steps", steps),
        ("batch_size", batch_size),
        ("keep", keep),
        ("validate_every", validate_every),
        ("checkpoint_every", checkpoint_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be [from, to], got {list(scale)}")
    if ema is not None and not 0 < ema < 1:
        raise ValueError(f"ema must be between 0 and 1, as 0.999, got {ema}")
    for name in trackers:
        if name not in TRACKERS:
            raise ValueError(f"trackers must be {', '.join(TRACKERS[:-1])} or {TRACKERS[-1]}, got {name!r}")
        if find_spec(name) is None:
            raise ValueError(f"the tracker {name} is not installed: pip install {name}")


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
        rest = [pair for pair in train.pairs if pair[0].resolve() not in images]
        if len(rest) + len(val) != len(train):
            raise ValueError(
                f"{held} names {len(val)} validation images, of which {len(train) - len(rest)} are in {data}: a run "
                "goes on with the data it began with; --model with another --out begins a new one"
            )
        return train.subset(rest), train.subset(val), True
    kept, split = split_pairs(train.pairs, fraction)
    return train.subset(kept), train.subset(split), True


def _model(
    name: str | None,
    classes: list[str],
    crop,
    newest: Path | None,
    backbone: str,
    inputs: Callable[[], dict],
    adds: bool,
    **arguments,
) -> tuple[SegViT, tuple[int, int]]:
    """The model to train, and the crop; `inputs` gives arguments that a new model needs for these images."""
    crop = as_pair("crop", crop)
    known = {"num_classes": len(classes), "class_names": classes}
    given = {key: value for key, value in arguments.items() if value is not None}
    memory = {key: given[key] for key in ("activation_checkpointing", "freeze_backbone")}
    saved = name is not None and name not in {info.name for info in list_models()}
    if adds and not saved:
        raise ValueError("add_classes: name the trained model that gets new classes, --model runs/mine")
    if newest is not None:
        model = load_model(newest)
        if model.class_names != classes:
            raise ValueError(f"{newest} was trained on other classes; to go on with new ones, name it as --model")
        if adds and not model.added:
            raise ValueError(f"{newest} began without add_classes; a run that adds classes needs another --out")
        model.backbone.activation_checkpointing = memory["activation_checkpointing"]
    elif name is None:
        model = SegViT(backbone, image_size=crop or (512, 512), **known, **inputs(), **given)
    elif not saved:
        model = create_model(name, **known, **({"image_size": crop} if crop else {}), **inputs(), **given)
    else:
        near = difflib.get_close_matches(name, [info.name for info in list_models()], n=2)
        if near and not Path(name).exists():
            raise ValueError(f"there is no model {name!r}; near: {', '.join(near)}")
        drop_path = {"drop_path": given["drop_path"]} if "drop_path" in given else {}
        model, said = other_classes(load_model(name), classes, adds, **memory, **drop_path)
        if os.environ.get("RANK", "0") == "0":
            print(f"{name}: {said}", file=sys.stderr)
        if crop not in (None, model.image_size):
            print(f"windows of predict and evaluate stay {model.image_size} unless --crop says so", file=sys.stderr)
    return model, crop or model.image_size

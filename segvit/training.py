"""The training loop, evaluation on a data set, and checkpoints that are never half written."""

import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segvit.data.folder import SegmentationFolder, read_classes
from segvit.data.transforms import TrainTransform
from segvit.inference import predict
from segvit.losses import ATMLoss
from segvit.metrics import ConfusionMatrix, Scores
from segvit.models import SegViT
from segvit.models.segvit import as_pair


def polynomial(steps: int, warmup: int = 0, power: float = 1.0) -> Callable[[int], float]:
    """The paper's schedule as a factor of the learning rate: linear warm-up, then (1 − progress)^power."""

    def factor(step: int) -> float:
        if step < warmup:
            return (step + 1) / (warmup + 1)
        return max(1 - (step - warmup) / max(steps - warmup, 1), 0.0) ** power

    return factor


def fit(
    model: nn.Module,
    loss: ATMLoss,
    data: Dataset,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 2e-5,
    weight_decay: float = 0.01,
    decoder_lr: float = 10.0,
    warmup: int = 0,
    power: float = 1.0,
    clip: float = 35.0,
    workers: int = 0,
    seed: int = 0,
    accelerator=None,
    log: Path | None = None,
    validate: Callable[[int], Scores] | None = None,
    validate_every: int | None = None,
    description: str = "training",
) -> list[dict]:
    """Train for `steps` optimizer steps: AdamW with the paper's parameter groups, polynomial decay, gradient clipping.

    Args:
        model, loss: a SegViT and its ATMLoss.
        data: samples (image float [C, H, W], labels int64 [H, W]) of one size.
        steps, batch_size, lr, weight_decay, decoder_lr (× lr), warmup (steps), power, clip (gradient norm): the recipe.
        workers: processes that load data.
        seed: of the data order and of the workers' augmentation.
        accelerator: an accelerate.Accelerator for device, precision and processes; None: where the model is.
        log: file that gets every record as one line of JSON when it is made.
        validate: called with the step, every `validate_every` steps and after the last; the bar shows its mIoU.
        description: of the progress bar.

    Returns:
        One record every ten steps and at validations: step, loss, ce, focal, dice (last stage), lr, seconds, and miou.

    Raises:
        FloatingPointError: the loss is no longer finite (seen at the next record); the model is left as it was then.
    """
    groups = model.parameter_groups(lr, weight_decay, decoder_lr)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, polynomial(steps, warmup, power))
    loader = _loader(data, batch_size, workers, seed, 1 if accelerator is None else accelerator.num_processes)
    network = model
    if accelerator is not None:
        network, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    device = next(model.parameters()).device
    loss = loss.to(device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    records, start, miou = [], time.perf_counter(), None
    if log is not None:
        log.parent.mkdir(parents=True, exist_ok=True)
        log.write_text("")
    quiet = accelerator is not None and not accelerator.is_main_process
    with tqdm(total=steps, desc=description, unit="step", disable=quiet) as bar:
        for step, (images, labels) in enumerate(_endless(loader, steps), 1):
            network.train()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            out = network(images)
            terms = loss(out, labels)
            if accelerator is None:
                terms.total.backward()
            else:
                accelerator.backward(terms.total)
            (nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_)(parameters, clip)
            optimizer.step()
            rate = schedule.get_last_lr()[0]
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            bar.update()
            validates = validate is not None and (step == steps or (validate_every and step % validate_every == 0))
            if step % 10 == 0 or step == steps or validates:  # elsewhere nothing waits for the device
                records.append(_record(step, terms, rate, time.perf_counter() - start))
            if validates:
                miou = records[-1]["miou"] = _or_none(validate(step).miou)
            if log is not None and records and records[-1]["step"] == step:
                with log.open("a") as file:
                    file.write(json.dumps(records[-1]) + "\n")
            if step % 10 == 0 or validates:
                shown = {"loss": f"{records[-1]['loss']:.2f}", "img/s": f"{bar.n * batch_size / bar_seconds(bar):.1f}"}
                bar.set_postfix(shown | ({} if miou is None else {"mIoU": f"{miou:.3f}"}))
    return records


def bar_seconds(bar: tqdm) -> float:
    return max(bar.format_dict["elapsed"], 1e-3)


def _record(step: int, terms, lr: float, seconds: float) -> dict:
    values = {"loss": terms.total, "ce": terms.ce[-1], "focal": terms.focal[-1], "dice": terms.dice[-1]}
    record = {"step": step, **{name: value.item() for name, value in values.items()}, "lr": lr, "seconds": seconds}
    if not math.isfinite(record["loss"]):
        raise FloatingPointError(f"the loss is {record['loss']} at step {step}; lower the learning rate")
    return record


def _or_none(value: float) -> float | None:
    """NaN is no JSON."""
    return None if value != value else value


def _loader(data: Dataset, batch_size: int, workers: int, seed: int, processes: int) -> DataLoader:
    generator = torch.Generator().manual_seed(seed)
    return DataLoader(
        data,
        batch_size,
        shuffle=True,
        drop_last=len(data)
        >= batch_size * processes,  # else the last batch is the only one, or not every process gets it
        num_workers=workers,
        generator=generator,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
    )


def _endless(loader: DataLoader, steps: int) -> Iterator:
    """`steps` batches, over as many epochs as that takes."""
    step = 0
    while step < steps:
        if len(loader) == 0:
            raise ValueError("the data set is smaller than one batch for every process; lower the batch size")
        for batch in loader:
            yield batch
            step += 1
            if step == steps:
                return


def evaluate(model: nn.Module, data: Dataset, ignore_index: int = 255, progress: bool = True, **options) -> Scores:
    """mIoU, mAcc, aAcc and per-class scores of a model on a data set, from one streaming confusion matrix.

    Args:
        model: a SegViT.
        data: samples (image uint8 [C, H, W], labels [H, W]) of any sizes.
        ignore_index: label that does not count.
        progress: show a progress bar.
        options: of segvit.predict, such as mode, crop_size, stride, scales, flip.

    Raises:
        ValueError: labels of another size than their image, or options that predict refuses.
    """
    matrix = ConfusionMatrix(model.num_classes, ignore_index)
    for i in tqdm(range(len(data)), desc="evaluating", unit="image", disable=not progress, leave=False):
        image, labels = data[i]
        matrix.update(predict(model, image[None], **options)[0].cpu(), labels)
    return matrix.compute()


def save_checkpoint(model: nn.Module, folder: str | Path) -> None:
    """safetensors + config.json in `folder`, complete or not at all: written beside it, then put in its place."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def train_folder(
    data: str,
    out: str,
    backbone: str,
    pretrained: bool | str = True,
    classes: str | None = None,
    shrink: str | None = None,
    crop: int | Sequence[int] = 512,
    scale: Sequence[float] = (0.5, 2.0),
    steps: int = 20000,
    batch_size: int = 8,
    lr: float = 1e-4,
    decoder_lr: float = 10.0,
    weight_decay: float = 0.01,
    warmup: int | None = None,
    drop_path: float = 0.1,
    freeze_backbone: bool = False,
    activation_checkpointing: bool = False,
    ignore_index: int = 255,
    ignored: str = "masked",
    precision: str = "no",
    validate_every: int | None = None,
    workers: int = 0,
    seed: int = 0,
) -> dict:
    """`segvit train`: train on DATA/train, validate on DATA/val at full size, keep the best and the last checkpoint.

    Writes OUT/best, OUT/last (safetensors + config.json) and OUT/log.jsonl (one record a line).

    Returns:
        miou of the best validation, checkpoint (its folder), records (see fit), main_process.

    Raises:
        RuntimeError: Accelerate is not installed.
        ValueError, FileNotFoundError: data or arguments that do not fit, named.
    """
    try:
        from accelerate import Accelerator
        from accelerate.utils import set_seed
    except ImportError as error:
        raise RuntimeError("training needs Accelerate: pip install 'segvit[train]'") from error
    if steps < 1 or batch_size < 1:
        raise ValueError(f"steps and batch_size must be at least 1, got {steps} and {batch_size}")
    if len(scale) != 2 or not 0 < scale[0] <= scale[1]:
        raise ValueError(f"scale must be [from, to], got {list(scale)}")
    crop = as_pair("crop", crop)
    set_seed(seed)
    names = read_classes(classes or Path(data, "classes.txt"))
    pretrained = {"true": True, "false": False}.get(str(pretrained).lower(), pretrained)
    folders = {part: SegmentationFolder(Path(data, part), names, ignore_index) for part in ("train", "val")}
    model = SegViT(
        backbone,
        len(names),
        crop,
        shrink=shrink,
        drop_path=drop_path,
        pretrained=pretrained,
        class_names=names,
        activation_checkpointing=activation_checkpointing,
        freeze_backbone=freeze_backbone,
    )
    accelerator = Accelerator(mixed_precision={"False": "no"}.get(str(precision), precision))  # YAML reads no as false
    folders["train"].transform = TrainTransform(crop, model.mean.tolist(), model.std.tolist(), ignore_index, scale)
    folder, best = Path(out), {"miou": -1.0}
    folder.mkdir(parents=True, exist_ok=True)
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder}: cannot write there")
    seen: set[int] = set()
    for i in tqdm(
        range(len(folders["val"])), desc="checking val", disable=not accelerator.is_main_process, leave=False
    ):
        seen |= set(folders["val"][i][1].unique().tolist())  # what is wrong should stop the run now, not after hours
    if seen <= {ignore_index}:
        raise ValueError(f"{folders['val'].root}: every label is {ignore_index}, which is ignored; there is no truth")
    if seen == {0, 255} and len(names) == 2 and ignore_index == 255:
        raise ValueError(f"{folders['val'].root}: labels are 0 and 255, a binary mask? 255 is ignored; write 1 instead")

    def validate(step: int) -> Scores:
        if accelerator.is_main_process:
            save_checkpoint(model, folder / "last")
        scores = evaluate(model, folders["val"], ignore_index, progress=accelerator.is_main_process)
        if best["miou"] < 0 or scores.miou > best["miou"]:
            best.update(miou=scores.miou if scores.miou == scores.miou else 0.0, checkpoint=str(folder / "best"))
            if accelerator.is_main_process:
                save_checkpoint(model, folder / "best")
        accelerator.wait_for_everyone()
        return scores

    try:
        records = fit(
            model,
            ATMLoss(len(names), ignore_index, ignored),
            folders["train"],
            steps=steps,
            batch_size=batch_size,
            lr=lr,
            weight_decay=weight_decay,
            decoder_lr=decoder_lr,
            warmup=steps // 20 if warmup is None else warmup,
            workers=workers,
            seed=seed,
            accelerator=accelerator,
            log=folder / "log.jsonl" if accelerator.is_main_process else None,
            validate=validate,
            validate_every=validate_every,
        )
    except KeyboardInterrupt:
        if accelerator.is_main_process:
            save_checkpoint(model, folder / "last")
        raise
    return best | {"records": records, "main_process": accelerator.is_main_process}

"""The training loop, and evaluation on a data set."""

import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segvit.inference import normalise, predict
from segvit.losses import ATMLoss
from segvit.metrics import BoundaryIoU, ConfusionMatrix, Scores

RECORD_EVERY = 10  # steps; elsewhere nothing waits for the device


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
    checkpoint: Callable[[dict], None] | None = None,
    state: dict | None = None,
    stopped: Callable[[], bool] = lambda: False,
    description: str = "training",
) -> list[dict]:
    """Train for `steps` optimizer steps: AdamW with the paper's parameter groups, polynomial decay, gradient clipping.

    What is drawn at a step (samples, their augmentation, dropout) depends on the seed and the step alone, not on what
    ran before or on the number of workers; so training that goes on from a checkpoint repeats the run that never
    stopped.

    Args:
        model: a SegViT.
        loss: its ATMLoss.
        data: samples (image float [C, H, W], labels int64 [H, W]) of one size.
        steps, batch_size, lr, weight_decay, decoder_lr (× lr), warmup (steps), power, clip (gradient norm): the recipe;
            batch_size counts for each process.
        workers: processes that load data.
        seed: of the data order, augmentation and dropout.
        accelerator: an accelerate.Accelerator for device, precision and processes; None: where the model is.
        log: file to which every record is added as one line of JSON when it is made.
        validate: called with the step, every `validate_every` steps and after the last; the bar shows its mIoU.
        checkpoint: called with a state before every validation, and when training is stopped.
        state: of an earlier `checkpoint`, to go on from; the model must have its weights already.
        stopped: asked after every step; true ends the training after a checkpoint.
        description: of the progress bar.

    Returns:
        One record every ten steps and at validations: step, loss, ce, focal, dice (last stage), lr, seconds, and miou.

    Raises:
        FloatingPointError: loss or gradients are no longer finite; names the files of the first such step.
        KeyboardInterrupt: `stopped` said so.
    """
    groups = model.parameter_groups(lr, weight_decay, decoder_lr)
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.999))
    rates, factor = [group["lr"] for group in groups], polynomial(steps, warmup, power)
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    network = model
    if accelerator is not None:
        network, optimizer = accelerator.prepare(model, optimizer)
    scaler = getattr(accelerator, "scaler", None)
    done = 0
    if state is not None:
        done = state["step"]
        optimizer.load_state_dict(state["optimizer"])
        for group, asked in zip(optimizer.param_groups, groups):
            group["weight_decay"] = asked["weight_decay"]
        if scaler is not None and state["scaler"]:
            scaler.load_state_dict(state["scaler"])
    stream = _Stream(data, batch_size, seed, rank, processes)
    device = next(model.parameters()).device
    loss = loss.to(device)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    first_bad = torch.zeros((), dtype=torch.int64, device=device)
    records, miou, validating = [], None, 0.0
    start = time.perf_counter() - (state["seconds"] if state else 0.0)

    def due(step: int) -> bool:
        return step == steps or bool(validate_every and step % validate_every == 0)

    def save(record: dict) -> None:
        if not all(p.isfinite().all() for p in parameters):
            raise FloatingPointError(
                f"the weights are no longer finite at step {record['step']}; lower the learning rate"
            )
        if checkpoint is not None:
            scaling = None if scaler is None else scaler.state_dict()
            now = {"step": record["step"], "seconds": record["seconds"], "record": dict(record)}
            checkpoint(now | {"optimizer": optimizer.state_dict(), "scaler": scaling})

    def finish(record: dict, stops: bool) -> float | None:
        """Validate if it is time, and keep the record."""
        nonlocal validating
        if due(record["step"]) and validate is not None and not stops:
            before = time.perf_counter()
            record["miou"] = _or_none(validate(record["step"]).miou)
            validating += time.perf_counter() - before
        records.append(record)
        if log is not None:
            with log.open("a") as file:
                file.write(json.dumps(record) + "\n")
        return record.get("miou", miou)

    if state and "record" in state:  # training ended between this checkpoint and its validation
        miou, validating = finish(dict(state["record"]), False), 0.0
    quiet = accelerator is not None and not accelerator.is_main_process
    with tqdm(total=steps, initial=done, desc=description, unit="step", disable=quiet) as bar:
        for step, (images, labels) in enumerate(stream.batches(done, steps, workers), done + 1):
            torch.manual_seed(_mix(seed, "step", step, rank))
            for group, rate in zip(optimizer.param_groups, rates):
                group["lr"] = rate * factor(step - 1)
            network.train()
            images, labels = images.to(device, non_blocking=True), labels.to(device, non_blocking=True)
            terms = loss(network(images), labels)
            if accelerator is None:
                terms.total.backward()
            else:
                accelerator.backward(terms.total)
            norm = (nn.utils.clip_grad_norm_ if accelerator is None else accelerator.clip_grad_norm_)(parameters, clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            finite = terms.total.detach().isfinite()
            if scaler is None:  # a scaler meets infinite gradients on purpose, and skips the step
                finite = finite & norm.isfinite()
            first_bad = torch.where(finite | (first_bad > 0), first_bad, step)
            bar.update()
            stops = _agree(stopped, accelerator, step)
            if step % RECORD_EVERY == 0 or due(step) or stops:
                if first_bad.item():
                    raise FloatingPointError(_blame(stream, int(first_bad), terms.total.item()))
                record = {"step": step, **_values(terms), "lr": rates[0] * factor(step - 1)}
                record["seconds"] = time.perf_counter() - start
                if due(step) or stops:
                    save(record)
                miou = finish(record, stops)
                seconds = max(bar.format_dict["elapsed"] - validating, 1e-3)
                speed = (step - done) * batch_size * processes / seconds
                shown = {"loss": f"{record['loss']:.2f}", "img/s": f"{speed:.1f}"}
                bar.set_postfix(shown | ({} if miou is None else {"mIoU": f"{miou:.3f}"}))
            if stops:
                raise KeyboardInterrupt(f"stopped at step {step}")
    return records


def _mix(*parts) -> int:
    """A seed of its own for every combination of parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "big")


class _Stream(Dataset):
    """Samples in an endless order: epoch after epoch, each a permutation. Position p is the same sample, augmented in

    the same way, whoever asks; a batch of all processes is a run of consecutive positions.
    """

    def __init__(self, data: Dataset, batch_size: int, seed: int, rank: int, processes: int):
        self.data, self.batch_size, self.seed, self.rank, self.processes = data, batch_size, seed, rank, processes
        self._epoch, self._order = -1, []

    def index(self, position: int) -> int:
        """Which sample of the data set is at a position."""
        epoch, i = divmod(position, len(self.data))
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(_mix(self.seed, "order", epoch))
            self._epoch, self._order = epoch, torch.randperm(len(self.data), generator=generator).tolist()
        return self._order[i]

    def __getitem__(self, position: int):
        generator = torch.default_generator
        before = generator.get_state()
        generator.manual_seed(_mix(self.seed, "sample", position))
        try:
            return self.data[self.index(position)]
        finally:
            generator.set_state(before)

    def positions(self, step: int) -> range:
        """Of all processes at a step, counted from 1."""
        whole = self.batch_size * self.processes
        return range((step - 1) * whole, step * whole)

    def batches(self, done: int, steps: int, workers: int) -> DataLoader:
        """This process's batches of the steps after `done`."""
        own = slice(self.rank * self.batch_size, (self.rank + 1) * self.batch_size)
        sampler = (list(self.positions(step)[own]) for step in range(done + 1, steps + 1))
        return DataLoader(self, batch_sampler=sampler, num_workers=workers, pin_memory=torch.cuda.is_available())


def _agree(stopped: Callable[[], bool], accelerator, step: int) -> bool:
    """Whether to stop after this step; processes ask each other when they wait for the device anyway."""
    if accelerator is None or accelerator.num_processes == 1:
        return stopped()
    if step % RECORD_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(stopped()), device=accelerator.device)).item())


def _blame(stream: _Stream, step: int, loss: float) -> str:
    """What to say when training broke down at a step."""
    pairs = getattr(stream.data, "pairs", None)
    found = sorted({stream.index(position) for position in stream.positions(step)})
    names = ", ".join(str(pairs[i][0]) if pairs else f"sample {i}" for i in found)
    what = f"the loss is {loss}" if not math.isfinite(loss) else "the gradients are not finite"
    return f"{what} since step {step}; lower the learning rate, or look at what that step saw: {names}"


def _values(terms) -> dict[str, float]:
    values = {"loss": terms.total, "ce": terms.ce[-1], "focal": terms.focal[-1], "dice": terms.dice[-1]}
    values |= {} if terms.edge is None else {"edge": terms.edge}
    return {name: value.item() for name, value in values.items()}


def _or_none(value: float) -> float | None:
    """NaN is no JSON."""
    return None if value != value else value


def evaluate(
    model: nn.Module,
    data: Dataset,
    ignore_index: int = 255,
    progress: bool = True,
    stopped: Callable[[], bool] = lambda: False,
    boundary: float | None = None,
    **options,
) -> Scores:
    """mIoU, mAcc, aAcc and per-class scores of a model on a data set, from counts that stay on the model's device.

    Args:
        model: a SegViT.
        data: samples (image [C, H, W], uint8 or scaled float32, labels [H, W]) of any sizes.
        ignore_index: label that does not count.
        progress: show a progress bar.
        stopped: asked after every image; true raises KeyboardInterrupt.
        boundary: also the boundary IoU within this share of the image's diagonal (0.02 in the paper).
        options: of segvit.predict, such as mode, crop_size, stride, short_side, scales, flip.

    Raises:
        ValueError: labels of another size than their image, or options that predict refuses.
    """
    device = next(model.parameters()).device
    matrix = ConfusionMatrix(model.num_classes, ignore_index, device)
    edges = None if boundary is None else BoundaryIoU(model.num_classes, ignore_index, device, boundary)
    for i in tqdm(range(len(data)), desc="evaluating", unit="image", disable=not progress, leave=False):
        image, labels = data[i]
        labels, predicted = labels.to(device), predict(model, normalise(model, image[None]), **options)[0]
        matrix.update(predicted, labels)
        if edges is not None:
            edges.update(predicted, labels)
        if stopped():
            raise KeyboardInterrupt("stopped during an evaluation")
    scores = matrix.compute()
    if edges is None:
        return scores
    per_class = edges.compute()
    return replace(scores, boundary_iou=per_class, boundary_miou=torch.tensor(per_class).nanmean().item())

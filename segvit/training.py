"""The training loop."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from segvit.data.stream import Stream, mix
from segvit.losses import ATMLoss, ATMLossOutput
from segvit.metrics import Scores
from segvit.step import compiled_step
from segvit.weights import Weights, load_optimizer_state, optimizer_state, shard, whole

RECORD_EVERY = 10  # steps; elsewhere nothing waits for the device
COMPILE = ("no", "model", "step")


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
    micro_batch: int | None = None,
    lr: float = 2e-5,
    weight_decay: float = 0.01,
    decoder_lr: float = 10.0,
    layer_decay: float | None = None,
    warmup: int = 0,
    power: float = 1.0,
    clip: float = 35.0,
    ema: float | None = None,
    compile: str = "no",
    fsdp: bool = False,
    workers: int = 0,
    strict: bool = False,
    seed: int = 0,
    accelerator=None,
    log: Path | None = None,
    track: Callable[[dict], None] | None = None,
    validate: Callable[[int, nn.Module], Scores] | None = None,
    validate_every: int | None = None,
    checkpoint: Callable[[dict, dict[str, Tensor]], None] | None = None,
    checkpoint_every: int | None = None,
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
        steps, batch_size, lr, weight_decay, decoder_lr (× lr), layer_decay, warmup (steps), power, clip (gradient
            norm): the recipe; batch_size counts for each process.
        micro_batch: images that go through the model at once; gradients of a batch's parts add up to exactly those of
            the whole batch. None: all.
        ema: decay of a moving average of the weights, which is what is validated then; None: none.
        compile: "no"; "model" (torch.compile, with any other option); or "step": compiled_step, a CUDA graph on a GPU.
        fsdp: spread parameters, gradients and optimizer state over the processes (FSDP2).
        workers: processes that load data.
        strict: a sample that cannot be read stops the training; else it is left out, said and counted.
        seed: of the data order, augmentation and dropout.
        accelerator: an accelerate.Accelerator for device, precision and processes; None: where the model is.
        log: file to which every record is added as one line of JSON when it is made.
        track: called with every record.
        validate: called with the step and the model to validate, every `validate_every` steps and after the last; the
            bar shows its mIoU.
        checkpoint: called with a state and all weights before every validation, every `checkpoint_every` steps, and
            when training is stopped.
        state: of an earlier `checkpoint`, to go on from; the model must have its weights already.
        stopped: asked after every step; true ends the training after a checkpoint.
        description: of the progress bar.

    Returns:
        One record every ten steps and at validations: step, loss, ce, focal, dice (last stage), lr, seconds, waiting
        (share of the time since the last record that was spent waiting for data), skipped (samples that could not be
        read, so far, if any), and miou.

    Raises:
        FloatingPointError: loss or gradients are no longer finite; names the files of the first such step.
        KeyboardInterrupt: `stopped` said so.
        ValueError: options that do not go together; a sample that cannot be read, if strict; else ten in a row.
    """
    rank, processes = (0, 1) if accelerator is None else (accelerator.process_index, accelerator.num_processes)
    optimization = _Optimization(
        model, loss, accelerator, (lr, weight_decay, decoder_lr, layer_decay), clip, micro_batch, ema, compile, fsdp
    )
    done, skipped_before, skipped = 0, 0, 0
    if state is not None:
        done, skipped_before = state["step"], state["skipped"]
        optimization.load(state)
    optimization.weights.start(None if state is None else state["ema"])
    factor = polynomial(steps, warmup, power)
    stream = Stream(data, batch_size, seed, rank, processes, strict)
    first_bad = torch.zeros((), dtype=torch.int64, device=optimization.device)
    records, miou = [], None
    clock = _Clock(state["seconds"] if state else 0.0)

    def due(step: int) -> bool:
        return step == steps or bool(validate_every and step % validate_every == 0)

    def save(record: dict) -> None:
        weights, average = optimization.weights.state()
        if not all(value.isfinite().all() for value in weights.values()):
            raise FloatingPointError(
                f"the weights are no longer finite at step {record['step']}; lower the learning rate"
            )
        if checkpoint is not None:
            now = {
                "step": record["step"],
                "seconds": record["seconds"],
                "record": dict(record),
                "skipped": record.get("skipped", 0),
            }
            checkpoint(now | {"ema": average} | optimization.state(), weights)

    def finish(record: dict, stops: bool) -> float | None:
        """Validate if it is time, and keep the record."""
        if due(record["step"]) and validate is not None and not stops:
            with clock.paused(), optimization.weights.evaluated() as evaluated:
                record["miou"] = _or_none(validate(record["step"], evaluated).miou)
        records.append(record)
        if log is not None:
            _append(log, record)
        if track is not None:
            with clock.paused():
                track(record)
        return record.get("miou", miou)

    if state and "record" in state:  # training ended between this checkpoint and its validation
        miou = finish(dict(state["record"]), False)
    quiet = accelerator is not None and not accelerator.is_main_process
    batches = stream.batches(done, steps, workers)
    with tqdm(total=steps, initial=done, desc=description, unit="step", disable=quiet) as bar:
        for step in range(done + 1, steps + 1):
            with clock.waiting():
                images, labels, unread = next(batches)
            for problem in unread:
                skipped += 1
                tqdm.write(f"left out at step {step} ({skipped_before + skipped} so far): {problem}", file=sys.stderr)
            torch.manual_seed(mix(seed, "step", step, rank))
            terms, finite = optimization.step(images, labels, factor(step - 1))
            optimization.weights.update(step)
            first_bad = torch.where(finite | (first_bad > 0), first_bad, step)
            bar.update()
            stops = _agree(stopped, accelerator, step)
            saves = due(step) or stops or bool(checkpoint_every and step % checkpoint_every == 0)
            if step % RECORD_EVERY == 0 or saves:
                if first_bad.item():
                    raise FloatingPointError(_blame(stream, int(first_bad), terms.total.item()))
                if optimization.collapsed():
                    raise FloatingPointError("no scale of fp16 is small enough for finite gradients; --precision bf16")
                values = _joint(accelerator, _values(terms) | {"waiting": clock.waited_share(), "skipped": skipped})
                values["skipped"] = skipped_before + round(values["skipped"] * processes)
                if not values["skipped"]:
                    del values["skipped"]
                record = {"step": step, "lr": lr * factor(step - 1), "seconds": clock.seconds()} | values
                if saves:
                    with clock.paused():
                        save(record)
                miou = finish(record, stops)
                speed = (step - done) * batch_size * processes / clock.training()
                shown = {"loss": f"{record['loss']:.2f}", "img/s": f"{speed:.1f}"}
                shown |= {"data wait": f"{100 * record['waiting']:.0f}%"}
                bar.set_postfix(shown | ({} if miou is None else {"mIoU": f"{miou:.3f}"}))
            if stops:
                raise KeyboardInterrupt(f"stopped at step {step}")
    return records


class _Optimization:
    """One optimizer step of a model, on one process or many: parts of a batch forward and backward, clipping, AdamW."""

    def __init__(self, model, loss, accelerator, rates, clip, micro_batch, ema, compile, fsdp):
        if compile not in COMPILE:
            raise ValueError(f"compile must be one of {', '.join(COMPILE)}, got {compile!r}")
        processes = 1 if accelerator is None else accelerator.num_processes
        precision = "no" if accelerator is None else accelerator.mixed_precision
        _check_together(compile, fsdp, processes, precision, micro_batch)
        self.device = next(model.parameters()).device if accelerator is None else accelerator.device
        if not fsdp:
            model.to(self.device)
        self.model, self.accelerator, self.clip, self.micro_batch = model, accelerator, clip, micro_batch
        self.loss, self.fsdp = loss.to(self.device), fsdp
        self.weights = Weights(model, self.device, ema, fsdp)
        if fsdp:
            shard(model, self.device)
        groups = model.parameter_groups(*rates)
        self.rates, self.decays = ([group[name] for group in groups] for name in ("lr", "weight_decay"))
        self.plain = torch.optim.AdamW(groups, lr=rates[0], betas=(0.9, 0.999))  # as torch knows it
        self.parameters = [p for group in groups for p in group["params"]]
        self.network, self.optimizer, self.compiled = model, self.plain, None
        if compile == "step":
            half = torch.bfloat16 if precision == "bf16" else None
            self.compiled = compiled_step(model, self.loss, self.plain, clip, half)
            return
        if compile == "model":
            self.network = torch.compile(model)
        if accelerator is not None:
            self.optimizer = accelerator.prepare(self.plain)
            self.network = self.network if fsdp else accelerator.prepare(self.network)

    @property
    def scaler(self):
        """Of gradients, with fp16; it meets infinite ones on purpose, and skips the step."""
        return getattr(self.accelerator, "scaler", None)

    def collapsed(self) -> bool:
        """Whether fp16 has skipped step after step until its scale vanished; asks the device."""
        return self.scaler is not None and self.scaler.get_scale() < 1

    def state(self) -> dict:
        scaling = None if self.scaler is None else self.scaler.state_dict()
        return {"optimizer": optimizer_state(self.model, self.plain), "scaler": scaling}

    def load(self, state: dict) -> None:
        load_optimizer_state(self.model, self.plain, state["optimizer"])
        for group, decay in zip(self.plain.param_groups, self.decays):
            group["weight_decay"] = decay
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def step(self, images: Tensor, labels: Tensor, factor: float) -> tuple[ATMLossOutput, Tensor]:
        """Loss terms, and whether they and the gradients are finite (0-d bool)."""
        for group, rate in zip(self.plain.param_groups, self.rates):
            group["lr"] = rate * factor
        self.model.train()
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        if self.compiled is not None:
            terms = self.compiled(images, labels)
            return terms, terms.total.isfinite() & self.compiled.norm.isfinite()
        terms = self._gradients(images, labels)
        clip = nn.utils.clip_grad_norm_ if self.accelerator is None else self.accelerator.clip_grad_norm_
        norm = whole(clip(self.parameters, self.clip))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        finite = terms.total.isfinite()
        return terms, finite if self.scaler is not None else finite & norm.isfinite()

    def _gradients(self, images: Tensor, labels: Tensor) -> ATMLossOutput:
        """Loss terms of a batch, whose gradients are added to the parameters', a part of it at a time."""
        size = self.micro_batch or len(images)
        divisors, found = (), None
        if size < len(images):
            divisors = (self.loss.divisors(labels, self.model.edge_patches(images.shape[-2:])),)
        parts = list(zip(images.split(size), labels.split(size)))
        for i, part in enumerate(parts, 1):
            with self._exchange(i == len(parts)):
                with nullcontext() if self.accelerator is None else self.accelerator.autocast():
                    out = self.network(part[0])
                terms = self.loss(out, part[1], *divisors)
                if self.accelerator is None:
                    terms.total.backward()
                else:
                    self.accelerator.backward(terms.total)
            terms = [None if term is None else term.detach() for term in terms]
            found = terms if found is None else [a if b is None else a + b for a, b in zip(found, terms)]
        return ATMLossOutput(*found)

    def _exchange(self, now: bool) -> AbstractContextManager:
        """Processes exchange gradients in this backward pass, or not yet."""
        if self.fsdp:
            self.model.set_requires_gradient_sync(now)
        waits = self.accelerator is not None and not now and not self.fsdp
        return self.accelerator.no_sync(self.network) if waits else nullcontext()


def _check_together(compile: str, fsdp: bool, processes: int, precision: str, micro_batch: int | None) -> None:
    """Refuse what cannot be done together, before anything runs."""
    reasons = {
        "several processes": processes > 1,
        "micro batches": micro_batch is not None,
        "fp16": precision == "fp16",
    }
    for what, there in reasons.items():
        if compile == "step" and there:
            raise ValueError(f"compile=step does not go with {what}; compile=model does")
    if fsdp and processes == 1:
        raise ValueError("fsdp spreads a model over processes, and there is one; start several with torchrun")
    if fsdp and precision == "fp16":
        raise ValueError("fsdp does not go with fp16; bf16 does")


class _Clock:
    """Seconds of a training, and how many of them it waited for data; validation and checkpoints count in neither."""

    def __init__(self, before: float):
        self.start = time.perf_counter() - before
        self.begun, self.pauses, self.waited = time.perf_counter(), 0.0, 0.0
        self.mark = (self.begun, 0.0, 0.0)

    def seconds(self) -> float:
        """Of the whole run, with what ran before it was resumed."""
        return time.perf_counter() - self.start

    def training(self) -> float:
        return max(time.perf_counter() - self.begun - self.pauses, 1e-3)

    @contextmanager
    def paused(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.pauses += time.perf_counter() - before

    @contextmanager
    def waiting(self) -> Iterator[None]:
        before = time.perf_counter()
        yield
        self.waited += time.perf_counter() - before

    def waited_share(self) -> float:
        """Since it was last asked."""
        now = (time.perf_counter(), self.pauses, self.waited)
        passed, pauses, waited = (new - old for new, old in zip(now, self.mark))
        self.mark = now
        return round(waited / max(passed - pauses, 1e-6), 4)


def _joint(accelerator, values: dict[str, float]) -> dict[str, float]:
    """Means over all processes."""
    if accelerator is None or accelerator.num_processes == 1:
        return values
    mean = accelerator.reduce(torch.tensor([*values.values()], device=accelerator.device, dtype=torch.float64), "mean")
    return dict(zip(values, mean.tolist()))


def _append(log: Path, record: dict) -> None:
    try:
        with log.open("a") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise OSError(f"{log}: cannot be written ({error.strerror})") from error


def _agree(stopped: Callable[[], bool], accelerator, step: int) -> bool:
    """Whether to stop after this step; processes ask each other when they wait for the device anyway."""
    if accelerator is None or accelerator.num_processes == 1:
        return stopped()
    if step % RECORD_EVERY:
        return False
    return bool(accelerator.reduce(torch.tensor(float(stopped()), device=accelerator.device)).item())


def _blame(stream: Stream, step: int, loss: float) -> str:
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

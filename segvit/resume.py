"""Going on where a run stopped, and stopping so that it can."""

import json
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from segvit.checkpoints import CURVES, LOG, step_folders, write_whole

HELD_OUT = "held_out.csv"  # validation images of a run whose data has no val part
ELSEWHERE = (  # options that may change without a word
    "data",
    "out",
    "channels",  # the model's own, or refused
    "resume",
    "overwrite",
    "check",
    "workers",
    "keep",
    "strict",
    "trackers",
    "activation_checkpointing",
    "pretrained",
    "add_classes",  # the checkpoint knows which
)
ENDS = (FloatingPointError, KeyboardInterrupt, OSError, RuntimeError, ValueError)
MODEL = ("model", "backbone", "shrink", "edge_budget", "drop_path", "freeze_backbone")


def own_files(run: Path) -> list[Path]:
    """What a run wrote to its folder; nothing else in there is ever touched."""
    folders = [path for path in (run / "best", *run.glob("step_*")) if (path / "config.json").is_file()]
    return folders + [run / name for name in (LOG, CURVES, HELD_OUT) if (run / name).is_file()]


def newest(run: Path, resume: bool, overwrite: bool) -> Path | None:
    """The checkpoint to go on from; refuses to train over a run unless told to."""
    if resume and overwrite:
        raise ValueError("resume goes on with a run, overwrite removes it: choose one")
    if run.exists() and not run.is_dir():
        raise ValueError(f"{run} is a file; choose another folder for --out")
    if own_files(run) and not (resume or overwrite):
        raise ValueError(
            f"{run} holds a run already: --resume goes on with it, --overwrite starts anew, or change --out"
        )
    found = step_folders(run)
    if resume and not found and (run / "best").exists():
        raise ValueError(
            f"{run} has no step checkpoint to go on from: --model {run} with another --out starts from its best model"
        )
    return found[-1] if found and resume else None


def _read_log(path: Path) -> list[dict]:
    """Whole lines of a log; the last one may have been cut off."""
    records = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return records


def go_on(run: Path, state: dict, accelerator) -> float | None:
    """Cut from the log what came after the checkpoint, or was not validated yet; returns the best mIoU until then."""
    records = _read_log(run / LOG)
    accelerator.wait_for_everyone()  # all have read the log
    step = state["step"]
    records = [r for r in records if r["step"] < step or (r["step"] == step and "miou" in r)]
    if records and records[-1]["step"] == step:
        del state["record"]
    if accelerator.is_main_process:
        write_whole(run / LOG, "".join(json.dumps(record) + "\n" for record in records))
    accelerator.wait_for_everyone()
    if not (run / "best" / "config.json").is_file():
        return None  # whatever comes next is the best there is
    return max((record["miou"] for record in records if record.get("miou") is not None), default=None)


def compare_options(old: dict, new: dict, main: bool) -> None:
    """Going on with other options is allowed, and said; but not with another model."""
    for name, value in new.items():
        if name in ELSEWHERE or name not in old or old[name] == value:
            continue
        if name in MODEL:
            raise ValueError(f"a run goes on with its own model: {name} was {old[name]}, and cannot become {value}")
        if main:
            print(f"resuming with {name} {value}, which was {old[name]}", file=sys.stderr)


@contextmanager
def last_good(run: Path) -> Iterator[None]:
    """Say with what stops a training where it can go on."""
    try:
        yield
    except ENDS as error:
        kept = step_folders(run)
        if isinstance(error, ValueError) and not kept:
            raise
        where = f"the last checkpoint is {kept[-1]}" if kept else "there is no checkpoint yet"
        kind = next(kind for kind in ENDS if isinstance(error, kind))
        raise kind(f"{_in_words(error)}; {where}") from error


def _in_words(error: BaseException) -> str:
    text = " ".join(str(error).split())
    if isinstance(error, torch.OutOfMemoryError):
        remedies = "a smaller --batch_size with --total_batch, --precision bf16, --activation_checkpointing need less"
        return f"the GPU has too little memory; {remedies} ({text[:200]})"
    several = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if several and isinstance(error, RuntimeError) and re.search("gloo|nccl|connection|peer|socket", text, re.I):
        gone = "another process of this training is gone, and may say why"
        return f"{gone}; the same command with --resume goes on ({text[:200]})"
    return text


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Ctrl-C (or SIGTERM) asks to stop after the step; a second one stops at once."""
    asked, process = threading.Event(), os.getpid()

    def handle(number, frame):
        if os.getpid() != process:  # one that loads data, and inherits this
            return
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

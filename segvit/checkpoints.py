"""Checkpoints that are never half written, and the newest of a run."""

import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from segvit.models import SegViT

WEIGHTS = "model.safetensors"
STATE = "training.pt"  # beside model.safetensors and config.json: what going on needs
LABELS = "data.json"  # and how the labels of its data were read
LOG = "log.jsonl"  # of a run, one record a line
CURVES = "curves.png"  # of a run, beside its log


def save_checkpoint(
    model: nn.Module,
    folder: str | Path,
    state: dict | None = None,
    labels: dict | None = None,
    weights: dict[str, Tensor] | None = None,
) -> None:
    """safetensors + config.json in `folder`, complete and on the disk, or not at all: written beside it, then renamed.

    With a state, training can go on from there; `labels` is how the data were read, for evaluation; `weights` are
    written instead of the model's.

    Raises:
        OSError: it cannot be written; what was in `folder` before is still there.
    """
    folder = Path(folder)
    new, old = _beside(folder, "new"), _beside(folder, "old")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(new, ignore_errors=True)
        _write(model, new, state, labels, weights)
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
    except Exception as error:  # safetensors and torch have errors of their own for a full disk
        shutil.rmtree(new, ignore_errors=True)
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise OSError(f"{folder}: cannot write this checkpoint ({reason})") from error
    _to_disk(folder.parent)
    shutil.rmtree(old, ignore_errors=True)


def _write(model: nn.Module, folder: Path, state, labels, weights) -> None:
    if weights is None:
        model.save_pretrained(folder)
    else:
        folder.mkdir()
        save_file({name: w.contiguous() for name, w in weights.items()}, folder / WEIGHTS, metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(model._hub_mixin_config, indent=2, sort_keys=True))
    if state is not None:
        torch.save(state, folder / STATE)
    if labels is not None:
        (folder / LABELS).write_text(json.dumps(labels, indent=2))
    umask = os.umask(0)
    os.umask(umask)
    for path in folder.iterdir():
        path.chmod(0o666 & ~umask)  # safetensors writes files that nobody else may read
        _to_disk(path)
    _to_disk(folder)


def _to_disk(path: Path) -> None:
    """What was written there outlives a power cut."""
    try:
        number = os.open(path, os.O_RDONLY)
    except PermissionError:  # a folder, on Windows
        return
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_whole(path: Path, content: str | bytes) -> None:
    """A file, complete or as it was before."""
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(content.encode() if isinstance(content, str) else content)
    _to_disk(new)
    os.replace(new, path)


def _beside(folder: Path, what: str) -> Path:
    return folder.with_name(f".{folder.name}.{what}")


def clean(run: Path) -> None:
    """Put back what save_checkpoint had moved away when it was killed, and remove what it had not finished."""
    best = run / "best"
    if _beside(best, "old").exists() and not best.exists():
        os.replace(_beside(best, "old"), best)
    for pattern in (".step_*.new", ".step_*.old", ".best.new", ".best.old"):
        for folder in run.glob(pattern):
            shutil.rmtree(folder)
    for file in (LOG, CURVES):
        (run / f".{file}.new").unlink(missing_ok=True)


def step_folders(run: str | Path) -> list[Path]:
    """Checkpoints RUN/step_… that training can go on from, oldest first."""
    return sorted(path.parent for path in Path(run).glob(f"step_*/{STATE}"))


def keep_newest(run: str | Path, count: int) -> None:
    """Remove all but the newest `count` step checkpoints."""
    for folder in step_folders(run)[:-count]:
        remove_checkpoint(folder)


def remove_checkpoint(folder: Path) -> None:
    """There is never half a checkpoint under its own name."""
    os.replace(folder, _beside(folder, "old"))
    shutil.rmtree(_beside(folder, "old"))


def load_state(folder: Path) -> dict:
    """What save_checkpoint was given as state.

    Raises:
        ValueError: a damaged file.
    """
    try:
        state = torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises what its reader raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder / STATE}: cannot be read; --model {folder} starts from its weights ({reason})"
        ) from error
    if not isinstance(state, dict) or not set(state) >= {"step", "seconds", "options", "optimizer", "ema", "skipped"}:
        raise ValueError(
            f"{folder / STATE}: not written by this version of segvit; --model {folder} starts from its weights"
        )
    return state


def find_checkpoint(name: str | Path) -> Path | str:
    """The folder of a saved model: itself, or of a run its best model (its newest, before the first validation).

    What is no folder, but could be a name on the Hub, is returned as it is.

    Raises:
        FileNotFoundError: no checkpoint there.
    """
    folder = Path(name)
    for path in (folder, folder / "best", *reversed(step_folders(folder))):
        if (path / "config.json").is_file():
            return path
    if str(name).count("/") == 1 and not folder.exists() and not folder.parent.is_dir():
        return str(name)
    raise FileNotFoundError(f"{name}: no checkpoint there (a folder with config.json and model.safetensors)")


def load_model(name: str | Path) -> SegViT:
    """A saved model: a folder, a run, or a name on the Hub; see find_checkpoint.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: one that cannot be loaded.
    """
    found = find_checkpoint(name)
    try:
        return SegViT.from_pretrained(found)
    except Exception as error:  # a damaged file raises what its reader raises
        raise ValueError(f"{name}: cannot load this model: {error}") from error


def load_labels(name: str | Path) -> dict:
    """How the labels of a saved model's training data were read; empty if nobody knows."""
    path = Path(find_checkpoint(name), LABELS)
    return json.loads(path.read_text()) if path.is_file() else {}


def make_folder(folder: Path) -> None:
    """A folder that can be written to.

    Raises:
        PermissionError: it cannot.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").write_text("")
        (folder / ".writable").unlink()
    except OSError as error:
        raise PermissionError(f"{folder}: cannot write there ({error.strerror}); change --out") from error


def check_writable(path: Path) -> None:
    """Make the folder of a file, and see that the file can be written.

    Raises:
        PermissionError: it cannot.
    """
    there = path.exists()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.open("ab").close()
        if not there:
            path.unlink()
    except OSError as error:
        raise PermissionError(f"{path}: cannot write there ({error.strerror}); choose another name") from error

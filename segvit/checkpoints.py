"""Checkpoints that are never half written, the newest of a run, and models that go on with other classes."""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from segvit.models import SegViT

STATE = "training.pt"  # beside model.safetensors and config.json: what going on needs
LABELS = "data.json"  # and how the labels of its data were read


def save_checkpoint(
    model: nn.Module, folder: str | Path, state: dict | None = None, labels: dict | None = None
) -> None:
    """safetensors + config.json in `folder`, complete or not at all: written beside it, then renamed.

    With a state, training can go on from there; `labels` is how the data were read, for evaluation.
    """
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    if state is not None:
        torch.save(state, new / STATE)
    if labels is not None:
        (new / LABELS).write_text(json.dumps(labels, indent=2))
    umask = os.umask(0)
    os.umask(umask)
    for path in new.iterdir():  # safetensors writes files that nobody else may read
        path.chmod(0o666 & ~umask)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.replace(folder, old)
    os.replace(new, folder)
    shutil.rmtree(old, ignore_errors=True)


def restore(folder: Path) -> None:
    """Put back what save_checkpoint had moved away when it was killed."""
    old = folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():
        os.replace(old, folder)


def step_folders(run: str | Path) -> list[Path]:
    """Checkpoints RUN/step_… that training can go on from, oldest first."""
    return sorted(path.parent for path in Path(run).glob(f"step_*/{STATE}"))


def keep_newest(run: str | Path, count: int) -> None:
    """Remove all but the newest `count` step checkpoints."""
    for folder in step_folders(run)[:-count]:
        shutil.rmtree(folder)


def load_state(folder: Path) -> dict:
    """What save_checkpoint was given as state.

    Raises:
        ValueError: a damaged file.
    """
    try:
        return torch.load(folder / STATE, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file raises what its reader raises
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder / STATE}: cannot be read; --model {folder} starts from its weights ({reason})"
        ) from error


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


def with_classes(model: SegViT, class_names: Sequence[str], **overrides) -> tuple[SegViT, str]:
    """A copy of a model for other classes: class tokens and classifier rows of names that it knows are kept.

    Args:
        model: a trained model.
        class_names: of the new one.
        overrides: further arguments of SegViT, such as drop_path.

    Returns:
        The new model, and a sentence that says which classes were kept, are new, and were dropped.
    """
    changed = {"num_classes": len(class_names), "class_names": list(class_names), "pretrained": False}
    new = SegViT(**(model._hub_mixin_config | changed | overrides))
    known = {name: i for i, name in enumerate(model.class_names)}
    pairs = [(i, known[name]) for i, name in enumerate(class_names) if name in known]
    source, target = model.state_dict(), new.state_dict()
    for name, value in target.items():
        rows = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
        if name.startswith("decoder.class_embed."):  # the last row is "no object"
            rows = torch.cat([rows, torch.tensor([[len(class_names)], [model.num_classes]])], 1)
        elif name != "decoder.queries":
            value.copy_(source[name])
            continue
        value[rows[0]] = source[name][rows[1]]
    return new, _said(list(class_names), model.class_names)


def _said(new: list[str], old: list[str]) -> str:
    shared = [name for name in new if name in old]
    parts = [f"{len(shared)} of {len(new)} classes are kept" if len(shared) < len(new) else "all classes are kept"]
    for title, names in (("new", [n for n in new if n not in old]), ("dropped", [n for n in old if n not in new])):
        if names:
            parts.append(f"{title}: {', '.join(names)}")
    return "; ".join(parts)

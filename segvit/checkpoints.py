"""Checkpoints that are never half written, the newest of a run, and models that go on with other classes."""

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from segvit.models import SegViT

STATE = "training.pt"  # beside model.safetensors and config.json: what going on needs


def save_checkpoint(model: nn.Module, folder: str | Path, state: dict | None = None) -> None:
    """safetensors + config.json (and state) in `folder`, complete or not at all: written beside it, then renamed."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = folder.with_name(f".{folder.name}.new"), folder.with_name(f".{folder.name}.old")
    shutil.rmtree(new, ignore_errors=True)
    model.save_pretrained(new)
    if state is not None:
        torch.save(state, new / STATE)
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


def load_model(checkpoint: str | Path) -> SegViT:
    """A saved model: a folder, a run (its best model, or before the first validation its newest), or a name on the Hub.

    Raises:
        FileNotFoundError: no checkpoint there.
        ValueError: one that cannot be loaded.
    """
    name, folder = str(checkpoint), Path(checkpoint)
    runs = [path for path in (folder / "best", *reversed(step_folders(folder))) if (path / "config.json").is_file()]
    folder = runs[0] if runs else folder
    on_hub = name.count("/") == 1 and not folder.exists() and not folder.parent.is_dir()
    if not (folder / "config.json").is_file() and not on_hub:
        raise FileNotFoundError(f"{checkpoint}: no checkpoint there (a folder with config.json and model.safetensors)")
    try:
        return SegViT.from_pretrained(name if on_hub else folder)
    except Exception as error:  # a damaged file raises what its reader raises
        raise ValueError(f"{checkpoint}: cannot load this model: {error}") from error


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

"""A trained model goes on with other classes: fine-tuned, or with more that leave what it knows unchanged."""

from collections.abc import Sequence

import torch

from segvit.models import SegViT

OVERRIDES = {"dropout", "drop_path", "activation_checkpointing", "freeze_backbone"}  # the backbone is frozen anyway
OF_CLASSES = ("queries", "class_embed.weight", "class_embed.bias")  # of a decoder, what belongs to single classes


def add_classes(model: SegViT, class_names: Sequence[str], **overrides) -> SegViT:
    """A copy of a trained model that can learn further classes, and keeps what it knows bit for bit.

    The new classes get class tokens and an ATM decoder of their own, which begins as a copy of the model's, so it reads
    the features already; all that was there is frozen, and its mask and class logits do not depend on the new classes.
    (Continual segmentation after the idea of SegViTv2, arXiv 2306.06289; the design is ours.) What is left to train is
    told by `parameter_groups()`, and to the loss by ATMLoss(learned=model.learned_classes).

    Args:
        model: a trained SegViT; it is not changed. Classes may be added to it again and again.
        class_names: of the new classes, which get the numbers after the model's.
        overrides: dropout, drop_path and activation_checkpointing of SegViT.

    Raises:
        ValueError: no new name, or one that the model knows already; another argument of SegViT; a model of int8.
    """
    if strange := sorted(set(overrides) - OVERRIDES):
        raise ValueError(f"a model that keeps what it knows keeps its {', '.join(strange)}, too")
    if isinstance(class_names, str):
        raise ValueError(f"class_names must be a list of names, got {class_names!r}")
    own = next(model.parameters())
    if any(type(p.data) is not torch.Tensor for p in model.parameters()):
        raise ValueError("classes cannot be added to a model of int8; load it again in float32")
    names = list(class_names)
    doubled = [name for i, name in enumerate(names) if name in model.class_names or name in names[:i]]
    if not names or doubled:
        raise ValueError(f"class_names must be new to the model, got {', '.join(map(repr, doubled)) or 'none'}")
    config = model._hub_mixin_config
    changed = {
        "num_classes": model.num_classes + len(names),
        "class_names": [*model.class_names, *names],
        "added": [*config.get("added", ()), len(names)],
        "pretrained": False,
    }
    new = SegViT(**(config | changed | overrides)).to(own.device, own.dtype)
    newest, known = new.added[-1], model.state_dict()
    for name, value in new.state_dict().items():
        if not name.startswith(f"added.{len(new.added) - 1}."):
            value.copy_(known[name])
    for name, value in newest.state_dict().items():
        if name not in OF_CLASSES:
            value.copy_(known[f"decoder.{name}"])
    with torch.no_grad():  # the last row is "no object"
        newest.class_embed.weight[-1].copy_(model.decoder.class_embed.weight[-1])
        newest.class_embed.bias[-1].copy_(model.decoder.class_embed.bias[-1])
    return new


def other_classes(model: SegViT, class_names: Sequence[str], adds: bool, **overrides) -> tuple[SegViT, str]:
    """add_classes, where `class_names` are the model's and new ones behind them, or else with_classes.

    Returns:
        The new model, and a sentence that says what became of the classes.

    Raises:
        ValueError: names that do not begin with the model's, or have no new one behind them.
    """
    if not adds:
        return with_classes(model, class_names, **overrides)
    known = model.num_classes
    for i, (ours, theirs) in enumerate(zip(model.class_names, class_names)):
        if ours != theirs:
            raise ValueError(
                f"add_classes: class {i} is {ours!r} to the model, but {theirs!r} in the data, whose classes must be "
                "the model's, in their order, and then the new ones (--classes FILE names them, --label_map renumbers)"
            )
    if len(class_names) <= known:
        raise ValueError(f"add_classes: the data has {len(class_names)} classes, and the model knows {known} already")
    new = list(class_names[known:])
    return add_classes(model, new, **overrides), f"{known} classes stay as they are; new: {', '.join(new)}"


def with_classes(model: SegViT, class_names: Sequence[str], **overrides) -> tuple[SegViT, str]:
    """A copy of a model for other classes: class tokens and classifier rows of names that it knows are kept.

    Args:
        model: a trained model.
        class_names: of the new one.
        overrides: further arguments of SegViT, such as drop_path.

    Returns:
        The new model, and a sentence that says which classes were kept, are new, and were dropped.

    Raises:
        ValueError: other classes for a model that has added ones, whose tokens are bound to decoders of their own.
    """
    if model.added and list(class_names) != model.class_names:
        raise ValueError(
            f"this model has classes that were added to a trained one; it goes on with its own {model.num_classes} "
            "classes, or with more (add_classes)"
        )
    changed = {"num_classes": len(class_names), "class_names": list(class_names), "pretrained": False}
    new = SegViT(**(model._hub_mixin_config | changed | overrides))
    known = {name: i for i, name in enumerate(model.class_names)}
    pairs = [(i, known[name]) for i, name in enumerate(class_names) if name in known]
    source, target = model.state_dict(), new.state_dict()
    if list(class_names) == model.class_names:
        new.load_state_dict(source)
        learning = [model.class_names[i] for i in model.learned_classes or ()]
        frozen = f"; {', '.join(learning)} learn, the rest is frozen" if learning else ""
        return new, _said(model.class_names, model.class_names) + frozen
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

"""Checkpoints in the official SegViT layout, into ours."""

import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from segvit.checkpoints import save_checkpoint
from segvit.data.dataset import read_classes
from segvit.data.layouts import find_classes
from segvit.models.backbone import Backbone
from segvit.models.registry import ModelInfo, create_model, list_models
from segvit.models.segvit import SegViT

# One rule per official name: pattern, our name. Groups are layer and stage numbers; official stages count from 1.
_BACKBONE = [
    (r"pos_embed", r"pos_embed"),
    (r"cls_token", r"cls_token"),
    (r"patch_embed\.projection\.(weight|bias)", r"patch_embed.proj.\1"),
    (r"layers\.(\d+)\.ln([12])\.(weight|bias)", r"blocks.\1.norm\2.\3"),
    (r"layers\.(\d+)\.attn\.attn\.in_proj_(weight|bias)", r"blocks.\1.attn.qkv.\2"),
    (r"layers\.(\d+)\.attn\.attn\.out_proj\.(weight|bias)", r"blocks.\1.attn.proj.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.0\.0\.(weight|bias)", r"blocks.\1.mlp.fc1.\2"),
    (r"layers\.(\d+)\.ffn\.layers\.1\.(weight|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"ln1\.(weight|bias)", r"norm.\1"),
]
_LAYER = [
    (r"self_attn\.in_proj_(weight|bias)", r"self_qkv.\1"),
    (r"self_attn\.out_proj\.(weight|bias)", r"self_proj.\1"),
    (r"multihead_attn\.q\.(weight|bias)", r"q.\1"),
    (r"multihead_attn\.proj\.(weight|bias)", r"proj.\1"),
    (r"multihead_attn\.out_proj\.(weight|bias)", r"proj.\1"),
    (r"linear([12])\.(weight|bias)", r"fc\1.\2"),
    (r"norm([123])\.(weight|bias)", r"norm\1.\2"),
]
Place = tuple[str, slice | None]  # our parameter, and the rows of it that an official one fills


def official_names(official: str, shape: torch.Size, shrunk: bool) -> list[tuple[Place, slice]]:
    """Where an official parameter goes: ((our name, rows of it), rows of the official one); empty: it is not needed.

    Raises KeyError for a name that the official layout does not have.
    """
    everything = slice(None)
    if official.endswith("criterion.empty_weight"):
        return []
    if official.startswith("backbone."):
        return [((f"backbone.model.{_rename(official.removeprefix('backbone.'), _BACKBONE)}", None), everything)]
    name = official.removeprefix("decode_head.")
    module = "decoder"
    if shrunk and name.startswith("atm."):
        name = name.removeprefix("atm.")
    elif shrunk:
        module = "upsample"
    if name == "q.weight":
        return [((f"{module}.queries", None), everything)]
    if match := re.fullmatch(r"class_embed\.(weight|bias)", name):
        return [((f"{module}.class_embed.{match[1]}", None), everything)]
    if match := re.fullmatch(r"(input_proj|proj_norm)_(\d+)\.(weight|bias)", name):
        part = 0 if match[1] == "input_proj" else 1
        return [((f"{module}.projections.{int(match[2]) - 1}.{part}.{match[3]}", None), everything)]
    match = re.fullmatch(r"decoder_(\d+)\.layers\.(\d+)\.(.+)", name)
    if not match:
        raise KeyError(official)
    stage, layer, rest = f"{module}.stages.{int(match[1]) - 1}", int(match[2]), match[3]
    if kv := re.fullmatch(r"multihead_attn\.([kv])\.(weight|bias)", rest):
        start = (2 * layer + (kv[1] == "v")) * shape[0]
        return [((f"{stage}.kv.{kv[2]}", slice(start, start + shape[0])), everything)]
    if qkv := re.fullmatch(r"multihead_attn\.in_proj_(weight|bias)", rest):
        dim = shape[0] // 3
        kv_rows = slice(2 * layer * dim, (2 * layer + 2) * dim)
        return [
            ((f"{stage}.layers.{layer}.q.{qkv[1]}", None), slice(0, dim)),
            ((f"{stage}.kv.{qkv[1]}", kv_rows), slice(dim, 3 * dim)),
        ]
    return [((f"{stage}.layers.{layer}.{_rename(rest, _LAYER)}", None), everything)]


def _rename(name: str, rules: list[tuple[str, str]]) -> str:
    for pattern, ours in rules:
        if re.fullmatch(pattern, name):
            return re.sub(pattern, ours, name)
    raise KeyError(name)


def from_official(state_dict: Mapping[str, Tensor], config: Mapping, **overrides) -> SegViT | Backbone:
    """A model from the official checkpoint layout.

    Args:
        state_dict: official names to tensors ("backbone.layers.0.ln1.weight", "decode_head.q.weight"…); what wraps them
            in a checkpoint file ("state_dict", "meta") must be taken off before.
        config: the official model dict: "backbone" (type VisionTransformer or vit_shrink, img_size, embed_dims,
            num_layers, num_heads, out_indices…) and "decode_head" (type ATMHead or TPNATMHead, in_channels,
            num_classes, num_layers, num_heads…). A backbone dict alone gives a Backbone.
        overrides: arguments of SegViT (or Backbone) that replace what the config says.

    Returns:
        SegViT in evaluation mode, with the official layout's ways: with_cls_token and final_norm as configured,
        position embeddings interpolated without antialiasing, images normalised by mean = std = 0.5.

    Raises:
        ValueError: a config or a state_dict that is not of the official layout, with the names that do not fit.
    """
    whole = "decode_head" in config
    backbone = config.get("backbone", config) if whole else config
    arguments = _backbone_arguments(backbone)
    if whole:
        arguments = _model_arguments(config["decode_head"], backbone, arguments)
    model = (SegViT if whole else Backbone)(**(arguments | overrides))
    _load(model, state_dict, shrunk=backbone.get("type") == "vit_shrink", prefix="" if whole else "backbone.")
    return model.eval()


def _get(config: Mapping, key: str, where: str):
    if key not in config:
        raise ValueError(f"config: {where} has no {key!r}; from_official takes the official model dict")
    return config[key]


def _backbone_arguments(config: Mapping) -> dict:
    kind = config.get("type")
    if kind not in ("VisionTransformer", "vit_shrink"):
        raise ValueError(f"config: the backbone's type must be VisionTransformer or vit_shrink, got {kind!r}")
    get = lambda key: _get(config, key, "backbone")  # noqa: E731
    size = get("img_size")
    out_indices = get("out_indices")
    return {
        "name": "vit_base_patch16_224",
        "image_size": (size, size) if isinstance(size, int) else tuple(size),
        "in_chans": config.get("in_channels", 3),
        "out_indices": [out_indices] if isinstance(out_indices, int) else list(out_indices),
        "drop_path": config.get("drop_path_rate", 0.0),
        "final_norm": config.get("final_norm", False),
        "pos_antialias": False,
        "embed_dim": get("embed_dims"),
        "depth": get("num_layers"),
        "num_heads": get("num_heads"),
        "patch_size": config.get("patch_size", 16),
        "class_token": config.get("with_cls_token", True),
        "global_pool": "",
        **({"shrink": True, "shrink_at": get("shrink_idx")} if kind == "vit_shrink" else {}),
    }


def _model_arguments(head: Mapping, backbone: Mapping, arguments: dict) -> dict:
    timm_names = ("embed_dim", "depth", "num_heads", "patch_size", "class_token", "global_pool")
    get = lambda key: _get(head, key, "decode_head")  # noqa: E731
    ours = {name: value for name, value in arguments.items() if name not in (*timm_names, "name", "shrink")}
    return ours | {
        "backbone": arguments["name"],
        "backbone_kwargs": {name: arguments[name] for name in timm_names},
        "num_classes": get("num_classes"),
        "decoder_dim": head.get("embed_dims", get("in_channels") // 2),
        "decoder_heads": get("num_heads"),
        "decoder_layers": get("num_layers"),
        "shrink": "v1" if arguments.get("shrink") else None,
        "mean": [0.5] * arguments["in_chans"],
        "std": [0.5] * arguments["in_chans"],
    }


def _load(model: SegViT | Backbone, state_dict: Mapping[str, Tensor], shrunk: bool, prefix: str) -> None:
    """Fill our parameters from official ones; everything must be filled, and nothing may be left over."""
    if not all(isinstance(value, Tensor) for value in state_dict.values()):
        inside = 'take state_dict["state_dict"]' if "state_dict" in state_dict else "every value must be a tensor"
        raise ValueError(f"state_dict: this is not the parameters themselves; {inside}")
    targets = dict(model.named_parameters())
    missing, unknown = {name: p.numel() for name, p in targets.items()}, []
    for official, value in state_dict.items():
        try:
            places = official_names(official, value.shape, shrunk)
        except KeyError:
            unknown.append(official)
            continue
        for (name, rows), taken in places:
            name = name.removeprefix(prefix)
            if name.endswith("cls_token") and name not in targets:
                continue  # in the checkpoint, and unused
            if name not in targets:
                unknown.append(official)
                continue
            target = targets[name].data if rows is None else targets[name].data[rows]
            source = value[taken]
            if name.endswith("pos_embed") and source.shape[1] == target.shape[1] + 1:
                source = source[:, 1:]  # position 0 is the class token's
            if source.shape != target.shape:
                raise ValueError(
                    f"state_dict: {official!r} is {tuple(source.shape)}, the config asks for {tuple(target.shape)}"
                )
            target.copy_(source)
            missing[name] -= source.numel()
    unfilled = [name for name, count in missing.items() if count]
    for names, problem in ((unknown, "has names that the config's model does not have"), (unfilled, "does not fill")):
        if names:
            shown = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            raise ValueError(f"state_dict: {problem}: {shown}")


def convert_checkpoint(
    file: str | Path,
    out: str | Path,
    model: str | None = None,
    config: str | Path | None = None,
    classes: str | Path | None = None,
) -> SegViT:
    """`segvit convert`: an official checkpoint file into a folder of ours.

    Args:
        file: .pth (only tensors and plain values are read, never code) or .safetensors.
        out: folder for model.safetensors and config.json.
        model: which of the paper's models; None: told from the shapes.
        config: JSON file with the official model dict instead, for other models.
        classes: file of class names; None: of the data set the model was published for.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a file that only code could read, that does not fit the model, or an `out` that exists.
    """
    if Path(out).exists():
        raise ValueError(f"{out} exists already; choose another folder")
    state = read_official(file)
    names = None if classes is None else read_classes(classes)
    if config is not None:
        described = _read_config(config)
        converted = from_official(state, described, **({} if names is None else {"class_names": names}))
    else:
        info = _published(state, model)
        names = names or find_classes(out, next(own for part, own in _LAYOUTS.items() if part in info.name))
        converted = create_model(info.name, class_names=names)
        _load(converted, state, shrunk=bool(info.arguments.get("shrink")), prefix="")
    save_checkpoint(converted.eval(), out)
    return converted


_LAYOUTS = {"ade20k": "ade20k", "cocostuff10k": "cocostuff10k", "pascal_context": "pascal_context_60"}


def read_official(file: str | Path) -> dict[str, Tensor]:
    """The parameters in a checkpoint file, without what wraps them. Nothing in the file is run.

    Raises:
        FileNotFoundError: no such file.
        ValueError: a damaged file, or one that cannot be read without running code in it.
    """
    if not Path(file).is_file():
        raise FileNotFoundError(f"{file}: no such file")
    try:
        if Path(file).suffix == ".safetensors":
            state = load_file(file)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # advice on files that are refused below
                state = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        if "Unsupported" not in str(error) and "GLOBAL" not in str(error):
            raise ValueError(f"{file}: not a readable checkpoint") from error
        raise ValueError(
            f"{file}: reading this pickle would run code that is stored in it, so it is refused. If you trust its "
            "source, take the tensors out where nothing can be harmed: torch.load(file, weights_only=False)"
            "['state_dict'], written by safetensors.torch.save_file; then convert the .safetensors file"
        ) from error
    except Exception as error:  # a damaged file raises what its reader stumbles over
        raise ValueError(f"{file}: not a readable checkpoint ({error})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(state, Mapping) and isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    if not isinstance(state, Mapping) or not all(isinstance(name, str) for name in state):
        raise ValueError(f"{file}: no checkpoint, but a {type(state).__name__} without names of parameters")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _read_config(path: str | Path) -> dict:
    try:
        config = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error}); write the official model dict as JSON") from error
    return config.get("model", config)


def _published(state: Mapping[str, Tensor], name: str | None) -> ModelInfo:
    """The published model of this name, or the one whose shapes the parameters have."""
    infos = [info for info in list_models() if info.published]
    if name is not None:
        found = [info for info in infos if info.name == name]
        if not found:
            raise ValueError(
                f"model must be one of the paper's: {', '.join(info.name for info in infos)}; got {name!r}"
            )
        return found[0]
    shrunk = any(key.startswith("decode_head.atm.") for key in state)
    rows = state.get(f"decode_head.{'atm.' if shrunk else ''}class_embed.bias")
    depth = len({key.split(".")[2] for key in state if key.startswith("backbone.layers.")})
    for info in infos:
        fits = info.arguments["out_indices"][-1] + 1 == depth and bool(info.arguments.get("shrink")) == shrunk
        if rows is not None and len(rows) == info.num_classes + 1 and fits:
            return info
    raise ValueError(
        "none of the paper's models has these parameters; --config FILE.json describes others (the official model dict)"
    )

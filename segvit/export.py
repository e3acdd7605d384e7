"""A model as one file for other programs: ONNX, or a program of torch.export, for any batch and any image size."""

import copy
import importlib.util
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from timm.layers import RotaryEmbeddingDinoV3
from torch import Tensor, nn

import segvit
from segvit import inference
from segvit.checkpoints import check_writable
from segvit.data import Shapes
from segvit.data.images import read_image, to_tensor
from segvit.models import SegViT
from segvit.ops import reference
from segvit.ops._dispatch import plain_torch
from segvit.ops.reference.mask_decode import label_dtype

AXES = {0: "batch", 2: "height", 3: "width"}
METADATA = "segvit.json"  # inside a .pt2 file
ENOUGH = 0.999  # of the labels must be those of segvit.predict


def export_onnx(model: nn.Module, path: str | Path, labels: bool = False, normalise: bool = True) -> dict[str, str]:
    """Write the model as ONNX, weights and all (beyond 2 GB they lie beside it, in PATH.data).

    Input `images` [B, C, H, W] of any B, H and W (of BEiT: the model's image_size alone): uint8 pixels, which the file
    normalises as segvit.predict does, or with normalise=False float32 that is normalised already. Output `scores`
    float32 [B, K, H, W], sums over class tokens, or with labels=True `labels` [B, H, W], uint8 up to 256 classes, else
    int16; both as segvit.predict gives them for whole images. What segvit leaves out is computed here: running it
    takes two float32 tensors of [B, K, H, W].

    Args:
        model: a SegViT; it is copied, and exported in float32 and evaluation mode.
        path: ends in .onnx; a file that is there is overwritten.

    Returns:
        What the file says of itself (metadata_props): class_names, mean and std as JSON, input, output, segvit.

    Raises:
        ValueError: a path that does not end in .onnx, or is a folder.
        PermissionError: nothing can be written there.
        RuntimeError: packages are missing, or the model cannot be exported, with the reason.
    """
    _need("onnx", "onnxscript")
    path = _target(path, ".onnx")
    program = _program(model, labels, normalise)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            names = {"output_names": ["labels" if labels else "scores"], "dynamic_shapes": {"images": AXES}}
            onnx = torch.onnx.export(program, (), dynamo=True, verbose=False, **names)
    except Exception as error:  # the exporter raises what its translations raise
        raise RuntimeError(f"this model cannot be translated to ONNX: {_first(error)}") from error
    metadata = _metadata(model, labels, normalise)
    onnx.model.metadata_props.update(metadata)
    _written(path, lambda: onnx.save(path))
    return metadata


def export_program(model: nn.Module, path: str | Path, labels: bool = False, normalise: bool = True) -> dict[str, str]:
    """Write the model as a program of torch.export, which torch.export.load(PATH).module() runs without segvit.

    As export_onnx, with a path that ends in .pt2 and segvit.json inside for what it says of itself. Each side of the
    images must have more than one patch (two, with shrink), and with shrink="edge" a batch more than one edge token.
    """
    path = _target(path, ".pt2")
    program = _program(model, labels, normalise)
    metadata = _metadata(model, labels, normalise)
    _written(path, lambda: torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)}))
    return metadata


class Exportable(nn.Module):
    """Images to scores or labels as predict has it, on a copy of the model that can be traced at any size."""

    def __init__(self, model: nn.Module, labels: bool, normalise: bool):
        super().__init__()
        self.model = copy.deepcopy(model).cpu().float().eval().requires_grad_(False)
        self.labels, self.normalise = labels, normalise
        rope = getattr(self.model.backbone.model, "rope", None)
        if isinstance(rope, RotaryEmbeddingDinoV3) and rope.normalize_coords == "separate":
            rope.get_embed = partial(_centred_embed, rope)

    def forward(self, images: Tensor) -> Tensor:
        """images [B, C, H, W] to scores [B, K, H, W] or labels [B, H, W]."""
        x = inference.normalise(self.model, images) if self.normalise else images
        masks, probs, extent = inference._masks(self.model, x)
        scores = reference.mask_decode(masks, probs, images.shape[2:], "scores", extent=extent)
        return scores.argmax(1).to(label_dtype(scores.shape[1])) if self.labels else scores


def _centred_embed(rope: nn.Module, shape: tuple[int, int]) -> Tensor:  # [h·w, 2·D]
    """DINOv3's rotary table; timm's own makes Python floats of the sides, which ties a trace to one size."""
    shape = shape if rope.grid_indexing == "ij" else shape[::-1]
    axes = [(torch.arange(side, dtype=torch.float32) + 0.5 + rope.grid_offset) / side for side in shape]
    grid = torch.stack(torch.meshgrid(axes, indexing=rope.grid_indexing), -1).flatten(0, 1)
    return torch.cat(rope._get_pos_embed_from_coords(2 * grid - 1), -1)


def _program(model: nn.Module, labels: bool, normalise: bool) -> torch.export.ExportedProgram:
    if not isinstance(model, SegViT):
        raise ValueError(f"model must be a SegViT, got {type(model).__name__}")
    axes, sides = {0: torch.export.Dim("batch", min=1)}, model.image_size
    if not model.backbone.fixed_size:
        cells = 2 if model.backbone.shrink_at is None else 3  # a side of one cell, kept or not, would be a constant
        low = [(cells - 1) * patch + 1 for patch in model.backbone.patch_size]
        axes |= {i: torch.export.Dim(AXES[i], min=low[i - 2]) for i in (2, 3)}
        sides = [low[0] + 1, low[1] + model.backbone.patch_size[1]]
    images = torch.zeros(2, len(model.mean), *sides, dtype=torch.uint8 if normalise else torch.float32)
    module = Exportable(model, labels, normalise)
    try:
        with plain_torch(), torch.no_grad():
            return torch.export.export(module, (images,), dynamic_shapes={"images": axes})
    except Exception as error:  # whatever a backbone does that depends on the size
        raise RuntimeError(f"this model cannot be exported for images of any size: {_first(error)}") from error


def _metadata(model: nn.Module, labels: bool, normalise: bool) -> dict[str, str]:
    channels, K = len(model.mean), model.num_classes
    size = f"{model.image_size[0]}, {model.image_size[1]}" if model.backbone.fixed_size else "H, W"
    kind, integer = "uint8" if normalise else "normalised float32", str(label_dtype(K)).removeprefix("torch.")
    return {
        "class_names": json.dumps(model.class_names),
        "mean": json.dumps(model.mean.tolist()),
        "std": json.dumps(model.std.tolist()),
        "input": f"images {kind} [B, {channels}, {size}]",
        "output": f"labels {integer} [B, {size}]" if labels else f"scores float32 [B, {K}, {size}]",
        "segvit": segvit.__version__,
    }


def _first(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _need(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise RuntimeError(f"this needs packages that are not installed: pip install {' '.join(missing)}")


def _target(path: str | Path, suffix: str) -> Path:
    """The path, when a file can be written there."""
    path = Path(path)
    if path.suffix != suffix or path.is_dir():
        raise ValueError(f"{path}: name a file that ends in {suffix}")
    check_writable(path)
    return path


def _written(path: Path, write: Callable[[], None]) -> None:
    try:
        write()
    except Exception as error:  # the writers have errors of their own for a full disk
        path.unlink(missing_ok=True)
        raise OSError(f"{path}: cannot write this file ({_first(error)})") from error


class Agreement(NamedTuple):
    images: int  # how many
    equal: float  # share of the labels
    difference: float | None  # the largest of the scores; None where the file gives labels


def verify(model: nn.Module, path: str | Path, images: Sequence[str | Path] | None = None) -> Agreement:
    """Compare an exported file, in ONNX Runtime or PyTorch, with segvit.predict of the model.

    Args:
        model: the one that was exported.
        path: .onnx or .pt2, of this module.
        images: image files; None: three of the embedded data set, in sizes around the model's.

    Raises:
        ValueError: a file that this module did not write, or an image that it cannot take.
        RuntimeError: onnxruntime is missing, or the file does not run.
    """
    path = Path(path)
    metadata, run = _open(path)
    if not {"input", "output"} <= set(metadata):
        raise ValueError(f"{path}: not written by segvit export")
    scored = metadata["output"].startswith("scores")
    same, pixels, difference = 0, 0, 0.0
    pictures = list(_shapes(model) if images is None else _files(images, len(model.mean)))
    for name, raw in pictures:
        given = inference.normalise(model, raw)[None].float().cpu()
        if "uint8" in metadata["input"]:
            if raw.dtype != torch.uint8:
                raise ValueError(f"{name} has more than 8 bits, but {path} takes uint8; export with normalise=False")
            given = raw[None]
        try:
            got = run(given)
        except Exception as error:  # ONNX Runtime has errors of its own
            raise RuntimeError(f"{path} does not run on {name}, {tuple(raw.shape)}: {_first(error)}") from error
        inside = inference.normalise(model, raw)[None]
        labels = inference.predict(model, inside).cpu()
        if scored:
            scores = inference.predict(model, inside, output="scores").cpu()
            difference = max(difference, (got - scores).abs().max().item())
            got = got.argmax(1)
        same, pixels = same + int((got == labels).sum()), pixels + labels.numel()
    return Agreement(len(pictures), same / pixels, difference if scored else None)


def _open(path: Path) -> tuple[dict[str, str], Callable[[Tensor], Tensor]]:
    """What an exported file says of itself, and a function from images to its output, on the CPU."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    if path.suffix == ".pt2":
        files = {METADATA: ""}
        try:
            program = torch.export.load(path, extra_files=files).module()
        except Exception as error:  # a damaged file raises what its reader raises
            raise ValueError(f"{path}: not a readable program ({_first(error)})") from error
        return json.loads(files[METADATA]), program
    _need("onnxruntime")
    import onnxruntime

    try:
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has errors of its own
        raise ValueError(f"{path}: not a readable ONNX file ({_first(error)})") from error

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return session.get_modelmeta().custom_metadata_map, run


def _shapes(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Three images of the embedded data set: of the model's size, and wider and lower ones of odd sides."""
    height, width = model.image_size
    sizes = [(height, width), (height, width * 5 // 4 | 1), (height * 3 // 4 | 1, width)]
    if model.backbone.fixed_size:
        sizes = sizes[:1] * 3
    data, channels = Shapes(len(sizes), max(max(size) for size in sizes)), torch.arange(len(model.mean)) % 3
    for i, (h, w) in enumerate(sizes):
        yield f"generated image {i}", data[i][0][channels, :h, :w].contiguous()


def _files(paths: Sequence[str | Path], channels: int) -> Iterator[tuple[str, Tensor]]:
    for path in paths:
        yield str(path), to_tensor(read_image(path, channels), channels)

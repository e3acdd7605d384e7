"""Why a model gives an image its labels: every stage's masks and class probabilities, and the scores of a pixel."""

import difflib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from segvit.data.images import MODES, read_image, to_picture
from segvit.inference import Picture, evaluating, in_own_dtype, last_stage, normalise, raw_image, rescaled
from segvit.models.shrunk import STRIDE
from segvit.ops import mask_decode
from segvit.ops.reference._sampling import bilinear_matrix, resize
from segvit.ops.reference.token_resample import stride_index
from segvit.visualize import picture as plain_picture

EVEN, EDGE = 1, 2  # kept cells, in Explanation.kept
MOST = 60  # classes of a page


class Ranked(NamedTuple):
    """One class at one pixel."""

    number: int
    name: str
    confidence: float  # probability that the class's token gives its own class
    mask: float  # its mask at the pixel, after the sigmoid
    score: float  # what classes are compared by: Σ_n p[n, class]·mask[n]


@dataclass(frozen=True)
class Explanation:
    """What a model computed for one image, on the CPU; N = K class tokens, S decoder stages, the last one decides."""

    image: Image.Image  # RGB, to look at
    labels: Tensor  # [H, W], those of segvit.predict
    class_names: list[str]
    shown: list[int]  # classes that picture() has a row for
    class_probs: Tensor  # [S, N, K+1] float32 (float64 of a float64 model), softmax; the last column is "no object"
    mask_logits: Tensor  # [S, N, h, w], of the same dtype
    extent: tuple[float, float]  # rows and columns of the mask grid that the image covers
    seen: tuple[int, int]  # height and width at which the model saw the image
    kept: Tensor | None  # [h, w] uint8, of a Shrunk model: EVEN and EDGE for cells whose tokens stay, else 0
    edges: Tensor | None  # [h, w] float32, with shrink="edge": probability that a patch holds more than one class
    window: tuple[int, int, int, int] | None = None  # top, left, height, width: the part of a larger image that this is

    @property
    def confidence(self) -> Tensor:
        """[S, N] probability that token n gives its own class."""
        return self.class_probs.diagonal(dim1=1, dim2=2)

    @property
    def no_object(self) -> Tensor:
        """[S, N] probability that token n finds its class nowhere."""
        return self.class_probs[..., -1]

    @property
    def masks(self) -> Tensor:
        """[S, N, h, w], the sigmoid of the mask logits."""
        return self.mask_logits.sigmoid()

    def mask(self, stage: int, number: int, size: tuple[int, int]) -> Tensor:
        """[H, W] of one class at any size, sampled as predict does: bilinear, then the sigmoid."""
        return resize(self.mask_logits[stage, number], size, self.extent).sigmoid()

    def scores(self, size: tuple[int, int]) -> Tensor:
        """[K, H, W] at any size; see segvit.ops.mask_decode."""
        probs = self.class_probs[-1:, :, :-1]
        return mask_decode(self.mask_logits[-1:], probs, size, "scores", extent=self.extent)[0]

    def ranking(self, y: int, x: int) -> list[Ranked]:
        """All classes at the pixel in row y and column x of the labels, best score first.

        A low mask of the right class means that its token looked elsewhere; a low confidence with a high mask that the
        token found the place, and took it for another class or for none.

        Raises:
            ValueError: a pixel outside the image.
        """
        check_point((y, x), self.labels.shape)
        logits = self.mask_logits[-1]
        rows, columns = (
            bilinear_matrix(cells, size, extent, logits)[i : i + 1]
            for cells, size, extent, i in zip(logits.shape[1:], self.labels.shape, self.extent, (y, x))
        )
        here = rows @ logits @ columns.mT  # [N, 1, 1], the mask logits at the pixel
        scores = mask_decode(here[None], self.class_probs[-1:, :, :-1], (1, 1), "scores")[0, :, 0, 0]
        mask, confidence = here[:, 0, 0].sigmoid(), self.confidence[-1]
        order = scores.argsort(descending=True, stable=True).tolist()
        return [Ranked(k, self.class_names[k], confidence[k].item(), mask[k].item(), scores[k].item()) for k in order]

    def picture(self, side: int = 240, point: tuple[int, int] | None = None, note: str = "") -> Image.Image:
        """Everything on one page: prediction, hesitation, kept tokens, then for each shown class its masks by stage.

        Args:
            side: longest side of each panel, in pixels.
            point: (row, column) of a pixel of the labels, to mark in every panel and to rank the classes of.
            note: text to write below the title.

        Raises:
            ValueError: a pixel outside the image, another side than from 32 to 1024, more classes than a page takes.
        """
        from segvit.panels import draw

        if not isinstance(side, int) or not 32 <= side <= 1024:
            raise ValueError(f"side must be an integer from 32 to 1024, got {side!r}")
        if len(self.shown) > MOST:
            raise ValueError(f"a page shows at most {MOST} classes, not {len(self.shown)}")
        if point is not None:
            check_point(point, self.labels.shape)
        return draw(self, side, point, note)


def explain(
    model: nn.Module,
    image: Picture,
    classes: Sequence[str | int] | None = None,
    top: int = 6,
    short_side: int | None = None,
    max_pixels: int | None = None,
    window: tuple[int, int, int, int] | None = None,
) -> Explanation:
    """What leads a model to its labels of one image, taken whole, in one forward pass.

    Args:
        model: a SegViT; its train or eval mode is left as it was found.
        image: one picture as segvit.predict takes it: a path, a PIL image, an array [H, W, C] or [H, W], or a uint8
            tensor [C, H, W].
        classes: names or numbers to show; None: the `top` that cover the most pixels, then the most confident others.
        top: how many classes to show.
        short_side: resize the image to this short side first, as in segvit.predict.
        max_pixels: then shrink it to at most so many pixels (and to what a backbone of one size takes).
        window: (top, left, height, width) of the part of the image to take, before it is resized; None: all of it.

    Returns:
        An Explanation; its labels [H, W] are those of segvit.predict(mode="whole"), unless max_pixels shrank the image.
        Of an image that is predicted in windows, a window shows what one of them makes of it.

    Raises:
        ValueError: an argument that does not fit, named.
        FileNotFoundError: a path that is not there.
    """
    if not isinstance(image, Picture) or (isinstance(image, Tensor) and image.dim() != 3):
        got = f"a tensor {tuple(image.shape)}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"image must be one path, PIL image, array or uint8 tensor [C, H, W], got {got}")
    for name, value in (("top", top), ("short_side", short_side), ("max_pixels", max_pixels)):
        if (value is not None or name == "top") and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    asked = None if classes is None else class_numbers(classes, model.class_names)
    if isinstance(image, str | Path):
        image = read_image(image, len(model.mean))
    raw = raw_image(image, len(model.mean))
    if window is not None:
        raw = _part(raw, window)
    images = _at_most(model, rescaled(normalise(model, raw)[None], short_side), max_pixels)
    with torch.no_grad(), evaluating(model):
        out = in_own_dtype(model, images)
        masks, probs, extent = last_stage(model, out)
        labels = mask_decode(masks, probs, tuple(raw.shape[1:]), extent=extent)[0].cpu()
        kept = _kept(model, out)
    class_probs = out.class_logits[:, 0].softmax(-1).cpu()
    return Explanation(
        image=_to_look_at(raw),
        labels=labels,
        class_names=list(model.class_names),
        shown=_most_telling(labels, class_probs, top) if asked is None else asked,
        class_probs=class_probs,
        mask_logits=out.mask_logits[:, 0].cpu(),
        extent=extent,
        seen=tuple(images.shape[2:]),
        kept=None if kept is None else kept.cpu(),
        edges=None if out.edge_logits is None else out.edge_logits[0].sigmoid().cpu(),
        window=window,
    )


def _part(raw: Tensor, window: tuple[int, int, int, int]) -> Tensor:
    H, W = raw.shape[1:]
    top, left, height, width = window if isinstance(window, Sequence) and len(window) == 4 else (-1,) * 4
    if not (0 <= top < top + height <= H and 0 <= left < left + width <= W):
        size = f"{H} high and {W} wide"
        raise ValueError(f"window must be (top, left, height, width) inside the image, which is {size}, got {window!r}")
    return raw[:, top : top + height, left : left + width]


def check_point(point: tuple[int, int], size: Sequence[int]) -> None:
    """Raises ValueError for what is no pixel (row, column) of an image of size (height, width)."""
    pair = isinstance(point, Sequence | np.ndarray) and len(point) == 2
    if not pair or not all(isinstance(value, Integral) for value in point):
        raise ValueError(f"point must be (row, column), two integers, got {point!r}")
    y, x = point
    if not (0 <= y < size[0] and 0 <= x < size[1]):
        raise ValueError(f"point: x {x}, y {y} is outside the image, which is {size[1]} wide and {size[0]} high")


def class_numbers(classes: Sequence[str | int] | str | int, class_names: Sequence[str]) -> list[int]:
    """Numbers of classes that are named or numbered; each once. Raises ValueError for what is no class."""
    numbers, K = [], len(class_names)
    for given in [classes] if isinstance(classes, str | int) else classes:
        if given in class_names:
            numbers.append(class_names.index(given))
        elif isinstance(given, Integral) and not isinstance(given, bool) and 0 <= given < K:
            numbers.append(int(given))
        else:
            near = difflib.get_close_matches(str(given), class_names, n=3)
            hint = f"; near: {', '.join(near)}" if near else ""
            raise ValueError(f"classes: {given!r} is neither a class of the model nor a number from 0 to {K - 1}{hint}")
    if not numbers:
        raise ValueError("classes must name at least one class")
    return list(dict.fromkeys(numbers))


def _at_most(model: nn.Module, images: Tensor, max_pixels: int | None) -> Tensor:
    """Images [1, C, H, W], shrunk where they have more pixels, or are larger than the one size that BEiT takes."""
    H, W = images.shape[2:]
    if max_pixels is None:
        return images
    scale = math.sqrt(max_pixels / (H * W))
    if model.backbone.fixed_size:
        scale = min(scale, *(most / side for most, side in zip(model.image_size, (H, W))))
    if scale >= 1:
        return images
    size = tuple(max(math.floor(side * scale), 1) for side in (H, W))
    return F.interpolate(images, size, mode="bilinear", align_corners=False, antialias=True)


def _kept(model: nn.Module, out) -> Tensor | None:
    """[h, w]: which cells of the token grid a Shrunk model kept."""
    if model.upsample is None:
        return None
    grid = tuple(out.mask_logits.shape[3:])
    kept = torch.zeros(grid[0] * grid[1], dtype=torch.uint8, device=out.mask_logits.device)
    kept[stride_index(grid, STRIDE, kept.device)[0]] = EVEN
    if out.edge_logits is not None:
        kept[model.select.choose(out.edge_logits.flatten(1), grid)[0]] = EDGE
    return kept.unflatten(0, grid)


def _most_telling(labels: Tensor, class_probs: Tensor, top: int) -> list[int]:
    """Classes by their share of the labels, then by the confidence of their token."""
    K = class_probs.shape[1]
    area = torch.bincount(labels.flatten().clamp(min=0).long(), minlength=K)[:K].tolist()
    confidence = class_probs[-1].diagonal().tolist()
    return sorted(range(K), key=lambda k: (-area[k], -confidence[k], k))[:top]


def _to_look_at(raw: Tensor) -> Image.Image:
    """RGB of an image [C, H, W]: 8-bit pictures as they are, others as to_picture shows them."""
    bands = raw.cpu().numpy()
    eight_bits = raw.dtype == torch.uint8 and len(bands) in MODES
    return plain_picture(bands) if eight_bits else to_picture(np.moveaxis(bands, 0, 2))

"""mask_loss: focal and dice loss at label resolution, a tile of rows at a time, forward and backward in closed form."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from ._dispatch import NATIVE_MISSING, choose, triton_missing, without_autocast
from ._library import LIBRARY, below_autograd, register
from .reference import mask_loss as reference_loss
from .reference._sampling import bilinear_matrix

# Stages × masks × pixels that a tile evaluates at once: what a core's cache holds; on a GPU, what few launches need.
TILE_ELEMENTS = {"cpu": 1 << 18, "cuda": 1 << 25}


def mask_loss(
    mask_logits: Tensor,  # [S, B, N, h, w]
    labels: Tensor,  # [B, H, W]
    present: Tensor,  # [B, N]
    num_masks: Tensor,  # 0-d
    ignore_index: int = 255,
    ignored: str = "masked",
    alpha: float = 0.25,
    gamma: float = 2.0,
    extent: tuple[float, float] | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Focal and dice loss of every present class's mask, upsampled to the labels' size, all stages in one call.

    For present (b, n), x_p = bilinear(mask_logits[s, b, n], p) and t_p = (labels[b, p] == n):
    focal = Σ mean_p α_t(1−p_t)^γ·BCE(x_p, t_p) / num_masks and dice = Σ 1 − (2Σσt + 1)/(Σσ + Σt + 1), / num_masks.
    (SegViT, arXiv 2210.05844, section 3.3; focal arXiv 1708.02002, dice arXiv 1606.04797.)

    Args:
        mask_logits: [S, B, N, h, w], float; half precision is cast to float32. The only input with a gradient.
        labels: [B, H, W], any integer dtype. A label that is neither a class nor ignore_index counts as ignored.
        present: [B, N] bool, class n occurs in image b; other masks are not looked at and get a zero gradient.
        num_masks: 0-d tensor on the same device, the divisor; at least 1 (with several processes: averaged over them).
        ignored: "masked" leaves ignored pixels out of every sum and mean; "negative" counts them as t = 0, as the
            official implementation does.
        alpha, gamma: of the focal loss.
        extent: (rows, columns), in cells, of the part of the mask grid that the labels cover; all of it by default.
        backend: "triton" (CUDA) and "native" (C++, CPU), both for gamma = 2 and not for float64; "tiled" (PyTorch, a
            few rows at a time), "reference", or None for the best that can run.

    Returns:
        focal [S] and dice [S], float32 (float64 for float64 logits), unweighted. Written to need no
        host sync on a GPU, where it has not run yet.

    Raises:
        ValueError: arguments that do not fit each other.
        RuntimeError: a backend that was asked for and cannot run.
    """
    rows, columns = _check(mask_logits, labels, present, num_masks, ignored, extent)
    mask_logits = mask_logits if mask_logits.dtype == torch.float64 else mask_logits.float()
    name = _choose(backend, mask_logits, labels, gamma, (rows, columns))
    with without_autocast(mask_logits.device):
        if name == "reference":
            options = (ignore_index, ignored, alpha, gamma, (rows, columns))
            return reference_loss(mask_logits, labels, present, num_masks, *options)
        options = (ignore_index, ignored == "masked", float(alpha), float(gamma), rows, columns, name)
        return torch.ops.segvit.mask_loss(mask_logits, labels, present, num_masks, *options)[:2]


def _choose(backend: str | None, mask_logits: Tensor, labels: Tensor, gamma: float, extent: tuple) -> str:
    triton = ("triton", lambda: _triton_reason(mask_logits, labels, gamma, extent))
    candidates = [("native", lambda: _native_reason(mask_logits, gamma)), ("tiled", None), ("reference", None)]
    candidates.insert(0 if mask_logits.is_cuda else 3, triton)  # an interpreted kernel is for those who ask for it
    return choose("mask_loss", backend, candidates)


def _native_reason(mask_logits: Tensor, gamma: float) -> str | None:
    if mask_logits.device.type != "cpu" or mask_logits.dtype == torch.float64 or gamma != 2:
        got = f"{mask_logits.dtype} on {mask_logits.device.type}, gamma = {gamma}"
        return f"it takes float32 and less on the CPU, and gamma = 2; got {got}"
    return NATIVE_MISSING


def _triton_reason(mask_logits: Tensor, labels: Tensor, gamma: float, extent: tuple) -> str | None:
    reason = triton_missing(mask_logits.device)
    if reason is None:
        from segvit.kernels.mask_loss import unsupported

        reason = unsupported(mask_logits, labels, gamma, extent)
    return reason


def _check(mask_logits, labels, present, num_masks, ignored, extent) -> tuple[float, float]:
    """Refuse what does not fit; return the extent."""
    op = "mask_loss"
    _checks.tensor(op, "mask_logits", mask_logits, "[S, B, N, h, w]")
    _checks.tensor(op, "labels", labels, "[B, H, W]", _checks.INTEGERS)
    _checks.tensor(op, "present", present, "[B, N]", (torch.bool,))
    if not isinstance(num_masks, Tensor) or num_masks.dim() != 0:
        raise ValueError(f"{op}: num_masks must be a 0-d tensor on the device of mask_logits, got {num_masks!r}")
    _, B, N, h, w = mask_logits.shape
    if 0 in mask_logits.shape or 0 in labels.shape:
        raise ValueError(f"{op}: no dimension may be zero, got {tuple(mask_logits.shape)} and {tuple(labels.shape)}")
    if labels.shape[0] != B:
        raise ValueError(f"{op}: labels must be [B, H, W] with B = {B}, got {tuple(labels.shape)}")
    if present.shape != (B, N):
        raise ValueError(f"{op}: present must be [B, N] = {(B, N)}, got {tuple(present.shape)}")
    _checks.same_device(op, mask_logits=mask_logits, labels=labels, present=present, num_masks=num_masks)
    if ignored not in ("masked", "negative"):
        raise ValueError(f'{op}: ignored must be "masked" or "negative", got {ignored!r}')
    return _checks.extent(op, extent, (h, w))


class _Tiles:
    """The pairs (image, class) that count, and their masks and targets a tile of rows at a time."""

    def __init__(self, mask_logits, labels, present, ignore_index, masked, rows, columns):
        self.S, B, N, self.h, w = mask_logits.shape
        self.labels, self.rows, self.ignore_index, self.masked = labels, rows, ignore_index, masked
        if present.device.type == "cpu":
            self.b, self.n = present.nonzero(as_tuple=True)
        else:  # every pair, weighted by presence: picking the present ones would wait for the device
            self.b = torch.arange(B, device=present.device).repeat_interleave(N)
            self.n = torch.arange(N, device=present.device).repeat(B)
        self.weight = present[self.b, self.n].to(mask_logits.dtype)  # [P]
        self.N, self.H = N, labels.shape[1]
        self.down = bilinear_matrix(self.h, labels.shape[1], rows, mask_logits)  # [H, h]
        self.across = bilinear_matrix(w, labels.shape[2], columns, mask_logits)  # [W, w]
        self.wide = mask_logits[:, self.b, self.n] @ self.across.mT  # [S, P, h, W]

    def __iter__(self) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
        """(rows, x [S, P, R, W], t [P, R, W] bool, valid [P, R, W] bool)"""
        elements = TILE_ELEMENTS.get(self.labels.device.type, TILE_ELEMENTS["cuda"])
        step = max(1, elements // max(self.S * len(self.b) * self.labels.shape[2], 1))
        for top in range(0, self.H, step):
            tile = slice(top, min(top + step, self.H))
            labels = self.labels[:, tile].long()
            valid = (labels >= 0) & (labels < self.N) & (labels != self.ignore_index)
            t = (labels[self.b] == self.n[:, None, None]) & valid[self.b]
            yield tile, self.down[tile] @ self.wide, t, valid[self.b] if self.masked else torch.ones_like(t)


def _signed(x: Tensor, t: Tensor, alpha: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """sign = +1 (t=0) or −1 (t=1), α_t, s = σ(sign·x) = 1−p_t, softplus(sign·x) = BCE."""
    target = t.to(x.dtype)
    sign = 1 - 2 * target
    u = x * sign
    return sign, (1 - alpha) + (2 * alpha - 1) * target, u.sigmoid(), F.softplus(u)


class _Native:
    """The present pairs and the labels as the C++ kernel reads them; sums and gradients of the pairs' masks."""

    def __init__(self, mask_logits, labels, present, ignore_index, masked, rows, columns):
        N, W = mask_logits.shape[2], labels.shape[2]
        self.b, self.n = present.nonzero(as_tuple=True)
        labels = labels.long()
        known = (labels >= 0) & (labels < N) & (labels != ignore_index)
        codes = F.pad(torch.where(known, labels, -1).int(), (0, -W % 16), value=-2).contiguous()
        self.arguments = (mask_logits.contiguous(), codes, self.b * N + self.n, W, masked, rows, columns)
        valid = known if masked else torch.ones_like(known)
        self.pixels = valid.sum((1, 2))[self.b].clamp(min=1)  # [P]

    def sums(self) -> tuple[Tensor, ...]:  # [S, P] float64 each
        """Σ s²·softplus of all pixels and of targets, Σσ, Σσt and Σt."""
        S, P = len(self.arguments[0]), len(self.b)
        out = torch.empty(5, S, P, dtype=torch.float64)
        torch.ops.segvit.mask_loss_sums_native(*self.arguments, out)
        focal, focal_t, s, s_t, target = out
        return focal, focal_t, s - 2 * s_t + target, target - s_t, target


def _forward(mask_logits, labels, present, num_masks, ignore_index, masked, alpha, gamma, rows, columns, backend):
    if backend == "triton":
        from segvit.kernels.mask_loss import forward

        return forward(mask_logits, labels, present, num_masks, ignore_index, masked, alpha, rows, columns)
    sums = mask_logits.new_zeros((3, *mask_logits.shape[:3]))  # Σσt, Σσ + Σt, pixels of the mean: what backward needs
    if backend == "native":
        native = _Native(mask_logits, labels, present, ignore_index, masked, rows, columns)
        focal, focal_t, sigma, overlap, target = native.sums()
        focal = ((1 - alpha) * focal + (2 * alpha - 1) * focal_t) / native.pixels
        dice = 1 - (2 * overlap + 1) / (sigma + target + 1)
        terms = torch.stack([overlap, sigma + target, native.pixels.expand_as(sigma)])
        sums[:, :, native.b, native.n] = terms.to(sums.dtype)
        return *((term.sum(1) / num_masks).to(sums.dtype) for term in (focal, dice)), sums
    tiles = _Tiles(mask_logits, labels, present, ignore_index, masked, rows, columns)
    focal, sigma, overlap, target, pixels = mask_logits.new_zeros((5, tiles.S, len(tiles.b)))
    for _, x, t, valid in tiles:
        _, alpha_t, s, softplus = _signed(x, t, alpha)
        focal += (alpha_t * s**gamma * softplus * valid).sum((-2, -1))
        probability = torch.where(t, 1 - s, s) * valid
        sigma += probability.sum((-2, -1))
        overlap += (probability * t).sum((-2, -1))
        target += t.sum((-2, -1))
        pixels += valid.sum((-2, -1))
    pixels.clamp_(min=1)
    dice = 1 - (2 * overlap + 1) / (sigma + target + 1)
    sums[:, :, tiles.b, tiles.n] = torch.stack([overlap, sigma + target, pixels])
    return (focal / pixels * tiles.weight).sum(1) / num_masks, (dice * tiles.weight).sum(1) / num_masks, sums


def _backward(
    grad_focal,
    grad_dice,
    mask_logits,
    labels,
    present,
    num_masks,
    sums,
    ignore_index,
    masked,
    alpha,
    gamma,
    rows,
    columns,
    backend,
):
    if backend == "triton":
        from segvit.kernels.mask_loss import backward

        arguments = (mask_logits, labels, present, num_masks, sums, ignore_index, masked, alpha, rows, columns)
        return backward(grad_focal, grad_dice, *arguments)
    if backend == "native":
        native = _Native(mask_logits, labels, present, ignore_index, masked, rows, columns)
        overlap, total, pixels = sums[:, :, native.b, native.n]
        at_focal = grad_focal[:, None] / (num_masks * pixels)
        at_dice = grad_dice[:, None] / (num_masks * (total + 1))
        ratio = (2 * overlap + 1) / (total + 1)
        terms = [at_focal * (1 - alpha), at_focal * -alpha, at_dice * ratio, at_dice * (ratio - 2)]
        grad = torch.zeros_like(mask_logits, memory_format=torch.contiguous_format)
        torch.ops.segvit.mask_loss_gradient_native(*native.arguments, torch.stack(terms).float(), grad)
        return grad
    tiles = _Tiles(mask_logits, labels, present, ignore_index, masked, rows, columns)
    overlap, total, pixels = sums[:, :, tiles.b, tiles.n][..., None, None]  # [S, P, 1, 1] each
    weight = (tiles.weight / num_masks)[:, None, None]
    at_focal = grad_focal[:, None, None, None] * weight / pixels.clamp(min=1)
    at_dice = grad_dice[:, None, None, None] * weight
    grad = torch.zeros_like(tiles.wide)  # [S, P, h, W]
    for tile, x, t, valid in tiles:
        sign, alpha_t, s, softplus = _signed(x, t, alpha)
        focal = sign * alpha_t * s**gamma * (gamma * (1 - s) * softplus + s)
        dice = ((2 * overlap + 1) / (total + 1) - 2 * t.to(x.dtype)) / (total + 1) * s * (1 - s)
        grad += tiles.down[tile].mT @ ((at_focal * focal + at_dice * dice) * valid)
    result = torch.zeros_like(mask_logits, memory_format=torch.contiguous_format)
    result[:, tiles.b, tiles.n] = grad @ tiles.across
    return result


def _forward_fake(mask_logits, labels, present, num_masks, *options):
    S, B, N = mask_logits.shape[:3]
    return mask_logits.new_empty((S,)), mask_logits.new_empty((S,)), mask_logits.new_empty((3, S, B, N))


def _backward_fake(grad_focal, grad_dice, mask_logits, *rest):
    return mask_logits.new_empty(mask_logits.shape)


class _Autograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mask_logits, labels, present, num_masks, *options):
        arguments = (mask_logits, labels, present, num_masks)
        focal, dice, sums = below_autograd(torch.ops.segvit.mask_loss, *arguments, *options)
        ctx.mark_non_differentiable(sums)
        ctx.save_for_backward(*arguments, sums)
        ctx.options = options
        return focal, dice, sums

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_focal, grad_dice, grad_sums):
        with without_autocast(grad_focal.device):
            grad = torch.ops.segvit.mask_loss_backward(grad_focal, grad_dice, *ctx.saved_tensors, *ctx.options)
        return grad, *[None] * (3 + len(ctx.options))


_OPTIONS = "int ignore_index, bool masked, float alpha, float gamma, float rows, float columns, str backend"
_INPUTS = "Tensor mask_logits, Tensor labels, Tensor present, Tensor num_masks"
register(
    f"mask_loss_backward(Tensor grad_focal, Tensor grad_dice, {_INPUTS}, Tensor sums, {_OPTIONS}) -> Tensor",
    _backward,
    _backward_fake,
)
register(f"mask_loss({_INPUTS}, {_OPTIONS}) -> (Tensor, Tensor, Tensor)", _forward, _forward_fake, _Autograd)
_NATIVE = "Tensor mask_logits, Tensor labels, Tensor pairs, int width, bool masked, float rows, float columns"
LIBRARY.define(f"mask_loss_sums_native({_NATIVE}, Tensor(a!) sums) -> ()")
LIBRARY.define(f"mask_loss_gradient_native({_NATIVE}, Tensor coefficients, Tensor(a!) grad) -> ()")

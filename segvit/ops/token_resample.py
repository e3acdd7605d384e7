"""token_resample: the token down- and up-sampling of Shrunk, and the attention of kept tokens to all tokens."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import _checks
from ._dispatch import CUDA_MISSING, NATIVE_MISSING, choose, without_autocast
from ._library import below_autograd, register
from .reference import query_attention as reference_attention
from .reference import token_downsample as reference_downsample
from .reference import token_upsample as reference_upsample
from .reference.token_resample import ceil_div, extra_places, stride_index


def token_downsample(
    x: Tensor,  # [B, P + h·w, C]
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    eps: float,
    grid: tuple[int, int],
    keep: int | Tensor,
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """LayerNorm of all tokens and a gather of the kept ones, in one pass: what query-based down-sampling (QD) needs.

    (SegViT, arXiv 2210.05844, section 3.4.)

    Args:
        x: [B, P + h·w, C] with P = length − h·w prefix tokens (class, registers) first; any float dtype.
        norm_weight, norm_bias: [C], of the LayerNorm; cast to x's dtype.
        eps: of the LayerNorm.
        grid: (h, w).
        keep: a stride s, which keeps rows and columns 0, s, 2s…; or the kept cells as an int64 index [B, M] into the
            grid (0 … h·w − 1, row by row). A cell may repeat: it is copied, and its gradients add up.
        backend: "native" (C++ on the CPU, CUDA on a GPU), "reference", or None for the best that can run.

    Returns:
        y [B, P + h·w, C], all tokens normalised; y_q and x_q [B, P + M, C], the prefix and then the kept tokens,
        normalised and as they were. Gradients reach x, norm_weight and norm_bias through all three.

    Raises:
        ValueError: shapes or dtypes that do not fit, a stride below 1.
        RuntimeError: a cell outside the grid (on a GPU a device-side assertion, as in PyTorch's own indexing); a
            backend that was asked for and cannot run, with the reason.
    """
    op = "token_downsample"
    grid = _checks.pair(op, "grid", grid)
    _checks.tensor(op, "x", x, "[B, P + h*w, C]")
    prefix = x.shape[1] - grid[0] * grid[1]
    if prefix < 0 or 0 in x.shape:
        raise ValueError(
            f"{op}: x must be [B, P + h*w, C] with grid (h, w) = {grid} and B, C > 0, got {tuple(x.shape)}"
        )
    for name, t in (("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if _checks.tensor(op, name, t, "[C]").shape[0] != x.shape[2]:
            raise ValueError(f"{op}: {name} must be [C] = [{x.shape[2]}], got {tuple(t.shape)}")
    if isinstance(keep, Tensor):
        _checks.tensor(op, "keep", keep, "[B, M]", (torch.int64,))
        if keep.shape[0] != x.shape[0]:
            raise ValueError(f"{op}: keep must be [B, M] with B = {x.shape[0]}, got {tuple(keep.shape)}")
    elif not isinstance(keep, int) or keep < 1:
        raise ValueError(f"{op}: keep must be a stride of at least 1 or an int64 index [B, M], got {keep!r}")
    _checks.same_device(
        op, x=x, norm_weight=norm_weight, norm_bias=norm_bias, keep=keep if isinstance(keep, Tensor) else None
    )
    if isinstance(keep, int) and all(side < keep for side in grid):
        keep = max(grid)  # beyond the grid all strides are the same
    weight, bias = norm_weight.to(x.dtype), norm_bias.to(x.dtype)
    with without_autocast(x.device):
        if choose(op, backend, _backends(x)) == "reference":
            return reference_downsample(x, weight, bias, eps, grid, keep)
        index, stride = (None, keep) if isinstance(keep, int) else (keep, 1)
        return torch.ops.segvit.token_downsample(x, weight, bias, index, *grid, stride, eps)[:3]


def token_upsample(
    x: Tensor,  # [B, P + ceil(h/s)·ceil(w/s) + E, C]
    skip: Tensor,  # [B, P + h·w, C]
    grid: tuple[int, int],
    stride: int,
    extra: Tensor | None = None,  # [B, E]
    backend: str | None = None,
) -> Tensor:
    """Return the kept tokens to the full grid, bilinearly, and add the skip: the inverse of down-sampling.

    A kept cell gets its own token exactly; cells between are interpolated from the even grid, cells past the last kept
    one repeat it.

    Args:
        x: [B, P + ceil(h/s)·ceil(w/s) + E, C]: prefix tokens, the kept grid row by row, the tokens of `extra`.
        skip: [B, P + h·w, C], the tokens of the full grid; same dtype and device.
        grid: (h, w) of the full grid.
        stride: s, of the even grid that was kept.
        extra: int64 cells [B, E] of the grid (0 … h·w − 1, row by row) that were kept beside the even grid. They get
            their own token in place of the interpolation; a cell that is there more than once gets its last.
        backend: "native" (C++ on the CPU, CUDA on a GPU), "reference", or None for the best that can run.

    Returns:
        [B, P + h·w, C] in x's dtype, with gradients to x and skip.

    Raises:
        ValueError: shapes or dtypes that do not fit, a stride below 1.
        RuntimeError: a cell outside the grid (on a GPU a device-side assertion, as in PyTorch's own indexing); a
            backend that was asked for and cannot run, with the reason.
    """
    op = "token_upsample"
    grid = _checks.pair(op, "grid", grid)
    _checks.tensor(op, "x", x, "[B, P + M, C]")
    _checks.tensor(op, "skip", skip, "[B, P + h*w, C]", (x.dtype,))
    if not isinstance(stride, int) or stride < 1:
        raise ValueError(f"{op}: stride must be an integer of at least 1, got {stride!r}")
    if all(side < stride for side in grid):
        stride = max(grid)  # beyond the grid all strides are the same
    kept = ceil_div(grid[0], stride) * ceil_div(grid[1], stride)
    if extra is not None:
        if _checks.tensor(op, "extra", extra, "[B, E]", (torch.int64,)).shape[0] != skip.shape[0]:
            raise ValueError(f"{op}: extra must be [B, E] with B = {skip.shape[0]}, got {tuple(extra.shape)}")
        kept += extra.shape[1]
    prefix = skip.shape[1] - grid[0] * grid[1]
    if prefix < 0 or 0 in skip.shape or x.shape != (skip.shape[0], prefix + kept, skip.shape[2]):
        shapes = f"x {tuple(x.shape)} and skip {tuple(skip.shape)}"
        raise ValueError(f"{op}: grid {grid} and stride {stride} ask for x [B, P + {kept}, C], B, C > 0, got {shapes}")
    _checks.same_device(op, x=x, skip=skip, extra=extra)
    with without_autocast(x.device):
        if choose(op, backend, _backends(x)) == "reference":
            return reference_upsample(x, skip, grid, stride, extra)
        return torch.ops.segvit.token_upsample(x, skip, extra, *grid, stride)


def query_attention(
    q: Tensor,  # [B, M, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    dropout_p: float = 0.0,
    backend: str | None = None,
) -> Tensor:  # [B, M, C]
    """softmax(QKᵀ/√d)V per head, by scaled_dot_product_attention.

    Args:
        q: [B, M, C], float; k, v: [B, L, C] of the same dtype and device.
        num_heads: must divide C.
        dropout_p: dropout of the attention weights, in [0, 1).
        backend: "library", "reference", or None for the best that can run.

    Returns:
        [B, M, C] in q's dtype, with gradients to all three.

    Raises:
        ValueError: shapes or dtypes that do not fit, heads that do not divide C, dropout outside [0, 1).
    """
    op = "query_attention"
    for name, t, layout in (("q", q, "[B, M, C]"), ("k", k, "[B, L, C]"), ("v", v, "[B, L, C]")):
        _checks.tensor(op, name, t, layout, (q.dtype,) if isinstance(q, Tensor) and name != "q" else _checks.FLOATS)
    if k.shape != v.shape or k.shape[0] != q.shape[0] or k.shape[2] != q.shape[2]:
        shapes = ", ".join(f"{n} {tuple(t.shape)}" for n, t in (("q", q), ("k", k), ("v", v)))
        raise ValueError(f"{op}: q must be [B, M, C] and k, v [B, L, C], got {shapes}")
    if not isinstance(num_heads, int) or num_heads < 1 or q.shape[2] % num_heads:
        raise ValueError(f"{op}: num_heads must divide the width C = {q.shape[2]}, got {num_heads}")
    if not 0 <= dropout_p < 1:
        raise ValueError(f"{op}: dropout_p must be in [0, 1), got {dropout_p}")
    _checks.same_device(op, q=q, k=k, v=v)
    if choose(op, backend, [("library", None), ("reference", None)]) == "reference":
        return reference_attention(q, k, v, num_heads, dropout_p)
    qh, kh, vh = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(qh, kh, vh, dropout_p=dropout_p).transpose(1, 2).flatten(2)


def _native_reason(x: Tensor) -> str | None:
    """Why the native kernels cannot take x; None where they can."""
    if x.device.type == "cpu":
        return NATIVE_MISSING
    if x.device.type != "cuda":
        return f"x is on {x.device.type}; the kernels are for the CPU and for CUDA"
    if x.dtype == torch.float64:
        return "the CUDA kernels have no float64"
    most = 4096 if x.shape[2] * x.element_size() % 16 == 0 else 2048
    if x.shape[2] > most:
        return f"the CUDA kernels take at most {most} channels of this kind, got {x.shape[2]}"
    return CUDA_MISSING


def _backends(x: Tensor) -> list[tuple[str, str | Callable | None]]:
    native = ("native", lambda: _native_reason(x))
    # the CUDA kernels have not been measured against the library on a GPU yet: there they serve who asks for them
    return [("reference", None), native] if x.device.type == "cuda" else [native, ("reference", None)]


def _cells(x: Tensor, index: Tensor | None, height: int, width: int, stride: int) -> Tensor:  # [B, M]
    return stride_index((height, width), stride, x.device).expand(len(x), -1) if index is None else index


def _downsample(x, weight, bias, index, height, width, stride, eps):
    """The operator's body where no native kernel is registered for x's device: the reference, and the statistics."""
    cells = _cells(x, index, height, width, stride)
    y, y_q, x_q = reference_downsample(x, weight, bias, eps, (height, width), cells)
    wide = x if x.dtype == torch.float64 else x.float()
    variance, mean = torch.var_mean(wide, -1, correction=0)
    return y, y_q, x_q, mean, (variance + eps).rsqrt()


def _downsample_fake(x, weight, bias, index, height, width, stride, eps):
    kept = -(-height // stride) * -(-width // stride) if index is None else index.shape[1]
    y_q = x.new_empty((x.shape[0], x.shape[1] - height * width + kept, x.shape[2]))
    stats = x.new_empty(x.shape[:2], dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    return torch.empty_like(x, memory_format=torch.contiguous_format), y_q, y_q.clone(), stats, stats.clone()


def _downsample_backward(grad_y, grad_y_q, grad_x_q, x, weight, index, mean, rstd, height, width, stride):
    """The gathered gradients go back to their tokens inside the LayerNorm's backward."""
    B, T, C = x.shape
    prefix, dtype = T - height * width, x.dtype
    first = torch.arange(prefix, device=x.device).expand(B, -1)
    rows = torch.cat([first, _cells(x, index, height, width, stride) + prefix], 1)[:, :, None].expand(-1, -1, C)
    grad_y, grad_y_q, grad_x_q, x, weight = (t.to(mean.dtype) for t in (grad_y, grad_y_q, grad_x_q, x, weight))
    grad_y = grad_y.scatter_add(1, rows, grad_y_q)
    hat = (x - mean[..., None]) * rstd[..., None]
    g = grad_y * weight
    grad_x = (g - g.mean(-1, keepdim=True) - hat * (g * hat).mean(-1, keepdim=True)) * rstd[..., None]
    grads = grad_x.scatter_add(1, rows, grad_x_q), (grad_y * hat).sum((0, 1)), grad_y.sum((0, 1))
    return tuple(grad.to(dtype) for grad in grads)


def _downsample_backward_fake(grad_y, grad_y_q, grad_x_q, x, weight, index, mean, rstd, height, width, stride):
    grad_x = torch.empty_like(x, memory_format=torch.contiguous_format)
    return grad_x, weight.new_empty(weight.shape), weight.new_empty(weight.shape)


class _Downsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, index, height, width, stride, eps):
        arguments = x, weight, bias, index, height, width, stride, eps
        *outputs, mean, rstd = below_autograd(torch.ops.segvit.token_downsample, *arguments)
        ctx.mark_non_differentiable(mean, rstd)
        ctx.save_for_backward(x, weight, index, mean, rstd)
        ctx.grid = height, width, stride
        return *outputs, mean, rstd

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_y, grad_y_q, grad_x_q, grad_mean, grad_rstd):
        upstream = (grad_y, grad_y_q, grad_x_q)
        with without_autocast(grad_y.device):
            grads = torch.ops.segvit.token_downsample_backward(*upstream, *ctx.saved_tensors, *ctx.grid)
        return *grads, None, None, None, None, None


def _upsample(x, skip, extra, height, width, stride):
    """The operator's body where no native kernel is registered for x's device."""
    return reference_upsample(x, skip, (height, width), stride, extra)


def _upsample_fake(x, skip, extra, height, width, stride):
    return torch.empty_like(skip, memory_format=torch.contiguous_format)


def _upsample_backward(grad, extra, height, width, stride):
    """The transpose of interpolation and of taking the cells of `extra`; in float32 at least, as the kernels do."""
    prefix, dtype = grad.shape[1] - height * width, grad.dtype
    grad = grad if dtype == torch.float64 else grad.float()
    full, own = grad[:, prefix:], []
    if extra is not None:
        place = extra_places(extra, (height, width))
        e = torch.arange(extra.shape[1], device=grad.device)
        wins = (place.gather(1, extra) == e)[..., None]
        own = [full.gather(1, extra[..., None].expand(-1, -1, grad.shape[2])) * wins]
        full = full * (place < 0)[..., None]
    rows, columns = (_shares(size, stride, grad) for size in (height, width))
    low = torch.einsum("yi,xj,byxc->bijc", rows, columns, full.unflatten(1, (height, width))).flatten(1, 2)
    return torch.cat([grad[:, :prefix], low, *own], 1).to(dtype)


def _shares(size: int, stride: int, like: Tensor) -> Tensor:  # [size, ceil(size / stride)], rows sum to 1
    """What every cell along an axis takes of the kept ones."""
    kept = -(-size // stride)
    at = (torch.arange(size, device=like.device, dtype=like.dtype) / stride).clamp(max=kept - 1)
    return (1 - (at[:, None] - torch.arange(kept, device=like.device)).abs()).clamp(min=0)


def _upsample_backward_fake(grad, extra, height, width, stride):
    kept = -(-height // stride) * -(-width // stride) + (0 if extra is None else extra.shape[1])
    return grad.new_empty((grad.shape[0], grad.shape[1] - height * width + kept, grad.shape[2]))


class _Upsample(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, skip, extra, height, width, stride):
        ctx.save_for_backward(extra)
        ctx.grid = height, width, stride
        return below_autograd(torch.ops.segvit.token_upsample, x, skip, extra, height, width, stride)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        (extra,) = ctx.saved_tensors
        with without_autocast(grad.device):
            grad_x = torch.ops.segvit.token_upsample_backward(grad, extra, *ctx.grid)
        return grad_x, grad, None, None, None, None


register(
    "token_downsample_backward(Tensor grad_y, Tensor grad_y_q, Tensor grad_x_q, Tensor x, Tensor weight, "
    "Tensor? index, Tensor mean, Tensor rstd, int height, int width, int stride) -> (Tensor, Tensor, Tensor)",
    _downsample_backward,
    _downsample_backward_fake,
)
register(
    "token_downsample(Tensor x, Tensor weight, Tensor bias, Tensor? index, int height, int width, int stride, "
    "float eps) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _downsample,
    _downsample_fake,
    _Downsample,
)
register(
    "token_upsample_backward(Tensor grad, Tensor? extra, int height, int width, int stride) -> Tensor",
    _upsample_backward,
    _upsample_backward_fake,
)
register(
    "token_upsample(Tensor x, Tensor skip, Tensor? extra, int height, int width, int stride) -> Tensor",
    _upsample,
    _upsample_fake,
    _Upsample,
)

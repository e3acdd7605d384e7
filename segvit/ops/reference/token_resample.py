import torch
import torch.nn.functional as F
from torch import Tensor


def ceil_div(size: int, part: int) -> int:
    """How many parts cover the size. Only positive numbers are divided: ONNX rounds a negative quotient up."""
    return (size + part - 1) // part


def stride_index(grid: tuple[int, int], stride: int, device: torch.device | None = None) -> Tensor:  # [1, M] int64
    """Cells on every `stride`-th row and column of the grid from 0, row by row: ceil(h/stride)·ceil(w/stride)."""
    rows = torch.arange(0, grid[0], stride, device=device)
    columns = torch.arange(0, grid[1], stride, device=device)
    return (rows[:, None] * grid[1] + columns).flatten()[None]


def token_downsample(
    x: Tensor,  # [B, P + h·w, C], P prefix tokens first
    norm_weight: Tensor,  # [C]
    norm_bias: Tensor,  # [C]
    eps: float,
    grid: tuple[int, int],
    keep: int | Tensor,  # a stride, or cells [B, M] int64
) -> tuple[Tensor, Tensor, Tensor]:  # y [B, P + h·w, C], y_q [B, P + M, C], x_q [B, P + M, C]
    """LayerNorm of all tokens (y), and the prefix plus the kept tokens, normalised (y_q) and as they were (x_q)."""
    prefix = x.shape[1] - grid[0] * grid[1]
    cells = stride_index(grid, keep, x.device) if isinstance(keep, int) else keep
    first = torch.arange(prefix, device=x.device)[None]
    rows = torch.cat([first.expand(cells.shape[0], -1), cells + prefix], 1).expand(x.shape[0], -1)
    y = F.layer_norm(x, x.shape[-1:], norm_weight, norm_bias, eps)
    rows = rows[:, :, None].expand(-1, -1, x.shape[-1])
    return y, y.gather(1, rows), x.gather(1, rows)


def token_upsample(
    x: Tensor,  # [B, P + ceil(h/s)·ceil(w/s) + E, C], the tokens that token_downsample kept, after further blocks
    skip: Tensor,  # [B, P + h·w, C], the full grid before down-sampling
    grid: tuple[int, int],
    stride: int,
    extra: Tensor | None = None,  # [B, E] int64, the cells of E further tokens of x, behind the others
) -> Tensor:  # [B, P + h·w, C]
    """Kept tokens back on the full grid, bilinear between the cells they came from, plus the skip.

    The cells in `extra` get their own token; a cell that is there more than once gets its last.
    """
    prefix = skip.shape[1] - grid[0] * grid[1]
    low_grid = ceil_div(grid[0], stride), ceil_div(grid[1], stride)
    kept = prefix + low_grid[0] * low_grid[1]

    def between(t: Tensor, dim: int) -> Tensor:  # along one axis: kept cells to all cells
        at = torch.arange(grid[dim - 1], device=t.device)
        low = (at // stride).clamp(max=low_grid[dim - 1] - 1)
        high = (low + 1).clamp(max=low_grid[dim - 1] - 1)
        shape = [-1 if i == dim else 1 for i in range(4)]
        share = torch.where(low == high, 0, (at - low * stride).to(t.dtype) / stride).to(t.dtype).view(shape)
        first = t.index_select(dim, low)
        return torch.where(share > 0, first * (1 - share) + t.index_select(dim, high) * share, first)

    full = between(between(x[:, prefix:kept].unflatten(1, low_grid), 1), 2).flatten(1, 2)
    if extra is not None:
        place = extra_places(extra, grid)[..., None]
        own = x[:, kept - 1 :].gather(1, (place + 1).expand_as(full))  # one token before them, so that there is one
        full = torch.where(place < 0, full, own)
    return torch.cat([x[:, :prefix], full], 1) + skip


def extra_places(extra: Tensor, grid: tuple[int, int]) -> Tensor:  # [B, h·w] int64
    """For every cell of the grid, its last place in extra [B, E]; -1 where it is not there."""
    places = torch.arange(extra.shape[1], device=extra.device).expand_as(extra)
    return places.new_full((extra.shape[0], grid[0] * grid[1]), -1).scatter_reduce(1, extra, places, "amax")


def query_attention(
    q: Tensor,  # [B, M, C]
    k: Tensor,  # [B, L, C]
    v: Tensor,  # [B, L, C]
    num_heads: int,
    dropout_p: float = 0.0,
) -> Tensor:  # [B, M, C]
    """softmax(QKᵀ/√d)V per head."""
    qh, kh, vh = (t.unflatten(-1, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    weights = (qh @ kh.mT * qh.shape[-1] ** -0.5).softmax(-1)
    return (F.dropout(weights, dropout_p) @ vh).transpose(1, 2).flatten(2)

"""Shrunk: query-based down-sampling (QD) inside the backbone, which tokens it keeps, and up-sampling (QU) behind it."""

import warnings
from fractions import Fraction

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from segvit.models.decoder import DecoderStage, FeatureProjection
from segvit.ops import query_attention, token_downsample, token_upsample
from segvit.ops.reference.token_resample import ceil_div, stride_index

BLOCKS = ("Block", "EvaBlock")  # of timm: pre-norm, attention then MLP
STRIDE = 2  # of the even grid that down-sampling keeps


def check_block(block: nn.Module) -> None:
    """Refuse, with one line, a block that query-based down-sampling cannot take over."""
    attention = getattr(block, "attn", None)
    kind = type(block).__name__
    reasons = {
        f"its blocks are {type(block).__module__}.{kind}": kind not in BLOCKS or hasattr(attention, "window_size"),
        "its attention is gated": getattr(attention, "gate", None) is not None,
        "its attention groups the queries": _is_grouped(attention),
        "its norm is no LayerNorm": not isinstance(getattr(block, "norm1", None), nn.LayerNorm),
    }
    for reason, holds in reasons.items():
        if holds:
            raise ValueError(f"shrink: this backbone cannot be down-sampled: {reason}")


def _is_grouped(attention: nn.Module) -> bool:
    k_proj = getattr(attention, "k_proj", None)
    return k_proj is not None and k_proj.out_features != attention.q_proj.out_features


def query_downsample(
    block: nn.Module,
    x: Tensor,  # [B, P + h·w, C]
    grid: tuple[int, int],
    keep: int | Tensor,  # a stride s, or cells [B, M]
    rope: Tensor | None = None,  # [h·w, D] or [H, h·w, D]
) -> Tensor:  # [B, P + M, C]; with a stride M = ceil(h/s)·ceil(w/s)
    """One encoder block whose queries and residual are the kept tokens and whose keys and values are all tokens.

    It has no parameters of its own. With stride 1 it is the block itself. (SegViT, arXiv 2210.05844, section 3.4.)
    """
    attention, norm = block.attn, block.norm1
    y, y_q, x_q = token_downsample(x, norm.weight, norm.bias, norm.eps, grid, keep)
    q, k, v = _project(attention, y_q, y)  # [B, H, tokens, d]
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        kept = keep_positions(rope, grid, keep)
        q = torch.cat([q[:, :, :prefix], apply_rot_embed_cat(q[:, :, prefix:], kept, half=half)], 2).type_as(v)
        k = torch.cat([k[:, :, :prefix], apply_rot_embed_cat(k[:, :, prefix:], rope, half=half)], 2).type_as(v)
    dropout_p = attention.attn_drop.p if block.training else 0.0
    merged = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = query_attention(*merged, attention.num_heads, dropout_p)
    out = attention.proj_drop(attention.proj(attention.norm(out)))
    x = x_q + block.drop_path1(_layer_scale(block, 1, out))
    return x + block.drop_path2(_layer_scale(block, 2, block.mlp(block.norm2(x))))


def keep_positions(
    position: Tensor,  # [.., h·w, D], a rotary table, the same for every image
    grid: tuple[int, int],
    keep: int | Tensor,  # a stride, or cells [B, M]
) -> Tensor:  # [.., M, D]; with cells [B, 1, M, D], or [.., B, H, M, D] of a table [.., H, h·w, D]
    """The rows of a rotary table that belong to the kept tokens."""
    if isinstance(keep, int):
        return position.index_select(-2, stride_index(grid, keep, position.device)[0])
    kept = position[..., keep, :]
    return kept[:, None] if position.dim() == 2 else kept.movedim(-3, -4)


def _project(attention: nn.Module, queries: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q of the kept tokens, k and v of all tokens, with each family's own weights; [B, H, tokens, d] each."""
    if attention.qkv is None:
        q, k, v = attention.q_proj(queries), attention.k_proj(tokens), attention.v_proj(tokens)
    else:
        weight, bias = attention.qkv.weight, attention.qkv.bias
        if getattr(attention, "q_bias", None) is not None:
            bias = torch.cat([attention.q_bias, attention.k_bias, attention.v_bias])
        width = weight.shape[0] // 3
        q = F.linear(queries, weight[:width], None if bias is None else bias[:width])
        k, v = F.linear(tokens, weight[width:], None if bias is None else bias[width:]).chunk(2, -1)
    q, k, v = (t.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    return attention.q_norm(q), attention.k_norm(k), v


def _layer_scale(block: nn.Module, branch: int, x: Tensor) -> Tensor:
    scale = getattr(block, f"ls{branch}", None)
    if scale is not None:
        return scale(x)
    gamma = getattr(block, f"gamma_{branch}", None)
    return x if gamma is None else gamma * x


class EdgeSelector(nn.Module):
    """Which tokens stay beside the even grid: those that an MLP takes for patches with more than one class.

    The number of them is a fixed share of the grid, so shapes depend on the image size alone and nothing waits for
    the device. Our own design after the abstract of SegViTv2 (arXiv 2306.06289), whose Shrunk++ was not released.

    Args:
        dim: width C of the backbone.
        budget: share of the grid's cells that stay beside the even grid, in (0, 1].
    """

    def __init__(self, dim: int, budget: float):
        super().__init__()
        self.budget = budget
        self.share = Fraction(budget).limit_denominator(10**6).as_integer_ratio()
        self.head = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim // 4), nn.GELU(), nn.Linear(dim // 4, 1))

    def count(self, grid: tuple[int, int]) -> int:
        """How many cells of a grid stay beside the even ones."""
        cells, even = grid[0] * grid[1], ceil_div(grid[0], STRIDE) * ceil_div(grid[1], STRIDE)
        above, below = self.share  # whole numbers alone, as ONNX has no round()
        twice = 2 * cells * above + below
        odd = twice // (2 * below) % 2
        return torch.sym_min((twice - odd) // (2 * below), cells - even)  # a half goes to the even number

    def forward(self, tokens: Tensor, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
        """tokens [B, h·w, C]. Returns edge logits [B, h, w] float32, and the chosen cells [B, E], none of them even."""
        logits = self.head(tokens)[..., 0]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        return logits.unflatten(1, grid), self.choose(logits.detach(), grid)

    def choose(self, logits: Tensor, grid: tuple[int, int]) -> Tensor:
        """The cells [B, E] with the largest edge logits [B, h·w] that are not even."""
        even = stride_index(grid, STRIDE, logits.device).expand(logits.shape[0], -1)
        return logits.scatter(1, even, -torch.inf).topk(self.count(grid), 1).indices


class LightUpsample(nn.Module):
    """Light QU: the low-grid tokens return to the full grid by interpolation and meet the tokens before QD there.

    Both features are projected and normalised; the first goes on alone, too, so that the ATM decoder has two features
    for its cascade. Nothing in it depends on the image size. It costs a sixtieth of the multiply-adds of Shrunk v1's
    QU, and the decoder behind it has one stage more. Our own design.

    Args:
        in_dim: width C of the backbone.
        dim: width C' of the decoder.
    """

    def __init__(self, in_dim: int, dim: int):
        super().__init__()
        self.projections = nn.ModuleList(FeatureProjection(in_dim, dim) for _ in range(2))

    def forward(self, features: list[Tensor], grid: tuple[int, int], extra: Tensor | None = None) -> list[Tensor]:
        """features: full grid [B, h·w, C], then what was kept: the even grid, and behind it the cells `extra` [B, E].

        Returns two features of the full grid, shallow to deep: [B, h·w, C'] each.
        """
        shallow, low = (project(tokens) for project, tokens in zip(self.projections, features))
        return [shallow, token_upsample(low, shallow.to(low.dtype), grid, STRIDE, extra)]


class QueryUpsample(nn.Module):
    """QU of Shrunk v1: one learned query per cell of the full grid attends to the full-grid and the low-grid feature.

    Args:
        in_dim: width C of the backbone.
        dim: width C' of the queries.
        num_heads: attention heads.
        num_layers: layers per feature.
        grid: (h, w) of the stored queries; on another grid they are interpolated, which is said once.
        dropout: of attention weights, residuals and FFN.
    """

    def __init__(self, in_dim: int, dim: int, num_heads: int, num_layers: int, grid: tuple[int, int], dropout: float):
        super().__init__()
        self.grid = tuple(grid)
        self.queries = nn.Parameter(torch.empty(grid[0] * grid[1], dim))
        nn.init.normal_(self.queries)
        self.projections = nn.ModuleList(FeatureProjection(in_dim, dim) for _ in range(2))
        self.stages = nn.ModuleList(DecoderStage(dim, num_heads, num_layers, dropout) for _ in range(2))
        self._said = False

    def forward(self, features: list[Tensor], grid: tuple[int, int], extra: None = None) -> list[Tensor]:
        """features: full grid [B, h·w, C], then low grid; grid: the full one. Returns one feature [B, h·w, C']."""
        q = self._queries_on(grid).repeat(features[0].shape[0], 1, 1)
        for project, stage, tokens in zip(self.projections, self.stages, features):
            q, _ = stage(q, project(tokens))
        return [q]

    def _queries_on(self, grid: tuple[int, int]) -> Tensor:
        if not torch.compiler.is_exporting() and grid == self.grid:
            return self.queries[None]
        if not self._said and not torch.compiler.is_exporting():
            self._said = True
            warnings.warn(
                f"Shrunk v1 has position queries for a {self.grid[0]}x{self.grid[1]} grid; "
                f"they are interpolated to {grid[0]}x{grid[1]} (accuracy may drop)",
                stacklevel=2,
            )
        stored = self.queries.T.unflatten(1, self.grid)[None]
        return F.interpolate(stored, grid, mode="bicubic", align_corners=False).flatten(2).mT

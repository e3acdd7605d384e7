"""Shrunk: query-based down-sampling (QD) inside the backbone, and query-based up-sampling (QU) behind it."""

import warnings

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from torch import Tensor, nn

from segvit.models.decoder import DecoderStage, FeatureProjection
from segvit.ops import query_attention, token_downsample
from segvit.ops.reference.token_resample import stride_index

BLOCKS = ("Block", "EvaBlock")  # of timm: pre-norm, attention then MLP


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
    stride: int,
    rope: Tensor | None = None,  # [h·w, D] or [H, h·w, D]
) -> Tensor:  # [B, P + ceil(h/s)·ceil(w/s), C]
    """One encoder block whose queries and residual are the kept tokens and whose keys and values are all tokens.

    It has no parameters of its own. With stride 1 it is the block itself. (SegViT, arXiv 2210.05844, section 3.4.)
    """
    attention, norm = block.attn, block.norm1
    y, y_q, x_q = token_downsample(x, norm.weight, norm.bias, norm.eps, grid, stride)
    q, k, v = _project(attention, y_q, y)  # [B, H, tokens, d]
    if rope is not None:
        prefix, half = attention.num_prefix_tokens, getattr(attention, "rotate_half", False)
        kept = rope.index_select(-2, stride_index(grid, stride, rope.device)[0])
        q = torch.cat([q[:, :, :prefix], apply_rot_embed_cat(q[:, :, prefix:], kept, half=half)], 2).type_as(v)
        k = torch.cat([k[:, :, :prefix], apply_rot_embed_cat(k[:, :, prefix:], rope, half=half)], 2).type_as(v)
    dropout_p = attention.attn_drop.p if block.training else 0.0
    merged = (t.transpose(1, 2).flatten(2) for t in (q, k, v))
    out = query_attention(*merged, attention.num_heads, dropout_p)
    out = attention.proj_drop(attention.proj(attention.norm(out)))
    x = x_q + block.drop_path1(_layer_scale(block, 1, out))
    return x + block.drop_path2(_layer_scale(block, 2, block.mlp(block.norm2(x))))


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

    def forward(self, features: list[Tensor], grid: tuple[int, int]) -> Tensor:
        """features: full grid [B, h·w, C], then low grid; grid: the full one. Returns [B, h·w, C']."""
        q = self._queries_on(grid).expand(features[0].shape[0], -1, -1)
        for project, stage, tokens in zip(self.projections, self.stages, features):
            q, _ = stage(q, project(tokens))
        return q

    def _queries_on(self, grid: tuple[int, int]) -> Tensor:
        if grid == self.grid:
            return self.queries[None]
        if not self._said:
            self._said = True
            warnings.warn(
                f"Shrunk v1 has position queries for a {self.grid[0]}x{self.grid[1]} grid; "
                f"they are interpolated to {grid[0]}x{grid[1]} (accuracy may drop)",
                stacklevel=2,
            )
        stored = self.queries.T.unflatten(1, self.grid)[None]
        return F.interpolate(stored, grid, mode="bicubic", align_corners=False).flatten(2).mT

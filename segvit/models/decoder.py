"""The ATM decoder: class tokens attend to the backbone's features, and their similarity is the mask."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from segvit.ops import atm, query_attention


class DecoderLayer(nn.Module):
    """Post-norm: self-attention of the queries, attention to the features (with the mask when asked), ReLU FFN."""

    def __init__(self, dim: int, num_heads: int, dropout: float):
        super().__init__()
        self.num_heads = num_heads
        self.self_qkv = nn.Linear(dim, 3 * dim)
        self.self_proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim)
        self.q = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)
        self.norm3 = nn.LayerNorm(dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,  # [B, N, C'], the queries
        k: Tensor,  # [B, L, C']
        v: Tensor,  # [B, L, C']
        with_mask: bool = False,
        carry: Tensor | None = None,  # [B, N, L]
    ) -> tuple[Tensor, Tensor | None]:  # x [B, N, C'], mask logits [B, N, L]
        dropout_p = self.dropout.p if self.training else 0.0
        attended = query_attention(*self.self_qkv(x).chunk(3, -1), self.num_heads, dropout_p)
        x = self.norm1(x + self.dropout(self.self_proj(attended)))
        mask = None
        if with_mask:
            attended, mask = atm(self.q(x), k, v, self.num_heads, dropout_p=dropout_p, mask_carry=carry)
        else:
            attended = query_attention(self.q(x), k, v, self.num_heads, dropout_p)
        x = self.norm2(x + self.dropout(self.proj(attended)))
        x = self.norm3(x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(x))))))
        return x, mask


class DecoderStage(nn.Module):
    """Layers on one feature map, whose keys and values all come from one projection."""

    def __init__(self, dim: int, num_heads: int, num_layers: int, dropout: float):
        super().__init__()
        self.kv = nn.Linear(dim, 2 * num_layers * dim)  # k, v of the first layer, then of the second …
        self.layers = nn.ModuleList(DecoderLayer(dim, num_heads, dropout) for _ in range(num_layers))

    def layer_inputs(self, features: Tensor) -> list[tuple[DecoderLayer, Tensor, Tensor]]:
        """(layer, k, v) for every layer; k and v are [B, L, C'] views of one projection."""
        parts = self.kv(features).chunk(2 * len(self.layers), -1)
        return list(zip(self.layers, parts[::2], parts[1::2]))

    def forward(
        self, x: Tensor, features: Tensor, with_mask: bool = False, carry: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Queries x [B, N, C'] through all layers; the mask, if asked for, is the last layer's plus the carry."""
        *first, (last, k, v) = self.layer_inputs(features)
        for layer, layer_k, layer_v in first:
            x, _ = layer(x, layer_k, layer_v)
        return last(x, k, v, with_mask, carry)


class FeatureProjection(nn.Sequential):
    """Linear to the decoder's width, then LayerNorm."""

    def __init__(self, in_dim: int, dim: int):
        super().__init__(nn.Linear(in_dim, dim), nn.LayerNorm(dim))

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(tokens.contiguous())  # else torch multiplies otherwise once the weights are frozen


class ATMDecoder(nn.Module):
    """Class tokens cascade through the features, deep to shallow; stage masks are cumulative sums of similarities.

    Args:
        in_dim: width C of the features.
        dim: width C' of the decoder.
        num_classes: K, also the number N of class tokens.
        num_heads: attention heads; dim / 32 in the paper.
        num_layers: layers a stage.
        num_stages: features to attend to; 0 means one feature that is already C' wide, with an output (not cumulative)
            after every layer, as behind Shrunk v1's QU.
        dropout: of attention weights, residuals and FFN.
        project: whether features are C wide, and projected and normalised here; else they are C' wide.
    """

    def __init__(
        self,
        in_dim: int,
        dim: int,
        num_classes: int,
        num_heads: int,
        num_layers: int,
        num_stages: int,
        dropout: float,
        project: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.queries = nn.Parameter(torch.empty(num_classes, dim))
        self.projections = nn.ModuleList(FeatureProjection(in_dim, dim) for _ in range(num_stages if project else 0))
        self.cascade = num_stages > 0
        stages = max(num_stages, 1)
        self.stages = nn.ModuleList(DecoderStage(dim, num_heads, num_layers, dropout) for _ in range(stages))
        self.class_embed = nn.Linear(dim, num_classes + 1)
        nn.init.normal_(self.queries)

    def forward(self, features: list[Tensor]) -> tuple[Tensor, Tensor]:
        """features, shallow to deep: [B, L, C] each. Returns class logits [S, B, N, K+1], mask logits [S, B, N, L]."""
        x = self.queries.repeat(features[0].shape[0], 1, 1)
        queries, masks, mask = [], [], None
        deep_first = [*reversed(features)]
        if self.projections:
            deep_first = [project(tokens) for project, tokens in zip(self.projections, deep_first)]
        if self.cascade:
            for stage, tokens in zip(self.stages, deep_first):
                x, mask = stage(x, tokens, with_mask=True, carry=mask)
                queries.append(x)
                masks.append(mask)
        else:
            for layer, k, v in self.stages[0].layer_inputs(deep_first[0]):
                x, mask = layer(x, k, v, with_mask=True)
                queries.append(x)
                masks.append(mask)
        class_logits = self.class_embed(torch.stack(queries))
        exact = class_logits if class_logits.dtype == torch.float64 else class_logits.float()
        return exact, torch.stack(masks)


def join_tokens(
    parts: list[tuple[Tensor, Tensor]],  # of each decoder: class logits [S, B, n, n+1], mask logits [S, B, n, L]
) -> tuple[Tensor, Tensor]:  # [S, B, N, K+1], [S, B, N, L]
    """Class tokens of several decoders side by side; a token gives the classes of other decoders the logit -inf."""
    if len(parts) == 1:
        return parts[0]
    joined, before, total = [], 0, sum(logits.shape[2] for logits, _ in parts)
    for logits, _ in parts:
        own, no_object = logits[..., :-1], logits[..., -1:]
        after = total - before - own.shape[-1]
        joined.append(torch.cat([F.pad(own, (before, after), value=-torch.inf), no_object], -1))
        before += own.shape[-1]
    return torch.cat(joined, 2), torch.cat([masks for _, masks in parts], 2)


def init_decoder(module: nn.Module) -> None:
    """Xavier for every Linear, with zero biases."""
    for m in module.modules():
        if isinstance(m, nn.Linear):
            nn.init.xavier_uniform_(m.weight)
            nn.init.zeros_(m.bias)

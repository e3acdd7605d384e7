"""token_resample at Shrunk's shapes, both ways and its attention, against eager PyTorch, torch.compile and the floor.

python bench/token_resample_kernel.py            # writes bench/results/token_resample_kernel_<device>.json
python bench/token_resample_kernel.py --quick    # one shape

Down-sampling: "eager" slices the even grid (or gathers an index) and takes two LayerNorms, of all and of the kept.
Up-sampling: "eager" is F.interpolate with aligned corners, the last row and column again, a scatter of the edge tokens
and an addition.
Attention of kept tokens (QD) and of grid queries (v1's QU): scaled_dot_product_attention, which serves, against softmax
between two matmuls. The floor is the bytes that must be read and written, at this machine's own copying speed.
All candidates of a shape are timed in turn. float32 on a CPU, bfloat16 on a GPU.
"""

import harness
import torch
import torch.nn.functional as F

from segvit.ops import query_attention, token_downsample, token_upsample
from segvit.ops.reference.token_resample import stride_index

SHAPES = {  # name: (B on a CPU, B on a GPU, grid, C, heads); one prefix token
    "ViT-L 640": (1, 16, (40, 40), 1024, 16),
    "ViT-L 640, more": (4, 1, (40, 40), 1024, 16),
    "ViT-B 512": (4, 16, (32, 32), 768, 12),
    "ViT-Ti 192x256": (8, 8, (12, 16), 192, 3),
}
EAGER = "eager"
BUDGET = 0.125


def edge_cells(B: int, grid: tuple[int, int]) -> torch.Tensor:  # [B, E], none on the even grid
    free = torch.ones(grid, dtype=torch.bool)
    free[::2, ::2] = False
    cells = free.flatten().nonzero()[:, 0]
    return torch.stack([cells[torch.randperm(len(cells))[: round(BUDGET * free.numel())]] for _ in range(B)])


def eager_down(x, weight, bias, grid, keep):
    prefix = x.shape[1] - grid[0] * grid[1]
    if isinstance(keep, int):
        kept = x[:, prefix:].unflatten(1, grid)[:, ::keep, ::keep].flatten(1, 2)
    else:
        kept = x[:, prefix:].gather(1, keep[:, :, None].expand(-1, -1, x.shape[2]))
    kept = torch.cat([x[:, :prefix], kept], 1)
    return F.layer_norm(x, x.shape[2:], weight, bias, 1e-6), F.layer_norm(kept, x.shape[2:], weight, bias, 1e-6), kept


def eager_up(x, skip, grid, extra=None):
    low = [-(-side // 2) for side in grid]
    cells = x[:, : low[0] * low[1]].unflatten(1, low).permute(0, 3, 1, 2)
    inner = [2 * n - 1 for n in low]
    full = F.interpolate(cells, inner, mode="bilinear", align_corners=True)
    for dim, side in ((2, grid[0]), (3, grid[1])):  # the last kept row and column again, where the grid goes on
        if full.shape[dim] < side:
            full = torch.cat([full, full.narrow(dim, -1, 1).repeat_interleave(side - full.shape[dim], dim)], dim)
    full = full.permute(0, 2, 3, 1).flatten(1, 2)
    if extra is not None:
        full = full.scatter(1, extra[:, :, None].expand(-1, -1, x.shape[2]), x[:, low[0] * low[1] :])
    return full + skip


def eager_attention(q, k, v, heads):
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    return ((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def cases(name: str) -> dict:
    """By operator: (candidates by name, leaves, bytes of forward, bytes of both passes; 0 for attention)."""
    on_cpu, on_gpu, grid, C, heads = SHAPES[name]
    gpu = torch.cuda.is_available()
    B, dtype = (on_gpu, torch.bfloat16) if gpu else (on_cpu, torch.float32)
    cells, even = grid[0] * grid[1], stride_index(grid, 2)
    extra = edge_cells(B, grid).to(harness.device())
    index = torch.cat([even.expand(B, -1).to(extra.device), extra], 1)
    leaf = lambda *shape: torch.randn(shape, device=harness.device(), dtype=dtype, requires_grad=True)  # noqa: E731
    x, norm = leaf(B, 1 + cells, C), (leaf(C), leaf(C))
    element = x.element_size() * B * C
    found = {}
    for label, keep, kept in (("stride", 2, even.shape[1]), ("index", index, index.shape[1])):
        forward = (2 * (1 + cells) + 2 * (1 + kept)) * element
        both = forward + (3 * (1 + cells) + 2 * (1 + kept)) * element
        calls = {
            EAGER: lambda x, w, b, k=keep: eager_down(x, w, b, grid, k),
            "native": lambda x, w, b, k=keep: token_downsample(x, w, b, 1e-6, grid, k, backend="native"),
            "reference": lambda x, w, b, k=keep: token_downsample(x, w, b, 1e-6, grid, k, backend="reference"),
        }
        found[f"token_downsample, {label}"] = (calls, [x, *norm], forward, both)
    half = C // 2
    for label, more in (("even grid", None), ("edge tokens", extra)):
        low, skip = leaf(B, even.shape[1] + (0 if more is None else more.shape[1]), half), leaf(B, cells, half)
        forward = (2 * cells + low.shape[1]) * element // 2
        calls = {
            EAGER: lambda x, s, e=more: eager_up(x, s, grid, e),
            "native": lambda x, s, e=more: token_upsample(x, s, grid, 2, e, backend="native"),
            "reference": lambda x, s, e=more: token_upsample(x, s, grid, 2, e, backend="reference"),
        }
        found[f"token_upsample, {label}"] = (
            calls,
            [low, skip],
            forward,
            forward + (cells + low.shape[1]) * element // 2,
        )
    for label, queries, width, h in (("QD", even.shape[1], C, heads), ("QU of v1", cells, half, heads)):
        leaves = [leaf(B, n, width) for n in (queries, cells, cells)]
        calls = {
            EAGER: lambda q, k, v, h=h: eager_attention(q, k, v, h),
            "library (SDPA)": lambda q, k, v, h=h: query_attention(q, k, v, h, backend="library"),
        }
        found[f"query_attention, {label}"] = (calls, leaves, 0, 0)
    return found


def passes(call, leaves: list) -> tuple:
    """The forward pass alone, and both passes."""

    def forward():
        with torch.no_grad():
            return call(*leaves)

    outputs = forward()
    upstream = [torch.randn_like(t) for t in (outputs if isinstance(outputs, tuple) else (outputs,))]
    return forward, lambda: torch.autograd.grad(call(*leaves), leaves, upstream)


def run(name: str, rounds: int, bytes_per_s: float) -> list[dict]:
    rows = []
    for op, (calls, leaves, forward_bytes, both_bytes) in cases(name).items():
        torch._dynamo.reset()
        calls["torch.compile of eager"] = torch.compile(calls[EAGER], dynamic=False)
        timed = {}
        for label, call in calls.items():
            forward, both = passes(call, leaves)
            timed |= {("forward", label): forward, ("forward + backward", label): both}
        measured = harness.interleaved(timed, rounds)
        for (kind, label), result in measured.items():
            row = {"op": op, "shape": name, "batch": len(leaves[0]), "pass": kind, "what": label, **result}
            row["vs_eager"] = measured[kind, EAGER]["p50_ms"] / row["p50_ms"]
            row["vs_compile"] = measured[kind, "torch.compile of eager"]["p50_ms"] / row["p50_ms"]
            moved = forward_bytes if kind == "forward" else both_bytes
            row["vs_floor"] = row["p50_ms"] / (1e3 * moved / bytes_per_s) if moved else None
            rows.append(row)
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("token_resample"):
        raise SystemExit("the tests of token_resample are red: no numbers are printed")
    bytes_per_s = harness.ceilings(torch.float32)["bytes_per_s"]
    names = list(SHAPES)[:1] if arguments.quick else list(SHAPES)
    rounds = 7 if arguments.quick or not torch.cuda.is_available() else 40
    rows = [row for name in names for row in run(name, rounds, bytes_per_s)]
    columns = [
        "op",
        "shape",
        "batch",
        "pass",
        "what",
        "p20_ms",
        "p50_ms",
        "p80_ms",
        "vs_eager",
        "vs_compile",
        "vs_floor",
    ]
    print(harness.table(rows, columns))
    print(harness.write("token_resample_kernel", arguments.out, bytes_per_s=bytes_per_s, rows=rows))


if __name__ == "__main__":
    main()

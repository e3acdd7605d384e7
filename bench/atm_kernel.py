"""atm: our paths against naive eager, torch.compile of it, the best library composition, FlexAttention, and the floor.

python bench/atm_kernel.py            # all shapes; writes bench/results/atm_kernel_<device>.json
python bench/atm_kernel.py --quick    # one shape

On a GPU in bfloat16, with the host's cost of a call. Without one: the CPU paths in float32, and what the compiler makes
of the kernels (bench/static.py). Floors are measured in the same run, from bytes of DRAM: at batch 1 everything may
stay in the cache, and a ratio to the floor be below 1. Buffers are not donated to compiled backward passes, which run
several times here.
"""

import time

import harness
import torch
import torch._functorch.config
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

from segvit.ops import atm, reference

torch._functorch.config.donated_buffer = False
SHAPES = {  # name: (B, heads, N, L), head width 32
    "ADE ViT-L 640": (1, 16, 150, 1600),
    "ADE ViT-L 640, batch 4": (4, 16, 150, 1600),
    "ADE ViT-L 640, batch 16": (16, 16, 150, 1600),
    "COCO-Stuff ViT-L 512": (4, 16, 171, 1024),
    "Pascal-Context ViT-L 480": (4, 16, 60, 900),
    "ADE ViT-B 512": (4, 12, 150, 1024),
    "N = 847": (1, 16, 847, 1600),
    "L = 4096": (1, 16, 150, 4096),
    "L = 16384": (1, 16, 150, 16384),
}
WIDTH = 32
ON_CPU = ("ADE ViT-L 640", "ADE ViT-L 640, batch 4", "Pascal-Context ViT-L 480", "ADE ViT-B 512", "N = 847", "L = 4096")


def floor_ms(B: int, H: int, N: int, L: int, size: int, backward: bool, ceilings: dict) -> float:
    """The larger of bytes that must move and multiply-adds that must happen, at the ceilings of this run."""
    C = H * WIDTH
    tokens = B * (2 * N + 2 * L) * C * size  # q, out; k, v
    mask = B * N * L * 4
    moved = tokens + mask if not backward else 2 * tokens + mask
    macs = B * 2 * N * L * C * (2.5 if backward else 1)
    return 1e3 * max(moved / ceilings["bytes_per_s"], macs / ceilings["macs_per_s"])


def heads(t: torch.Tensor, H: int) -> torch.Tensor:  # [B, n, C] -> [B, H, n, d]
    return t.unflatten(-1, (H, -1)).transpose(1, 2)


def library_best(q, k, v, H: int, attention=F.scaled_dot_product_attention):
    """Fused attention and one full-width GEMM; without gradients the GEMM writes float32 itself."""
    out = attention(heads(q, H), heads(k, H), heads(v, H)).transpose(1, 2).flatten(2)
    alpha = (q.shape[-1] // H) ** -0.5 / H
    if q.is_cuda and not torch.is_grad_enabled():  # bmm: baddbmm would first copy what it adds to
        return out, torch.bmm(q * alpha, k.mT, out_dtype=torch.float32)
    return out, torch.baddbmm(q.new_zeros(1, 1, 1), q, k.mT, beta=0, alpha=alpha).float()


NAIVE, LIBRARY = "naive eager", "library-best (SDPA + baddbmm)"


def candidates(H: int, gpu: bool) -> dict:
    calls = {
        NAIVE: lambda q, k, v: reference.atm(q, k, v, H),
        "torch.compile of naive": torch.compile(lambda q, k, v: reference.atm(q, k, v, H), dynamic=False),
        LIBRARY: lambda q, k, v: library_best(q, k, v, H),
        "ours (auto)": lambda q, k, v: atm(q, k, v, H),
    }
    if gpu:
        flex = torch.compile(flex_attention, dynamic=False)
        calls["FlexAttention + baddbmm"] = lambda q, k, v: library_best(q, k, v, H, flex)
        calls["ours (triton)"] = lambda q, k, v: atm(q, k, v, H, backend="triton")
    return calls


def passes(call, leaves: list[torch.Tensor]) -> dict:
    """What is timed: forward without gradients, backward alone, and both with gradients."""
    out, mask = call(*leaves)
    upstream = [torch.randn_like(out), torch.randn_like(mask)]

    def forward():
        with torch.no_grad():
            return call(*leaves)

    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad((out, mask), leaves, upstream, retain_graph=True),
        "both": lambda: torch.autograd.grad(call(*leaves), leaves, upstream),
    }


def reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def run(name: str, dtype: torch.dtype, ceilings: dict, seconds: float) -> list[dict]:
    B, H, N, L = SHAPES[name]
    where = harness.device()
    torch._dynamo.reset()
    leaves = [torch.randn(B, n, H * WIDTH, device=where).to(dtype).requires_grad_() for n in (N, L, L)]
    rows = []
    floors = [floor_ms(B, H, N, L, leaves[0].element_size(), back, ceilings) for back in (False, True)]
    for label, call in candidates(H, where.type == "cuda").items():
        try:
            timed = passes(call, leaves)
            measured = [(kind, harness.measure(timed[kind], seconds)) for kind in timed]
        except Exception as error:  # an opponent that cannot run here must not cost the other numbers
            if label in (NAIVE, LIBRARY) or label.startswith("ours"):
                raise
            print(f"{label} cannot run {name}: {reason(error)}")
            continue
        for (kind, result), floor in zip(measured, (*floors, sum(floors))):
            rows.append({"shape": name, "pass": kind, "what": label, **result, "floor_ms": floor})
    for row in rows:
        for column, against in (("vs_naive", NAIVE), ("vs_library", LIBRARY)):
            other = next(r for r in rows if r["what"] == against and r["pass"] == row["pass"])
            row[column] = other["p50_ms"] / row["p50_ms"]
        row["vs_floor"] = row["p50_ms"] / row["floor_ms"]
    return rows


def host_cost_us() -> list[dict]:
    """Microseconds of the host per call, where the GPU has next to nothing to do: launches included, no wait."""
    leaves = [
        torch.randn(1, n, 2 * WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True) for n in (8, 16, 16)
    ]
    rows = []
    for label, call in candidates(2, True).items():
        try:
            timed = passes(call, leaves)
            timed["forward with gradients"] = lambda call=call: call(*leaves)
            for kind, once in timed.items():
                for _ in range(20):
                    once()
                torch.cuda.synchronize()
                start = time.perf_counter()
                for _ in range(200):
                    once()
                rows.append({"what": label, "pass": kind, "host_us": (time.perf_counter() - start) * 1e6 / 200})
                torch.cuda.synchronize()
        except Exception as error:
            print(f"host cost of {label}: {reason(error)}")
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("atm"):
        raise SystemExit("the tests of atm are red: no numbers are printed")
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    ceilings = harness.ceilings(dtype)
    names = [name for name in SHAPES if gpu or name in ON_CPU]
    rows, more = [], {}
    for name in names[:1] if arguments.quick else names:
        rows += run(name, dtype, ceilings, 0.2 if arguments.quick else 1.0)
    columns = ["shape", "pass", "what", "p20_ms", "p50_ms", "p80_ms", "peak_mib", "vs_naive", "vs_library", "vs_floor"]
    print(harness.table(rows, [c for c in columns if gpu or c != "peak_mib"]))
    if gpu:
        harness.write("atm_kernel", arguments.out, dtype=str(dtype), ceilings=ceilings, rows=rows)
        more["host"] = host_cost_us()
        print(harness.table(more["host"], ["what", "pass", "host_us"]))
    else:
        print("\nno GPU here: nothing above is a GPU number. What the compiler makes of the kernels:")
        import static

        more["static"] = [row for row in static.static_table() if row["op"] == "atm"]
        print(harness.table(more["static"], static.COLUMNS))
    print(harness.write("atm_kernel", arguments.out, dtype=str(dtype), ceilings=ceilings, rows=rows, **more))


if __name__ == "__main__":
    main()

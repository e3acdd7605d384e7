"""atm: our path against naive eager (the reference), torch.compile of it, and the floor measured in the same run.

python bench/atm_kernel.py            # all shapes; writes bench/results/atm_kernel_<device>.json
python bench/atm_kernel.py --quick    # one shape
"""

import harness
import torch

from segvit.ops import atm, reference

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


def candidates(H: int, gpu: bool) -> dict:
    calls = {
        "naive eager": lambda q, k, v: reference.atm(q, k, v, H),
        "ours (library)": lambda q, k, v: atm(q, k, v, H, backend="library"),
    }
    if gpu:
        calls["ours (triton)"] = lambda q, k, v: atm(q, k, v, H, backend="triton")
        calls["torch.compile of naive"] = torch.compile(calls["naive eager"], dynamic=False)
    return calls


def run(name: str, dtype: torch.dtype, ceilings: dict, seconds: float) -> list[dict]:
    B, H, N, L = SHAPES[name]
    where = harness.device()
    leaves = [torch.randn(B, n, H * WIDTH, device=where).to(dtype).requires_grad_() for n in (N, L, L)]
    rows = []
    for label, call in candidates(H, where.type == "cuda").items():
        out, mask = call(*leaves)
        upstream = [torch.randn_like(out), torch.randn_like(mask)]

        def forward(call=call):
            with torch.no_grad():
                return call(*leaves)

        def both(call=call, upstream=upstream):
            return torch.autograd.grad(call(*leaves), leaves, upstream)

        for kind, timed in (("forward", forward), ("forward + backward", both)):
            floor = floor_ms(B, H, N, L, leaves[0].element_size(), False, ceilings)
            if timed is both:
                floor += floor_ms(B, H, N, L, leaves[0].element_size(), True, ceilings)
            result = harness.measure(timed, seconds)
            rows.append({"shape": name, "pass": kind, "what": label, **result, "floor_ms": floor})
    for row in rows:
        naive = next(r for r in rows if r["what"] == "naive eager" and r["pass"] == row["pass"])
        row["vs_naive"] = naive["p50_ms"] / row["p50_ms"]
        row["vs_floor"] = row["p50_ms"] / row["floor_ms"]
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("atm"):
        raise SystemExit("the tests of atm are red: no numbers are printed")
    gpu = torch.cuda.is_available()
    dtype = torch.bfloat16 if gpu else torch.float32
    if not gpu:
        print("no GPU here: our CPU path against naive eager, in float32; nothing below is a GPU number")
    ceilings = harness.ceilings(dtype)
    names = [name for name in SHAPES if gpu or name in ON_CPU]
    rows = []
    for name in names[:1] if arguments.quick else names:
        rows += run(name, dtype, ceilings, 0.2 if arguments.quick else 1.0)
    columns = ["shape", "pass", "what", "p20_ms", "p50_ms", "p80_ms", "peak_mib", "vs_naive", "vs_floor"]
    print(harness.table(rows, [c for c in columns if gpu or c != "peak_mib"]))
    print(harness.write("atm_kernel", arguments.out, dtype=str(dtype), ceilings=ceilings, rows=rows))


if __name__ == "__main__":
    main()

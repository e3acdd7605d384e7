"""token_downsample: the C++ kernel against the eager chain (the reference), forward and forward + backward.

python bench/token_resample_kernel.py            # writes bench/results/token_resample_kernel_<device>.json
python bench/token_resample_kernel.py --quick    # one shape
"""

import harness
import torch

from segvit.ops import token_downsample

SHAPES = {  # name: (B, grid, C), stride 2, one prefix token
    "ViT-L 640": (1, (40, 40), 1024),
    "ViT-L 640, batch 4": (4, (40, 40), 1024),
    "ViT-B 512": (4, (32, 32), 768),
    "ViT-Ti 192x256, batch 8": (8, (12, 16), 192),
}


def run(name: str, backends: list[str], seconds: float) -> list[dict]:
    B, grid, C = SHAPES[name]
    shapes = ((B, 1 + grid[0] * grid[1], C), (C,), (C,))
    leaves = [torch.randn(shape, device=harness.device(), requires_grad=True) for shape in shapes]
    rows = []
    for backend in backends:

        def forward(backend=backend):
            with torch.no_grad():
                return token_downsample(*leaves, 1e-6, grid, 2, backend=backend)

        upstream = [torch.randn_like(t) for t in forward()]

        def both(backend=backend, upstream=upstream):
            return torch.autograd.grad(token_downsample(*leaves, 1e-6, grid, 2, backend=backend), leaves, upstream)

        for kind, timed in (("forward", forward), ("forward + backward", both)):
            rows.append({"shape": name, "pass": kind, "backend": backend, **harness.measure(timed, seconds)})
    for row in rows:
        eager = next(r for r in rows if r["backend"] == "reference" and r["pass"] == row["pass"])
        row["vs_eager"] = eager["p50_ms"] / row["p50_ms"]
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("token_resample"):
        raise SystemExit("the tests of token_resample are red: no numbers are printed")
    gpu = torch.cuda.is_available()
    if gpu:
        print("this version has no CUDA kernel for token_downsample: the reference alone")
    backends = ["reference"] if gpu else ["reference", "native"]
    names = list(SHAPES)[:1] if arguments.quick else list(SHAPES)
    rows = [row for name in names for row in run(name, backends, 0.2 if arguments.quick else 1.0)]
    columns = ["shape", "pass", "backend", "p20_ms", "p50_ms", "p80_ms", "vs_eager"]
    print(harness.table(rows, columns))
    print(harness.write("token_resample_kernel", arguments.out, rows=rows))


if __name__ == "__main__":
    main()

"""mask_decode: our paths against naive eager, torch.compile of it, chunked eager, and the floor.

python bench/mask_decode_kernel.py            # all shapes; writes bench/results/mask_decode_kernel_<device>.json
python bench/mask_decode_kernel.py --quick    # one shape

Labels, their confidence not asked for, and scores. Three kinds of data: "flat", where all classes are nearly equal and
none can be left out; "random" class probabilities; and "trained", where ten classes are in an image
(harness.trained_like). `pruned` drops class tokens below the probability 0.01, and says how many. On a GPU all run in
half precision, but for the row that says float32; without one the CPU paths run in float32, with peak memory, and what
the compiler makes of the kernels follows (bench/static.py). All candidates of a case are timed in turn. The floor is of
all multiply-adds and of the bytes that must move, at the ceilings of this run: what leaves classes out may pass it.
"""

import harness
import torch
import torch.nn.functional as F

from segvit.ops import mask_decode

SHAPES = {  # name: (B, N = K, grid, output)
    "ADE 640": (1, 150, (40, 40), (640, 640)),
    "ADE 640, batch 16": (16, 150, (40, 40), (640, 640)),
    "ADE 512": (1, 150, (32, 32), (512, 512)),
    "COCO-Stuff 512": (1, 171, (32, 32), (512, 512)),
    "Pascal-Context 640": (1, 60, (40, 40), (640, 640)),
    "Cityscapes 1024x2048": (1, 19, (64, 128), (1024, 2048)),
    "ADE-full 640": (1, 847, (40, 40), (640, 640)),
}
GPU_ALONE = ("ADE 640, batch 16", "ADE-full 640")
PRUNE = 0.01
NAIVE = "naive eager"


def naive_scores(logits, probs, size):
    masks = F.interpolate(logits.to(probs.dtype), size, mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bnk,bnhw->bkhw", probs, masks)


def naive(logits, probs, size):
    return naive_scores(logits, probs, size).argmax(1).to(torch.uint8 if probs.shape[2] <= 256 else torch.int16)


def chunked(logits, probs, size):
    """The same an image and 64 rows of output at a time, from the cells they need: what people do about memory."""
    labels = torch.empty(len(logits), *size, dtype=torch.uint8 if probs.shape[2] <= 256 else torch.int16)
    labels, scale = labels.to(logits.device), size[0] // logits.shape[2]
    for b in range(len(logits)):
        for top in range(0, size[0], 64):
            low, high = max(top // scale - 1, 0), min(-(-(top + 64) // scale) + 1, logits.shape[2])
            part = logits[b : b + 1, :, low:high]
            rows = naive(part, probs[b : b + 1], ((high - low) * scale, size[1]))
            labels[b, top : top + 64] = rows[0, top - low * scale :][: min(64, size[0] - top)]
    return labels


def candidates(gpu: bool) -> dict:
    calls = {
        NAIVE: naive,
        "torch.compile of naive": torch.compile(naive, dynamic=False),
        "chunked eager": chunked,
        "ours (auto)": mask_decode,
        "ours (auto), pruned": lambda *inputs: mask_decode(*inputs, prune=PRUNE),
        "ours (tiled)": lambda *inputs: mask_decode(*inputs, backend="tiled"),
    }
    if gpu:
        calls["ours (triton), float32"] = lambda logits, probs, size: mask_decode(logits, probs.float(), size)
    calls["naive eager, scores"] = naive_scores
    calls["ours (auto), scores"] = lambda *inputs: mask_decode(*inputs, "scores")
    return calls


def floor_ms(B: int, N: int, grid: tuple, size: tuple, scores: bool, ceilings: dict) -> float:
    pixels = B * size[0] * size[1]
    moved = 4 * B * N * grid[0] * grid[1] + pixels * (4 * N if scores else 1)
    return 1e3 * max(moved / ceilings["bytes_per_s"], pixels * N * N / ceilings["macs_per_s"])


def inputs(name: str, kind: str, gpu: bool):
    B, N, grid, size = SHAPES[name]
    if kind == "trained":
        logits, classes = harness.trained_like(B, N, N, grid)
    else:
        logits = torch.randn(B, N, *grid, device=harness.device()) * 4
        classes = torch.randn(B, N, N + 1, device=harness.device()) * (3 if kind == "random" else 1e-3)
    probs = classes.softmax(-1)[..., :-1].contiguous()
    return logits, probs.half() if gpu else probs, size


@torch.no_grad()
def run(name: str, kind: str, ceilings: dict, rounds: int) -> list[dict]:
    gpu = torch.cuda.is_available()
    torch._dynamo.reset()
    given = inputs(name, kind, gpu)
    B, N, grid, size = SHAPES[name]
    exact = naive(given[0], given[1].float(), size)
    calls = {}
    for label, call in candidates(gpu).items():
        needless = ("pruned" in label and kind != "trained") or (label.endswith("scores") and kind != "random")
        if not needless:  # nothing would be dropped, or nothing differs
            calls[label] = lambda call=call: call(*given)
    measured, rows = harness.interleaved(calls, rounds), []
    for label, result in measured.items():
        scores = label.endswith("scores")
        result["floor_ms"] = floor_ms(B, N, grid, size, scores, ceilings)
        result["same"] = None if scores else (calls[label]() == exact).double().mean().item()
        if "pruned" in label:
            result["dropped"] = (given[1].amax(-1) < PRUNE).double().mean().item()
        rows.append({"shape": name, "data": kind, "what": label, **result})
    for row in rows:
        other = next(r for r in rows if r["what"] == NAIVE + (", scores" if row["what"].endswith("scores") else ""))
        row["vs_naive"] = other["p50_ms"] / row["p50_ms"]
        row["memory_vs_naive"] = row["peak_mib"] / other["peak_mib"] if row["peak_mib"] is not None else None
        row["vs_floor"] = row["p50_ms"] / row["floor_ms"]
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("mask_decode"):
        raise SystemExit("the tests of mask_decode are red: no numbers are printed")
    gpu = torch.cuda.is_available()
    ceilings = harness.ceilings(torch.float16 if gpu else torch.float32)
    names = [name for name in SHAPES if gpu or name not in GPU_ALONE]
    rows, more = [], {}
    for name in names[:1] if arguments.quick else names:
        for kind in ("flat", "random", "trained"):
            rows += run(name, kind, ceilings, 3 if arguments.quick else 200 if gpu else 5)
    columns = ["shape", "data", "what", "p20_ms", "p50_ms", "p80_ms", "peak_mib", "vs_naive", "memory_vs_naive"]
    print(harness.table(rows, [*columns, "vs_floor", "same", "dropped"]))
    if not gpu:
        print("\nno GPU here: nothing above is a GPU number. What the compiler makes of the kernels:")
        import static

        more["static"] = [row for row in static.static_table() if row["op"] == "mask_decode"]
        print(harness.table(more["static"], static.COLUMNS))
    print(harness.write("mask_decode_kernel", arguments.out, ceilings=ceilings, rows=rows, **more))


if __name__ == "__main__":
    main()

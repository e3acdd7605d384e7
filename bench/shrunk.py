"""What Shrunk's variants cost: multiply-adds, parameters, and how much of what they save arrives in time and memory.

python bench/shrunk.py            # ViT-B 512 and ViT-L 640; writes bench/results/shrunk_<device>.json
python bench/shrunk.py --quick    # ViT-B 512 alone, few repetitions

Whole inference, from the normalised image to the label map, random weights (the decoder's answers are those of a
trained one, as in bench/inference.py). All variants of a model and its bare backbone are timed in turn.
On a CPU eager, float32, batch 1; on a GPU compiled, bfloat16, batch 16.
"""

import functools

import harness
import torch
from inference import Trained

import segvit
from segvit.models.complexity import count_multiply_adds, count_parameters

MODELS = ("segvit_base_ade20k_512", "segvit_large_ade20k_640")
VARIANTS = (None, "v1", "light", "edge")
BARE = "bare backbone"


def build(name: str, shrink: str | None) -> segvit.SegViT:
    return segvit.create_model(name, shrink=shrink, **({"out_indices": None} if shrink else {}))


@torch.enable_grad()  # which the counter needs
def costs(name: str, shrink: str | None) -> dict:
    with torch.device("meta"):
        model = build(name, shrink)
    return {"gmac": count_multiply_adds(model) / 1e9, "params_m": count_parameters(model) / 1e6}


@torch.no_grad()
def run(name: str, batch: int, rounds: int) -> list[dict]:
    gpu, device = torch.cuda.is_available(), harness.device()
    torch._dynamo.reset()
    prepare = torch.compile if gpu else lambda module: module
    calls, table = {}, {}
    for shrink in VARIANTS:
        model = build(name, shrink).eval().to(device)
        images = torch.randn(batch, 3, *model.image_size, device=device)
        model.decoder = Trained(model.decoder, model.backbone.grid, model.num_classes)
        label = shrink or "full"
        calls[label] = functools.partial(segvit.predict, prepare(model), images)
        table[label] = costs(name, shrink)
        if shrink is None:
            calls[BARE] = functools.partial(prepare(model.backbone), images)
            table[BARE] = {"params_m": count_parameters(model.backbone) / 1e6}
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=gpu):
        measured = harness.interleaved(calls, rounds)
    rows = []
    for label, result in measured.items():
        row = {"model": name, "batch": batch, "variant": label, **table[label], **result}
        row["gmac_vs_full"] = row["gmac"] / table["full"]["gmac"] if "gmac" in row else None
        row["time_vs_full"] = row["p50_ms"] / measured["full"]["p50_ms"]
        row["time_vs_bare"] = row["p50_ms"] / measured[BARE]["p50_ms"]
        rows.append(row)
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("token_resample"):
        raise SystemExit("the tests of token_resample are red: no numbers are printed")
    gpu, rows = torch.cuda.is_available(), []
    for name in MODELS[:1] if arguments.quick else MODELS:
        rows += run(name, 16 if gpu else 1, 3 if arguments.quick else 30 if gpu else 3)
    columns = ["model", "batch", "variant", "gmac", "params_m", "p20_ms", "p50_ms", "p80_ms", "peak_mib"]
    print(harness.table(rows, [*columns, "gmac_vs_full", "time_vs_full", "time_vs_bare"]))
    print(harness.write("shrunk", arguments.out, rows=rows))


if __name__ == "__main__":
    main()

"""What Shrunk's variants cost in accuracy: the same short training of each on real data, several seeds.

python bench/shrunk_ablation.py DATA WEIGHTS    # a data set and a pretrained ViT-Tiny; an hour on two cores

Each run trains on random crops at the crop's size and is scored twice: in windows of the crop, which suits v1's stored
positions, and on whole images. A run of as many steps that stands in the JSON already is not repeated.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import harness

VARIANTS = ("full", "light", "edge", "v1")
BACKBONE = "vit_tiny_patch16_224.augreg_in21k_ft_in1k"
TRAIN = ["--backbone", BACKBONE, "--crop", "[192,256]", "--batch_size", "8", "--mode", "slide"]


def segvit(*arguments: str) -> str:
    """What a command of the shell prints; its progress goes to the terminal."""
    command = [sys.executable, "-m", "segvit", *arguments]
    return subprocess.run(command, cwd=harness.ROOT, stdout=subprocess.PIPE, text=True, check=True).stdout


def run(data: str, weights: str, variant: str, seed: int, steps: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        shrink = [] if variant == "full" else ["--shrink", variant]
        length = ["--steps", str(steps), "--validate_every", str(steps), "--seed", str(seed)]
        segvit("train", data, "--pretrained", weights, *TRAIN, *shrink, *length, "--out", folder)
        last = json.loads(Path(folder, "log.jsonl").read_text().splitlines()[-1])
        row = {"variant": variant, "seed": seed, "train_seconds": round(last["seconds"])}
        for mode in ("slide", "whole"):
            found = json.loads(segvit("evaluate", folder, data, "--mode", mode, "--boundary", "0.02", "--json"))
            row |= {f"miou_{mode}": found["miou"], f"boundary_{mode}": found["boundary_miou"]}
    return row


def summary(rows: list[dict]) -> list[dict]:
    """Mean of the seeds, and the distance between the best and the worst."""
    lines = []
    for variant in VARIANTS:
        own = [row for row in rows if row["variant"] == variant]
        if own:
            line = {"variant": variant, "seeds": len(own)}
            for name in ("miou_slide", "miou_whole", "boundary_whole"):
                values = [row[name] for row in own]
                line |= {name: round(statistics.mean(values), 4), f"± {name}": round(max(values) - min(values), 4)}
            lines.append(line)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data")
    parser.add_argument("weights")
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder for the JSON file")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "shrunk_ablation.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    rows = found["rows"] if found.get("steps") == arguments.steps else []
    for seed in range(arguments.seeds):
        for variant in VARIANTS:
            if any((row["variant"], row["seed"]) == (variant, seed) for row in rows):
                continue
            print(f"{variant}, seed {seed}", flush=True)
            rows.append(run(arguments.data, arguments.weights, variant, seed, arguments.steps))
            content = {"command": "python bench/shrunk_ablation.py DATA WEIGHTS", "machine": harness.machine()}
            content |= {"steps": arguments.steps, "rows": rows, "summary": summary(rows)}
            path.write_text(json.dumps(content, indent=1) + "\n")
    print(harness.table(summary(rows), list(summary(rows)[0])))


if __name__ == "__main__":
    main()

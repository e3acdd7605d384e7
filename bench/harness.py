"""Shared by the benchmarks: timing, the machine's own ceilings, a verdict of the tests, and one JSON file a run."""

import argparse
import ctypes
import gc
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).resolve().parent / "results"


def arguments(description: str) -> argparse.Namespace:
    """The command line that every benchmark has."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON file")
    parser.add_argument("--quick", action="store_true", help="the first shape only, few repetitions")
    return parser.parse_args()


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def measure(call: Callable[[], object], seconds: float = 1.0, least: int = 5) -> dict[str, float]:
    """Milliseconds per call at the 20th, 50th and 80th percentile, and on a GPU the extra peak memory in MiB."""
    for _ in range(3):
        call()
    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    times, start = [], time.perf_counter()
    while len(times) < least or time.perf_counter() - start < seconds:
        times.append(_once_cuda(call) if gpu else _once_cpu(call))
    p20, p50, p80 = torch.tensor(times).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
    row = {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "calls": len(times)}
    if gpu:
        row["peak_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
    return row


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, dict[str, float]]:
    """As `measure` for calls whose ratio matters: in turn, so that a machine that slows down slows all of them."""
    rows = {}
    for label, call in calls.items():
        rows[label] = measure(call, 0, 1)  # warms up, and on a GPU notes the memory
        if not torch.cuda.is_available():
            rows[label]["peak_mib"] = peak_mib(call)
    times = {label: [] for label in calls}
    for _ in range(rounds):
        for label, call in calls.items():
            times[label].append(_once_cuda(call) if torch.cuda.is_available() else _once_cpu(call))
    for label, row in rows.items():
        p20, p50, p80 = torch.tensor(times[label]).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
        row |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80, "calls": rounds}
    return rows


def _once_cpu(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def _once_cuda(call: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(4_000_000)  # about 2 ms: the queue fills meanwhile, so that launching is not what is measured
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def peak_mib(call: Callable[[], object]) -> float | None:
    """Most memory of this process during a call, beyond what it needed before, in MiB; None where nothing tells."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back first, or the call would live on it unseen
        Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
        before = resident("VmRSS")
    except (OSError, AttributeError):
        before = None
    call()
    return None if before is None else (resident("VmHWM") - before) / 2**20


def resident(kind: str) -> int:
    """Bytes of this process's memory: VmRSS now, VmHWM at most since it was forgotten (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(kind))


def trained_like(
    B: int, N: int, K: int, grid: tuple[int, int], present: int = 10
) -> tuple[torch.Tensor, torch.Tensor]:  # mask logits [B, N, h, w], class logits [B, N, K + 1]
    """What a trained model says of images with a few classes: smooth masks, and "no object" for all other tokens.

    Class token n means class n and is sure of it where it is present; the others leave it half a percent.
    """
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(B, N, 5, 5, generator=generator) * 6
    masks = torch.nn.functional.interpolate(coarse, grid, mode="bicubic") - 2
    logits = torch.randn(B, N, K + 1, generator=generator) / 2
    logits[..., -1] += 10
    for b in range(B):
        own = torch.arange(min(N, K))
        logits[b, own, own] += 5
        found = torch.randperm(len(own), generator=generator)[:present]
        logits[b, found, found] += 9
    return masks.to(device()), logits.to(device())


def ceilings(dtype: torch.dtype) -> dict[str, float]:
    """What this machine reaches in this run: bytes per second of a copy, multiply-adds per second of a matmul."""
    where = device()
    elements = 2**28 if where.type == "cuda" else 2**24
    source = torch.empty(elements, dtype=torch.float32, device=where).normal_()
    target = torch.empty_like(source)
    copy = measure(lambda: target.copy_(source), 0.5)["p50_ms"]
    side = 8192 if where.type == "cuda" else 1536
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    matmul = measure(lambda: a @ b, 0.5)["p50_ms"]
    return {"bytes_per_s": 2 * 4 * elements / copy * 1e3, "macs_per_s": side**3 / matmul * 1e3}


def tests_are_green(op: str) -> bool:
    """Whether the operator's tests pass right now; without that no speed-up is worth printing."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"tests/test_{op}.py"]
    print(f"checking: {' '.join(command[1:])}", flush=True)
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    print(run.stdout.strip().splitlines()[-1] if run.stdout.strip() else run.stderr, flush=True)
    return run.returncode == 0


def machine() -> dict:
    """Device, versions and commit: what makes a number comparable."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], cwd=ROOT, capture_output=True)
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "device": gpu or f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "triton": triton_version,
        "python": platform.python_version(),
        "commit": git.stdout.strip() + ("+changes" if changed.stdout else ""),
        "date": time.strftime("%Y-%m-%d"),
    }


def write(name: str, folder: Path, **content) -> Path:
    """One JSON object, named after the benchmark and the kind of device."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}_{device().type}.json"
    command = " ".join(["python", f"bench/{name}.py", *sys.argv[1:]])
    path.write_text(json.dumps({"command": command, "machine": machine(), **content}, indent=1) + "\n")
    return path


def table(rows: list[dict], columns: list[str]) -> str:
    """Rows as aligned text."""
    cells = [columns] + [[_text(row.get(column)) for column in columns] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(line, widths)) for line in cells)


def _text(value: object) -> str:
    if value is None:
        return "–"
    return f"{value:.3g}" if isinstance(value, float) else str(value)

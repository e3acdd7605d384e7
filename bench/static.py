"""What the compiler makes of every Triton kernel at its main shapes: registers, spills, shared memory, tensor cores.

Needs Triton and no GPU: kernels are compiled ahead of time and their machine code is read.

    python bench/static.py            # a table
    python bench/static.py --json     # one list of objects
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch
import triton
from segvit.kernels import atm, mask_decode, mask_loss
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

ARCHITECTURES = {"sm_80": 80, "sm_90": 90, "sm_100": 100}
TENSOR_CORE = re.compile(r"\b(HMMA|HGMMA|UTCHMMA|UTCQMMA)\b")
COLUMNS = ["op", "kernel", "variant", "arch", "registers", "spill_bytes", "shared_bytes", "tensor_core"]
NAMES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}


def atm_cases() -> Iterator[tuple[triton.JITFunction, str, dict, dict, dict]]:
    """(kernel, variant, types of its arguments, compile-time arguments, options)."""
    for dtype, width, N, dropout in (  # the shapes of the models, then what else the contract allows
        (torch.bfloat16, 32, 150, False),
        (torch.bfloat16, 32, 150, True),
        (torch.bfloat16, 32, 171, False),
        (torch.bfloat16, 32, 847, True),
        (torch.float16, 16, 150, True),
        (torch.bfloat16, 64, 150, True),
        (torch.bfloat16, 128, 150, True),
        (torch.float32, 32, 150, True),
        (torch.float32, 64, 150, True),
        (torch.float32, 128, 150, True),
    ):
        for kernel in (atm.atm_forward, atm.atm_backward_keys, atm.atm_backward_queries):
            if N != 150 and kernel is not atm.atm_backward_keys:
                continue  # the others are the same for every N
            tiles, options = atm.config(kernel.__name__, dtype, width, N, dropout)
            known = atm.constants(dtype, width, float(dropout)) | tiles
            if kernel is atm.atm_forward:
                known |= {"HAS_CARRY": True, "SIGMOID": width > 32}
            variant = f"{NAMES[dtype]}, heads of {width}, {N} queries{', dropout' if dropout else ''}"
            yield kernel, variant, _types(kernel, known, dtype), known, options


def mask_decode_cases() -> Iterator[tuple[triton.JITFunction, str, dict, dict, dict]]:
    """As atm_cases; half precision means float16 products."""
    for dtype, num, kind in (
        (torch.float16, 150, "labels"),
        (torch.float16, 150, "scores, added"),
        (torch.float16, 150, "labels, pruned"),
        (torch.float16, 150, "labels, gathered"),
        (torch.float16, 171, "labels"),
        (torch.float16, 60, "labels"),
        (torch.float16, 19, "labels"),
        (torch.float16, 847, "labels"),
        (torch.float32, 150, "labels"),
        (torch.float32, 150, "scores"),
        (torch.float32, 19, "labels"),
    ):
        exact, labels = dtype == torch.float32, kind.startswith("labels")
        known = mask_decode.constants(exact, False)
        known |= {"LABELS": labels, "CONFIDENCE": labels, "ADD": kind.endswith("added")}
        known |= {"PRUNED": kind.endswith("pruned"), "PRODUCT": not kind.endswith("gathered")}
        for tiles, options in mask_decode.rounds(num, num, exact, labels):
            kernel, every = mask_decode.mask_decode_pixels, known | tiles
            variant = f"{NAMES[dtype]}, {num} classes, {kind}" + (f", round {r}" if (r := tiles["ROUND"]) else "")
            yield kernel, variant, _types(kernel, every, dtype), every, options
        if kind == "labels" and num == 150:
            for kernel, known in mask_decode.preparations(num, True, False):
                options = {"num_warps": known.pop("num_warps", 4)}
                yield kernel, f"{NAMES[dtype]}, {num} classes", _types(kernel, known, dtype), known, options


def mask_loss_cases() -> Iterator[tuple[triton.JITFunction, str, dict, dict, dict]]:
    """As atm_cases; blocks of 16x16 pixels, and the largest."""
    main = {"mask_loss_sums": {"FAST": True}, "mask_loss_gradient": {"FAST": True}}
    other = {"mask_loss_plan": {}, "mask_loss_labels": {"MASKED": True}, "mask_loss_finish": {"MASKED": True}}
    for side, names in ((16, main | other | {"mask_loss_join": {}}), (32, main)):
        for name, known in names.items():
            tiles, options = mask_loss.options(name, {"ROWS": side, "COLUMNS": side}, 150)
            kernel = getattr(mask_loss, name)
            every = tiles | known
            yield kernel, f"fp32, {side}x{side} pixels", _types(kernel, every, torch.float32), every, options


POINTERS = {  # what they point to, where it is not the data's own dtype
    "i64": ("seed_ptr",),
    "i32": ("queries_ptr", "kept_ptr", "classes_ptr", "pairs_ptr", "count_ptr", "counts_ptr", "starts_ptr", "open_ptr"),
    "i16": ("codes_ptr",),
    "u8": ("labels_ptr", "present_ptr"),
    "fp32": ("carry_ptr", "mask_ptr", "lse_ptr", "delta_ptr", "logits_ptr", "most_ptr", "bounds_ptr", "best_ptr"),
}
POINTERS["fp32"] += ("scores_ptr",)
FLOATS = ("scale", "scale_log2", "mask_scale", "keep_scale", "prune", "step_y", "step_y_low", "step_x", "step_x_low")
FLOATS += ("alpha", "limit")


def _types(kernel: triton.JITFunction, known: dict, dtype: torch.dtype) -> dict[str, str]:
    """Types of a kernel's arguments, told by their names."""
    types = {}
    for name in kernel.arg_names:
        if name in known:
            types[name] = "constexpr"
        elif name.endswith("_ptr"):
            types[name] = "*" + next((kind for kind, names in POINTERS.items() if name in names), NAMES[dtype])
        else:
            types[name] = "i64" if name == "threshold" else "fp32" if name in FLOATS else "i32"
    return types


CASES = {"atm": atm_cases, "mask_decode": mask_decode_cases, "mask_loss": mask_loss_cases}
DIVISIBLE = re.compile(r"_ptr$|_stride$|_batch$|^width$|^row$")  # arguments that Triton sees divisible by 16


def compiled(kernel: triton.JITFunction, types: dict, known: dict, options: dict, arch: str):
    """One kernel compiled for one architecture; returns Triton's compiled object."""
    index = {name: (i,) for i, name in enumerate(kernel.arg_names)}
    divisible = {
        index[n]: [["tt.divisibility", 16]] for n, t in types.items() if t != "constexpr" and DIVISIBLE.search(n)
    }
    source = ASTSource(kernel, types, {index[name]: value for name, value in known.items()}, divisible)
    return triton.compile(source, target=GPUTarget("cuda", ARCHITECTURES[arch], 32), options=options)


def resources(cubin: bytes) -> dict:
    """Registers, spilled bytes, and whether tensor-core instructions occur, read from the machine code."""
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = _run(tools / "cuobjdump", "-res-usage", file.name)
        code = _run(tools / "cuobjdump", "-sass", file.name)
    # LOCAL:0 alone proves nothing: spills live on the stack, and show as local loads and stores.
    spilled = int(re.search(r"STACK:(\d+)", usage)[1])
    if not spilled and re.search(r"\b(LDL|STL)\b", code):
        spilled = 4 * len(re.findall(r"\b(?:LDL|STL)\b", code))
    return {
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spill_bytes": spilled,
        "tensor_core": bool(TENSOR_CORE.search(code)),
    }


def _run(*command: object) -> str:
    return subprocess.run([str(c) for c in command], capture_output=True, text=True, check=True).stdout


def static_table(architectures: tuple[str, ...] = tuple(ARCHITECTURES)) -> list[dict]:
    """One row a kernel, variant and architecture; as many processes compile as there are cores."""
    tasks = [(op, i, arch) for op, cases in CASES.items() for i, _ in enumerate(cases()) for arch in architectures]
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn")) as pool:
        return list(pool.map(_row, tasks))


def _row(task: tuple[str, int, str]) -> dict:
    op, i, arch = task
    kernel, variant, types, known, options = list(CASES[op]())[i]
    binary = compiled(kernel, types, known, options, arch)
    names = {"op": op, "kernel": kernel.__name__, "variant": variant, "arch": arch}
    return names | resources(binary.asm["cubin"]) | {"shared_bytes": binary.metadata.shared}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true", help="print one JSON list and nothing else to stdout")
    rows = static_table() if parser.parse_args().json else None
    if rows is not None:
        json.dump(rows, sys.stdout, indent=1)
        return
    import harness

    print(harness.table(static_table(), COLUMNS))


if __name__ == "__main__":
    main()

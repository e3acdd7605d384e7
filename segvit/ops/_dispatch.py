"""Which backend serves a call: one ordered list of (name, why not) per operator, decided in one place.

The environment variable SEGVIT_KERNELS (auto, reference, triton or native; read at every call) forces a backend on the
operators that have it; the keyword `backend=` forces one on a single call. What is forced and cannot run raises.
"""

import contextlib
import importlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextvars import ContextVar

import torch

KNOWN = ("auto", "reference", "triton", "native", "library", "tiled")
_PLAIN = ContextVar("segvit_plain", default=False)


@contextlib.contextmanager
def plain_torch() -> Iterator[None]:
    """Inside, for this thread alone, what a model calls is its reference, and made of PyTorch's operators alone.

    For exporters, which know no segvit:: operator: SEGVIT_KERNELS and `backend=` do not count here.
    """
    token = _PLAIN.set(True)
    try:
        yield
    finally:
        _PLAIN.reset(token)


def is_plain() -> bool:
    """Whether the caller is inside plain_torch()."""
    return _PLAIN.get()


def choose(op: str, backend: str | None, candidates: Sequence[tuple[str, str | Callable | None]]) -> str:
    """Name of the backend that serves this call.

    candidates: (name, reason) in order of preference; reason is None where the backend can run, else says why not. A
    reason that is a function is asked for only when it matters: then nothing is imported or traced for nothing.
    Raises ValueError for an unknown name, RuntimeError for a forced backend that cannot run.
    """
    if is_plain():
        return "reference"
    offered = dict(candidates)
    name = backend or os.environ.get("SEGVIT_KERNELS") or "auto"
    if name not in KNOWN:
        origin = "backend" if backend else "SEGVIT_KERNELS"
        raise ValueError(f"{op}: {origin}={name!r} is no backend; choose from auto, {', '.join(offered)}")
    if name == "auto" or (backend is None and name not in offered):
        return next(candidate for candidate, reason in candidates if _ask(reason) is None)
    if name not in offered:
        raise RuntimeError(f"{op}: there is no {name!r} backend for this operator; it has {', '.join(offered)}")
    reason = _ask(offered[name])
    if reason is not None:
        raise RuntimeError(f"{op}: the {name!r} backend cannot run: {reason}")
    return name


def _ask(reason: str | Callable | None) -> str | None:
    return reason() if callable(reason) else reason


def _load(library: str, built_with: str) -> str | None:
    """Why a library of operators is not there; None where it is loaded."""
    try:
        importlib.import_module(library)
    except ModuleNotFoundError:
        return f"{library} was not built; install {built_with} and run `pip install -e .` again"
    except ImportError as error:
        return f"{library} does not load: {error}"
    return None


NATIVE_MISSING = _load("segvit._C", "a C++ compiler, for example g++")  # None where the CPU's operators are loaded
CUDA_MISSING = (  # None where the CUDA operators are loaded, which needs no GPU
    _load("segvit._C_cuda", "the CUDA toolkit that PyTorch was built for (CUDA_HOME names its folder)")
    if torch.version.cuda
    else "this PyTorch was built without CUDA"
)


def triton_missing(device: torch.device) -> str | None:
    """Why no Triton kernel can run on tensors of this device; None where one can."""
    if device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"the tensors are on {device.type}, not on a GPU (TRITON_INTERPRET=1 runs kernels on the CPU, slowly)"
    if torch.version.hip:
        return "these kernels have instructions of NVIDIA's GPUs in them"
    try:
        import triton  # noqa: F401  (a statement, which torch.compile executes as it is; it refuses import_module)
    except ImportError as error:
        return f"Triton does not import: {error}"
    return None


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype that autocast asks for on this device; None where autocast is off."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Where autocast is on, off: the operators choose their dtypes themselves."""
    if autocast_dtype(device) is None:
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)

"""What the launches of all kernels share."""

import contextlib

import torch
from torch import Tensor


def on_device(t: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device, which need not be the tensors'."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def halves(step: float) -> tuple[float, float]:
    """A float64 as the sum of two float32, which is what a kernel's argument can be."""
    high = torch.tensor(step, dtype=torch.float32, device="cpu").item()
    return high, step - high

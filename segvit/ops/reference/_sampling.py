import torch
from torch import Tensor


def exact_dtype(device: torch.device | str) -> torch.dtype:
    """float64 where the device has it: Apple's GPUs do not."""
    return torch.float32 if torch.device(device).type == "mps" else torch.float64


def sample_positions(
    cells: int,  # grid cells along one axis
    size: int,  # output pixels along that axis
    extent: float,  # the part of the grid that the output covers, in cells
    device: torch.device | str = "cpu",
) -> Tensor:  # [size], float64 where the device has it
    """Where output pixels look along one axis, align_corners=False: clamp((i+½)·extent/size − ½, 0, cells−1)."""
    i = torch.arange(size, device=device, dtype=exact_dtype(device))
    return ((i + 0.5) * (extent / size) - 0.5).clamp(0, cells - 1)


def bilinear_matrix(
    cells: int,  # grid cells along one axis
    size: int,  # output pixels along that axis
    extent: float,  # the part of the grid that the output covers, in cells
    like: Tensor,  # gives dtype and device
) -> Tensor:  # [size, cells], rows sum to 1
    """Bilinear along one axis: weights of the cells around each pixel's position."""
    c = sample_positions(cells, size, extent, like.device)
    distance = (c[:, None] - torch.arange(cells, device=like.device, dtype=c.dtype)).abs()
    return (1 - distance).clamp(min=0).to(like.dtype)


def resize(
    x: Tensor,  # [..., h, w]
    size: tuple[int, int],
    extent: tuple[float, float] | None = None,
) -> Tensor:  # [..., H, W]
    """Bilinear resizing of a grid, or of its upper left part `extent`: equals pad, interpolate, crop."""
    h, w = x.shape[-2:]
    rows, columns = extent or (h, w)
    return bilinear_matrix(h, size[0], rows, x) @ x @ bilinear_matrix(w, size[1], columns, x).mT

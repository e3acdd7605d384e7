"""Argument checks of the operators: one clear ValueError that names the argument, its shape and what is wanted."""

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16)


def tensor(op: str, name: str, value: object, layout: str, dtypes: tuple = FLOATS) -> Tensor:
    """Check that `value` is a tensor with the dimensions of `layout`, such as "[B, N, C]", and one of `dtypes`."""
    if not isinstance(value, Tensor):
        raise ValueError(f"{op}: {name} must be a tensor {layout}, got {type(value).__name__}")
    if value.dim() != layout.count(",") + 1:
        raise ValueError(f"{op}: {name} must be {layout}, got shape {tuple(value.shape)}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise ValueError(f"{op}: {name} must have one of the dtypes {wanted}, got {value.dtype}")
    return value


def same_device(op: str, **tensors: Tensor | None) -> None:
    """Check that all given tensors share the first one's device."""
    given = {name: t for name, t in tensors.items() if t is not None}
    first, *rest = given
    for name in rest:
        if given[name].device != given[first].device:
            raise ValueError(f"{op}: {name} is on {given[name].device}, but {first} is on {given[first].device}")


def pair(op: str, name: str, value: object, low: int = 1) -> tuple[int, int]:
    """(height, width) from an int or a pair; every entry at least `low`."""
    try:
        height, width = (value, value) if isinstance(value, int) else value
        if all(isinstance(side, torch.SymInt) or int(side) == side for side in (height, width)):
            height, width = (side if isinstance(side, torch.SymInt) else int(side) for side in (height, width))
            if height >= low and width >= low:
                return height, width
    except (TypeError, ValueError):
        pass
    raise ValueError(f"{op}: {name} must be (height, width), each an integer of at least {low}, got {value!r}")


def extent(op: str, value: object, grid: tuple[int, int]) -> tuple[float, float]:
    """The part of the mask grid that the output covers, (rows, columns) in cells; None means all of it."""
    if value is None:
        return float(grid[0]), float(grid[1])
    try:
        rows, columns = (float(v) for v in value)
        if 0 < rows <= grid[0] and 0 < columns <= grid[1]:
            return rows, columns
    except (TypeError, ValueError):
        pass
    raise ValueError(
        f"{op}: extent must be (rows, columns) in cells, above 0 and within the grid {grid}, got {value!r}"
    )

"""Registration with torch.library: schemas live here in Python, so every operator exists without any binary."""

from collections.abc import Callable

import torch
from torch.autograd import forward_ad

LIBRARY = torch.library.Library("segvit", "FRAGMENT")


def register(
    schema: str, impl: Callable, fake: Callable, autograd: type[torch.autograd.Function] | None = None
) -> None:
    """Define segvit::NAME: `impl` for every device without a kernel of its own, `fake` for shapes, `autograd` on top.

    `autograd.apply` gets the operator's arguments in order. It runs only when a gradient is wanted, which is cheaper
    per call than torch.library.register_autograd and leaves float32 arguments alone under autocast.
    """
    name = schema.split("(", 1)[0]
    LIBRARY.define(schema)
    LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"segvit::{name}", fake, lib=LIBRARY)
    if autograd is None:
        return
    op = getattr(torch.ops.segvit, name).default

    def with_autograd(*args):
        if forward_ad._current_level >= 0 and any(
            isinstance(a, torch.Tensor) and forward_ad.unpack_dual(a).tangent is not None for a in args
        ):
            raise NotImplementedError(f"segvit::{name} has no forward-mode derivative; backend='reference' has")
        if torch.is_grad_enabled() and any(isinstance(a, torch.Tensor) and a.requires_grad for a in args):
            return autograd.apply(*args)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*args)

    LIBRARY.impl(name, with_autograd, "Autograd")


def below_autograd(op: Callable, *args):
    """Call an operator from its own autograd.Function without entering its Autograd key again."""
    with torch._C._AutoDispatchBelowAutograd():
        return op(*args)

"""The weights of a training: spread over processes (FSDP2) or not, their moving average, and all of them for a file."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: nn.Module, device: torch.device) -> None:
    """Spread parameters, gradients and optimizer state over all processes (FSDP2): a unit each block, one the rest.

    Units go to the device one by one, so that it never holds the whole model. The block that became query-based
    down-sampling is not called as a module, so it belongs to the rest.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for i, block in enumerate(model.backbone.model.blocks):
        if i != model.backbone.shrink_at:
            fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor that may be spread over processes, which then all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict:
    """All of the optimizer's state on the CPU, by parameter name: it fits one process, and any number of them."""
    return get_optimizer_state_dict(model, optimizer, options=WHOLE)


def load_optimizer_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict) -> None:
    set_optimizer_state_dict(model, optimizer, state, options=WHOLE)


class Weights:
    """What is evaluated and saved of a model in training: its weights, or their moving average.

    Made before the model is sharded or wrapped.

    Args:
        model: a SegViT.
        device: where it trains.
        ema: decay of the average, 0.999 say; smaller in the first steps, (1 + step) / (10 + step). None: no average.
        sharded: whether the model's parameters will be spread over processes.
    """

    def __init__(self, model: nn.Module, device: torch.device, ema: float | None = None, sharded: bool = False):
        self.model, self.ema, self.sharded, self.device = model, ema, sharded, device
        self.twin = copy.deepcopy(model) if ema is not None or sharded else None
        self._average: list[Tensor] | None = None

    def start(self, average: dict[str, Tensor] | None = None) -> None:
        """Once the model is where it trains: begin to average, from a saved average if there is one."""
        if self.twin is not None:
            self.twin.requires_grad_(False)
        if self.ema is None:
            return
        source = self.model if self.sharded else self.twin
        self._average = [p.detach().clone() if self.sharded else p for p in source.parameters()]
        for own, (name, p) in zip(self._average, self.model.named_parameters()):
            value = p.detach() if average is None else average[name].to(p.device)
            own.copy_(_spread_like(value, p))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """After an optimizer step, counted from 1."""
        if self._average is not None:
            decay = min(self.ema, (1 + step) / (10 + step))
            torch._foreach_lerp_(self._average, [p.detach() for p in self.model.parameters()], 1 - decay)

    @contextmanager
    def evaluated(self) -> Iterator[nn.Module]:
        """The model to evaluate and to keep, whole in every process; all processes must ask."""
        if not self.sharded:
            yield self.model if self.twin is None else self.twin
            return
        source = self.model.parameters() if self._average is None else self._average
        with torch.no_grad():
            for own, value in zip(self.twin.parameters(), source):
                own.copy_(whole(value.detach()))
        yield self.twin.to(self.device)
        self.twin.cpu()  # it has no place there while the model trains

    @torch.no_grad()
    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None]:
        """All of the weights, and of their average, by name on the CPU; all processes must ask."""
        weights = {name: whole(value).cpu() for name, value in self.model.state_dict().items()}
        if self._average is None:
            return weights, None
        names = [name for name, _ in self.model.named_parameters()]
        return weights, {name: whole(value).cpu() for name, value in zip(names, self._average)}


def _spread_like(value: Tensor, p: Tensor) -> Tensor:
    if not isinstance(p, DTensor) or isinstance(value, DTensor):
        return value
    return distribute_tensor(value, p.device_mesh, p.placements)

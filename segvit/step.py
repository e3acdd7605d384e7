"""A whole training step as one thing to run: a CUDA graph on a GPU, a compiled forward pass elsewhere."""

import warnings
from collections.abc import Callable

import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn

from segvit.losses import ATMLoss, ATMLossOutput

WARM_UP = 2  # steps of a shape that run as they are before the next one is captured
KEPT = 16  # captured steps that are kept; the oldest goes first


def compiled_step(
    model: nn.Module,
    loss: ATMLoss,
    optimizer: torch.optim.Optimizer,
    clip: float | None = 35.0,
    autocast: torch.dtype | None = None,
    graph: bool | None = None,
    compiled: bool = True,
    backend: str = "inductor",
) -> Callable[[Tensor, Tensor], ATMLossOutput]:
    """A function step(images, labels) that trains: forward, loss, backward, gradient clipping, optimizer.

    With a CUDA graph the host launches a handful of things a step and waits for nothing. The first steps of every shape
    run as they are, and train like all others; then the step is captured, and captured again for another shape, when a
    module changes its mode, a parameter its requires_grad or its storage, the loss or the optimizer an option, or when
    the optimizer loads a state. The learning rate may change at any time, by a scheduler or by hand. Dropout and drop
    path draw fresh numbers at every step.

    Args:
        model: a SegViT, in the mode it should train in.
        loss: its ATMLoss; moved to the model's device.
        optimizer: of the model's parameters. With a graph, one of torch's that have `capturable`, such as AdamW, which
            is switched on; learning rates become tensors.
        clip: largest norm of all gradients; None: no clipping.
        autocast: torch.bfloat16, or None for none.
        graph: capture a CUDA graph; None: where the model is on a GPU.
        compiled: torch.compile the forward pass and the loss, as one graph.
        backend: of torch.compile.

    Returns:
        step(images [B, C, H, W], labels [B, H, W]) → ATMLossOutput, detached.

    Raises:
        ValueError: nothing to do (neither graph nor compiled), another autocast than bfloat16, a loss with debug=True,
            which looks at labels on the host.
        RuntimeError: a graph that cannot be captured, and why: no GPU, several processes, an optimizer without
            `capturable`, or an operation that waits for the device.
    """
    device = next(model.parameters()).device
    graph = device.type == "cuda" if graph is None else graph
    if not graph and not compiled:
        raise ValueError("compiled_step: neither graph nor compiled, which leaves nothing to do")
    if autocast not in (None, torch.bfloat16):
        raise ValueError(f"compiled_step: autocast must be torch.bfloat16 or None, got {autocast}")
    if loss.debug:
        raise ValueError("compiled_step: a loss with debug=True looks at labels on the host; use it in a plain step")
    if graph:
        _check_graph(device, optimizer)
    return _Step(model, loss.to(device), optimizer, clip, autocast, graph, compiled, backend)


def _check_graph(device: torch.device, optimizer: torch.optim.Optimizer) -> None:
    reason = None
    if device.type != "cuda":
        reason = f"the model is on {device.type}, not on a GPU"
    elif dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        reason = "several processes exchange gradients, which is not captured here"
    elif any("capturable" not in group for group in optimizer.param_groups):
        reason = f"{type(optimizer).__name__} has no option `capturable`; torch.optim.AdamW has"
    if reason:
        raise RuntimeError(f"compiled_step: no CUDA graph can be captured: {reason}; graph=False compiles without one")


class _Step:
    def __init__(self, model, loss, optimizer, clip, autocast, graph, compiled, backend):
        self.model, self.loss, self.optimizer, self.clip, self.autocast = model, loss, optimizer, clip, autocast
        self.device = next(model.parameters()).device
        self.forward = self._forward
        if compiled:
            self.forward = torch.compile(self._forward, fullgraph=True, dynamic=False, backend=backend)
        self.graphs = {} if graph else None  # by shape and options: steps so far, or what was captured
        self.rates, self.norm = [], None  # norm: of the last step's gradients, 0-d; 0 without clip
        if graph:
            self.stream, self.pool = _side_stream(self.device), None
            self._make_capturable()
            optimizer.register_load_state_dict_post_hook(lambda _: self._make_capturable())

    def __call__(self, images: Tensor, labels: Tensor) -> ATMLossOutput:
        images, labels = (t.to(self.device, non_blocking=True) for t in (images, labels))
        if self.graphs is None:
            return self._split(self._step(images, labels))
        self._take_rates()
        key = self._key(images, labels)
        found = self.graphs.setdefault(key, 0)
        if len(self.graphs) > KEPT:
            del self.graphs[next(iter(self.graphs))]
            warnings.warn(
                f"compiled_step: more than {KEPT} shapes and settings; steps that always change are never captured "
                "(does a scheduler change more than the learning rate?)",
                stacklevel=2,
            )
        if found == WARM_UP:
            found = self.graphs[key] = self._captured(images, labels)
        if isinstance(found, int):
            self.graphs[key] += 1
            return self._split(self._aside(images, labels))
        replay, held, packed = found
        for buffer, given in zip(held, (images, labels)):
            buffer.copy_(given, non_blocking=True)
        replay()
        return self._split(packed.clone())

    def _forward(self, images: Tensor, labels: Tensor) -> Tensor:
        terms = self.loss(self.model(images), labels)
        edge = [] if terms.edge is None else [terms.edge[None]]
        return torch.cat([terms.total[None], terms.ce, terms.focal, terms.dice, *edge])

    def _step(self, images: Tensor, labels: Tensor) -> Tensor:  # total; ce, focal, dice of every stage; edge; norm
        enabled = self.autocast is not None  # without the cache of casts, which would outlive a captured step
        casts = torch.autocast(self.device.type, dtype=self.autocast, enabled=enabled, cache_enabled=False)
        shapes = torch._dynamo.config.patch(recompile_limit=1 << 16, accumulated_recompile_limit=1 << 16)  # no limit
        with casts, shapes:
            packed = self.forward(images, labels)
        packed[0].backward()
        norm = packed.new_zeros(())
        if self.clip is not None:
            parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
            norm = nn.utils.clip_grad_norm_(parameters, self.clip)
        self.optimizer.step()
        self._zero_grad()
        return torch.cat([packed.detach(), norm.detach()[None]])

    def _zero_grad(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.model.zero_grad(set_to_none=True)  # what the optimizer does not have, too

    def _split(self, packed: Tensor) -> ATMLossOutput:
        packed, self.norm = packed[:-1], packed[-1]
        stages, with_edge = divmod(len(packed) - 1, 3)
        per_stage = packed[1 : 1 + 3 * stages].chunk(3)
        return ATMLossOutput(packed[0], *per_stage, packed[-1] if with_edge else None)

    def _aside(self, images: Tensor, labels: Tensor) -> Tensor:
        """A step as it is, on a stream of its own, as capture wants what comes before."""
        if self.stream is None:
            return self._step(images, labels)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            packed = self._step(images, labels)
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
        return packed

    def _captured(self, images: Tensor, labels: Tensor) -> tuple[Callable, tuple[Tensor, Tensor], Tensor]:
        """Replay, the tensors that it reads, and the one that it writes."""
        held = images.to(self.device, copy=True), labels.to(self.device, copy=True)
        self._zero_grad()
        try:
            replay, packed, self.pool = _capture(lambda: self._step(*held), self.pool, self.device)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:500]
            what = "compiled_step: the step cannot be captured as a CUDA graph"
            raise RuntimeError(f"{what}: {reason}; graph=False compiles without one") from error
        return replay, held, packed

    def _make_capturable(self) -> None:
        """Switch on what a graph needs; captured steps, which know the optimizer's old state, go."""
        self.graphs.clear()
        for group in self.optimizer.param_groups:
            group["capturable"] = True
        self._take_rates()
        for state in self.optimizer.state.values():
            for name, value in state.items():  # of steps before, on the host until now
                if isinstance(value, Tensor) and value.dim() == 0:
                    state[name] = value.to(self.device)

    def _take_rates(self) -> None:
        """Learning rates that were set anew go to the tensors that the graph reads."""
        for i, group in enumerate(self.optimizer.param_groups):
            given = group["lr"]
            if i == len(self.rates):
                own = isinstance(given, Tensor) and given.device.type == self.device.type and given.dim() == 0
                shared = any(given is rate for rate in self.rates)
                self.rates.append(given if own and not shared else torch.full((), float(given), device=self.device))
            elif given is not self.rates[i]:
                self.rates[i].copy_(given) if isinstance(given, Tensor) else self.rates[i].fill_(given)
            group["lr"] = self.rates[i]

    def _key(self, images: Tensor, labels: Tensor) -> tuple:
        """All that a captured step has in it and that may change."""
        plain = (int, float, str, tuple, type(None))
        options = [tuple(v for v in group.values() if isinstance(v, plain)) for group in self.optimizer.param_groups]
        loss = tuple(value for value in vars(self.loss).values() if isinstance(value, plain))
        parameters = tuple((p.data_ptr(), p.requires_grad) for p in self.model.parameters())
        modes = tuple(module.training for module in self.model.modules())
        shapes = images.shape, images.dtype, labels.shape, labels.dtype
        return (*shapes, self.clip, tuple(options), loss, parameters, modes)


def _side_stream(device: torch.device):
    return torch.cuda.Stream(device)


def _capture(call: Callable[[], Tensor], pool, device: torch.device) -> tuple[Callable, Tensor, object]:
    graph, stream = torch.cuda.CUDAGraph(), _side_stream(device)
    # other threads, which load data, may go on talking to the GPU
    with torch.cuda.device(device), torch.cuda.graph(graph, pool, stream, "thread_local"):
        packed = call()

    def replay() -> None:
        with torch.cuda.device(device):
            graph.replay()

    return replay, packed, graph.pool()

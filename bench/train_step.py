"""A whole training step, forward to optimizer, against the bare backbone's and against the usual full-size loss.

python bench/train_step.py            # all models; writes bench/results/train_step_<device>.json
python bench/train_step.py --quick    # one model and batch size, few repetitions

Every candidate clips its gradients and steps AdamW over its own parameters. (a) "bare backbone": forward, backward from
fixed gradients of the features, clipping, optimizer. (b) "eager loss": the same model and the loss that
bench/mask_loss_kernel.py calls eager, with CE; compiled, model and loss both are (picking the masks that are present
breaks the graph). Ours: in plain PyTorch, compiled, and as CUDA graph (segvit.compiled_step). Labels have ten classes
an image. On a GPU under bfloat16 autocast, with the share of the step that the GPU is busy and the kernels that it
runs, counted by torch.profiler; on a CPU in float32, a ViT-Tiny at batch 2.
"""

import harness
import torch
import torch.nn.functional as F
from mask_loss_kernel import eager as eager_mask_loss
from torch import nn
from torch.profiler import ProfilerActivity, profile

import segvit

TINY = {"backbone": "vit_tiny_patch16_384.augreg_in21k_ft_in1k", "num_classes": 150, "image_size": 512}
MODELS = {
    "ViT-Ti 512": TINY,
    "ViT-B 512": "segvit_base_ade20k_512",
    "ViT-L 640": "segvit_large_ade20k_640",
    "ViT-L 640, Shrunk": "segvit_large_shrunk_ade20k_640",
}
CLASSES = 10


class EagerLoss(nn.Module):
    """ATMLoss as it is usually written."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.num_classes = num_classes
        self.register_buffer("weight", torch.tensor([1.0] * num_classes + [0.1]))

    def forward(self, out, labels):
        K, size = self.num_classes, out.class_logits.shape[1]
        found = torch.zeros(size, 256, dtype=torch.bool, device=labels.device)
        present = found.scatter(1, labels.flatten(1), True)[:, :K]
        target = torch.where(present, torch.arange(K, device=labels.device).expand(size, -1), K)
        ce = sum(F.cross_entropy(stage.transpose(1, 2), target, self.weight) for stage in out.class_logits.float())
        focal, dice = eager_mask_loss(out.mask_logits, labels, present, present.sum().clamp(min=1))
        return ce + (20 * focal + dice).sum()


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    given = MODELS[name]
    model = segvit.create_model(given) if isinstance(given, str) else segvit.SegViT(**given)
    return model.train().to(harness.device())


def optimise(parameters: list, optimizer: torch.optim.Optimizer) -> None:
    nn.utils.clip_grad_norm_(parameters, 35.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def adamw(parameters) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=torch.tensor(1e-6, device=harness.device()), capturable=gpu())


def gpu() -> bool:
    return torch.cuda.is_available()


def autocast():
    return torch.autocast("cuda", dtype=torch.bfloat16, enabled=gpu(), cache_enabled=False)


def backbone_step(name: str, images, compiled: bool):
    model = model_of(name)
    forward, optimizer = model.backbone, adamw(model.backbone.parameters())
    forward = torch.compile(forward) if compiled else forward
    parameters = list(model.backbone.parameters())
    with autocast(), torch.no_grad():
        upstream = [torch.randn_like(tokens) * 1e-3 for tokens in model.backbone(images).tokens]

    def step():
        with autocast():
            tokens = forward(images).tokens
        torch.autograd.backward(tokens, upstream)
        optimise(parameters, optimizer)

    return step


def model_step(name: str, images, labels, loss: nn.Module, compiled: bool):
    model, loss = model_of(name), loss.to(harness.device())
    optimizer = adamw(model.parameter_groups(lr=1e-6))
    forward, parameters = model, list(model.parameters())
    if compiled:
        forward, loss = torch.compile(model), torch.compile(loss)

    def step():
        with autocast():
            terms = loss(forward(images), labels)
        (terms if isinstance(terms, torch.Tensor) else terms.total).backward()
        optimise(parameters, optimizer)

    return step


def compiled_step(name: str, images, labels, graph: bool):
    model = model_of(name)
    options = {"autocast": torch.bfloat16 if gpu() else None, "graph": graph}
    step = segvit.compiled_step(model, segvit.ATMLoss(150), adamw(model.parameter_groups(lr=1e-6)), **options)
    return lambda: step(images, labels)


def candidates(name: str, images, labels) -> dict:
    """By name, a function that builds the step: one model lives at a time."""
    calls = {
        "bare backbone, eager": lambda: backbone_step(name, images, False),
        "bare backbone, compiled": lambda: backbone_step(name, images, True),
        "eager loss, eager model": lambda: model_step(name, images, labels, EagerLoss(150), False),
        "eager loss, compiled": lambda: model_step(name, images, labels, EagerLoss(150), True),
        "ours, eager": lambda: model_step(name, images, labels, segvit.ATMLoss(150), False),
        "ours, compiled": lambda: compiled_step(name, images, labels, False),
    }
    if gpu():
        calls["ours, graph"] = lambda: compiled_step(name, images, labels, True)
    return calls


def counted(step) -> dict:
    """Kernels of a step, and the share of its time that they run."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        for _ in range(3):
            step()
        torch.cuda.synchronize()
    kernels = [e for e in profiler.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    start, end = (f(e.time_range.start if f is min else e.time_range.end for e in kernels) for f in (min, max))
    busy = sum(e.time_range.elapsed_us() for e in kernels) / (end - start)
    return {"kernels": len(kernels) // 3, "busy": min(busy, 1.0)}


def run(name: str, batch: int, seconds: float) -> list[dict]:
    side = 640 if "640" in name else 512
    images = torch.randn(batch, 3, side, side, device=harness.device())
    coarse = torch.stack([torch.randperm(150)[:CLASSES][torch.arange(64) % CLASSES].view(8, 8) for _ in range(batch)])
    labels = F.interpolate(coarse[:, None].float(), (side, side), mode="nearest")[:, 0].long().to(harness.device())
    labels[:, :4] = 255
    rows = []
    for label, build in candidates(name, images, labels).items():
        torch._dynamo.reset()
        step = build()
        result = harness.measure(step, seconds, 3)
        if label.endswith("graph"):
            result["peak_mib"] = None  # a graph's memory was taken when it was captured
        extra = counted(step) if gpu() else {"peak_mib": harness.peak_mib(step)}
        rows.append({"model": name, "batch": batch, "what": label, **result, **extra})
        del step
    for row in rows:
        kind = "eager" if row["what"].endswith("eager") or "eager model" in row["what"] else "compiled"
        bare = next(r for r in rows if r["what"] == f"bare backbone, {kind}")
        row["images_per_s"] = 1e3 * batch / row["p50_ms"]
        row["vs_backbone"] = row["p50_ms"] / bare["p50_ms"]
        row["memory_vs_backbone"] = row["peak_mib"] / bare["peak_mib"] if bare["peak_mib"] else None
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("step"):
        raise SystemExit("the tests of the training step are red: no numbers are printed")
    names = list(MODELS) if gpu() and not arguments.quick else list(MODELS)[:1]
    rows = []
    for name in names:
        for batch in (2, 8, 16) if gpu() and not arguments.quick else (2,):
            rows += run(name, batch, 0.5 if arguments.quick else 3.0)
    columns = ["model", "batch", "what", "p20_ms", "p50_ms", "p80_ms", "images_per_s", "peak_mib", "vs_backbone"]
    print(harness.table(rows, [*columns, "memory_vs_backbone", "kernels", "busy"]))
    print(harness.write("train_step", arguments.out, rows=rows))


if __name__ == "__main__":
    main()

"""mask_loss: our paths against eager, torch.compile of it, point sampling as in Mask2Former, and the floor.

python bench/mask_loss_kernel.py            # all shapes; writes bench/results/mask_loss_kernel_<device>.json
python bench/mask_loss_kernel.py --quick    # one shape

Three stages; forward alone, and forward + backward. "eager" is what a careful user writes: the masks of the classes
that are present, picked, upsampled, focal and dice on all pixels. "point sampling" is Mask2Former's way out, another
loss: 12544 points a mask, three quarters of them where the mask is least sure among three times as many. The floor, on
a GPU alone: three special functions a pixel of a mask and stage, 16 of them an SM and clock.
"""

import harness
import torch
import torch.nn.functional as F

from segvit.ops import mask_loss

SHAPES = {  # name: (B, N, classes in an image, grid, labels)
    "B=2, 10 classes, 512": (2, 150, 10, (32, 32), (512, 512)),
    "B=16, 5 classes, 640": (16, 150, 5, (40, 40), (640, 640)),
    "B=16, 10 classes, 640": (16, 150, 10, (40, 40), (640, 640)),
    "B=16, 40 classes, 640": (16, 150, 40, (40, 40), (640, 640)),
    "B=2, 40 classes, 512": (2, 150, 40, (32, 32), (512, 512)),
    "B=2, 10 classes, 640": (2, 150, 10, (40, 40), (640, 640)),
    "B=2, 10 classes, 1024": (2, 150, 10, (64, 64), (1024, 1024)),
}
ON_CPU = ("B=2, 10 classes, 512", "B=2, 10 classes, 640", "B=2, 40 classes, 512", "B=2, 10 classes, 1024")
STAGES, POINTS = 3, 12544
EAGER = "eager"


def eager(logits, labels, present, num_masks):
    """Focal and dice loss of the masks that are present, at the labels' size."""
    b, n = present.nonzero(as_tuple=True)
    valid = (labels != 255)[b]
    t = (labels[b] == n[:, None, None]) & valid
    focal, dice = [], []
    for stage in logits:
        x = F.interpolate(stage[b, n][None], labels.shape[1:], mode="bilinear", align_corners=False)[0]
        target, p = t.to(x.dtype), x.sigmoid()
        p_t = p * target + (1 - p) * (1 - target)
        bce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        alpha_t = 0.25 * target + 0.75 * (1 - target)
        pixels = valid.sum((1, 2))
        focal.append(((alpha_t * (1 - p_t) ** 2 * bce * valid).sum((1, 2)) / pixels).sum() / num_masks)
        p = p * valid
        overlap = (p * target).sum((1, 2))
        dice.append((1 - (2 * overlap + 1) / (p.sum((1, 2)) + target.sum((1, 2)) + 1)).sum() / num_masks)
    return torch.stack(focal), torch.stack(dice)


def point_sampling(logits, labels, present, num_masks):
    """Focal and dice loss at sampled points: the most unsure of many, and some at random."""
    b, n = present.nonzero(as_tuple=True)
    t = (labels[b] == n[:, None, None])[:, None].to(logits.dtype)
    focal, dice = [], []
    for stage in logits:
        x = stage[b, n][:, None]
        with torch.no_grad():
            many = torch.rand(len(b), 3 * POINTS, 1, 2, device=x.device) * 2 - 1
            unsure = -F.grid_sample(x, many, align_corners=False)[:, 0, :, 0].abs()
            chosen = unsure.topk(POINTS * 3 // 4, dim=1).indices[:, :, None, None].expand(-1, -1, 1, 2)
            some = torch.rand(len(b), POINTS - POINTS * 3 // 4, 1, 2, device=x.device) * 2 - 1
            points = torch.cat([many.gather(1, chosen), some], 1)
            target = F.grid_sample(t, points, align_corners=False, mode="nearest")[:, 0, :, 0]
        x = F.grid_sample(x, points, align_corners=False)[:, 0, :, 0]
        p = x.sigmoid()
        bce = F.binary_cross_entropy_with_logits(x, target, reduction="none")
        p_t = p * target + (1 - p) * (1 - target)
        focal.append(((0.75 - 0.5 * target) * (1 - p_t) ** 2 * bce).mean(1).sum() / num_masks)
        overlap = (p * target).sum(1)
        dice.append((1 - (2 * overlap + 1) / (p.sum(1) + target.sum(1) + 1)).sum() / num_masks)
    return torch.stack(focal), torch.stack(dice)


def candidates() -> dict:
    return {
        EAGER: eager,
        "torch.compile of eager": torch.compile(eager, dynamic=False),
        "point sampling (another loss)": point_sampling,
        "ours (auto)": mask_loss,
        "ours (tiled)": lambda *inputs: mask_loss(*inputs, backend="tiled"),
    }


def inputs(name: str) -> tuple:
    B, N, classes, grid, size = SHAPES[name]
    where = harness.device()
    logits = torch.randn(STAGES, B, N, *grid, device=where) * 3
    # regions of `classes` classes, and a border that is ignored
    coarse = torch.stack([torch.randperm(classes)[torch.arange(64) % classes].view(8, 8) for _ in range(B)])
    own = torch.stack([torch.randperm(N)[:classes] for _ in range(B)])
    labels = own.gather(1, coarse.flatten(1)).view(B, 1, 8, 8).float()
    labels = F.interpolate(labels, size, mode="nearest")[:, 0].long().to(where)
    labels[:, :4] = 255
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(N)], 1)
    return logits.requires_grad_(), labels, present, present.sum().float()


def run(name: str, seconds: float) -> list[dict]:
    torch._dynamo.reset()
    given, gpu = inputs(name), torch.cuda.is_available()
    B, _, classes, _, size = SHAPES[name]
    rows = []
    for label, call in candidates().items():

        def forward(call=call):
            with torch.no_grad():
                return call(*given)

        def both(call=call):
            focal, dice = call(*given)
            return torch.autograd.grad(focal.sum() + dice.sum(), given[0])

        for kind, timed in (("forward", forward), ("forward + backward", both)):
            result = harness.measure(timed, seconds, 3)
            if not gpu:
                result["peak_mib"] = harness.peak_mib(timed)
            rows.append({"shape": name, "pass": kind, "what": label, **result})
            if gpu:
                pixels = STAGES * B * classes * size[0] * size[1] * (1 if kind == "forward" else 2)
                properties = torch.cuda.get_device_properties(0)
                per_second = 16 * properties.multi_processor_count * properties.clock_rate * 1e3
                rows[-1]["vs_floor"] = result["p50_ms"] / (3e3 * pixels / per_second)
    for row in rows:
        other = next(r for r in rows if r["what"] == EAGER and r["pass"] == row["pass"])
        row["vs_eager"] = other["p50_ms"] / row["p50_ms"]
        row["memory_vs_eager"] = row["peak_mib"] / other["peak_mib"] if other["peak_mib"] else None
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("mask_loss"):
        raise SystemExit("the tests of mask_loss are red: no numbers are printed")
    gpu, more = torch.cuda.is_available(), {}
    names = [name for name in SHAPES if gpu or name in ON_CPU]
    rows = []
    for name in names[:1] if arguments.quick else names:
        rows += run(name, 0.2 if arguments.quick else 1.0)
    columns = ["shape", "pass", "what", "p20_ms", "p50_ms", "p80_ms", "peak_mib", "vs_eager", "memory_vs_eager"]
    print(harness.table(rows, [*columns, "vs_floor"]))
    if not gpu:
        print("\nno GPU here: nothing above is a GPU number. What the compiler makes of the kernels:")
        import static

        more["static"] = [row for row in static.static_table() if row["op"] == "mask_loss"]
        print(harness.table(more["static"], static.COLUMNS))
    print(harness.write("mask_loss_kernel", arguments.out, rows=rows, **more))


if __name__ == "__main__":
    main()

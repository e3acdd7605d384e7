"""A whole model's inference, images to label maps, against its bare backbone and against others of the same size.

python bench/inference.py            # all models; writes bench/results/inference_<device>.json
python bench/inference.py --quick    # one model, few repetitions

Against (a) the bare backbone, eager and compiled, (b) the same model with the eager pipeline behind it (masks at full
size, contraction, argmax), (c) transformers' EoMT and Mask2Former at the same size, where transformers is installed,
with their own post-processing. All candidates of a model are timed in turn. Weights are random, so the decoder's output
is replaced by what a trained model says of images with ten classes (harness.trained_like, added to it, so that nothing
is skipped). Everything from the normalised image to the label map is included; "windows" predicts an image of 1.5
times the width in sliding windows, and is compared with the backbone on those windows. `pruned` drops class tokens
below 0.01.
On a GPU under bfloat16 autocast, at batch 1 and 16, also as CUDA graphs; on a CPU in float32 at batch 1.
"""

import harness
import torch
import torch.nn.functional as F
from torch import nn

import segvit
from segvit.inference import evaluating

MODELS = {  # registry name: width, depth, heads of the ViT; embed_dim and depths of a Swin of that size
    "segvit_base_ade20k_512": ((768, 12, 12), (128, [2, 2, 18, 2])),
    "segvit_large_ade20k_640": ((1024, 24, 16), (192, [2, 2, 18, 2])),
}
PRUNE = 0.01


class Trained(nn.Module):
    """A decoder whose answers are those of a trained one."""

    def __init__(self, decoder: nn.Module, grid: tuple[int, int], classes: int):
        super().__init__()
        self.decoder = decoder
        masks, logits = harness.trained_like(1, classes, classes, grid)
        self.register_buffer("masks", masks.flatten(2))
        self.register_buffer("logits", logits)

    def forward(self, features):
        logits, masks = self.decoder(features)
        return self.logits + 1e-6 * logits, self.masks + 1e-6 * masks


def eager_pipeline(model, images):
    out = model(images)
    probs = out.class_logits[-1].softmax(-1)[..., :-1]
    masks = F.interpolate(out.mask_logits[-1], images.shape[2:], mode="bilinear", align_corners=False).sigmoid()
    return torch.einsum("bqc,bqhw->bchw", probs, masks).argmax(1).to(torch.uint8)


def graphed(call):
    """The call as a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph.replay


def others(side: int, vit: tuple, swin: tuple, images: torch.Tensor) -> dict:
    """EoMT and Mask2Former of the same size with their own post-processing; nothing where transformers is missing."""
    try:
        import transformers
    except ImportError:
        print("transformers is not installed: no EoMT, no Mask2Former")
        return {}
    width, depth, heads = vit
    sizes = [(side, side)] * len(images)
    labels = {i: str(i) for i in range(150)}
    eomt = transformers.EomtForUniversalSegmentation(
        transformers.EomtConfig(
            hidden_size=width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=side,
            num_queries=100,
            id2label=labels,
        )
    )
    backbone = transformers.SwinConfig(
        embed_dim=swin[0],
        depths=swin[1],
        num_heads=[swin[0] // 32 * 2**i for i in range(4)],
        window_size=12,
        image_size=384,
        out_features=["stage1", "stage2", "stage3", "stage4"],
    )
    config = transformers.Mask2FormerConfig(backbone_config=backbone, id2label=labels)
    mask2former = transformers.Mask2FormerForUniversalSegmentation(config)
    post = transformers.EomtImageProcessor(size={"shortest_edge": side, "longest_edge": None})
    post2 = transformers.Mask2FormerImageProcessor()
    eomt, mask2former = eomt.eval().to(images.device), mask2former.eval().to(images.device)
    eomt.attn_mask_probs.zero_()  # as at the end of training: no masked attention in inference

    def run_eomt():
        out = eomt(pixel_values=images)
        out.patch_offsets = None
        return post.post_process_semantic_segmentation(out, sizes)

    def run_mask2former():
        return post2.post_process_semantic_segmentation(mask2former(pixel_values=images), sizes)

    return {"transformers' EoMT": run_eomt, "transformers' Mask2Former (Swin)": run_mask2former}


def candidates(name: str, batch: int) -> dict:
    device = harness.device()
    model = segvit.create_model(name).eval().to(device)
    side = model.image_size[0]
    model.decoder = Trained(model.decoder, model.backbone.grid, model.num_classes)
    images = torch.randn(batch, 3, side, side, device=device)
    wide = torch.randn(batch, 3, side, side * 3 // 2, device=device)
    windows = torch.randn(2 * batch, 3, side, side, device=device)  # at 0 and at the right edge
    compiled, backbone, pipeline = torch.compile(model), torch.compile(model.backbone), torch.compile(eager_pipeline)
    calls = {
        "bare backbone, eager": lambda: model.backbone(images),
        "bare backbone, compiled": lambda: backbone(images),
        "bare backbone on the windows, eager": lambda: model.backbone(windows),
        "eager pipeline": lambda: eager_pipeline(model, images),
        "eager pipeline, compiled": lambda: pipeline(model, images),
        "ours, eager": lambda: segvit.predict(model, images),
        "ours, compiled": lambda: segvit.predict(compiled, images),
        "ours, eager, pruned": lambda: segvit.predict(model, images, prune=PRUNE),
        "ours, compiled, pruned": lambda: segvit.predict(compiled, images, prune=PRUNE),
        "ours, windows, eager": lambda: segvit.predict(model, wide, mode="slide", window_batch=2 * batch),
    }
    with evaluating(model):
        assert (calls["ours, eager"]() == calls["eager pipeline"]()).float().mean() > 0.99
    calls |= others(side, *MODELS[name], images)
    if device.type == "cuda":
        calls["bare backbone, graph"] = graphed(calls["bare backbone, compiled"])
        calls["ours, graph"] = graphed(calls["ours, compiled"])
        calls["ours, graph, pruned"] = graphed(calls["ours, compiled, pruned"])
    return calls


def against(label: str) -> str:
    """The bare backbone that a candidate is compared with."""
    if "windows" in label:
        return "bare backbone on the windows, eager"
    if "graph" in label:
        return "bare backbone, graph"
    return "bare backbone, compiled" if "compiled" in label else "bare backbone, eager"


@torch.no_grad()
def run(name: str, batch: int, rounds: int) -> list[dict]:
    torch._dynamo.reset()
    with torch.autocast("cuda", dtype=torch.bfloat16, enabled=torch.cuda.is_available()):
        measured = harness.interleaved(candidates(name, batch), rounds)
    rows = [{"model": name, "batch": batch, "what": label, **result} for label, result in measured.items()]
    for row in rows:
        row["images_per_s"] = 1e3 * batch / row["p50_ms"]
        row["vs_backbone"] = row["p50_ms"] / measured[against(row["what"])]["p50_ms"]
        row["vs_compiled_backbone"] = row["p50_ms"] / measured["bare backbone, compiled"]["p50_ms"]
    return rows


def main() -> None:
    arguments = harness.arguments(__doc__.splitlines()[0])
    if not harness.tests_are_green("inference"):
        raise SystemExit("the tests of inference are red: no numbers are printed")
    gpu = torch.cuda.is_available()
    names = list(MODELS) if gpu and not arguments.quick else list(MODELS)[:1]
    rows = []
    for name in names:
        for batch in (1, 16) if gpu else (1,):
            rows += run(name, batch, 3 if arguments.quick else 30 if gpu else 7)
    columns = ["model", "batch", "what", "p20_ms", "p50_ms", "p80_ms", "images_per_s", "peak_mib", "vs_backbone"]
    print(harness.table(rows, [*columns, "vs_compiled_backbone"]))
    print(harness.write("inference", arguments.out, rows=rows))


if __name__ == "__main__":
    main()

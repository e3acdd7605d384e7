"""Writes tests/data/small.safetensors: a tiny model in the official layout, and its outputs in float64.

Run by hand after a change that is meant to alter results: python tests/make_small.py
"""

import torch
from safetensors.torch import save_file
from test_convert import SMALL, SMALL_CONFIG

import segvit


def official_state(generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Seeded noise under the official names of SMALL_CONFIG's model."""
    C, D, K = 16, 8, 3
    shapes = {"backbone.pos_embed": (1, 17, C), "backbone.cls_token": (1, 1, C)}

    def linear(name: str, out: int, *inputs: int):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, *inputs), (out,)

    linear("backbone.patch_embed.projection", C, 3, 8, 8)
    for i in range(2):
        block = f"backbone.layers.{i}"
        shapes |= {f"{block}.attn.attn.in_proj_weight": (3 * C, C), f"{block}.attn.attn.in_proj_bias": (3 * C,)}
        linear(f"{block}.attn.attn.out_proj", C, C)
        linear(f"{block}.ffn.layers.0.0", 4 * C, C)
        linear(f"{block}.ffn.layers.1", C, 4 * C)
        linear(f"{block}.ln1", C)
        linear(f"{block}.ln2", C)
        linear(f"decode_head.input_proj_{i + 1}", D, C)
        linear(f"decode_head.proj_norm_{i + 1}", D)
        for j in range(2):
            layer = f"decode_head.decoder_{i + 1}.layers.{j}"
            shapes |= {f"{layer}.self_attn.in_proj_weight": (3 * D, D), f"{layer}.self_attn.in_proj_bias": (3 * D,)}
            linear(f"{layer}.self_attn.out_proj", D, D)
            for part in ("q", "k", "v", "proj"):
                linear(f"{layer}.multihead_attn.{part}", D, D)
            linear(f"{layer}.linear1", 4 * D, D)
            linear(f"{layer}.linear2", D, 4 * D)
            for n in (1, 2, 3):
                linear(f"{layer}.norm{n}", D)
    shapes["decode_head.q.weight"] = (K, D)
    linear("decode_head.class_embed", K + 1, D)
    return {name: torch.randn(shape, generator=generator) * 0.4 for name, shape in shapes.items()}


def main() -> None:
    generator = torch.Generator().manual_seed(7)
    state = official_state(generator)
    image = torch.randn(2, 3, 29, 35, generator=generator)  # no multiple of the patch: padding and extent take part
    labels = torch.randint(0, 3, (2, 29, 35), generator=generator)
    labels[0, :5] = 255
    model = segvit.from_official(state, SMALL_CONFIG).double()
    with torch.no_grad():
        out = model(image.double())
        total = segvit.ATMLoss(3).double()(out, labels).total
        scores = segvit.predict(model, image.double(), (37, 41), output="scores", protocol="paper")
    outputs = {"class_logits": out.class_logits, "mask_logits": out.mask_logits, "total": total, "scores": scores}
    inputs = {"image": image, "labels": labels.to(torch.uint8)}
    save_file(inputs | outputs | {f"state/{name}": value for name, value in state.items()}, SMALL)


if __name__ == "__main__":
    main()

import socket
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F

import segvit
from segvit.losses import mixed_patches
from segvit.ops import mask_loss


def outputs(S=2, B=3, K=4, grid=(5, 6), dtype=torch.float64):
    class_logits = torch.randn(S, B, K, K + 1, dtype=dtype, requires_grad=True)
    mask_logits = torch.randn(S, B, K, *grid, dtype=dtype, requires_grad=True)
    return SimpleNamespace(class_logits=class_logits, mask_logits=mask_logits)


def labelled(B=3, K=4, size=(20, 24)):
    labels = torch.randint(0, K - 1, (B, *size))
    labels[0, :7] = 255
    labels[-1] = 255
    return labels


def test_total_is_the_sum_of_the_weighted_terms():
    out, labels = outputs(), labelled()
    losses = segvit.ATMLoss(4).double()(out, labels)
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(4)], 1)
    focal, dice = mask_loss(out.mask_logits, labels, present, present.sum().double())
    torch.testing.assert_close(losses.focal, 20 * focal)
    torch.testing.assert_close(losses.dice, dice)
    target = torch.where(present, torch.arange(4), 4)
    weight = torch.tensor([1.0, 1, 1, 1, 0.1], dtype=torch.float64)
    for stage, ce in zip(out.class_logits, losses.ce):
        torch.testing.assert_close(ce, F.cross_entropy(stage.transpose(1, 2), target, weight=weight))
    torch.testing.assert_close(losses.total, (losses.ce + losses.focal + losses.dice).sum())


def test_weights_of_the_terms_and_of_the_classes():
    out, labels = outputs(), labelled()
    plain = segvit.ATMLoss(4).double()(out, labels)
    other = segvit.ATMLoss(4, ce_weight=2, focal_weight=1, dice_weight=3).double()(out, labels)
    torch.testing.assert_close(other.total, (2 * plain.ce + plain.focal / 20 + 3 * plain.dice).sum())
    weighted = segvit.ATMLoss(4, class_weights=[1.0, 5.0, 0.5, 2.0]).double()(out, labels)
    present = torch.stack([(labels == n).flatten(1).any(1) for n in range(4)], 1)
    target = torch.where(present, torch.arange(4), 4)
    want = F.cross_entropy(
        out.class_logits[0].transpose(1, 2), target, weight=torch.tensor([1, 5, 0.5, 2, 0.1], dtype=torch.float64)
    )
    torch.testing.assert_close(weighted.ce[0], want)
    torch.testing.assert_close(weighted.focal, plain.focal)


def test_the_two_treatments_of_ignored_pixels_differ_only_where_pixels_are_ignored():
    out, labels = outputs(), labelled()
    masked, negative = (segvit.ATMLoss(4, ignored=how).double()(out, labels) for how in ("masked", "negative"))
    assert not torch.isclose(masked.focal, negative.focal).any()
    labels = torch.randint(0, 4, (3, 20, 24))
    masked, negative = (segvit.ATMLoss(4, ignored=how).double()(out, labels) for how in ("masked", "negative"))
    torch.testing.assert_close(masked.total, negative.total)


@pytest.mark.parametrize("ignored", ["masked", "negative"])
def test_a_batch_with_nothing_to_learn_gives_every_parameter_a_finite_gradient(ignored):
    model = segvit.SegViT("vit_tiny_patch16_224", 3, 32, backbone_kwargs={"depth": 3, "embed_dim": 32, "num_heads": 2})
    losses = segvit.ATMLoss(3, ignored=ignored)(model(torch.randn(2, 3, 32, 32)), torch.full((2, 32, 32), 255))
    assert losses.focal.eq(0).all()
    assert losses.dice.eq(0).all()
    losses.total.backward()
    for name, p in model.named_parameters():
        assert p.grad is not None, name
        assert p.grad.isfinite().all(), name


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
def test_any_integer_labels_and_any_ignore_index(dtype):
    out, labels = outputs(), labelled()
    want = segvit.ATMLoss(4).double()(out, labels).total
    torch.testing.assert_close(segvit.ATMLoss(4).double()(out, labels.to(dtype)).total, want)
    if dtype != torch.uint8:
        other = labels.where(labels != 255, -100).to(dtype)
        torch.testing.assert_close(segvit.ATMLoss(4, ignore_index=-100).double()(out, other).total, want)


def test_weights_of_zero_give_no_nan():
    out = outputs()
    nothing = torch.full((3, 20, 24), 255)
    assert segvit.ATMLoss(4, no_object_weight=0).double()(out, nothing).total == 0
    only = torch.zeros(3, 20, 24, dtype=torch.long)
    assert segvit.ATMLoss(4, class_weights=[0, 1, 1, 1], no_object_weight=0).double()(out, only).total.isfinite()


def test_one_class_and_one_stage():
    out = outputs(S=1, K=1)
    losses = segvit.ATMLoss(1).double()(out, torch.zeros(3, 9, 9, dtype=torch.long))
    assert losses.total.isfinite()
    assert losses.ce.shape == (1,)


def test_reads_attributes_only_and_extent_when_present():
    out, labels = outputs(grid=(5, 7)), labelled(size=(75, 107))
    plain = segvit.ATMLoss(4).double()(out, labels)
    out.extent = (75 / 16, 107 / 16)
    assert not torch.isclose(plain.focal, segvit.ATMLoss(4).double()(out, labels).focal).any()
    padded = F.interpolate(out.mask_logits.flatten(0, 1), (80, 112), mode="bilinear").unflatten(0, (2, 3))
    cropped = SimpleNamespace(class_logits=out.class_logits, mask_logits=padded[..., :75, :107])
    want = segvit.ATMLoss(4).double()(cropped, labels)
    torch.testing.assert_close(segvit.ATMLoss(4).double()(out, labels).total, want.total)


def test_compiles_in_one_graph_and_agrees():
    torch._dynamo.reset()
    loss = segvit.ATMLoss(4).double()
    output = segvit.models.SegViTOutput
    compiled = torch.compile(lambda a, b, y: loss(output(a, b, (5.0, 6.0)), y), fullgraph=True, backend="aot_eager")
    out, labels = outputs(), labelled()
    got, want = compiled(out.class_logits, out.mask_logits, labels), loss(out, labels)
    torch.testing.assert_close(got.total, want.total)
    grads = (torch.autograd.grad(t.total, [out.class_logits, out.mask_logits]) for t in (got, want))
    for a, b in zip(*grads):
        torch.testing.assert_close(a, b)


SIZES = [  # of labels, grid, extent
    ((64, 96), (4, 6), None),
    ((70, 98), (5, 7), (70 / 16, 98 / 16)),
    ((33, 20), (3, 2), (33 / 16, 20 / 16)),
    ((100, 90), (5, 7), (4.5, 6.2)),
    ((33, 3), (3, 10), None),  # patches narrower than a pixel
]


@pytest.mark.parametrize(("size", "grid", "extent"), SIZES)
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_mixed_patches_are_those_with_two_classes(size, grid, extent, dtype):
    labels = torch.ones(2, *size, dtype=dtype)
    labels[torch.rand(labels.shape) < 0.01] = 2
    labels[:, : size[0] // 2][torch.rand(2, size[0] // 2, size[1]) < 0.3] = 255
    labels[1, : size[0] // grid[0] + 5] = 255  # the first row of patches, and more
    mixed, seen = mixed_patches(labels, labels != 255, grid, extent)
    rows, columns = ((torch.arange(n) + 0.5) * covered / n for n, covered in zip(size, extent or grid))
    for b in range(2):
        for i in range(grid[0]):
            for j in range(grid[1]):
                at_row, at_column = rows.long() == i, columns.long() == j
                if not at_column.any():  # no centre lies in it: the pixel that it lies in
                    at_column[int((j + 0.5) * size[1] / grid[1])] = True
                patch = labels[b][at_row][:, at_column]
                classes = set(patch.flatten().tolist()) - {255}
                assert bool(mixed[b, i, j]) == (len(classes) > 1)
                assert bool(seen[b, i, j]) == (len(classes) > 0)
    assert mixed.any()
    assert not seen.all()


def test_edge_loss_is_the_mean_over_patches_that_count():
    out, labels = outputs(), labelled()
    plain = segvit.ATMLoss(4).double()(out, labels)
    assert plain.edge is None
    out.edge_logits = torch.randn(3, 5, 6, dtype=torch.float64, requires_grad=True)
    losses = segvit.ATMLoss(4, edge_weight=3.0).double()(out, labels)
    mixed, seen = mixed_patches(labels, labels < 4, (5, 6))
    want = F.binary_cross_entropy_with_logits(out.edge_logits[seen], mixed[seen].double())
    torch.testing.assert_close(losses.edge, 3 * want)
    torch.testing.assert_close(losses.total, plain.total + losses.edge)
    (grad,) = torch.autograd.grad(losses.total, out.edge_logits)
    assert (grad[~seen] == 0).all()
    nothing = segvit.ATMLoss(4).double()(out, torch.full_like(labels, 255))
    assert nothing.edge == 0
    assert (torch.autograd.grad(nothing.total, out.edge_logits)[0] == 0).all()


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def _rank(rank: int, port: int, class_logits, mask_logits, edge_logits, labels, results) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    try:
        mine = slice(2 * rank, 2 * rank + 2)
        out = SimpleNamespace(
            class_logits=class_logits[:, mine].clone().requires_grad_(),
            mask_logits=mask_logits[:, mine].clone().requires_grad_(),
            edge_logits=edge_logits[mine].clone().requires_grad_(),
        )
        total = segvit.ATMLoss(4).double()(out, labels[mine]).total
        total.backward()
        results[rank] = (total.detach(), out.class_logits.grad, out.mask_logits.grad, out.edge_logits.grad)
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("labelled_images", [4, 2, 1, 0])
def test_two_processes_average_to_the_loss_of_the_joint_batch(labelled_images):
    """DDP averages gradients: half the sum of the ranks' gradients must be the joint batch's gradient."""
    out = outputs(B=4)
    out.edge_logits = torch.randn(4, 5, 6, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(0, 3, (4, 20, 24))
    labels[0] = 0  # ranks with unequal numbers of classes
    labels[labelled_images:] = 255
    joint = segvit.ATMLoss(4).double()(out, labels).total
    joint.backward()
    with mp.Manager() as manager:
        results = manager.dict()
        leaves = (out.class_logits.detach(), out.mask_logits.detach(), out.edge_logits.detach())
        mp.spawn(_rank, (_free_port(), *leaves, labels, results), nprocs=2)
        totals, class_grads, mask_grads, edge_grads = zip(*(results[rank] for rank in (0, 1)))
        torch.testing.assert_close(sum(totals) / 2, joint.detach())
        torch.testing.assert_close(torch.cat(class_grads, 1) / 2, out.class_logits.grad)
        torch.testing.assert_close(torch.cat(mask_grads, 1) / 2, out.mask_logits.grad)
        torch.testing.assert_close(torch.cat(edge_grads) / 2, out.edge_logits.grad)


@pytest.mark.parametrize(
    ("build", "call", "message"),
    [
        ({"num_classes": 0}, {}, "num_classes must be an integer of at least 1"),
        ({"ignored": "zero"}, {}, 'ignored must be "masked" or "negative"'),
        ({"class_weights": [1.0]}, {}, "class_weights must be 4 numbers"),
        ({"no_object_weight": -0.1}, {}, "no_object_weight must be at least 0"),
        ({"edge_weight": float("nan")}, {}, "edge_weight must be at least 0"),
        ({}, {"labels": torch.zeros(3, 20, 24)}, r"labels must be integers \[B, H, W\] with B = 3, got torch.float32"),
        ({}, {"labels": torch.zeros(2, 20, 24, dtype=torch.long)}, "labels must be integers"),
        ({}, {"labels": torch.zeros(3, 1, 20, 24, dtype=torch.long)}, "labels must be integers"),
        ({"num_classes": 5}, {}, r"out.class_logits must be \[S, B, 5, 6\]"),
        ({}, {"mask_logits": torch.zeros(2, 3, 5, 4, 4)}, r"out.mask_logits must be \[S, B, N, h, w\]"),
        ({}, {"labels": torch.zeros(3, 20, 24, dtype=torch.long, device="meta")}, "labels are on meta"),
        ({}, {"edge_logits": torch.zeros(2, 5, 6)}, r"out.edge_logits must be \[B, h, w\] with B = 3"),
    ],
)
def test_bad_input_gets_one_clear_error(build, call, message):
    out = outputs(dtype=torch.float32)
    out.mask_logits = call.pop("mask_logits", out.mask_logits)
    out.edge_logits = call.pop("edge_logits", None)
    with pytest.raises(ValueError, match=message):
        segvit.ATMLoss(**({"num_classes": 4} | build))(out, call.get("labels", labelled()))


def test_debug_reports_labels_that_are_no_class():
    out, labels = outputs(), labelled()
    labels[1, 3, 4:6], labels[1, 5, 5] = 17, -2
    segvit.ATMLoss(4).double()(out, labels)  # they count as ignored
    with pytest.raises(
        ValueError, match=r"3 pixels that are neither a class \(0 to 3\) nor ignore_index \(255\): -2, 17"
    ):
        segvit.ATMLoss(4, debug=True).double()(out, labels)
    segvit.ATMLoss(4, debug=True).double()(out, labelled())

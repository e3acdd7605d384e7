import math

import pytest
import torch

from segvit.metrics import BoundaryIoU, ConfusionMatrix, boundary

classification = pytest.importorskip("torchmetrics.classification")


def pairs(K=5, images=4):
    for _ in range(images):
        truth = torch.randint(0, K, (30, 20))
        predicted = torch.where(torch.rand(30, 20) < 0.6, truth, torch.randint(0, K, (30, 20)))
        truth[:3] = 255
        yield predicted.to(torch.uint8), truth


def test_equals_torchmetrics():
    matrix = ConfusionMatrix(5)
    jaccard = classification.MulticlassJaccardIndex(5, ignore_index=255)
    per_class = classification.MulticlassJaccardIndex(5, ignore_index=255, average="none")
    recall = classification.MulticlassAccuracy(5, ignore_index=255, average="macro")
    micro = classification.MulticlassAccuracy(5, ignore_index=255, average="micro")
    for predicted, truth in pairs():
        matrix.update(predicted, truth)
        for metric in (jaccard, per_class, recall, micro):
            metric.update(predicted.long(), truth)
    scores = matrix.compute()
    assert scores.miou == pytest.approx(jaccard.compute().item())
    assert scores.iou == pytest.approx(per_class.compute().tolist())
    assert scores.macc == pytest.approx(recall.compute().item())
    assert scores.aacc == pytest.approx(micro.compute().item())


def test_a_class_that_is_absent_from_the_truth_is_left_out_and_said():
    matrix = ConfusionMatrix(4)
    matrix.update(torch.tensor([0, 0, 1, 3]), torch.tensor([0, 1, 1, 0]))
    scores = matrix.compute()
    assert math.isnan(scores.iou[2])
    assert math.isnan(scores.iou[3])  # predicted, though absent from the truth: an error of class 0 alone
    assert scores.miou == pytest.approx((1 / 3 + 1 / 2) / 2)
    assert scores.aacc == pytest.approx(1 / 2)
    assert scores.confusion == [[1, 0, 0, 1, 0], [1, 1, 0, 0, 0], [0] * 5, [0] * 5]
    assert scores.absent(["a", "b", "c", "d"]) == ["c", "d"]
    table = scores.table(["a", "b", "c", "d"])
    assert "not in this set, left out of the means: c, d" in table
    assert "0.333" in table


def test_memory_does_not_depend_on_the_number_of_images():
    matrix = ConfusionMatrix(3)
    before = matrix.counts.shape
    for predicted, truth in pairs(3, 10):
        matrix.update(predicted, truth)
    assert matrix.counts.shape == before == (3, 4)  # the last column: predicted as no class
    assert matrix.counts.sum() == 10 * 27 * 20


def test_bad_input_gets_one_clear_error():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"predicted \(2,\) and truth \(3,\) must agree"):
        matrix.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="labels outside 0 to 2"):
        matrix.update(torch.tensor([3]), torch.tensor([0]))


def naive_boundaries(labels, K, reach):  # [H, W] -> [K, H, W]: each class's mask less its erosion by a square
    ndimage = pytest.importorskip("scipy.ndimage")
    square = torch.ones(2 * reach + 1, 2 * reach + 1).bool().numpy()
    masks = [(labels == c).numpy() for c in range(K)]
    return torch.stack([torch.from_numpy(m & ~ndimage.binary_erosion(m, square)) for m in masks])


@pytest.mark.parametrize("reach", [1, 3, 40])
def test_boundary_is_each_mask_less_its_erosion(reach):
    labels = torch.randint(0, 4, (2, 3, 4)).repeat_interleave(12, 1).repeat_interleave(9, 2)
    want = torch.stack([naive_boundaries(image, 4, reach).any(0) for image in labels])
    assert torch.equal(boundary(labels, reach), want)
    assert want.float().mean() < 0.99 or reach == 40


def test_boundary_iou_equals_the_masks_own():
    K, edges, both, either = 4, BoundaryIoU(4, distance=0.05), 0, 0
    for _ in range(3):
        truth = torch.randint(0, K, (5, 6)).repeat_interleave(8, 0).repeat_interleave(10, 1)
        predicted = truth.roll(2, 1)
        truth[:6, :7] = 255
        edges.update(predicted[None].to(torch.uint8), truth[None])
        reach = round(0.05 * (40**2 + 60**2) ** 0.5)
        valid = truth != 255
        seen = predicted.where(valid, 255)
        a, b = naive_boundaries(truth, K, reach), naive_boundaries(seen, K, reach)
        both, either = both + (a & b & valid).sum((1, 2)), either + ((a | b) & valid).sum((1, 2))
    assert edges.compute() == pytest.approx((both / either).tolist())
    assert 0 < min(edges.compute()) < max(edges.compute()) < 1
    assert math.isnan(BoundaryIoU(2).compute()[0])
    for distance in (0, 2, float("nan")):
        with pytest.raises(ValueError, match="distance must be a share of the diagonal"):
            BoundaryIoU(2, distance=distance)
    perfect = BoundaryIoU(K)
    perfect.update(torch.where(valid, truth, 0), truth)
    assert set(perfect.compute()) <= {1.0}
    with pytest.raises(ValueError, match="must agree in shape"):
        edges.update(torch.zeros(1, 3, 3), torch.zeros(1, 3, 4))

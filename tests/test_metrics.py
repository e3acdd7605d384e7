import math

import pytest
import torch

from segvit.metrics import ConfusionMatrix

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
    assert scores.absent(["a", "b", "c", "d"]) == ["c", "d"]
    table = scores.table(["a", "b", "c", "d"])
    assert "not in this set, left out of the means: c, d" in table
    assert "0.333" in table


def test_memory_does_not_depend_on_the_number_of_images():
    matrix = ConfusionMatrix(3)
    before = matrix.counts.shape
    for predicted, truth in pairs(3, 10):
        matrix.update(predicted, truth)
    assert matrix.counts.shape == before == (3, 3)
    assert matrix.counts.sum() == 10 * 27 * 20


def test_bad_input_gets_one_clear_error():
    matrix = ConfusionMatrix(3)
    with pytest.raises(ValueError, match=r"predicted \(2,\) and truth \(3,\) must agree"):
        matrix.update(torch.zeros(2), torch.zeros(3))
    with pytest.raises(ValueError, match="labels outside 0 to 2"):
        matrix.update(torch.tensor([3]), torch.tensor([0]))

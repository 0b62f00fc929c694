import pytest
import torch

from tract_det.errors import UserError
from tract_det.evaluation.classification import Mistakes, TopK
from tract_det.evaluation.metrics import CLASSIFICATION_METRICS
from tract_det.evaluation.wilson import wilson_interval


def test_counts_equal_sorting_the_logits(generator):
    logits = torch.randn(50, 12, generator=generator, dtype=torch.float64)
    labels = torch.randint(12, (50,), generator=generator)
    top = TopK(50)
    top.add(logits[:20], labels[:20])
    top.add(logits[20:], labels[20:])
    order = logits.argsort(dim=1, descending=True)
    results = top.evaluate()
    for k in (1, 5):
        expected = sum(int(label in row[:k]) for label, row in zip(labels, order, strict=True))
        assert results["correct"][f"top{k}"] == expected
        assert results[f"top{k}"] == 2 * expected
    assert results["images"] == 50


def test_equal_scores_rank_in_the_order_of_the_class_list():
    top = TopK(12)
    top.add(torch.zeros(12, 12), torch.arange(12))
    assert top.evaluate()["correct"] == {"top1": 1, "top5": 5}


def test_the_metrics_of_a_config_are_the_accuracies_and_those_of_the_moving_average():
    top = TopK(1)
    top.add(torch.zeros(1, 2), torch.tensor([0]))
    names = [name for name, value in top.evaluate().items() if isinstance(value, float)]
    assert (*names, *(f"ema.{name}" for name in names)) == CLASSIFICATION_METRICS


def test_top5_of_fewer_classes_is_100_per_cent():
    top = TopK(2)
    top.add(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    results = top.evaluate()
    intervals = results.pop("intervals")
    assert results == {
        "images": 2, "top1": 50.0, "top5": 100.0, "correct": {"top1": 1, "top5": 2},
    }  # fmt: skip
    assert intervals["top5"] == (100 * wilson_interval(2, 2)[0], 100)


def test_a_score_that_is_not_finite_is_refused_with_the_image():
    logits = torch.zeros(2, 3)
    logits[1, 2] = torch.nan
    with pytest.raises(UserError, match=r"a score of b\.png is not finite"):
        TopK(2).add(logits, torch.tensor([0, 0]), ["a.png", "b.png"])


@pytest.mark.parametrize("evaluated", [2, 4])
def test_an_image_too_few_or_too_many_is_refused(evaluated):
    top = TopK(3)
    top.add(torch.zeros(evaluated, 3), torch.zeros(evaluated, dtype=torch.long))
    with pytest.raises(
        UserError, match=f"{evaluated} images were evaluated and 0 skipped, the split has 3"
    ):
        top.evaluate()


def test_a_skipped_image_is_counted_separately():
    top = TopK(3)
    top.add(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0, 0]))
    top.skipped = 1
    results = top.evaluate()
    del results["intervals"]
    assert results == {
        "images": 2, "top1": 100.0, "top5": 100.0, "correct": {"top1": 2, "top5": 2}, "skipped": 1,
    }  # fmt: skip


def test_the_classes_together_are_the_whole(generator):
    """Also of equal scores, and of those that are equal once they are rounded."""
    logits = torch.randint(3, (60, 4), generator=generator).double()
    logits[:, 3] = logits[:, 0] + 1e-12
    labels = torch.randint(3, (60,), generator=generator)
    labels[labels == 2] = 3  # no image is of class c
    top, mistakes = TopK(60), Mistakes(["a", "b", "c", "d"])
    top.add(logits, labels)
    mistakes.add(logits, labels, [str(i) for i in range(60)])
    classes = mistakes.by_class()
    assert classes.pop("c") == {"images": 0}
    counts = [row["images"] for row in classes.values()]
    assert counts == torch.bincount(labels)[[0, 1, 3]].tolist()
    correct = [round(row["top1"] * row["images"] / 100) for row in classes.values()]
    assert sum(correct) == top.evaluate()["correct"]["top1"]
    for row, count in zip(classes.values(), correct, strict=True):
        low, high = wilson_interval(count, row["images"])
        assert row["interval"] == (100 * low, 100 * high)

"""What runs leave of other draws of their images gives the paired bootstrap of their difference."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from tests.evaluation.detections import evaluate, random_split
from tract_det.errors import UserError
from tract_det.evaluation.classification import TopK, sampled_accuracies
from tract_det.evaluation.detection_results import compare, sampled_means, summary
from tract_det.evaluation.samples import OverImages, over_images, read_samples, write_samples
from tract_det.training.detection import means

METRIC = "voc_area.mAP"
RNG = np.random.default_rng(0)


def write(folder, values, ids="abcd", figure=50.0):
    folder.mkdir()
    write_samples(folder, ids, {"top1": figure}, {"top1": np.array(values, dtype=float)})
    return read_samples(folder, "top1")


def test_two_runs_each_by_itself_give_the_interval_of_both_evaluated_together(tmp_path):
    images, detections = random_split(30)
    worse = [d._replace(scores=RNG.random(len(d.scores))) for d in detections]
    both = [evaluate(images, d)[0].evaluated for d in (detections, worse)]
    expected = compare(*both, sampled_means(both[0], 200))[METRIC]
    samples = []
    for name, evaluated in zip(("run", "baseline"), both, strict=True):
        (tmp_path / name).mkdir()
        ids = [image.image_id for image in images]
        figures = means(summary(evaluated))
        write_samples(tmp_path / name, ids, figures, sampled_means(evaluated, 200))
        samples.append(read_samples(tmp_path / name, METRIC))
    interval = over_images([tuple(samples)], expected["difference"])
    assert (interval.low, interval.high) == expected["interval"]
    assert (interval.images, interval.n) == (30, 1)


def test_one_image_is_no_evidence(tmp_path):
    run, baseline = write(tmp_path / "a", [53, 53, 52]), write(tmp_path / "b", [50, 50, 50])
    assert over_images([(run, baseline)], 0.0) is not None
    of_one = [replace(side, images=1) for side in (run, baseline)]
    assert over_images([tuple(of_one)], 0.0) is None


def test_a_difference_that_one_image_makes_is_not_seen(tmp_path):
    """It is missing in more than a third of the samples, and all images make a little noise.

    So it is with a class that one image has: without it, its AP leaves the mean.
    """
    drawn = np.random.default_rng(0).poisson(1, 1000)  # how often the image is in each sample
    noise = 0.1 * RNG.normal(size=1000)
    few = write(tmp_path / "few", 50 + 10 * (drawn > 0) + noise, figure=60.0)
    many = write(tmp_path / "many", 60 + 10 * noise, figure=60.0)
    plain = write(tmp_path / "plain", np.full(1000, 50.0))
    assert over_images([(few, plain)], 10.0).low < 0.1
    assert over_images([(many, plain)], 10.0).low > 7
    assert over_images([(plain, few)], -10.0).high > -0.1


def test_the_accuracies_of_samples_are_those_of_the_images_drawn(generator):
    logits = torch.randn(40, 10, generator=generator)
    labels = torch.randint(10, (40,), generator=generator)
    names = [f"{i:02d}" for i in range(40)]
    whole = TopK(40)
    whole.add(logits, labels, names)
    ids, correct = whole.by_image()
    assert ids == names
    sampled = sampled_accuracies(correct, 3)
    drawn = np.random.default_rng(0).integers(0, 40, (3, 40))
    for number, positions in enumerate(drawn):
        top = TopK(40)
        top.add(logits[positions], labels[positions])
        results = top.evaluate()
        for name in ("top1", "top5"):
            assert sampled[name][number] == pytest.approx(results[name], rel=1e-12)


def test_the_images_of_a_classifier_are_in_one_order_whatever_their_batches():
    logits, labels = torch.eye(4), torch.tensor([0, 1, 3, 3])
    forward, backward = TopK(4), TopK(4)
    forward.add(logits, labels, list("abcd"))
    backward.add(logits.flip(0), labels.flip(0), list("dcba"))
    for top in (forward, backward):
        ids, correct = top.by_image()
        assert ids == list("abcd") and correct[:, 0].tolist() == [True, True, False, True]


def test_the_runs_of_all_seeds_are_judged_on_the_same_images(tmp_path):
    """Two pairs whose differences cancel in every sample are certain to be equal in the mean."""
    noise = RNG.normal(size=100)
    plain, up, down = (
        write(tmp_path / name, values)
        for name, values in (("p", 50 + 0 * noise), ("u", 50 + noise), ("d", 50 - noise))
    )
    assert over_images([(up, plain), (down, plain)], 0.0) == OverImages(0.0, 0.0, 4, 2)
    alone = over_images([(up, plain)], 0.0)
    assert alone.low < -1 and alone.high > 1


def test_runs_without_samples_or_on_other_images_have_no_interval(tmp_path):
    run, other = write(tmp_path / "a", [1, 2, 3]), write(tmp_path / "b", [1, 2, 3], ids="abce")
    fewer = write(tmp_path / "c", [1, 2])
    for baseline in (None, other, fewer):
        assert over_images([(run, baseline)], 0.0) is None
    assert over_images([(run, run), (run, None)], 0.0) is None


def test_samples_of_other_weights_than_those_compared_give_no_interval(tmp_path):
    """An evaluation of model_best.pth may have replaced those of the last weights."""
    run, baseline = write(tmp_path / "a", [51, 53], figure=52.0), write(tmp_path / "b", [48, 51])
    assert over_images([(run, baseline)], 2.0) is not None
    assert over_images([(run, baseline)], 2.1) is None


def test_the_figures_of_the_moving_average_have_names_of_their_own(tmp_path):
    figures = {"top1": 5.0, "ema.top1": 6.0}
    write_samples(tmp_path, "ab", figures, {"top1": np.zeros(3)}, {"top1": np.ones(3)})
    model, average = (read_samples(tmp_path, name) for name in ("top1", "ema.top1"))
    assert (model.figure, model.values.tolist()) == (5, [0, 0, 0])
    assert (average.figure, average.values.tolist()) == (6, [1, 1, 1])
    assert read_samples(tmp_path, "top5") is None


def test_an_evaluation_without_samples_leaves_none_of_an_older_one(tmp_path):
    write(tmp_path / "run", [1, 2])
    none = sampled_accuracies(np.ones((2, 2), dtype=bool), 0)
    write_samples(tmp_path / "run", "ab", {"top1": 100.0}, none)
    assert read_samples(tmp_path / "run", "top1") is None


@pytest.mark.parametrize("cut", [0, 40, -30])
def test_a_damaged_file_is_named_with_the_way_out(tmp_path, cut):
    write(tmp_path / "run", [1, 2])
    path = tmp_path / "run/samples.npz"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=r"samples\.npz is damaged \(.*\): delete it") as error:
        read_samples(tmp_path / "run", "top1")
    assert "\n" not in str(error.value)

"""The evaluator: results, input, output files, and several ranks."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from tests.evaluation.detections import (
    BOX,
    CLASSES,
    NONE,
    evaluate,
    image,
    perfect,
    random_split,
)
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.evaluators import DetectionEvaluator
from tract_det.evaluation.metrics import METRICS
from tract_det.evaluation.tables import format_table
from tract_det.files import write_json

# ---- Results. ----


@pytest.mark.parametrize("rule", ["devkit", "detectron2"])
def test_perfect_detections_give_100_by_every_measure(rule):
    images, _ = random_split(12)
    _, results = evaluate(images, perfect(images), rule)
    assert results["images"] == 12
    assert results["rule"] == rule
    for definition in ("voc_07", "voc_area"):
        assert results[definition]["mAP"] == pytest.approx(100)
        assert results[definition]["mAP_50_95"] == pytest.approx(100)
        for per_class in ("AP", "AP_50_95"):
            assert results[definition][per_class] == pytest.approx(dict.fromkeys(CLASSES, 100))
    coco = results["coco"]
    assert list(coco) == ["AP", "AP50", "AP75", "APs", "APm", "APl"]
    assert [coco[name] for name in ("AP", "AP50", "AP75", "APl")] == pytest.approx([100] * 4)


def test_results_are_in_per_cent_by_class():
    cat, dog = (0, 0, 100, 100), (200, 0, 300, 100)
    images = [image("a", [cat, dog], [0, 1]), image("b", [cat], [0])]
    halved = (200, 0, 300, 50)  # IoU 0.5: matches at threshold 0.5 only, by the devkit's rule
    detections = [([cat, halved], [0.9, 0.9], [0, 1]), NONE]
    _, results = evaluate(images, detections)
    assert results["voc_07"]["AP"]["cat"] == pytest.approx(600 / 11)
    assert results["voc_area"]["AP"]["cat"] == pytest.approx(50)
    assert results["voc_area"]["AP_50_95"]["cat"] == pytest.approx(50)
    assert results["voc_area"]["AP"]["dog"] == pytest.approx(100)
    assert results["voc_area"]["AP_50_95"]["dog"] == pytest.approx(10)
    assert math.isnan(results["voc_area"]["AP"]["bus"])
    assert results["voc_area"]["mAP"] == pytest.approx(75)
    assert results["voc_area"]["mAP_50_95"] == pytest.approx(30)
    # pycocotools: recall 0, 0.01, ..., 0.5 is 51 of 101 points for the cats; IoU >= for the dogs.
    assert results["coco"]["AP50"] == pytest.approx((5100 / 101 + 100) / 2)
    _, strict = evaluate(images, detections, "detectron2")
    assert strict["voc_area"]["AP"]["dog"] == 0


def test_the_mean_over_stricter_overlaps_is_lower():
    results = evaluate(*random_split(20))[1]
    assert 0 < results["voc_07"]["mAP_50_95"] < results["voc_07"]["mAP"] < 100


def test_the_metrics_of_a_config_are_the_means_in_the_results():
    results = evaluate(*random_split(4))[1]
    means = [
        f"{group}.{name}"
        for group in ("voc_07", "voc_area", "coco")
        for name, value in results[group].items()
        if isinstance(value, float)
    ]
    assert tuple(means) == METRICS


def test_no_detections_is_zero_and_no_ground_truth_is_nan():
    images = [image("a", [(0, 0, 50, 50)], [0])]
    _, results = evaluate(images, [NONE])
    assert results["voc_07"]["mAP"] == results["coco"]["AP"] == 0
    _, results = evaluate([image("a", [], [])], [NONE])
    assert math.isnan(results["voc_07"]["mAP"])
    assert all(map(math.isnan, results["coco"].values()))


def test_coco_leaves_difficult_objects_out_of_the_recall():
    easy, hard = (0, 0, 50, 50), (100, 0, 200, 100)
    images = [image("a", [easy, hard], [0, 0], [False, True])]
    for boxes in ([easy], [easy, hard]):
        detections = (boxes, [0.5, 0.9][: len(boxes)], [0] * len(boxes))
        assert evaluate(images, [detections])[1]["coco"]["AP"] == pytest.approx(100)


def test_coco_does_not_treat_a_difficult_object_as_a_crowd():
    # A quarter of a difficult object: all of the detection lies inside it, but the IoU is 0.25.
    easy, hard, inside = (0, 0, 50, 50), (100, 0, 200, 100), (100, 0, 150, 50)
    images = [image("a", [easy, hard], [0, 0], [False, True])]
    _, results = evaluate(images, [([easy, inside], [0.5, 0.9], [0, 0])])
    assert results["coco"]["AP50"] == pytest.approx(50)


def test_evaluation_prints_nothing(capfd):
    images, detections = random_split(3)
    evaluate(images, detections)
    assert capfd.readouterr().out == ""


# ---- Input. ----


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_tensors_equal_arrays(dtype):
    images, detections = random_split(6)
    tensors = [
        (
            torch.from_numpy(boxes).to(dtype).requires_grad_(),
            torch.from_numpy(scores).to(dtype),
            torch.from_numpy(labels),
        )
        for boxes, scores, labels in detections
    ]
    as_arrays = [
        (b.detach().double().numpy(), s.double().numpy(), y.numpy()) for b, s, y in tensors
    ]
    assert evaluate(images, tensors)[1] == evaluate(images, as_arrays)[1]


def test_added_detections_are_copies():
    evaluator = DetectionEvaluator([image("a", BOX, [0])], CLASSES[:1])
    boxes, scores, labels = np.ones((1, 4)), np.ones(1), np.zeros(1, dtype=np.int64)
    evaluator.add("a", boxes, scores, labels)
    boxes[:], scores[:], labels[:] = 7, 7, 2
    evaluator.evaluate()
    assert [values.max() for values in evaluator.detections["a"]] == [1, 1, 0]


@pytest.mark.parametrize(
    ("detections", "error", "message"),
    [
        ((BOX, [0.5], [3]), UserError, r"image 'a': .*labels 3 to 3; the 3 classes are 0 to 2"),
        ((BOX, [0.5], [-1]), UserError, r"labels -1 to -1"),
        ((BOX, [math.nan], [0]), DivergedError, r"image 'a': .*not finite"),
        ((BOX + math.inf, [0.5], [0]), DivergedError, r"not finite"),
        ((BOX, [0.5, 0.4], [0, 0]), ValueError, r"boxes \(1, 4\), scores \(2,\)"),
        ((BOX[0], [0.5], [0]), ValueError, r"boxes \(4,\)"),
    ],
)
def test_bad_detections_are_refused_with_the_image(detections, error, message):
    evaluator = DetectionEvaluator([image("a", [], [])], CLASSES)
    with pytest.raises(error, match=message) as caught:
        evaluator.add("a", *detections)
    assert type(caught.value) is error


def test_unknown_and_repeated_images_are_refused_by_id():
    evaluator = DetectionEvaluator([image("a", [], [])], CLASSES)
    with pytest.raises(UserError, match="'b' is not among the 1 images"):
        evaluator.add("b", *NONE)
    evaluator.add("a", *NONE)
    with pytest.raises(UserError, match="'a' was added twice"):
        evaluator.add("a", *NONE)


def test_missing_images_are_counted_and_named():
    evaluator = DetectionEvaluator([image(f"i{k}", [], []) for k in range(9)], CLASSES)
    evaluator.add("i0", *NONE)
    message = r"8 of 9 images were not evaluated \(i1, i2, i3, i4, i5, \.\.\.\)"
    with pytest.raises(UserError, match=message):
        evaluator.evaluate()


def test_names_that_occur_twice_unknown_labels_and_rules_are_refused():
    bus = image("a", [(0, 0, 5, 5)], [2])
    with pytest.raises(ValueError, match="1 class names occur more than once"):
        DetectionEvaluator([bus], ["cat", "dog", "cat"])
    with pytest.raises(ValueError, match="1 image ids occur more than once"):
        DetectionEvaluator([bus, bus], CLASSES)
    with pytest.raises(ValueError, match=r"labels outside 0\.\.1"):
        DetectionEvaluator([bus], CLASSES[:2])
    with pytest.raises(ValueError, match="'voc'"):
        DetectionEvaluator([bus], CLASSES, rule="voc")


def test_detections_are_available_only_after_evaluate():
    images, detections = random_split(4)
    evaluator = DetectionEvaluator(images, CLASSES)
    with pytest.raises(RuntimeError, match="evaluate"):
        _ = evaluator.detections
    for annotation, image_detections in reversed(list(zip(images, detections, strict=True))):
        evaluator.add(annotation.image_id, *image_detections)
    evaluator.evaluate()
    assert list(evaluator.detections) == [annotation.image_id for annotation in images]


# ---- JSON and the table. ----


def test_json_has_null_for_nan_and_full_precision(tmp_path):
    images, detections = random_split(10)
    results = evaluate(images, detections)[1]
    results["voc_07"]["AP"]["bus"] = math.nan
    path = tmp_path / "new" / "results.json"
    write_json(path, results)

    def no_constant(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    read = json.loads(path.read_text(), parse_constant=no_constant)
    assert read["voc_07"]["AP"].pop("bus") is None
    results["voc_07"]["AP"].pop("bus")
    assert read["voc_07"] == results["voc_07"]
    assert [file.name for file in path.parent.iterdir()] == ["results.json"]


def test_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_json(path, {"images": 1})

    def full(self, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(UserError, match=r"results\.json cannot be written: No space left"):
        write_json(path, {"images": 2})
    assert json.loads(path.read_text()) == {"images": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_table_names_rule_classes_means_and_coco():
    images = [image("a", [(0, 0, 100, 100), (0, 0, 40, 40)], [0, 1])]
    detections = [([(0, 0, 100, 100)], [0.9], [0])]
    lines = format_table(evaluate(images, detections, "detectron2")[1]).splitlines()
    assert "detectron2 rule" in lines[0]
    assert lines[0].endswith("1 images")
    rows = [line.split() for line in lines[2:6]]
    assert rows == [
        ["cat", *["100.00"] * 4],
        ["dog", *["0.00"] * 4],
        ["bus", *["n/a"] * 4],
        ["mean", *["50.00"] * 4],
    ]
    assert lines[6].startswith("COCO: AP 50.00  AP50 50.00")
    assert len({len(line) for line in lines[1:6]}) == 1  # columns are aligned


# ---- Several ranks. ----


def evaluate_shard(rank: int, folder: Path) -> None:
    """One of two ranks: seven images divided unequally, then a missing and a repeated image."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    images, detections = random_split(7)
    report: dict[str, Any] = {}
    for case, numbers in {
        "interleaved": [(0, 2, 3, 5, 6), (1, 4)][rank],
        "all on one": [(), range(7)][rank],
        "missing": [(0, 2, 3, 5), (1, 4)][rank],
        "twice": [(0, 2, 3, 5, 6), (1, 4, 3)][rank],
    }.items():
        evaluator = DetectionEvaluator(images, CLASSES)
        for number in numbers:
            evaluator.add(images[number].image_id, *detections[number])
        try:
            report[case] = evaluator.evaluate()
        except UserError as error:
            report[case] = str(error)
        else:
            if rank == 0:
                evaluator.write_detections(folder / case, "test")
    write_json(folder / f"rank{rank}.json", report)
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_ranks_give_the_results_and_files_of_one_process(tmp_path):
    mp.start_processes(evaluate_shard, (tmp_path,), nprocs=2, start_method="spawn")
    evaluator, results = evaluate(*random_split(7))
    write_json(tmp_path / "alone.json", results)
    evaluator.write_detections(tmp_path / "alone", "test")
    expected = json.loads((tmp_path / "alone.json").read_text())
    assert 0 < expected["voc_07"]["mAP"] < 100
    for rank in (0, 1):
        report = json.loads((tmp_path / f"rank{rank}.json").read_text())
        assert report["interleaved"] == report["all on one"] == expected
        assert report["missing"].startswith("1 of 7 images were not evaluated (000006)")
        assert report["twice"].startswith("1 of 7 images were evaluated twice (000003)")
    for path in (tmp_path / "alone").iterdir():
        for case in ("interleaved", "all on one"):
            assert (tmp_path / case / path.name).read_text() == path.read_text()

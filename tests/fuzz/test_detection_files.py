"""Damaged files of detections and COCO files are read or refused in a line of words.

More cases than the suite has: `FUZZ_CASES=10000 python -m pytest -n0 tests/fuzz`.
"""

import json
import random

import numpy as np
import pytest

from tests.evaluation.test_coco_results import RESULTS, TRUTH, read_coco_ground_truth
from tests.fuzz.mutations import damaged
from tests.fuzz.refusals import cases
from tract_det.errors import UserError
from tract_det.evaluation.coco_results import read_coco_results
from tract_det.evaluation.detection_files import read_detections
from tract_det.evaluation.detection_results import details, evaluate_detections, summary

CASES = cases(250)
CHALLENGE = (
    "\n".join(f"a {k / 10} {k} {k}.5 {k + 20} 30.25" for k in range(1, 9)) + "\nb 1 1 1 2 2\n"
)
# Values that JSON or a line of numbers may have in a number's place.
WORDS = (
    *(
        "NaN",
        "Infinity",
        "-1e999",
        "1e400",
        "1e308",
        "-0",
        "null",
        "true",
        '"7"',
        "[]",
        "{}",
        "[1]",
        "1.5",
    ),
    *("9" * 400, "9" * 5000, "-7", "0x1", "1_0", "\u0663", "\u2028", '"\\ud800"', "", "{", '"'),
)


def with_another_word(data: bytes, rng: random.Random) -> bytes:
    """One of the file's words is another."""
    words = data.decode(errors="replace").split(" ")
    words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words).encode()


def outcome(read, path, data):
    """What is read, or None if a line refuses it that names the file."""
    path.write_bytes(data)
    try:
        return read()
    except UserError as error:
        assert str(path) in str(error)
        assert len(str(error)) < 2_100 and "\n" not in str(error)
        return None


def fuzz(seed, text, path, read, check):
    """Damages a text in many ways; some of the files must be read, and some refused."""
    rng = random.Random(seed)
    read_files = 0
    for _ in range(CASES):
        damage = rng.choice((damaged, with_another_word))
        content = outcome(read, path, damage(text.encode(), rng))
        if content is not None:
            check(content)
            read_files += 1
    assert 0 < read_files < CASES


def assert_sound(detections):
    """The arrays agree, are finite, and have no negative sizes."""
    n = len(detections.scores)
    assert detections.boxes.shape == (n, 4) and len(detections.image) == len(detections.labels) == n
    assert np.isfinite(detections.boxes).all() and np.isfinite(detections.scores).all()
    assert (detections.boxes[:, 2:] - detections.boxes[:, :2] > -1e-5).all()


@pytest.fixture
def truth(tmp_path):
    path = tmp_path / "truth.json"
    path.write_text(json.dumps(TRUTH))
    return read_coco_ground_truth(path)


def test_a_damaged_file_of_the_challenge_is_read_or_refused_in_a_line(tmp_path, truth):
    path = tmp_path / "comp4_det_test_cat.txt"

    def read():
        return read_detections(tmp_path, "test", ["cat"], truth.positions)

    fuzz(0, CHALLENGE, path, read, assert_sound)


def test_a_damaged_coco_result_is_read_or_refused_in_a_line(tmp_path, truth):
    path = tmp_path / "results.json"
    text = json.dumps(RESULTS, indent=1)
    fuzz(1, text, path, lambda: read_coco_results(path, truth), assert_sound)


@pytest.mark.filterwarnings("ignore:.*have no objects in this split")
def test_a_damaged_coco_ground_truth_is_evaluated_or_refused_in_a_line(tmp_path, truth):
    path, results = tmp_path / "damaged.json", tmp_path / "results.json"
    results.write_text(json.dumps(RESULTS))

    def check(damaged_truth):
        assert np.isfinite(damaged_truth.objects.boxes).all()
        detections = read_coco_results(results, truth)
        if len(damaged_truth.image_ids) == 2 and len(damaged_truth.class_names) == 2:
            evaluated = evaluate_detections(damaged_truth, detections)
            assert summary(evaluated)["images"] == 2
            assert set(details(evaluated)) == {"classes", "errors", "confusion"}

    fuzz(2, json.dumps(TRUTH, indent=1), path, lambda: read_coco_ground_truth(path), check)

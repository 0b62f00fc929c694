"""`tract-det detect`: files in, files out, and what an evaluation makes of them."""

import json
import re
import shutil
from fractions import Fraction

import numpy as np
import pytest
import torch
from PIL import Image

from tests.training.runs import results, run_here
from tract_det import load_detector
from tract_det.cli import call
from tract_det.data.voc_xml import parse_annotation
from tract_det.errors import UserError


def detect(run, out, *arguments):
    common = ("--weights", run / "model_final.pth", "--out", out, "--device", "cpu")
    return run_here("detect", *map(str, arguments), *common, "--workers", 0)


def refused(run, out, *arguments):
    with pytest.raises(UserError) as error:
        detect(run, out, *arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.fixture(scope="module")
def found(detector_run, tree, tmp_path_factory):
    """All formats, of the images of the split `test`."""
    out = tmp_path_factory.mktemp("found") / "out"
    pattern = tree / "JPEGImages/b*.png"
    printed = detect(detector_run, out, pattern, "--format", "images", "voc", "coco", "comp4")
    assert printed == f"wrote {out}: 5 of 5 files\n"
    return out


def test_the_challenges_files_are_those_of_the_evaluation_to_the_last_bit(found, detector_run):
    files = sorted((detector_run / "detections").iterdir())
    assert [path.name for path in files] == sorted(p.name for p in (found / "comp4").iterdir())
    for path in files:
        assert path.read_bytes() == (found / "comp4" / path.name).read_bytes()


@pytest.mark.parametrize("detections", ["comp4", "coco.json"])
def test_evaluating_what_was_written_gives_the_figures_of_the_training(
    found, detector_run, tree, tmp_path, detections
):
    run_here(
        "evaluate", "--root", tree, "--detections", found / detections, "--bootstrap", 0,
        "--json", tmp_path / "figures.json",
    )  # fmt: skip
    figures = json.loads((tmp_path / "figures.json").read_text())
    for group in ("voc_07", "voc_area", "coco"):
        assert figures[group] == results(detector_run)[group]


def test_annotated_images_are_drawn_on_and_nothing_temporary_stays(detector_run, tree, tmp_path):
    source = tree / "JPEGImages/b000.png"
    detect(detector_run, tmp_path, source, "--format", "images", "--score-threshold", 0.01)
    with Image.open(tmp_path / "images/b000.jpg") as drawn, Image.open(source) as image:
        assert drawn.size == image.size
        difference = np.abs(np.asarray(drawn, int) - np.asarray(image.convert("RGB"), int))
    assert (difference > 100).any()
    assert {path.name for path in tmp_path.rglob("*")} == {"images", "b000.jpg", "detect.json"}


def test_an_annotation_has_the_detections_from_the_threshold_on_as_whole_pixels(
    detector_run, tree, tmp_path
):
    path = tree / "JPEGImages/b001.png"
    detector = load_detector(detector_run / "model_final.pth", "cpu")
    every = detector(path, batch_size=1)
    threshold = every.scores.median().item()
    detect(
        detector_run, tmp_path, path, "--format", "voc", "--score-threshold", threshold,
        "--batch-size", 1,
    )  # fmt: skip
    expected = every.above(threshold)
    record = parse_annotation(tmp_path / "voc/b001.xml")
    assert (record.filename, record.size) == ("b001.png", (96, 96))
    assert record.classes == expected.names and 0 < len(expected) < len(every)
    boxes = torch.tensor(record.boxes)
    labelled = expected.boxes.round() if len(boxes) == len(expected) else None
    assert labelled is not None and torch.equal(boxes, labelled)


def test_pictures_show_scores_from_one_half_on_and_results_have_all(found, detector_run):
    scores = [entry["score"] for entry in json.loads((found / "coco.json").read_text())]
    shown = sum(len(parse_annotation(xml).classes) for xml in (found / "voc").glob("*.xml"))
    assert shown == sum(score >= 0.5 for score in scores) < len(scores)


def test_files_of_one_name_keep_apart_and_hostile_names_stay_in_the_folder(
    detector_run, tree, tmp_path
):
    source, data = tree / "JPEGImages/b000.png", tmp_path / "data"
    names = ("a/x.png", "b/x.png", "b/x.bmp", "y.png", "z%2F..%2Fz.png", "two\nlines.png")
    for name in names:
        (data / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, data / name)
    detect(detector_run, data / "out", data, data / "a", data / "y.png", "--format", "voc", "comp4")
    assert {path.name for path in (data / "out/voc").iterdir()} == {
        "a%2Fx.xml", "b%2Fx.png.xml", "x.bmp.xml", "y.xml", "z%252F..%252Fz.xml",
        "two%250Alines.xml",
    }  # fmt: skip
    ids = set()
    for path in (data / "out/comp4").iterdir():
        ids |= {line.rsplit(None, 5)[0] for line in path.read_text().splitlines()}
    assert ids == {"a/x", "b/x.png", "x.bmp", "y", "z%2F..%2Fz", "two%0Alines"}


def test_unreadable_files_are_named_together_and_the_others_are_done(detector_run, tree, tmp_path):
    data = tmp_path / "data"
    data.mkdir()
    shutil.copy(tree / "JPEGImages/b000.png", data)
    for name in ("broken.png", "empty.jpg"):
        (data / name).write_bytes(b"" if name == "empty.jpg" else b"\x89PNG")
    message = refused(detector_run, tmp_path / "out", data)
    assert message.startswith("2 of 3 files could not be read, the others are done: ")
    assert "broken.png" in message and "empty.jpg" in message
    record = json.loads((tmp_path / "out/detect.json").read_text())
    assert [image["id"] for image in record["images"]] == ["b000"]
    assert len(record["unreadable"]) == 2
    assert (tmp_path / "out/images/b000.jpg").is_file()
    assert json.loads((tmp_path / "out/coco.json").read_text())


def test_results_are_refused_or_moved_aside(detector_run, tree, tmp_path):
    image = tree / "JPEGImages/b000.png"
    detect(detector_run, tmp_path, image, "--format", "coco")
    (tmp_path / "notes.txt").write_text("mine")
    old = (tmp_path / "coco.json").read_bytes()
    message = refused(detector_run, tmp_path, image, "--format", "coco")
    assert message.startswith(f"--out {tmp_path} holds results already (coco.json)")
    detect(detector_run, tmp_path, image, "--format", "voc", "--overwrite")
    assert (tmp_path / "previous-1/coco.json").read_bytes() == old
    assert {path.name for path in tmp_path.iterdir()} == {
        "previous-1", "voc", "detect.json", "notes.txt",
    }  # fmt: skip


def test_what_is_not_there_is_named_at_once(detector_run, tmp_path):
    (tmp_path / "empty").mkdir()
    names = ("nowhere.jpg", str(tmp_path / "empty"), str(tmp_path / "*.gif"))
    message = refused(detector_run, tmp_path / "out", *names)
    assert message == (
        f"nowhere.jpg: does not exist: correct it; {names[1]}: has no image or video in it: name "
        f"another folder; {names[2]}: matches no file: correct it"
    )
    assert not (tmp_path / "out").exists()


def test_a_classifiers_weights_are_refused_with_the_name_of_what_loads_them(
    classifier_run, tree, tmp_path
):
    message = refused(classifier_run, tmp_path / "out", tree / "JPEGImages")
    assert message.endswith("has a classifier's weights: use load_classifier for it")


@pytest.fixture(scope="module")
def video(tree, tmp_path_factory):
    """Five frames, not evenly spaced in time, of an odd width."""
    pytest.importorskip("av")
    from tract_det.inference.video import Frame, write_frames

    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    images = [np.array(Image.open(p)) for p in sorted((tree / "JPEGImages").glob("b*.png"))]
    times = [Fraction(k, 10) for k in (0, 1, 2, 5, 6)]
    frames = [
        Frame(torch.from_numpy(image[:, :95]).permute(2, 0, 1), seconds)
        for image, seconds in zip(images, times, strict=True)
    ]
    write_frames(path, iter(frames))
    return path


def test_a_video_gives_a_video_of_the_same_timing_and_results_by_frame(
    detector_run, video, tmp_path
):
    from tract_det.inference.video import read_frames

    detect(detector_run, tmp_path, video, "--score-threshold", 0.01)
    before, after = list(read_frames(video)), list(read_frames(tmp_path / "videos/clip.mp4"))
    assert [frame.seconds for frame in after] == [frame.seconds for frame in before]
    assert after[0].image.shape == before[0].image.shape == (3, 96, 94)
    difference = (after[0].image.int() - before[0].image.int()).abs()
    assert (difference > 100).any()
    ids = {entry["image_id"] for entry in json.loads((tmp_path / "coco.json").read_text())}
    assert ids == {f"clip.mp4#{number:06d}" for number in range(1, 6)}


def test_a_damaged_video_leaves_nothing_and_is_named(detector_run, video, tree, tmp_path):
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(video.read_bytes()[:200])
    message = refused(detector_run, tmp_path / "out", broken, tree / "JPEGImages/b000.png")
    assert re.match(r"1 of 2 files could not be read, .*broken\.mp4: the video cannot be", message)
    assert not list((tmp_path / "out").glob("videos/*"))
    entries = json.loads((tmp_path / "out/coco.json").read_text())
    assert {entry["image_id"] for entry in entries} == {"b000"}


def test_without_pyav_a_video_is_refused_in_a_line(detector_run, tmp_path, monkeypatch):
    (tmp_path / "clip.mp4").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    message = refused(detector_run, tmp_path / "out", tmp_path / "clip.mp4")
    assert message.endswith("which is not installed: pip install 'tract-det[video]'")


@pytest.mark.parametrize(
    "arguments",
    [["--score-threshold", "2"], ["--batch-size", "0"], ["--workers", "-1"], ["--format", "png"]],
)
def test_arguments_out_of_range_are_refused(arguments, capsys):
    with pytest.raises(SystemExit):
        call("detect", ["x.png", "--weights", "w.pth", "--out", "o", *arguments])
    assert arguments[0] in capsys.readouterr().err


def test_worker_processes_read_the_same(detector_run, tree, found, tmp_path):
    run_here(
        "detect", tree / "JPEGImages/b*.png", "--weights", detector_run / "model_final.pth",
        "--out", tmp_path, "--format", "coco", "--workers", 2,
    )  # fmt: skip
    assert (tmp_path / "coco.json").read_bytes() == (found / "coco.json").read_bytes()

import os
import threading
from pathlib import Path

import numpy as np
import pytest

from tract_det.data import shapes
from tract_det.data.datasets import read_dataset
from tract_det.data.detection import DetectionDataset, aspect_groups
from tract_det.data.shapes import SHAPES_CLASSES, draw_scene, ensure_shapes
from tract_det.data.voc import read_split
from tract_det.errors import UserError

SCENES = range(40)


@pytest.fixture
def few(monkeypatch):
    monkeypatch.setattr(shapes, "_IMAGES", {"train": 6, "test": 2})


@pytest.fixture(scope="module")
def scenes():
    return [draw_scene(number) for number in SCENES]


def test_a_scene_is_a_pure_function_of_its_number(scenes):
    image, objects = draw_scene(3)
    assert np.array_equal(image, scenes[3][0])
    assert [o.box for o in objects] == [o.box for o in scenes[3][1]]
    assert not np.array_equal(image, draw_scene(4)[0])


def test_boxes_are_tight_around_the_half_covered_pixels(scenes):
    for image, objects in scenes:
        height, width = image.shape[:2]
        for o in objects:
            xmin, ymin, xmax, ymax = o.box
            assert 1 <= xmin < xmax <= width
            assert 1 <= ymin < ymax <= height
            mask = o.alpha >= 0.5
            inside = mask[ymin - 1 : ymax, xmin - 1 : xmax]
            assert inside.sum() == mask.sum()  # nothing outside
            # and every side touches it
            assert inside[0].any()
            assert inside[-1].any()
            assert inside[:, 0].any()
            assert inside[:, -1].any()


def test_boxes_are_where_the_pixels_changed():
    """Checked without the masks of the drawing code: one object against its own background."""
    rng = np.random.default_rng(0)
    shape = None
    while shape is None or shape.truncated:
        shape = shapes._random_shape(rng, 128, 160)
    ground = np.full((128, 160, 3), 0.5)
    changed = np.abs(shapes.paint_shape(rng, ground, shape) - ground).max(axis=2)
    rows, columns = np.nonzero(changed > 0.3)
    changed_box = (columns.min() + 1, rows.min() + 1, columns.max() + 1, rows.max() + 1)
    assert changed_box == pytest.approx(shape.box, abs=1)


def test_circles_are_as_wide_as_high_and_rings_have_holes():
    centre = np.array([64.0, 64.0])
    circle = shapes._alpha("circle", 41.0, 0.0, centre, (128, 128))
    ring = shapes._alpha("ring", 41.0, 0.0, centre, (128, 128))
    shape = shapes.Shape("circle", circle, 0)
    xmin, ymin, xmax, ymax = shape.box
    assert xmax - xmin == ymax - ymin
    assert xmax - xmin + 1 == pytest.approx(41, abs=1)
    assert circle[64, 64] == 1
    assert ring[64, 64] == 0


def test_objects_stay_visible_or_are_difficult(scenes):
    for _, objects in scenes:
        hidden = np.zeros_like(objects[0].mask)
        for o in reversed(objects):
            visible = (o.mask & ~hidden).sum() / o.area
            assert visible >= (0.25 if o.difficult else 0.7)
            hidden |= o.mask


def test_scenes_vary_in_class_size_number_and_format(scenes):
    objects = [o for _, in_scene in scenes for o in in_scene]
    widths = [o.box[2] - o.box[0] + 1 for o in objects]
    assert {o.name for o in objects} == set(SHAPES_CLASSES)
    assert {len(in_scene) for _, in_scene in scenes} == {1, 2, 3, 4, 5}
    assert {image.shape for image, _ in scenes} == {
        (128, 128, 3),
        (128, 160, 3),
        (160, 128, 3),
    }
    assert min(widths) < 25
    assert max(widths) > 55
    assert 0 < sum(o.difficult for o in objects) < 0.15 * len(objects)
    assert any(o.truncated for o in objects)


@pytest.mark.usefixtures("few")
def test_the_tree_is_read_back_by_the_voc_reader(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACT_DET_CACHE", str(tmp_path))
    train = read_dataset(["shapes_train"], None, None)
    test = read_dataset(["shapes_test"], None, None)
    assert train.class_names == test.class_names == SHAPES_CLASSES
    assert [len(s.annotations) for s in (train, test)] == [6, 2]
    assert train.dropped == 0
    for number, a in enumerate(train.annotations + test.annotations):
        drawn = draw_scene(number)[1]
        expected = [(x1 - 1, y1 - 1, x2, y2) for x1, y1, x2, y2 in (o.box for o in drawn)]
        assert a.boxes.tolist() == [list(map(float, box)) for box in expected]
        assert [SHAPES_CLASSES[k] for k in a.labels] == [o.name for o in drawn]
        assert a.difficult.tolist() == [o.difficult for o in drawn]
    for index, (image, _) in enumerate(map(DetectionDataset(train).__getitem__, range(6))):
        drawn = draw_scene(index)[0].transpose(2, 0, 1)
        assert np.abs(image.numpy().astype(int) - drawn).mean() < 6  # JPEG
    assert len(aspect_groups(train)) == 6


@pytest.mark.usefixtures("few")
def test_a_complete_tree_is_never_written_again(tmp_path):
    root = ensure_shapes(tmp_path)
    stamps = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert ensure_shapes(tmp_path) == root
    assert {path: path.stat().st_mtime_ns for path in root.rglob("*")} == stamps
    assert list(tmp_path.iterdir()) == [root]  # nothing half-written is left beside it


@pytest.mark.usefixtures("few")
def test_several_writers_at_once_leave_one_complete_tree(tmp_path):
    results: list[Path | Exception] = []
    barrier = threading.Barrier(4)

    def write():
        barrier.wait()
        try:
            results.append(ensure_shapes(tmp_path))
        except Exception as error:
            results.append(error)

    threads = [threading.Thread(target=write) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(results)) == 1
    assert list(tmp_path.iterdir()) == [results[0]]
    assert len(read_split(results[0], "train").annotations) == 6


@pytest.mark.usefixtures("few")
def test_an_interrupted_drawing_leaves_nothing(tmp_path, monkeypatch):
    def fail(number):
        if number == 3:
            raise KeyboardInterrupt
        return draw_scene(number)

    with monkeypatch.context() as patch:
        patch.setattr(shapes, "draw_scene", fail)
        with pytest.raises(KeyboardInterrupt):
            ensure_shapes(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert ensure_shapes(tmp_path).is_dir()


@pytest.mark.usefixtures("few")
def test_a_damaged_tree_says_what_to_delete(tmp_path):
    root = ensure_shapes(tmp_path)
    next((root / "JPEGImages").iterdir()).unlink()
    with pytest.raises(UserError, match=f"delete {root}"):
        ensure_shapes(tmp_path)


@pytest.mark.usefixtures("few")
def test_a_cache_that_cannot_be_written_names_the_variable(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{tmp_path}.*TRACT_DET_CACHE"):
        ensure_shapes(tmp_path / "file")


def test_the_whole_set_is_four_hundred_and_a_hundred_images(tmp_path):
    started = os.times().user
    root = ensure_shapes(tmp_path)
    assert os.times().user - started < 60
    train, test = (read_split(root, name, SHAPES_CLASSES) for name in ("train", "test"))
    assert (len(train.annotations), len(test.annotations)) == (400, 100)
    ids = {a.image_id for s in (train, test) for a in s.annotations}
    assert len(ids) == 500
    per_class = np.bincount(np.concatenate([a.labels for a in test.annotations]), minlength=6)
    assert per_class.min() >= 20

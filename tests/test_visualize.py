"""Pictures show their data, as read back from matplotlib's figures and from the PNG files."""

import json

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from PIL import Image

from tests.names import NAMES
from tract_det.cli import call
from tract_det.engine.checkpoint import save_weights
from tract_det.errors import UserError
from tract_det.report.images import filter_sheet
from tract_det.visualize import (
    Picture,
    annotation_grid,
    beside_the_results,
    detection_grid,
    stem_filters,
    training_curves,
)

NO_BOXES = np.zeros((0, 4))
GROUND_TRUTH = np.array([[5.0, 5, 20, 20]])


@pytest.fixture
def figures(monkeypatch):
    """The figures that were saved, in order."""
    saved = []
    savefig = Figure.savefig

    def record(figure, *args, **kwargs):
        saved.append(figure)
        savefig(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", record)
    return saved


def pixels(path):
    with Image.open(path) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB")).astype(int)


def picture(path, boxes=NO_BOXES, scores=(), labels=(), color=(0, 0, 90)):
    Image.new("RGB", (60, 40), color).save(path)
    return Picture(path, GROUND_TRUTH, np.array(boxes), np.array(labels, int), np.array(scores))


def corners(patch):
    """Box of a rectangle in pixel edges. matplotlib's origin is the first pixel's centre."""
    (left, top), width, height = patch.get_xy(), patch.get_width(), patch.get_height()
    return [left + 0.5, top + 0.5, left + width + 0.5, top + height + 0.5]


def legend_colors(legend):
    """Edge colour of each entry, by its text."""
    return {
        text.get_text(): to_rgb(handle.get_edgecolor())
        for text, handle in zip(legend.get_texts(), legend.get_patches(), strict=True)
    }


# ---- Detections. ----


def test_a_detection_is_drawn_when_its_score_reaches_the_threshold(tmp_path):
    def grid(boxes, scores):
        entry = picture(tmp_path / "image.png", boxes, scores, [0] * len(scores))
        detection_grid(tmp_path / "grid.png", [entry], ["cat"])
        return pixels(tmp_path / "grid.png")

    box = [[25.0, 10, 55, 35]]
    without, low, high = grid(NO_BOXES, []), grid(box, [0.4]), grid(box, [0.9])
    assert (low == without).all()
    assert (high != without).any()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["grid.png", "image.png"]


def test_detections_have_their_box_class_score_and_the_colour_of_the_legend(tmp_path, figures):
    boxes = [[1.0, 2, 30, 20], [10, 5, 50, 35], [-3, -2, 12, 39]]
    entry = picture(tmp_path / "image.png", boxes, [0.49, 0.5, 0.875], [0, 1, 2])
    detection_grid(tmp_path / "grid.png", [entry], ["cat", "dog", "bus"])
    (axis,) = figures[0].axes
    ground_truth, *detections = axis.patches
    assert corners(ground_truth) == GROUND_TRUTH[0].tolist()
    assert to_rgb(ground_truth.get_edgecolor()) == (1, 1, 1)
    assert ground_truth.get_linestyle() not in ("-", "solid")
    assert [corners(patch) for patch in detections] == boxes[1:]
    assert [text.get_text() for text in axis.texts] == ["dog 0.50", "bus 0.88"]
    # A label is at its box's corner, or at the image's where the box begins outside.
    assert [text.get_position() for text in axis.texts] == [(10, 5), (0, 0)]
    colors = legend_colors(figures[0].legends[0])
    assert list(colors) == ["ground truth", "cat", "dog", "bus"]
    assert len(set(colors.values())) == 4
    drawn = [to_rgb(patch.get_edgecolor()) for patch in detections]
    assert drawn == [colors["dog"], colors["bus"]]
    assert [to_rgb(text.get_bbox_patch().get_facecolor()) for text in axis.texts] == drawn


def test_any_name_of_a_class_is_drawn_as_it_is_written(tmp_path, figures):
    boxes = [[1.0, 2, 30, 20]] * len(NAMES)
    scores, labels = [0.9] * len(NAMES), range(len(NAMES))
    entry = picture(tmp_path / "image.png", boxes, scores, labels)
    detection_grid(tmp_path / "grid.png", [entry], NAMES)
    assert len(figures[0].legends[0].get_texts()) == len(NAMES) + 1
    texts = [text.get_text() for text in figures[0].axes[0].texts]
    assert "$\\frac{1}$ 0.90" in texts and "<script>alert(1)</script> 0.90" in texts


def test_more_than_ten_classes_have_twenty_colours(tmp_path, figures):
    names = [f"class {number}" for number in range(20)]
    detection_grid(tmp_path / "grid.png", [picture(tmp_path / "image.png")], names)
    colors = legend_colors(figures[0].legends[0])
    assert len({colors[name] for name in names}) == 20


def test_without_pictures_the_legend_alone_is_drawn(tmp_path, figures):
    detection_grid(tmp_path / "grid.png", [], ["cat"])
    assert list(legend_colors(figures[0].legends[0])) == ["cat"]
    assert not any(axis.images for axis in figures[0].axes)


def test_annotations_have_no_ground_truth_beside_them_in_the_legend(tmp_path, figures):
    boxes, labels = np.array([[10.0, 20, 30, 40]]), np.array([0])
    image = picture(tmp_path / "image.png").path
    annotation_grid(tmp_path / "grid.png", [(image, boxes, labels)], ["cat"], pixels)
    assert list(legend_colors(figures[0].legends[0])) == ["cat"]


def test_rows_are_as_high_as_their_images(tmp_path, figures):
    wide = [np.zeros((60, 120, 3), dtype=np.uint8)] * 4
    tall = [np.zeros((72, 60, 3), dtype=np.uint8)] * 4
    none = NO_BOXES[:, 0]
    pictures = [Picture(tmp_path, NO_BOXES, NO_BOXES, none, none, image) for image in wide + tall]
    detection_grid(tmp_path / "grid.png", pictures, ["cat"])
    width, height = figures[0].get_size_inches()
    assert height / width == pytest.approx((0.5 + 1.2) / 4)
    for axis in figures[0].axes:  # no image is smaller than its cell, but for the margins
        assert axis.get_window_extent().width > 0.9 * figures[0].bbox.width / 4


def test_a_label_that_has_no_room_above_its_box_is_within_it(tmp_path, figures):
    boxes = [[1.0, 1, 30, 20], [10, 20, 50, 35]]
    entry = picture(tmp_path / "image.png", boxes, [0.9, 0.9], [0, 0])
    detection_grid(tmp_path / "grid.png", [entry], ["cat"])
    assert [text.get_va() for text in figures[0].axes[0].texts] == ["top", "bottom"]


def test_pictures_are_laid_out_row_by_row(tmp_path, figures):
    shades = [10, 60, 110, 160, 210]
    pictures = [picture(tmp_path / f"{shade}.png", color=(shade, 0, 0)) for shade in shades]
    detection_grid(tmp_path / "grid.png", pictures, ["cat"], columns=2)
    axes = figures[0].axes
    assert axes[0].get_gridspec().get_geometry() == (3, 2)
    assert [int(axis.images[0].get_array()[0, 0, 0]) for axis in axes[:5]] == shades
    assert not axes[5].images
    assert not any(axis.axison for axis in axes)


# ---- Curves. ----


def write_run(folder, losses, evaluations):
    """Writes a run's `metrics.jsonl` from pairs of a step and a value."""
    entries = [{"iteration": step, "loss": loss} for step, loss in losses]
    entries += [{"iteration": step, "voc_area.mAP": value} for step, value in evaluations]
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))


def lines(axis):
    """Points of each line, by its label."""
    return {line.get_label(): list(map(tuple, line.get_xydata().tolist())) for line in axis.lines}


def legend_names(axis):
    return [text.get_text() for text in axis.get_legend().get_texts()]


def test_curves_and_filters_through_the_tool(tmp_path, figures, capsys):
    losses = {name: [(k, scale / k) for k in range(1, 9)] for name, scale in (("a", 1), ("b", 2))}
    write_run(tmp_path / "a", losses["a"], [(4, 25.0), (6, None), (8, 50.0)])  # null: NaN
    write_run(tmp_path / "b", losses["b"], [(8, 60.0)])
    filters = torch.nn.Conv2d(3, 20, 7)
    save_weights(tmp_path / "b/model_final.pth", filters, {})
    out = tmp_path / "pictures"
    call("visualize", [str(tmp_path / "a"), str(tmp_path / "b"), "--out", str(out)])
    assert f"{tmp_path / 'a'} has no model_final.pth yet" in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["b-stem.png", "curves.png"]

    curves, stem = figures
    loss_axis, map_axis = curves.axes
    assert lines(loss_axis) == losses
    assert lines(map_axis) == {"a": [(4, 25), (8, 50)], "b": [(8, 60)]}
    assert legend_names(loss_axis) == legend_names(map_axis) == ["a", "b"]
    assert (loss_axis.get_ylabel(), loss_axis.get_yscale()) == ("loss", "log")
    assert map_axis.get_ylabel().startswith("mAP")
    assert sum(len(axis.images) for axis in stem.axes) == 20


@pytest.mark.parametrize(("channels", "drawn"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_filters_of_other_channels_are_drawn_by_the_first_three_or_the_first_in_grey(
    tmp_path, figures, channels, drawn
):
    write_run(tmp_path / "run", [(1, 3.0)], [])
    layer = torch.nn.Conv2d(channels, 4, 5)
    save_weights(tmp_path / "run/model_final.pth", layer, {})
    call("visualize", [str(tmp_path / "run"), "--out", str(tmp_path / "pictures")])
    for axis, kernel in zip(figures[1].axes, layer.weight.detach().numpy(), strict=False):
        (image,) = axis.images
        restored = kernel[drawn] - kernel[drawn].min()
        expected = (restored / restored.max()).transpose(1, 2, 0)
        np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-6)


def test_a_run_without_evaluations_has_a_loss_and_no_map(tmp_path, figures):
    write_run(tmp_path / "run", [(1, 3.0), (2, 2.0)], [])
    training_curves(tmp_path / "curves.png", {"new": tmp_path / "run/metrics.jsonl"})
    loss_axis, map_axis = figures[0].axes
    assert lines(loss_axis) == {"new": [(1, 3), (2, 2)]}
    assert lines(map_axis) == {} and map_axis.get_legend() is None


# ---- Filters. ----


def test_filters_keep_their_order_and_each_fills_its_own_range(tmp_path, figures):
    weight = np.random.default_rng(0).normal(size=(18, 3, 2, 5))
    weight *= np.logspace(-4, 4, 18)[:, None, None, None]
    weight[7] = 0.3  # constant: no range to fill
    stem_filters(tmp_path / "stem.png", weight)
    axes = figures[0].axes
    assert axes[0].get_gridspec().get_geometry() == (2, 16)
    drawn = [np.asarray(axis.images[0].get_array()) for axis in axes if axis.images]
    assert len(drawn) == 18
    for number, (image, kernel) in enumerate(zip(drawn, weight, strict=True)):
        assert image.shape == (2, 5, 3)
        assert (image.min(), image.max()) == (0, 0 if number == 7 else 1)
        restored = image.transpose(2, 0, 1) * np.ptp(kernel) + kernel.min()
        np.testing.assert_allclose(restored, kernel, rtol=0, atol=1e-12 * np.abs(kernel).max())


def test_the_file_shows_the_filters_from_left_to_right_in_rgb(tmp_path):
    red, blue = np.array([2.0, -1, -1]), np.array([-3.0, -3, 1])
    stem_filters(tmp_path / "stem.png", np.stack([red, blue])[:, :, None, None])
    image = pixels(tmp_path / "stem.png")
    columns = [np.flatnonzero((image == rgb).all(axis=2).any(axis=0)) for rgb in np.eye(3) * 255]
    assert len(columns[0]) and len(columns[2]) and not len(columns[1])
    assert columns[0].max() < columns[2].min()


@pytest.mark.parametrize(("channels", "shown"), [(1, [0, 0, 0]), (2, [0, 0, 0]), (5, [0, 1, 2])])
def test_filters_of_other_channels_show_the_first_three_or_the_first(
    tmp_path, figures, channels, shown
):
    weight = np.random.default_rng(0).normal(size=(4, channels, 3, 3))
    stem_filters(tmp_path / "stem.png", weight)
    (image,) = figures[0].axes[0].images
    kernel = weight[0, shown].transpose(1, 2, 0)
    expected = (kernel - kernel.min()) / np.ptp(kernel)
    np.testing.assert_allclose(np.asarray(image.get_array()), expected, atol=1e-12)
    assert filter_sheet(weight).startswith("<img")


# ---- Errors. ----


def test_bad_input_is_refused_by_name_and_leaves_no_file(tmp_path):
    with pytest.raises(UserError, match=r"metrics\.jsonl is missing"):
        training_curves(tmp_path / "c.png", {"a": tmp_path / "a/metrics.jsonl"})
    with pytest.raises(UserError, match=r"\(M, C, kh, kw\)"):
        stem_filters(tmp_path / "s.png", np.zeros((4, 27)))
    with pytest.raises(UserError, match=r"same folder name \(run, run\)"):
        call("visualize", [str(tmp_path / "x/run"), str(tmp_path / "y/run")])
    assert not list(tmp_path.iterdir())


def test_whatever_goes_wrong_beside_the_results_is_a_warning_in_one_line(tmp_path):
    with pytest.warns(UserWarning) as warned, beside_the_results(tmp_path / "a.png"):
        raise RuntimeError("cannot\ndraw")
    (warning,) = warned
    assert str(warning.message) == f"{tmp_path / 'a.png'} is not drawn: cannot draw"


def test_curves_of_classifiers_show_their_top_1(tmp_path, figures):
    entries = [{"iteration": 2, "loss": 1.0}, {"iteration": 2, "top1": 40.0}]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    training_curves(tmp_path / "curves.png", {"c": tmp_path / "m.jsonl"})
    axis = figures[0].axes[1]
    assert lines(axis) == {"c": [(2, 40.0)]} and axis.get_ylabel() == "top-1, %"

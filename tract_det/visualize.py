"""Pictures as PNG files: detections on images, curves of training runs, filters of a stem."""

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")  # draws to files, needs no display

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image, ImageOps

from tract_det.errors import UserError, shortened
from tract_det.files import atomically, read_metrics, steps_and_values
from tract_det.pixels import shown_channels

# The figure that a training's curve shows, and its title: a detector's, a classifier's.
_METRICS = {"voc_area.mAP": "mAP (area, IoU 0.5)", "top1": "top-1"}

Color = tuple[float, float, float, float]  # RGBA, 0..1


@dataclass(frozen=True)
class Picture:
    """An image with its ground truth and its detections. Boxes are xyxy pixel edges.

    Attributes:
        path: the image file; its EXIF orientation is applied.
        ground_truth: `(n, 4)` boxes of the annotation.
        boxes: `(m, 4)` boxes of the detections.
        labels: `(m,)` int, 0..K-1.
        scores: `(m,)` float; infinite = none, and none is written.
        pixels: `(H, W, 3)` uint8, what is drawn instead of the file; None = the file.
    """

    path: Path
    ground_truth: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    pixels: np.ndarray | None = None


@contextmanager
def beside_the_results(path: Path) -> Iterator[None]:
    """Around the drawing of a picture: whatever goes wrong is a warning, and costs no result."""
    try:
        yield
    except Exception as error:  # of matplotlib, of an image file, of the disk
        reason = shortened(str(error) or type(error).__name__, 200)
        warnings.warn(f"{path} is not drawn: {reason}", stacklevel=3)


@contextmanager
def _as_written() -> Iterator[None]:
    """A dollar sign in a name is no mathematics."""
    with plt.rc_context({"text.parse_math": False}):
        yield


def _label(name: str) -> str:
    """A name as a label of the legend, which leaves out those that begin with an underscore."""
    return shortened(f" {name}" if name.startswith("_") else name)


@_as_written()
def detection_grid(
    path: Path,
    pictures: Sequence[Picture],
    class_names: Sequence[str],
    *,
    score_thresh: float = 0.5,
    columns: int = 4,
) -> None:
    """Draws detections (coloured, with class and score) over the ground truth (white, dashed).

    Args:
        path: the PNG file to write.
        pictures: drawn row by row; there may be none.
        class_names: the K names that the labels index.
        score_thresh: detections with a lower score are not drawn.
        columns: number of pictures per row.
    """
    cells = max(1, len(pictures))  # without pictures, one empty cell above the legend
    columns = min(columns, cells)
    pixels = [_pixels(picture) for picture in pictures]
    heights = _row_heights(pixels, columns) or [1.0]
    figure, axes = plt.subplots(
        len(heights),
        columns,
        figsize=(3.2 * columns, 3.2 * sum(heights)),
        height_ratios=heights,
        squeeze=False,
        layout="constrained",
    )
    colors = plt.get_cmap("tab20" if len(class_names) > 10 else "tab10")
    shown = [_label(name) for name in class_names]
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, picture, image in zip(axes.flat, pictures, pixels, strict=False):
        axis.imshow(image)
        for box in picture.ground_truth:
            _rectangle(axis, box, edgecolor="white", linestyle=(0, (3, 3)), linewidth=1.2)
        for box, label, score in zip(picture.boxes, picture.labels, picture.scores, strict=True):
            if score >= score_thresh:
                color = colors(int(label) % colors.N)
                text = f"{shown[int(label)]} {score:.2f}" if math.isfinite(score) else ""
                _detection(axis, box, text or shown[int(label)], color)
    handles = [
        Rectangle((0, 0), 1, 1, fill=False, edgecolor=colors(k % colors.N), label=name)
        for k, name in enumerate(shown)
    ]
    if any(len(picture.ground_truth) for picture in pictures):
        dashed = Rectangle((0, 0), 1, 1, fill=False, edgecolor="grey", linestyle="--")
        dashed.set_label("ground truth")
        handles.insert(0, dashed)
    figure.legend(handles=handles, loc="outside lower center", ncols=min(len(handles), 8))
    _save(figure, path)


def annotation_grid(
    path: Path,
    annotations: Sequence[tuple[Path, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
    read: Callable[[Path], np.ndarray],
) -> None:
    """Draws annotated boxes with their classes.

    Args:
        path: the PNG file to write.
        annotations: of each image its file, its boxes `(n, 4)` and their labels `(n,)`.
        class_names: the K names that the labels index.
        read: gives `(H, W, 3)` uint8 of an image file, as its boxes mean it.
    """
    nothing = np.zeros((0, 4))
    pictures = [
        Picture(image, nothing, boxes, labels, np.full(len(labels), np.inf), read(image))
        for image, boxes, labels in annotations
    ]
    detection_grid(path, pictures, class_names)


def _pixels(picture: Picture) -> np.ndarray:
    if picture.pixels is not None:
        return picture.pixels
    with Image.open(picture.path) as image:
        image.load()  # turns TIFF, so that it is not turned twice
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def _row_heights(pixels: Sequence[np.ndarray], columns: int) -> list[float]:
    """The height of each row in widths of a cell: what its tallest image fills, within limits."""
    shapes = [min(max(len(image) / image.shape[1], 0.4), 1.3) for image in pixels]
    return [max(shapes[start : start + columns]) for start in range(0, len(shapes), columns)]


def _detection(axis: Axes, box: np.ndarray, text: str, color: Color) -> None:
    """Draws a box with a label above its top left corner, or below it where the image begins."""
    _rectangle(axis, box, edgecolor=color, linewidth=1.8)
    left, right = axis.get_xlim()
    has_room = box[1] > 0.05 * abs(right - left)  # in a cell 3.2 inches wide, of 7 points
    axis.text(
        max(box[0], 0),
        max(box[1], 0),
        text,
        fontsize=7,
        color="white",
        va="bottom" if has_room else "top",
        clip_on=True,
        bbox={"facecolor": color, "edgecolor": "none", "pad": 1, "alpha": 0.85},
    )


def _rectangle(axis: Axes, box: np.ndarray, **style: object) -> None:
    # matplotlib puts pixel centres at integers, so the first pixel begins at -0.5.
    left, top, right, bottom = (float(edge) - 0.5 for edge in box)
    axis.add_patch(Rectangle((left, top), right - left, bottom - top, fill=False, **style))  # type: ignore[arg-type]


@_as_written()
def training_curves(path: Path, runs: Mapping[str, Path]) -> None:
    """Draws the loss and the mAP, or a classifier's top-1, of training runs over their steps.

    Args:
        path: the PNG file to write.
        runs: the `metrics.jsonl` of each run, by the run's name.

    Raises:
        UserError: a file is missing.
    """
    figure, (loss_axis, map_axis) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    drawn: list[str] = []
    for name, metrics in runs.items():
        entries = read_metrics(metrics)
        metric = next((key for key in _METRICS if any(key in entry for entry in entries)), "")
        drawn += [metric] if metric else []
        for axis, key in ((loss_axis, "loss"), (map_axis, metric)):
            steps, values = steps_and_values(entries, key)
            if steps:
                axis.plot(steps, values, label=name, marker="." if key != "loss" else "")
    loss_axis.set(xlabel="step", ylabel="loss", yscale="log")
    titles = [title for key, title in _METRICS.items() if key in drawn]
    map_axis.set(xlabel="step", ylabel=f"{' or '.join(titles or _METRICS.values())}, %")
    for axis in (loss_axis, map_axis):
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend()
    _save(figure, path)


@dataclass(frozen=True)
class Line:
    """The metric of an arm over a training, for `comparison`.

    Attributes:
        name: of the arm.
        epochs: length of the training.
        at: (E,) epochs of the evaluations, ascending.
        mean: (E,) mean over seeds.
        sd: (E,) standard deviation over seeds, NaN for one seed.
        finals: the final metric of each seed.
    """

    name: str
    epochs: float
    at: np.ndarray
    mean: np.ndarray
    sd: np.ndarray
    finals: Mapping[int, float]


@_as_written()
def comparison(path: Path, lines: Sequence[Line], metric: str) -> None:
    """Draws the metric over the epochs, and the final metrics of all seeds.

    Left: at the greatest length, the mean of each arm with one standard deviation to either side.
    Right: with several lengths, final metrics over the length; otherwise each seed's over the arms,
    those of one seed connected.

    Args:
        path: the PNG file to write.
        lines: those of an arm have one name, whatever their length.
        metric: its name, for the axes.
    """
    names = list(dict.fromkeys(line.name for line in lines))
    palette = plt.get_cmap("tab20" if len(names) > 10 else "tab10")
    colors = {name: palette(i % palette.N) for i, name in enumerate(names)}
    lengths = sorted({line.epochs for line in lines})
    figure, (over_epochs, at_end) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for line in lines:
        if line.epochs == lengths[-1]:
            over_epochs.plot(line.at, line.mean, color=colors[line.name], label=line.name)
            low, high = line.mean - line.sd, line.mean + line.sd
            over_epochs.fill_between(line.at, low, high, color=colors[line.name], alpha=0.2, lw=0)
    over_epochs.set(xlabel="epoch", ylabel=f"{metric}, %", title="mean ± standard deviation")
    over_epochs.grid(alpha=0.3)
    if len(names) > 5:  # beside so many lines there is no room for it
        handles, labels = over_epochs.get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=6, frameon=False)
    else:
        over_epochs.legend()
    if len(lengths) > 1:
        _finals_over_lengths(at_end, lines, colors)
        at_end.set_xticks(lengths, [f"{length:g}" for length in lengths])
        at_end.set(xlabel="length of the training, epochs")
    else:
        _finals_over_arms(at_end, lines, colors)
    at_end.set(ylabel=f"final {metric}, %", title="every seed's final figure")
    at_end.grid(alpha=0.3)
    _save(figure, path)


def _finals_over_lengths(axis: Axes, lines: Sequence[Line], colors: Mapping[str, Color]) -> None:
    for name, color in colors.items():
        points = sorted(
            (line.epochs, list(line.finals.values()))
            for line in lines
            if line.name == name and line.finals
        )
        for epochs, finals in points:
            axis.plot([epochs] * len(finals), finals, ".", color=color, alpha=0.6)
        means = [float(np.mean(finals)) for _, finals in points]
        axis.plot([epochs for epochs, _ in points], means, color=color)


def _finals_over_arms(axis: Axes, lines: Sequence[Line], colors: Mapping[str, Color]) -> None:
    seeds = sorted({seed for line in lines for seed in line.finals})
    for seed in seeds:
        points = [(i, line.finals[seed]) for i, line in enumerate(lines) if seed in line.finals]
        axis.plot(*zip(*points, strict=True), color="grey", linewidth=0.8, alpha=0.6)
    for i, line in enumerate(lines):
        finals = list(line.finals.values())
        axis.plot([i] * len(finals), finals, "o", color=colors[line.name], markersize=4)
        if finals:
            axis.plot(i, np.mean(finals), "_", color=colors[line.name], markersize=24)
    names = [line.name for line in lines]
    axis.set_xticks(range(len(lines)), names)
    if len(names) > 4:
        axis.tick_params(axis="x", rotation=30)
        plt.setp(axis.get_xticklabels(), ha="right")
    axis.set_xlim(-0.5, len(lines) - 0.5)


def stem_filters(path: Path, weight: np.ndarray) -> None:
    """Draws the filters of a stem as RGB images, in order, each scaled to its own range.

    Args:
        path: the PNG file to write.
        weight: `(M, C, kh, kw)`; of other than three channels those that a picture shows.

    Raises:
        UserError: it has another shape.
    """
    if weight.ndim != 4:
        raise UserError(f"a stem's filters are (M, C, kh, kw), not {weight.shape}")
    weight = weight[:, shown_channels(weight.shape[1])]
    columns = min(16, len(weight))
    rows = -(-len(weight) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(columns * 0.7, rows * 0.7), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, kernel in zip(axes.flat, weight, strict=False):
        span = np.ptp(kernel)
        axis.imshow(((kernel - kernel.min()) / (span or 1.0)).transpose(1, 2, 0))
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    try:
        atomically(path, lambda temporary: figure.savefig(temporary, dpi=130))
    finally:
        plt.close(figure)

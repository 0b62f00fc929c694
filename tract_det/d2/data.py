"""Data in VOC layout for detectron2's programs, and their evaluation by this project's rules."""

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from tract_det.data.voc import VOC_CLASSES, Annotation, read_split
from tract_det.errors import UserError
from tract_det.evaluation.evaluators import DetectionEvaluator, format_table


def register_voc(
    name: str,
    root: str | Path,
    split: str,
    class_names: Sequence[str] = VOC_CLASSES,
    *,
    use_difficult: bool = True,
) -> None:
    """Registers a split of a tree in VOC layout with detectron2, to be read when it is first used.

    Unlike detectron2's `register_pascal_voc` it reads images of any suffix, and says what is wrong
    with a file by its name.

    Args:
        name: for DATASETS.TRAIN and DATASETS.TEST.
        root: the folder that holds Annotations/, ImageSets/ and JPEGImages/.
        split: name of a file in ImageSets/Main, without ".txt".
        class_names: the classes, in the order of the labels.
        use_difficult: train on objects marked difficult, as detectron2 does.

    Raises:
        UserError: `class_names` is one name, or empty.
        AssertionError: detectron2's, for a name that is registered already.
    """
    if isinstance(class_names, str) or not class_names:
        raise UserError(
            f"class_names of register_voc is {class_names!r}: give a sequence of names, such as "
            "('RBC', 'WBC')"
        )
    names = tuple(class_names)

    def read() -> list[dict[str, Any]]:
        found = read_split(Path(root), split, names)
        return to_records(found.annotations, use_difficult=use_difficult)

    DatasetCatalog.register(name, read)
    MetadataCatalog.get(name).set(
        thing_classes=list(names), dirname=str(root), split=split, year=2007
    )


def to_records(
    annotations: Sequence[Annotation], *, use_difficult: bool = True
) -> list[dict[str, Any]]:
    """Images and boxes as detectron2's data loaders take them.

    Args:
        annotations: as `tract_det.data.voc` reads them.
        use_difficult: keep objects marked difficult.
    """
    return [_record(one, use_difficult) for one in annotations]


def _record(annotation: Annotation, use_difficult: bool) -> dict[str, Any]:
    return {
        "file_name": str(annotation.path),
        "image_id": annotation.image_id,
        "height": annotation.height,
        "width": annotation.width,
        "annotations": [
            {"bbox": box.tolist(), "bbox_mode": BoxMode.XYXY_ABS, "category_id": int(label)}
            for box, label, difficult in zip(
                annotation.boxes, annotation.labels, annotation.difficult, strict=True
            )
            if use_difficult or not difficult
        ],
    }


class VOCEvaluator(DatasetEvaluator):
    """This project's evaluation (see `DetectionEvaluator`) as one of detectron2's.

    Args:
        dataset_name: a data set of `register_voc`, or of detectron2's `register_pascal_voc`.
        rule: one of `evaluation.voc_ap.RULES`: "devkit", or "detectron2" for that one's figures.
        output_dir: where the challenge's files are written; None = nowhere.

    Raises:
        UserError: there is no such data set, or it has no VOC layout.

    Attributes:
        table: the figures by class as text, after `evaluate`.
    """

    def __init__(
        self, dataset_name: str, *, rule: str = "devkit", output_dir: str | Path | None = None
    ) -> None:
        # Its `get` would make one.
        meta: Any = MetadataCatalog.get(dataset_name) if dataset_name in MetadataCatalog else None
        if not all(hasattr(meta, name) for name in ("dirname", "split", "thing_classes")):
            raise UserError(
                f"VOCEvaluator: '{dataset_name}' is no registered data set in VOC layout: register "
                "it with tract_det.d2.register_voc, under that name"
            )
        self._split = str(meta.split)
        self._classes, self._rule = tuple(meta.thing_classes), rule
        self._output = None if output_dir is None else Path(output_dir)
        root = Path(meta.dirname)
        found = read_split(root, self._split, self._classes, need_images=False)
        self._annotations = found.annotations
        self.table = ""
        self.reset()

    def reset(self) -> None:
        """Forgets the detections."""
        self._evaluator = DetectionEvaluator(self._annotations, self._classes, rule=self._rule)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Takes the detections of a batch."""
        for one, output in zip(inputs, outputs, strict=True):
            found = output["instances"]
            boxes = found.pred_boxes.tensor
            self._evaluator.add(str(one["image_id"]), boxes, found.scores, found.pred_classes)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Figures of all ranks' detections, on every rank, which all must call it.

        Returns:
            `voc_07` and `voc_area`, each with `mAP`, `mAP_50_95` and `AP-<class>`, and `coco`; in
            per cent, NaN where there is nothing to find.

        Raises:
            UserError: unless each image of the split was evaluated exactly once.
        """
        results = self._evaluator.evaluate()
        self.table = format_table(results)
        if self._output is not None and comm.is_main_process():
            self._evaluator.write_detections(self._output, self._split)
        figures: dict[str, dict[str, float]] = OrderedDict()
        for group in ("voc_07", "voc_area"):
            own = results[group]
            figures[group] = {key: own[key] for key in ("mAP", "mAP_50_95")}
            figures[group] |= {f"AP-{name}": value for name, value in own["AP"].items()}
        figures["coco"] = dict(results["coco"])
        return figures

"""Data in VOC layout for detectron2's programs, and evaluation by this project's rules."""

import logging
import sys
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.structures import BoxMode
from detectron2.utils import comm

from tract_det.data.annotations import Annotation
from tract_det.data.choices import EXIF_MODES
from tract_det.data.exif import check_headers, with_sizes
from tract_det.data.images import orientation_of
from tract_det.data.voc import VOC_CLASSES, read_split
from tract_det.errors import UserError
from tract_det.evaluation.evaluators import DetectionEvaluator
from tract_det.evaluation.tables import format_table

_LOG = logging.getLogger("detectron2.tract_det")  # below the logger that detectron2 sets up


def register_voc(
    name: str,
    root: str | Path,
    split: str,
    class_names: Sequence[str] = VOC_CLASSES,
    *,
    use_difficult: bool = True,
    exif: str = "auto",
) -> None:
    """Registers a split of a tree in VOC layout with detectron2; it is read when it is first used.

    Unlike detectron2's `register_pascal_voc`, it also reads images that are not .jpg, its errors
    name the file and what is wrong with it, and it compares every image's size with its annotation
    before a training begins. detectron2's own programs evaluate it by their evaluator for VOC: by
    the rule of 2012 if the folder is a devkit's `VOC2012`, and otherwise by that of 2007.

    Args:
        name: the data set's name in DATASETS.TRAIN and DATASETS.TEST.
        root: the folder that holds Annotations/, ImageSets/ and JPEGImages/.
        split: name of a file in ImageSets/Main, without ".txt".
        class_names: the classes, in the order of the labels.
        use_difficult: train on objects marked difficult, as detectron2 does.
        exif: as INPUT.EXIF: auto, apply, ignore or refuse. detectron2 turns every image upright, so
            that under `ignore` no image may have an EXIF orientation.

    Raises:
        UserError: `class_names` is a single string, or empty, or `exif` is none of these.
        AssertionError: from detectron2, if the name is already registered.
    """
    if isinstance(class_names, str) or not class_names:
        raise UserError(
            f"class_names of register_voc is {class_names!r}: give a sequence of names, such as "
            "('RBC', 'WBC')"
        )
    if exif not in EXIF_MODES:
        raise UserError(f"exif of register_voc is {exif!r}: give one of {', '.join(EXIF_MODES)}")
    root, names = Path(root).expanduser(), tuple(class_names)

    def read() -> list[dict[str, Any]]:
        annotations = read_split(root, split, names, upright=exif != "ignore").annotations
        # A reader of detectron2 would fail on them, one by one; it knows no bound of the pixels.
        orientations = check_headers(annotations, exif, max_pixels=sys.maxsize)
        if exif == "ignore" and orientations.oriented:
            raise UserError(
                f"{root}: exif of register_voc is ignore, but detectron2 applies the EXIF "
                f"orientation that {orientations.oriented} images have: rewrite them without it"
            )
        _refuse_turned_tiffs(annotations)
        return to_records(with_sizes(annotations, orientations), use_difficult=use_difficult)

    DatasetCatalog.register(name, read)
    MetadataCatalog.get(name).set(
        thing_classes=list(names),
        evaluator_type="pascal_voc",
        dirname=str(root),
        split=split,
        year=2012 if root.absolute().name == "VOC2012" else 2007,
    )


def _refuse_turned_tiffs(annotations: Sequence[Annotation]) -> None:
    """Pillow turns TIFF as it decodes it, and detectron2 would turn it once more."""
    turned = [
        str(annotation.path)
        for annotation in annotations
        if annotation.path.suffix.lower() in (".tif", ".tiff")
        and orientation_of(annotation.path) != 1
    ]
    if turned:
        raise UserError(
            f"{turned[0]}: detectron2 turns a TIFF file with an EXIF orientation twice "
            f"({len(turned)} images): rewrite them upright"
        )


def to_records(
    annotations: Sequence[Annotation], *, use_difficult: bool = True
) -> list[dict[str, Any]]:
    """Images and boxes in the format of detectron2's data loaders.

    Args:
        annotations: read by `tract_det.data.voc`.
        use_difficult: keep objects marked difficult.
    """
    return [
        {
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
        for annotation in annotations
    ]


class VOCEvaluator(DatasetEvaluator):
    """This project's evaluation (see `DetectionEvaluator`) as a detectron2 evaluator.

    It logs the table of figures by class.

    Args:
        dataset_name: a data set registered by `register_voc`, or by detectron2's
            `register_pascal_voc`.
        rule: one of `evaluation.voc_ap.RULES`: "devkit", or "detectron2" for detectron2's figures.
        output_dir: folder for the detections in the VOC challenge's files; None = not written.

    Raises:
        UserError: there is no such data set, or it is not in VOC layout.

    Attributes:
        table: after `evaluate`, the figures by class as text.
    """

    def __init__(
        self, dataset_name: str, *, rule: str = "devkit", output_dir: str | Path | None = None
    ) -> None:
        # `MetadataCatalog.get` would create an entry for an unknown name.
        meta: Any = MetadataCatalog.get(dataset_name) if dataset_name in MetadataCatalog else None
        if not all(hasattr(meta, name) for name in ("dirname", "split", "thing_classes")):
            raise UserError(
                f"VOCEvaluator: '{dataset_name}' is not a registered data set in VOC layout: "
                "register it under that name with tract_det.d2.register_voc"
            )
        self._name, self._split = dataset_name, str(meta.split)
        self._classes, self._rule = tuple(meta.thing_classes), rule
        self._output = None if output_dir is None else Path(output_dir)
        root = Path(meta.dirname)
        voc_split = read_split(root, self._split, self._classes, need_images=False)
        self._annotations = voc_split.annotations
        self.table = ""
        self.reset()

    def reset(self) -> None:
        """Discards all detections."""
        self._evaluator = DetectionEvaluator(self._annotations, self._classes, rule=self._rule)

    def process(self, inputs: list[dict[str, Any]], outputs: list[dict[str, Any]]) -> None:
        """Adds the detections of a batch."""
        for record, output in zip(inputs, outputs, strict=True):
            image_id, instances = str(record["image_id"]), output["instances"]
            boxes = instances.pred_boxes.tensor
            self._evaluator.add(image_id, boxes, instances.scores, instances.pred_classes)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """The figures over the detections of all ranks. Every rank must call it, and gets them.

        Returns:
            `voc_07` and `voc_area`, each with `mAP`, `mAP_50_95` and `AP-<class>`, and `coco`; in
            per cent, NaN for a class without objects.

        Raises:
            UserError: an image of the split was not evaluated exactly once.
        """
        results = self._evaluator.evaluate()
        self.table = format_table(results)
        if comm.is_main_process():
            _LOG.info("Evaluation of %s\n%s", self._name, self.table)
        if self._output is not None and comm.is_main_process():
            self._evaluator.write_detections(self._output, self._split)
        figures: dict[str, dict[str, float]] = OrderedDict()
        for group in ("voc_07", "voc_area"):
            by_rule = results[group]
            figures[group] = {key: by_rule[key] for key in ("mAP", "mAP_50_95")}
            figures[group] |= {f"AP-{name}": value for name, value in by_rule["AP"].items()}
        figures["coco"] = dict(results["coco"])
        return figures

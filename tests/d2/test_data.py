"""Data and evaluation of this project in detectron2's programs."""

import logging
import shutil
from contextlib import contextmanager
from functools import partial

import numpy as np
import pytest
import torch
from detectron2.data import (
    DatasetCatalog,
    DatasetMapper,
    MetadataCatalog,
    build_detection_test_loader,
)
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.evaluation import (
    PascalVOCDetectionEvaluator,
    inference_on_dataset,
    pascal_voc_evaluation,
)
from detectron2.structures import Boxes, Instances
from PIL import Image

from tests.conftest import write_voc_tree
from tests.d2.models import tract_cfg
from tract_det.d2 import VOCEvaluator, register_voc
from tract_det.data.detection import DetectionDataset
from tract_det.data.exif import check_headers, with_sizes
from tract_det.data.voc import read_split
from tract_det.errors import UserError

CLASSES = ("disc", "box")


@contextmanager
def registered(name, *arguments, **options):
    """The name of a data set that is registered meanwhile."""
    register_voc(name, *arguments, **options)
    try:
        yield name
    finally:
        DatasetCatalog.remove(name)
        MetadataCatalog.remove(name)


@pytest.fixture(scope="module")
def name(voc_tree):
    with registered("test_data", voc_tree, "train", CLASSES) as name:
        yield name


def test_a_registered_split_equals_what_detectron2_reads(name, voc_tree):
    expected = load_voc_instances(str(voc_tree), "train", CLASSES)
    for record, other in zip(DatasetCatalog.get(name), expected, strict=True):
        assert record["image_id"] == other["image_id"]
        assert (record["height"], record["width"]) == (other["height"], other["width"])
        assert record["annotations"] == other["annotations"]
        assert record["file_name"].endswith(".png")  # detectron2 knows only .jpg


def made_up_detections(name, generator):
    """Jittered ground truth and noise, with equal scores in and across images."""
    outputs = []
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        labels = torch.tensor([a["category_id"] for a in record["annotations"]])
        boxes = torch.cat([boxes + torch.randn(2, 4, generator=generator) * 4] * 3)
        boxes[4:] += 12
        scores = torch.randint(1, 10, (6,), generator=generator) / 10
        instances = Instances((96, 96), pred_boxes=Boxes(boxes), scores=scores)
        instances.pred_classes = torch.cat([labels, labels, 1 - labels])
        outputs.append(({"image_id": record["image_id"]}, {"instances": instances}))
    return outputs


@pytest.fixture(params=["VOC2007", "VOC2012"])
def complete(request, voc_tree, tmp_path):
    """A data set with the optional tags that detectron2's evaluator cannot do without."""
    root = shutil.copytree(voc_tree, tmp_path / request.param)
    for xml in (root / "Annotations").iterdir():
        tags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>"
        xml.write_text(xml.read_text().replace("<difficult>", tags))
    with registered("test_complete", root, "train", CLASSES) as name:
        yield name


class StableNumpy:
    """numpy for their module, with a defined order of equal scores."""

    argsort = staticmethod(partial(np.argsort, kind="stable"))

    def __getattr__(self, name):
        return getattr(np, name)


def test_figures_by_the_detectron2_rule_are_those_of_detectron2s_evaluator(
    complete, generator, monkeypatch
):
    name = complete
    monkeypatch.setattr(pascal_voc_evaluation, "np", StableNumpy())
    reference, evaluator = PascalVOCDetectionEvaluator(name), VOCEvaluator(name, rule="detectron2")
    reference.reset()
    for record, output in made_up_detections(name, generator):
        reference.process([record], [output])
        evaluator.process([record], [output])
    expected, figures = reference.evaluate()["bbox"], evaluator.evaluate()
    group = figures["voc_07" if MetadataCatalog.get(name).year == 2007 else "voc_area"]
    assert 5 < expected["AP50"] < 95
    assert group["mAP"] == pytest.approx(expected["AP50"], abs=1e-9)
    assert group["mAP_50_95"] == pytest.approx(expected["AP"], abs=1e-9)


def test_the_table_by_class_is_in_detectron2s_log(name, generator, caplog):
    evaluator = VOCEvaluator(name)
    for record, output in made_up_detections(name, generator):
        evaluator.process([record], [output])
    with caplog.at_level(logging.INFO, "detectron2.tract_det"):
        figures = evaluator.evaluate()
    assert f"{figures['voc_07']['AP-disc']:.2f}" in caplog.text and "box  " in caplog.text
    assert evaluator.table in caplog.text and caplog.records[0].name == "detectron2.tract_det"


def test_inference_on_dataset_accepts_the_evaluator(name, tmp_path):
    class Perfect(torch.nn.Module):
        def forward(self, inputs):
            return [{"instances": self.detections[record["image_id"]]} for record in inputs]

    model = Perfect()
    model.detections = {}
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        instances = Instances((96, 96), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        instances.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        model.detections[record["image_id"]] = instances
    cfg = tract_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    evaluator = VOCEvaluator(name, output_dir=tmp_path)
    results = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)
    assert results["voc_area"]["mAP"] == results["voc_07"]["AP-disc"] == pytest.approx(100)
    assert (tmp_path / "comp4_det_train_disc.txt").is_file()


def test_a_missing_image_is_an_error_not_a_lower_figure(name, generator):
    evaluator = VOCEvaluator(name)
    for record, output in made_up_detections(name, generator)[1:]:
        evaluator.process([record], [output])
    with pytest.raises(UserError, match="1 of 8 images were not evaluated"):
        evaluator.evaluate()


@pytest.mark.parametrize("other", ["test_nowhere", "coco_2017_train"])
def test_an_evaluator_for_other_data_than_voc_names_register_voc(other):
    with pytest.raises(UserError, match=rf"'{other}' is not a registered .*register_voc"):
        VOCEvaluator(other)
    assert "test_nowhere" not in MetadataCatalog


@pytest.mark.parametrize("classes", ["RBC", ()])
def test_class_names_are_a_sequence_of_names(classes, voc_tree):
    with pytest.raises(UserError, match=r"class_names of register_voc is .*: give a sequence"):
        register_voc("test_refused", voc_tree, "train", classes)
    assert "test_refused" not in DatasetCatalog


def test_the_error_for_an_unknown_class_names_the_argument(voc_tree):
    with (
        registered("test_one_class", voc_tree, "train", ("disc",)) as name,
        pytest.raises(UserError, match=r"'box' is not in .*register_voc's class_names"),
    ):
        DatasetCatalog.get(name)


def test_detectron2s_programs_find_their_evaluator_and_its_rule(name, voc_tree, tmp_path):
    meta = MetadataCatalog.get(name)
    assert (meta.evaluator_type, meta.year, meta.split) == ("pascal_voc", 2007, "train")
    (tmp_path / "VOC2012").symlink_to(voc_tree)
    with registered("test_2012", tmp_path / "VOC2012", "train", CLASSES) as other:
        assert MetadataCatalog.get(other).year == 2012


def turned_tree(root, orientation, *, stored_sizes=False):
    """Two images of 96 x 64, upright, whose pixels are stored as EXIF's orientation says."""
    write_voc_tree(root, train=2, test=1, size=(96, 64))
    turn = {3: Image.ROTATE_180, 6: Image.ROTATE_90, 8: Image.ROTATE_270, 1: None}[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    for path in (root / "JPEGImages").iterdir():
        image = Image.open(path)
        stored = image if turn is None else image.transpose(turn)
        stored.save(path, exif=exif)
        xml = root / "Annotations" / f"{path.stem}.xml"
        if stored_sizes:
            swapped = "<width>64</width><height>96</height>"
            xml.write_text(xml.read_text().replace("<width>96</width><height>64</height>", swapped))
    return root


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_both_back_ends_read_the_same_pixels_and_boxes_upright(orientation, tmp_path):
    root = turned_tree(tmp_path / "tree", orientation)
    mapper = DatasetMapper(True, augmentations=[], image_format="RGB")
    ours = DetectionDataset(read_split(root, "train", CLASSES))
    with registered("test_turned", root, "train", CLASSES) as name:
        theirs = [mapper(record) for record in DatasetCatalog.get(name)]
    for (image, target), record in zip(ours, theirs, strict=True):
        assert torch.equal(image, record["image"]) and image.shape == (3, 64, 96)
        assert torch.equal(target["boxes"], record["instances"].gt_boxes.tensor)


@pytest.mark.parametrize(
    ("orientation", "message"),
    [
        (1, r"a000\.png: the image is 96 x 64 .* swapped in <size>.*; .*a001\.png"),
        (6, r"^2 of 2 images have an EXIF orientation .*\(a000\.png, a001\.png\): .*register_voc"),
    ],
)
def test_sizes_that_disagree_are_refused_before_the_training(orientation, message, tmp_path):
    root = turned_tree(tmp_path / "tree", orientation, stored_sizes=True)
    with (
        registered("test_swapped", root, "train", CLASSES) as name,
        pytest.raises(UserError, match=message),
    ):
        DatasetCatalog.get(name)
    with pytest.raises(UserError, match=r"a000\.png: the image is 96 x 64"):
        DetectionDataset(read_split(root, "train", CLASSES))[0]


def test_under_apply_both_back_ends_turn_images_whose_size_is_the_stored_one(tmp_path):
    root = turned_tree(tmp_path / "tree", 6, stored_sizes=True)
    split = read_split(root, "train", CLASSES)
    split.annotations = with_sizes(split.annotations, check_headers(split.annotations, "apply"))
    mapper = DatasetMapper(True, augmentations=[], image_format="RGB")
    with registered("test_apply", root, "train", CLASSES, exif="apply") as name:
        theirs = [mapper(record) for record in DatasetCatalog.get(name)]
    for (image, target), record in zip(DetectionDataset(split), theirs, strict=True):
        assert torch.equal(image, record["image"]) and image.shape == (3, 64, 96)
        assert torch.equal(target["boxes"], record["instances"].gt_boxes.tensor)


def test_what_detectron2_turns_is_refused_under_ignore(tmp_path):
    root = turned_tree(tmp_path / "tree", 6, stored_sizes=True)
    with (
        registered("test_ignore", root, "train", CLASSES, exif="ignore") as name,
        pytest.raises(UserError, match=r"but detectron2 applies .* that 2 images have"),
    ):
        DatasetCatalog.get(name)
    with pytest.raises(UserError, match="exif of register_voc is 'turn': give one of auto, apply"):
        register_voc("test_turn", root, "train", CLASSES, exif="turn")


def test_a_tiff_that_detectron2_would_turn_twice_is_refused(tmp_path):
    root = turned_tree(tmp_path / "tree", 6)
    for path in sorted((root / "JPEGImages").iterdir()):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.open(path).save(path.with_suffix(".tiff"), exif=exif)
        path.unlink()
    with (
        registered("test_tiff", root, "train", CLASSES) as name,
        pytest.raises(UserError, match=r"a000\.tiff: detectron2 turns a TIFF .*\(2 images\)"),
    ):
        DatasetCatalog.get(name)

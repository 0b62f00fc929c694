"""Data and evaluation of this project in detectron2's programs."""

import shutil

import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog, build_detection_test_loader
from detectron2.data.datasets.pascal_voc import load_voc_instances
from detectron2.evaluation import PascalVOCDetectionEvaluator, inference_on_dataset
from detectron2.structures import Boxes, Instances

from tests.d2.models import tract_cfg
from tract_det.d2 import VOCEvaluator, register_voc
from tract_det.errors import UserError

CLASSES = ("disc", "box")


@pytest.fixture(scope="module")
def name(voc_tree):
    register_voc("test_data", voc_tree, "train", CLASSES)
    yield "test_data"
    DatasetCatalog.remove("test_data")
    MetadataCatalog.remove("test_data")


def test_a_registered_split_equals_what_detectron2_reads(name, voc_tree):
    expected = load_voc_instances(str(voc_tree), "train", CLASSES)
    for record, other in zip(DatasetCatalog.get(name), expected, strict=True):
        assert record["image_id"] == other["image_id"]
        assert (record["height"], record["width"]) == (other["height"], other["width"])
        assert record["annotations"] == other["annotations"]
        assert record["file_name"].endswith(".png")  # detectron2 knows only .jpg


def made_up_detections(name, generator):
    """Jittered ground truth and noise, without equal scores: detectron2 does not order them."""
    outputs = []
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        labels = torch.tensor([a["category_id"] for a in record["annotations"]])
        boxes = torch.cat([boxes + torch.randn(2, 4, generator=generator) * 4] * 3)
        boxes[4:] += 12
        scores = torch.rand(6, generator=generator)
        instances = Instances((96, 96), pred_boxes=Boxes(boxes), scores=scores)
        instances.pred_classes = torch.cat([labels, labels, 1 - labels])
        outputs.append(({"image_id": record["image_id"]}, {"instances": instances}))
    return outputs


@pytest.fixture
def complete(voc_tree, tmp_path):
    """A data set with the optional tags that detectron2's evaluator cannot do without."""
    shutil.copytree(voc_tree, tmp_path / "tree")
    for xml in (tmp_path / "tree/Annotations").iterdir():
        tags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>"
        xml.write_text(xml.read_text().replace("<difficult>", tags))
    register_voc("test_complete", tmp_path / "tree", "train", CLASSES)
    yield "test_complete"
    DatasetCatalog.remove("test_complete")
    MetadataCatalog.remove("test_complete")


def test_figures_by_the_detectron2_rule_are_those_of_detectron2s_evaluator(complete, generator):
    name = complete
    reference, evaluator = PascalVOCDetectionEvaluator(name), VOCEvaluator(name, rule="detectron2")
    reference.reset()
    for record, output in made_up_detections(name, generator):
        reference.process([record], [output])
        evaluator.process([record], [output])
    expected, figures = reference.evaluate()["bbox"], evaluator.evaluate()
    assert 5 < expected["AP50"] < 95
    assert figures["voc_07"]["mAP"] == pytest.approx(expected["AP50"], abs=1e-6)  # year 2007
    assert figures["voc_07"]["mAP_50_95"] == pytest.approx(expected["AP"], abs=1e-6)
    assert "disc" in evaluator.table and np.isfinite(figures["voc_area"]["AP-box"])


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
    register_voc("test_one_class", voc_tree, "train", ("disc",))
    try:
        with pytest.raises(UserError, match=r"'box' is not in .*register_voc's class_names"):
            DatasetCatalog.get("test_one_class")
    finally:
        DatasetCatalog.remove("test_one_class")
        MetadataCatalog.remove("test_one_class")

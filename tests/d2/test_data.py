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


def test_a_registered_split_is_what_detectron2_reads_itself(name, voc_tree):
    expected = load_voc_instances(str(voc_tree), "train", CLASSES)
    found = DatasetCatalog.get(name)
    for one, other in zip(found, expected, strict=True):
        assert one["image_id"] == other["image_id"]
        assert (one["height"], one["width"]) == (other["height"], other["width"])
        assert one["annotations"] == other["annotations"]
        assert one["file_name"].endswith(".png")  # detectron2 knows .jpg alone


def made_up_detections(name, generator):
    """Jittered ground truth and noise; equal scores would be in no order in detectron2."""
    outputs = []
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        labels = torch.tensor([a["category_id"] for a in record["annotations"]])
        boxes = torch.cat([boxes + torch.randn(2, 4, generator=generator) * 4] * 3)
        boxes[4:] += 12
        scores = torch.rand(6, generator=generator)
        found = Instances((96, 96), pred_boxes=Boxes(boxes), scores=scores)
        found.pred_classes = torch.cat([labels, labels, 1 - labels])
        outputs.append(({"image_id": record["image_id"]}, {"instances": found}))
    return outputs


@pytest.fixture
def complete(voc_tree, tmp_path):
    """The tree with the optional tags without which detectron2's evaluator does not run."""
    shutil.copytree(voc_tree, tmp_path / "tree")
    for xml in (tmp_path / "tree/Annotations").iterdir():
        tags = "<pose>Unspecified</pose><truncated>0</truncated><difficult>"
        xml.write_text(xml.read_text().replace("<difficult>", tags))
    register_voc("test_complete", tmp_path / "tree", "train", CLASSES)
    yield "test_complete"
    DatasetCatalog.remove("test_complete")
    MetadataCatalog.remove("test_complete")


def test_figures_by_the_detectron2_rule_are_those_of_its_own_evaluator(complete, generator):
    name = complete
    theirs, ours = PascalVOCDetectionEvaluator(name), VOCEvaluator(name, rule="detectron2")
    theirs.reset()
    for one, output in made_up_detections(name, generator):
        theirs.process([one], [output])
        ours.process([one], [output])
    expected, found = theirs.evaluate()["bbox"], ours.evaluate()
    assert 5 < expected["AP50"] < 95
    assert found["voc_07"]["mAP"] == pytest.approx(expected["AP50"], abs=1e-6)  # year 2007
    assert found["voc_07"]["mAP_50_95"] == pytest.approx(expected["AP"], abs=1e-6)
    assert "disc" in ours.table and np.isfinite(found["voc_area"]["AP-box"])


def test_it_is_an_evaluator_for_inference_on_dataset(name, tmp_path):
    class Perfect(torch.nn.Module):
        def forward(self, inputs):
            return [{"instances": self.found[one["image_id"]]} for one in inputs]

    model = Perfect()
    model.found = {}
    for record in DatasetCatalog.get(name):
        boxes = torch.tensor([a["bbox"] for a in record["annotations"]])
        found = Instances((96, 96), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        found.pred_classes = torch.tensor([a["category_id"] for a in record["annotations"]])
        model.found[record["image_id"]] = found
    cfg = tract_cfg()
    cfg.DATALOADER.NUM_WORKERS = 0
    evaluator = VOCEvaluator(name, output_dir=tmp_path)
    results = inference_on_dataset(model, build_detection_test_loader(cfg, name), evaluator)
    assert results["voc_area"]["mAP"] == results["voc_07"]["AP-disc"] == pytest.approx(100)
    assert (tmp_path / "comp4_det_train_disc.txt").is_file()


def test_a_missing_image_is_an_error_not_a_lower_figure(name, generator):
    evaluator = VOCEvaluator(name)
    for one, output in made_up_detections(name, generator)[1:]:
        evaluator.process([one], [output])
    with pytest.raises(UserError, match="1 of 8 images were not evaluated"):
        evaluator.evaluate()


@pytest.mark.parametrize("other", ["test_nowhere", "coco_2017_train"])
def test_an_evaluator_of_no_voc_data_names_register_voc(other):
    with pytest.raises(UserError, match=rf"'{other}' is no registered .*register_voc"):
        VOCEvaluator(other)
    assert "test_nowhere" not in MetadataCatalog


@pytest.mark.parametrize("classes", ["RBC", ()])
def test_class_names_are_a_sequence_of_names(classes, voc_tree):
    with pytest.raises(UserError, match=r"class_names of register_voc is .*: give a sequence"):
        register_voc("test_refused", voc_tree, "train", classes)
    assert "test_refused" not in DatasetCatalog


def test_a_class_that_is_not_in_the_list_says_where_it_is_given(voc_tree):
    register_voc("test_one_class", voc_tree, "train", ("disc",))
    try:
        with pytest.raises(UserError, match=r"'box' is not in .*register_voc's class_names"):
            DatasetCatalog.get("test_one_class")
    finally:
        DatasetCatalog.remove("test_one_class")
        MetadataCatalog.remove("test_one_class")

"""The same pictures are the same data in every format, and what is wrong is said in one line."""

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

from tests.data.conftest import BCCD
from tests.data.formats import (
    FORMS,
    WITHOUT_SPLITS,
    coco,
    label_img,
    labels,
    litter,
    yolo_ultralytics,
)
from tract_det.data.datasets import Holdout, read_dataset, splits_of
from tract_det.data.detection import DetectionDataset
from tract_det.data.yolo_labels import parse_labels
from tract_det.errors import UserError

MARKS = ("iscrowd", "difficult", "ignore")
CAT, DOG = ("cat", (2, 3, 10, 8)), ("dog", (1, 1, 20, 10))


@pytest.fixture
def tree(new_tree):
    """Two splits: images of several sizes, one without objects, one with a difficult one."""
    tree = new_tree("voc")
    tree.add("a", CAT, DOG)
    tree.add("b", DOG, ("cat", (5, 2, 6, 9)), size=(31, 17))
    tree.add("c", size=(13, 29))
    tree.add("d", ("cat", (1, 2, 7, 5)), size=(7, 11))
    tree.split("train", ["a", "b", "c"])
    tree.split("test", ["d"])
    return tree


@pytest.fixture
def out(tmp_path):
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def read(root, name, **options):
    return read_dataset([name], root, options.pop("class_names", None), **options)


def both(root):
    train = read(root, "train")
    return [train, read(root, "test", class_names=train.class_names)]


def assert_same(split, expected):
    assert split.class_names == expected.class_names
    assert [a.image_id for a in split.annotations] == [a.image_id for a in expected.annotations]
    for a, b in zip(split.annotations, expected.annotations, strict=True):
        assert (a.width, a.height) == (b.width, b.height)
        np.testing.assert_array_equal(a.boxes, b.boxes)
        np.testing.assert_array_equal(a.labels, b.labels)
        assert a.path.read_bytes() == b.path.read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_data_set_gives_the_same_boxes_labels_and_sizes(tree, out, form):
    splits = both(tree.root)
    FORMS[form](out / form, splits)
    for split in splits:
        copy = read(out / form, split.name, class_names=splits[0].class_names)
        assert_same(copy, split)
        assert copy.origin.startswith(form.partition("_")[0].upper())
    assert read(out / form, "train").class_names == ("cat", "dog")


@pytest.mark.parametrize("form", FORMS)
def test_what_systems_leave_behind_is_no_part_of_the_data(tree, out, form):
    splits = both(tree.root)
    FORMS[form](out / form, splits)
    names = splits_of(out / form)
    litter(out / form)
    assert splits_of(out / form) == names
    for split in splits:
        assert_same(read(out / form, split.name, class_names=splits[0].class_names), split)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.skipif(not BCCD.is_dir(), reason="BCCD is not there")
def test_photographs_of_cells_are_the_same_in_every_form(out, form):
    splits = [read(BCCD, "train").first(20)]
    FORMS[form](out, splits)
    expected = read(BCCD, "train").first(20)
    names = sorted(a.image_id for a in expected.annotations)
    assert names == [a.image_id for a in expected.annotations]
    assert_same(read(out, "train"), expected)


@pytest.mark.parametrize("form", WITHOUT_SPLITS)
def test_data_without_splits_are_held_out_by_a_seed(tree, out, form):
    tree.split("all", "abcd")
    whole = read(tree.root, "all")
    WITHOUT_SPLITS[form](out / form, [whole])
    for name in ("train", "test"):
        with pytest.raises(UserError, match=r"set DATASETS\.HOLDOUT to the share of the images"):
            read(out / form, name)
    ids = {}
    for seed in (0, 1, 2):
        holdout = Holdout(0.5, seed)
        parts = [read(out / form, name, holdout=holdout) for name in ("train", "test")]
        ids[seed] = [{a.image_id for a in part.annotations} for part in parts]
        assert len(parts[0]) == len(parts[1]) == 2
        assert ids[seed][0] | ids[seed][1] == set("abcd")
        assert "0.5 of the images are held out" in parts[1].origin
        again = read(out / form, "test", holdout=holdout)
        assert {a.image_id for a in again.annotations} == ids[seed][1]
    assert len({tuple(map(frozenset, parts)) for parts in map(tuple, ids.values())}) > 1


def test_what_is_held_out_stays_so_when_images_are_added(tree, out):
    tree.split("all", "abcd")
    label_img(out / "x", [read(tree.root, "all")])
    before = {a.image_id for a in read(out / "x", "test", holdout=Holdout(0.5)).annotations}
    shutil.copy(out / "x/a.jpg", out / "x/e.jpg")
    shutil.copy(out / "x/a.txt", out / "x/e.txt")
    after = {a.image_id for a in read(out / "x", "test", holdout=Holdout(0.4)).annotations}
    assert len(before & after) >= 1 and after - before <= {"e"}


def test_a_crowd_and_what_is_marked_is_difficult(tree, out):
    content = coco([read(tree.root, "train")])
    for annotation, key in zip(content["annotations"], MARKS, strict=False):
        annotation[key] = 1
    write_coco(out, content)
    split = read(out, "train", need_images=False)
    assert np.concatenate([a.difficult for a in split.annotations]).tolist() == [True] * 3 + [False]


def test_a_polygon_counts_by_its_bounding_box(tree, out):
    content = coco([read(tree.root, "train")])
    content["annotations"][0] |= {"bbox": [], "segmentation": [[1, 2, 10, 4, 3, 8]]}
    write_coco(out / "coco", content)
    split = read(out / "coco", "train", need_images=False)
    assert split.annotations[0].boxes[0].tolist() == [1, 2, 10, 8]
    yolo_ultralytics(out / "yolo", both(tree.root))
    (out / "yolo/labels/train/a.txt").write_text("0 0.05 0.2 0.5 0.4 0.15 0.8\n")
    assert read(out / "yolo", "train").annotations[0].boxes[0].tolist() == [1, 2, 10, 8]


@pytest.mark.parametrize("digits", [4, 6, 9, 17])
def test_whole_pixels_survive_the_digits_of_a_yolo_file(digits, generator_of_boxes):
    size, annotation = generator_of_boxes
    path = annotation.path.with_suffix(".txt")
    path.write_text(labels(annotation, digits))
    record = parse_labels(path, annotation.path, size, {0: "cell"})
    np.testing.assert_array_equal(record.boxes, annotation.boxes)


@pytest.fixture
def generator_of_boxes(out):
    generator = np.random.default_rng(0)
    width, height = 500, 375
    corners = generator.integers(0, (width - 1, height - 1), (200, 2))
    sides = generator.integers(1, 200, (200, 2))
    boxes = np.concatenate((corners, np.minimum(corners + sides, (width, height))), 1)
    labels = np.zeros(200, dtype=np.int64)
    annotation = SimpleNamespace(
        path=out / "x.jpg", boxes=boxes.astype(float), labels=labels, width=width,
        height=height,
    )  # fmt: skip
    return (width, height), annotation


THIN = {
    "a line": ((3, 2, 4, 8), True),
    "a line across": ((0, 9, 20, 10), True),
    "two pixels": ((6, 4, 8, 5), True),
    "a pixel": ((5, 5, 6, 6), False),
    "no width": ((7, 7, 7, 9), False),
    "no height": ((2, 4, 9, 4), False),
}


@pytest.mark.filterwarnings("ignore:.*boxes have no area, or that of a pixel")
@pytest.mark.parametrize("form", ["voc", "coco_roboflow", "yolo_ultralytics"])
def test_a_line_of_pixels_is_an_object_and_a_pixel_is_none_in_every_format(new_tree, out, form):
    tree = new_tree("thin")
    edges = [box for box, _ in THIN.values()]
    corners = [("cat", (x1 + 1, y1 + 1, x2, y2)) for x1, y1, x2, y2 in edges]
    tree.add("a", ("cat", (1, 1, 20, 10)), *corners)
    tree.split("train", ["a"])
    split = read(tree.root, "train")
    if form != "voc":
        boxes = np.array([(0, 0, 20, 10), *edges], dtype=float)
        flags = {"labels": np.zeros(len(boxes), int), "difficult": np.zeros(len(boxes), bool)}
        FORMS[form](out, [replace(split, annotations=[
            replace(split.annotations[0], boxes=boxes, **flags)
        ])])  # fmt: skip
        split = read(out, "train")
    kept = [(0, 0, 20, 10), *(box for box, is_kept in THIN.values() if is_kept)]
    np.testing.assert_allclose(split.annotations[0].boxes, kept, rtol=0, atol=1e-9)
    assert split.dropped == 3
    _, target = DetectionDataset(split)[0]
    assert len(target["boxes"]) == len(kept)  # all of them are trained on


def test_an_edge_between_pixels_stays_there(out):
    path = out / "x.txt"
    path.write_text("0 0.50625 0.5 0.4125 0.5\n")  # edges at 24.0 and 57.0, of 80 pixels
    half = out / "y.txt"
    half.write_text("0 0.50312500 0.5 0.40625000 0.5\n")  # edges at 24.0 and 56.5
    names = {0: "cell"}
    assert parse_labels(path, path, (80, 80), names).boxes[0][::2] == (24.0, 57.0)
    assert parse_labels(half, half, (80, 80), names).boxes[0][::2] == (24.0, 56.5)


def test_images_without_annotations_or_label_files_are_negatives(tree, out):
    splits = both(tree.root)
    yolo_ultralytics(out, splits)
    (out / "labels/train/c.txt").unlink()
    with pytest.warns(UserWarning, match=r"1 of 3 images have no label file and count as images"):
        split = read(out, "train")
    assert_same(split, splits[0])


def test_val_and_valid_name_the_same_split(tree, out):
    FORMS["coco_roboflow"](out, both(tree.root))
    (out / "test").rename(out / "valid")
    assert len(read(out, "val")) == len(read(out, "valid")) == 1


def test_two_formats_in_one_folder_ask_for_the_key(tree, out):
    splits = both(tree.root)
    FORMS["coco_beside"](out, splits)
    FORMS["yolo_ultralytics"](out, splits)
    with pytest.raises(
        UserError, match=r"holds COCO and YOLO: set DATASETS.FORMAT to coco or yolo"
    ):
        read(out, "train")
    for format in ("coco", "yolo"):
        assert_same(read(out, "train", format=format), splits[0])
    with pytest.raises(UserError, match=r"nothing here is in the format voc .*: VOC: XML files"):
        read(out, "train", format="voc")


def test_images_are_read_by_the_data_set_as_by_vocs(tree, out):
    splits = both(tree.root)
    FORMS["coco_official"](out, splits)
    image, target = DetectionDataset(read(out, "train"))[1]
    expected_image, expected_target = DetectionDataset(splits[0])[1]
    assert (image == expected_image).all()
    assert (target["boxes"] == expected_target["boxes"]).all()


@pytest.mark.parametrize(
    ("files", "ids"),
    [
        (["./a.jpg", "x/./b.jpg", "images//c.tar.gz"], ["a", "x/b", "images/c.tar"]),
        ([".hidden", "no_suffix", "dot."], [".hidden", "no_suffix", "dot."]),
        (["a/1.jpg", "b/1.jpg", "b\\2.jpg"], ["a/1", "b/1", "b/2"]),
        (["1.jpg", "1.png"], ["1.jpg", "1.png"]),
        (["/tmp/a.jpg", "C:\\data\\b.jpg"], ["a", "b"]),
    ],
)
def test_the_id_of_an_image_in_cocos_format_is_its_file_without_suffix(tmp_path, files, ids):
    images = [{"id": k, "file_name": name, "width": 9, "height": 9} for k, name in enumerate(files)]
    box = {"id": 1, "image_id": 0, "category_id": 1, "bbox": [0, 0, 5, 5]}
    content = {"images": images, "annotations": [box], "categories": [{"id": 1, "name": "cat"}]}
    (tmp_path / "train.json").write_text(json.dumps(content))
    split = read_dataset(["train"], tmp_path, None, need_images=False)
    assert [annotation.image_id for annotation in split.annotations] == ids


def write_coco(root, content):
    root.mkdir(exist_ok=True)
    text = content if isinstance(content, str) else json.dumps(content)
    (root / "train.json").write_text(text)


def change(path, value):
    def apply(content):
        *parents, last = path
        for key in parents:
            content = content[key]
        if value is None:
            del content[last]
        else:
            content[last] = value

    return apply


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (change(["annotations", 0, "category_id"], 99), "annotation 1: category_id 99 is no"),
        (change(["annotations", 1, "image_id"], 1), "annotation 2: image_id 1 is no image's id"),
        (change(["annotations", 0, "image_id"], None), "annotation 1: image_id None is no image"),
        (change(["annotations", 0, "image_id"], "100"), "image_id '100' is text, the image's id"),
        (change(["images", 0, "id"], "100"), "image_id 100 is a number, the image's id is text"),
        (change(["categories", 0, "id"], "10"), "category_id 10 is a number, the category's id is"),
        (change(["annotations", 0, "bbox"], [1, 2, 3]), r"bbox is \[1, 2, 3\]: write"),
        (change(["annotations", 0, "bbox", 2], float("nan")), "annotation 1: bbox is"),
        (change(["annotations", 0, "bbox", 2], "9"), "annotation 1: bbox is"),
        (change(["annotations", 0], 5), "annotation 5 is no object"),
        (change(["images", 0, "id"], None), "has no id: write one"),
        (change(["images", 0, "id"], 101), "image id 101 occurs twice"),
        (change(["images", 0, "file_name"], "b.jpg"), "file_name 'b.jpg' occurs twice"),
        (change(["images", 0, "file_name"], None), "image 100 has no file_name"),
        (change(["images", 0, "file_name"], "z.jpg"), r"\(z.jpg\): the file is missing in"),
        (change(["categories", 0, "name"], ""), "has no id and name"),
        (change(["categories", 0, "id"], 3), "category id 3 occurs twice"),
        (change(["images"], {}), "has no list 'images'"),
        (change(["annotations", 0, "bbox", 2], 10**400), "annotation 1: bbox is"),
        (change(["images", 0, "file_name"], "a\0b/z.jpg"), "the file is missing in"),
        (change(["images", 0, "file_name"], "a\n\ud800.jpg"), r"\(a  .jpg\): the file is missing"),
        (change(["images", 0, "file_name"], "x/b.jpg"), r"\(b.jpg\): its image .* is also that of"),
        (change(["categories", 0, "name"], "a\x1b[2J"), "has a character that cannot be printed"),
    ],
)  # fmt: skip
def test_a_fault_in_a_coco_file_is_named_with_file_and_id(tree, out, changed, message):
    splits = both(tree.root)
    FORMS["coco_roboflow"](out, splits)
    path = out / "train/_annotations.coco.json"
    content = json.loads(path.read_text())
    changed(content)
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=message) as error:
        read(out, "train")
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_all_faults_of_a_file_are_said_at_once(tree, out):
    content = coco([read(tree.root, "train")])
    content["annotations"][0]["category_id"] = 99
    content["annotations"][2]["bbox"] = "x"
    write_coco(out, content)
    with pytest.raises(UserError, match=r"annotation 1: .*; .*annotation 3: "):
        read(out, "train")


def test_what_is_no_json_is_named_with_its_line(out):
    write_coco(out, '{"images": [],\n"categories": [,]}')
    with pytest.raises(UserError, match=r"train.json, line 2: is no JSON"):
        read(out, "train")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("2 0.5 0.5 0.5 0.5", r"a.txt, line 2: class '2' is none of the 2 classes \(0 to 1\)"),
        ("cat 0.5 0.5 0.5 0.5", "line 2: class 'cat' is none of"),
        ("0 0.5 0.5 0.5", "line 2: has 3 numbers behind the class"),
        ("0 0.5 0.5 0.5 0.5 0.9", "line 2: has 5 numbers behind the class"),
        ("0 0.5 nan 0.5 0.5", "line 2: has something that is no number"),
        ("0 0.5 x 0.5 0.5", "line 2: has something that is no number"),
        ("0 120 80 30 40", "line 2: has 120: x, y, width and height are fractions"),
        ("0 -0.2 0.5 0.1 0.1", "line 2: has 0.5|line 2: has -0.2"),
    ],
)
def test_a_fault_in_a_label_file_is_named_with_file_and_line(tree, out, line, message):
    yolo_ultralytics(out, both(tree.root))
    path = out / "labels/train/a.txt"
    path.write_text(f"0 0.5 0.5 0.5 0.5\n{line}\n")
    with pytest.raises(UserError, match=message) as error:
        read(out, "train")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("names: [a, b]\nnc: 3\ntrain: images/train", "nc is 3, but names has 2 classes"),
        ("names: 5\ntrain: images/train", "names is 5: write a list of classes"),
        ("names: [a, a]\ntrain: images/train", "two classes have the same name"),
        ("names: [a, b]\ntrain: nowhere", "train: there is no 'nowhere' in"),
        ("names: [a, b]", "has none of train, val"),
        ("names: [a, b\ntrain: images/train", "is no YAML"),
        ("names: [yes, no]\ntrain: images/train", "write a list of classes, .* in quotes where"),
        ("names: [a, b]\ntrain: /content/images", "train: there is no '/content/images' in"),
        ("names: [a, b]\ntrain: ..", r"train: there is no '\.\.' in"),
        ("names: [a, b]\ntrain: 5", r"path is '\.', and train \[5\]: write folders"),
        ("names: [a, b]\nkpt_shape: [2, 3]\ntrain: images/train", "keep the first five columns"),
    ],
)
def test_a_fault_in_a_description_is_named(tree, out, text, message):
    yolo_ultralytics(out, both(tree.root))
    (out / "data.yaml").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(out, "train")
    assert str(out / "data.yaml") in str(error.value)


def test_a_named_test_split_without_files_is_no_split_and_others_are_refused(tree, out):
    yolo_ultralytics(out, both(tree.root)[:1])
    text = (out / "data.yaml").read_text()
    (out / "data.yaml").write_text(f"{text}\ntest: ../test/images\n")
    assert splits_of(out) == ["train"]
    (out / "data.yaml").write_text(f"{text}\nval: ../valid/images\n")
    with pytest.raises(UserError, match=r"val: there is no '\.\./valid/images' in"):
        splits_of(out)


def test_class_lists_of_split_folders_must_agree(tree, out):
    FORMS["yolo_roboflow_darknet"](out, both(tree.root))
    (out / "test/_darknet.labels").write_text("dog\ncat\n")
    with pytest.raises(UserError, match=r"train/_darknet.labels and .*test/_darknet.labels have"):
        splits_of(out)


def test_splits_of_one_name_in_two_folders_are_refused(tree, out):
    FORMS["voc_tensorflow"](out, both(tree.root))
    shutil.copytree(out / "images/train", out / "more/train")
    with pytest.raises(UserError, match=r"images/train and .*more/train are both the split"):
        splits_of(out)


def test_a_split_is_found_by_another_name_and_case(tree, out):
    FORMS["yolo_cvat"](out, both(tree.root))
    (out / "Test.txt").rename(out / "Validation.txt")
    assert splits_of(out) == ["Train", "Validation"]
    assert len(read(out, "train")) == 3 and len(read(out, "val")) == 1


@pytest.mark.parametrize("place", ["VOC2007", "VOCdevkit/VOC2007"])
def test_a_devkit_in_a_folder_below_is_pointed_at(new_tree, tmp_path, place):
    tree = new_tree(f"above/{place}")
    tree.add("a", CAT)
    with pytest.raises(UserError, match=f"recognised here, but in {tree.root}: set"):
        splits_of(tmp_path / "above")


def test_label_files_without_classes_ask_for_them(tree, out):
    label_img(out, both(tree.root))
    (out / "classes.txt").unlink()
    with pytest.raises(UserError, match=r"looks like YOLO's labels, .*write .*classes\.txt"):
        read(out, "train")


def test_label_files_that_are_all_missing_are_refused(tree, out):
    yolo_ultralytics(out, both(tree.root))
    shutil.rmtree(out / "labels")
    with pytest.raises(UserError, match="none of its 3 images has a label file"):
        read(out, "train")


def test_an_image_that_another_xml_names_is_not_taken(tree, out):
    FORMS["voc_roboflow"](out, both(tree.root))
    (out / "train/a.jpg").unlink()
    xml = out / "train/a.xml"
    xml.write_text(xml.read_text().replace("<size>", "<filename>b.jpg</filename><size>"))
    with pytest.raises(UserError, match=r"a.xml: no image a\.\* or <filename> 'b.jpg' beside it"):
        read(out, "train")


def test_two_xml_files_do_not_take_one_image(tree, out):
    FORMS["voc_roboflow"](out, both(tree.root))
    (out / "train/a.jpg").rename(out / "train/z.jpg")
    (out / "train/b.jpg").unlink()
    for name in "ab":
        xml = out / f"train/{name}.xml"
        xml.write_text(xml.read_text().replace("<size>", "<filename>z.jpg</filename><size>"))
    with pytest.raises(UserError, match=r"b.xml: its image .*z.jpg is also that of .*a.xml"):
        read(out, "train")


def test_a_folder_with_nothing_that_is_known_shows_what_is_expected(out):
    with pytest.raises(UserError, match=r"is recognised: VOC: .* or COCO: .* or YOLO: .*README$"):
        read(out, "train")
    (out / "Annotations").mkdir()
    with pytest.raises(UserError, match=r"no folder ImageSets/Main here\nexpected:"):
        read(out, "train")
    (out / "Annotations").rmdir()
    with pytest.raises(UserError, match="there is no such folder"):
        read(out / "x", "train")
    for format in ("coco", "yolo"):
        with pytest.raises(UserError, match=rf"nothing here is in the format {format}"):
            read(out, "train", format=format)


# ---- Trees as people have them ----


def test_hidden_files_of_archives_from_macos_are_no_data(tree, out):
    splits = both(tree.root)
    for form, folder, suffix in (("voc_roboflow", "train", "xml"), ("yolo_darknet", "", "txt")):
        root = out / form
        FORMS[form](root, splits)
        for a in splits[0].annotations:
            for name in (f"._{a.image_id}.{suffix}", f"._{a.path.name}"):
                (root / folder / name).write_bytes(b"\0\5\26\7")
                (root / "__MACOSX" / folder).mkdir(parents=True, exist_ok=True)
                (root / "__MACOSX" / folder / name).write_bytes(b"\0\5\26\7")
        assert_same(read(root, "train"), splits[0])


def test_a_yaml_file_is_a_root_as_a_json_file_is(tree, out):
    splits = both(tree.root)
    FORMS["yolo_ultralytics"](out, splits)
    assert_same(read(out / "data.yaml", "train"), splits[0])


def test_a_class_number_may_be_written_as_a_float(tree, out):
    splits = both(tree.root)
    FORMS["yolo_ultralytics"](out, splits)
    for path in (out / "labels/train").iterdir():
        lines = [line.partition(" ") for line in path.read_text().splitlines()]
        path.write_text("".join(f"{number}.0 {box}\n" for number, _, box in lines))
    assert_same(read(out, "train"), splits[0])


def test_data_below_the_root_are_pointed_to(tree, out):
    FORMS["yolo_ultralytics"](out / "inner", both(tree.root))
    with pytest.raises(
        UserError, match=r"no data set is recognised here, but in .*/inner: set DATASETS"
    ):
        read(out, "train")
    shutil.copytree(tree.root, out / "devkit/VOC2012")
    shutil.rmtree(out / "inner")
    with pytest.raises(UserError, match=r"but in .*/devkit/VOC2012: set DATASETS\.ROOT to that"):
        read(out, "train")


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("labels/a.txt", "0 0.5 0.5 0.1 0.1\n", r"labels/a\.txt looks like .*classes\.txt"),
        ("data.yaml", "train: images\n", r"data\.yaml has no names"),
        ("train.json", '{"images": []}', r"train\.json has no lists 'images' and 'categories'"),
    ],
)
def test_what_is_nearly_a_format_is_told_what_it_lacks(out, name, text, message):
    (out / name).parent.mkdir(exist_ok=True)
    (out / name).write_text(text)
    with pytest.raises(UserError, match=message):
        read(out, "train")


def test_a_split_of_yolos_is_not_sought_above_the_data(tree, out):
    FORMS["yolo_ultralytics"](out, both(tree.root))
    path = out / "data.yaml"
    path.write_text(path.read_text().replace("train: images/train", "train: /"))
    with pytest.raises(UserError, match=r"data\.yaml: train: there is no '/' in"):
        read(out, "train")

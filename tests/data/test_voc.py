"""The reader of the devkit's layout: its results and its error messages."""

import warnings

import numpy as np
import pytest

from tract_det.data.datasets import read_dataset
from tract_det.data.voc import VOC_CLASSES, find_devkit, read_split, split_names
from tract_det.errors import UserError

CAT = ("cat", (2, 3, 10, 8))


def test_voc_has_twenty_classes_in_alphabetical_order():
    assert len(VOC_CLASSES) == 20
    assert list(VOC_CLASSES) == sorted(VOC_CLASSES)


def test_inclusive_pixels_become_half_open_edges(tree):
    tree.add("a", ("cat", (1, 1, 20, 10)), ("cat", (5, 6, 7, 8)))
    tree.split("train", ["a"])
    split = read_split(tree.root, "train")
    assert split.origin == f"VOC, {tree.root / 'ImageSets/Main/train.txt'}"
    (a,) = split.annotations
    assert a.boxes.tolist() == [[0, 0, 20, 10], [4, 5, 7, 8]]
    assert (a.boxes.dtype, a.labels.dtype, a.difficult.dtype) == (np.float64, np.int64, bool)
    assert (a.image_id, a.width, a.height) == ("a", 20, 10)


def test_boxes_are_as_read_with_fractions_and_beyond_the_image(tree):
    tree.add("a", ("cat", (45.70, 0, 99, 10.25)))
    tree.split("train", ["a"])
    (a,) = read_split(tree.root, "train").annotations
    assert a.boxes == pytest.approx(np.array([[44.70, -1, 99, 10.25]]))


def test_optional_tags_default_and_tag_order_is_free(tree):
    tree.image("a.jpg")
    tree.xml(
        "a",
        "<annotation><object><bndbox><ymax>8</ymax><xmax>9</xmax><ymin>2</ymin><xmin> 3 </xmin>"
        "</bndbox><name> cat </name><difficult></difficult></object><object>"
        "<difficult>1</difficult><name>cat</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>4</xmax>"
        "<ymax>4</ymax></bndbox></object><size><height>10</height><width>20</width></size>"
        "</annotation>",
    )
    tree.split("train", ["a"])
    (a,) = read_split(tree.root, "train").annotations
    assert a.boxes.tolist() == [[2, 1, 9, 8], [0, 0, 4, 4]]
    assert a.difficult.tolist() == [False, True]


def test_parts_of_an_object_are_not_objects(tree):
    tree.image("a.jpg")
    tree.xml(
        "a",
        "<annotation><size><width>20</width><height>10</height></size><object><part><name>head"
        "</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>3</xmax><ymax>3</ymax></bndbox></part>"
        "<name>person</name><bndbox><xmin>1</xmin><ymin>1</ymin><xmax>9</xmax><ymax>9</ymax>"
        "</bndbox></object></annotation>",
    )
    tree.split("train", ["a"])
    split = read_split(tree.root, "train")
    assert split.class_names == ("person",)
    assert split.annotations[0].boxes.tolist() == [[0, 0, 9, 9]]


def test_classes_are_the_sorted_ones_found_unless_a_list_is_given(tree):
    tree.add("a", ("dog", (1, 1, 5, 5)), ("ant", (1, 1, 5, 5)))
    tree.add("b", ("cat", (1, 1, 5, 5)))
    tree.split("train", ["a", "b"])
    split = read_split(tree.root, "train")
    assert split.class_names == ("ant", "cat", "dog")
    assert [a.labels.tolist() for a in split.annotations] == [[2, 0], [1]]
    with_list = read_split(tree.root, "train", ["dog", "cat", "bee", "ant"])
    assert with_list.class_names == ("dog", "cat", "bee", "ant")
    assert [a.labels.tolist() for a in with_list.annotations] == [[0, 3], [1]]


def test_an_image_without_objects_is_a_negative(tree):
    tree.add("a", CAT)
    tree.add("b")
    tree.split("train", ["a", "b"])
    b = read_split(tree.root, "train").annotations[1]
    assert b.boxes.shape == (0, 4)
    assert b.labels.shape == b.difficult.shape == (0,)


@pytest.mark.parametrize("name", ["a.jpg", "a.JPG", "a.jpeg", "a.png", "a.PNG"])
def test_images_are_found_by_id_with_any_suffix(tree, write_annotation, name):
    path = tree.image(name)
    tree.xml("a", write_annotation(CAT))
    tree.split("train", ["a"])
    assert read_split(tree.root, "train").annotations[0].path == path


@pytest.mark.parametrize("filename", ["photo.png", "photo", "C:\\data\\photo.png", "/x/photo.jpg"])
def test_images_are_found_by_the_filename_tag_when_not_by_id(tree, write_annotation, filename):
    path = tree.image("photo.png")
    tree.xml("a", write_annotation(CAT, head=f"<filename>{filename}</filename>"))
    tree.split("train", ["a"])
    assert read_split(tree.root, "train").annotations[0].path == path


def test_the_id_goes_before_the_filename_tag_and_jpg_before_png(tree, write_annotation):
    for name in ("a.png", "a.jpg", "b.jpg"):
        tree.image(name)
    tree.xml("a", write_annotation(CAT, head="<filename>b.jpg</filename>"))
    tree.split("train", ["a"])
    assert read_split(tree.root, "train").annotations[0].path.name == "a.jpg"


@pytest.mark.parametrize("size", ["", "<size><width>0</width><height>0</height></size>"])
def test_a_size_that_is_not_given_comes_from_the_image(tree, size):
    tree.image("a.jpg", (33, 22))
    xml = tree.xml("a", f"<annotation>{size}</annotation>")
    tree.split("train", ["a"])
    (a,) = read_split(tree.root, "train", ["cat"]).annotations
    assert (a.width, a.height) == (33, 22)
    (tree.root / "JPEGImages" / "a.jpg").unlink()
    (a,) = read_split(tree.root, "train", ["cat"], need_images=False).annotations
    assert (a.width, a.height) == (0, 0)
    (tree.root / "JPEGImages" / "a.jpg").write_bytes(b"")
    with pytest.raises(UserError, match=f"{xml}.*<size>"):
        read_split(tree.root, "train", ["cat"])


def test_without_need_for_images_none_has_to_be_there(tree, write_annotation):
    tree.xml("a", write_annotation(CAT))
    tree.split("test", ["a"])
    (tree.root / "JPEGImages").rmdir()
    (a,) = read_split(tree.root, "test", need_images=False).annotations
    assert a.boxes.tolist() == [[1, 2, 10, 8]]


@pytest.mark.parametrize(
    "text",
    [
        b"a\nb c\n",
        b"a",
        b"\xef\xbb\xbfa\r\n\r\nb c\r\n",
        b"a  1\nb c -1\n  \n",
        "a\r\nb c\r\n".encode("utf-16"),
    ],
    ids=["plain", "no newline", "BOM and CRLF", "second column", "UTF-16"],
)
def test_split_files_of_all_kinds_are_read(tree, text):
    tree.add("a", CAT)
    tree.add("b c" if b"-1" not in text else "b", CAT)
    tree.split("train", text)
    ids = [a.image_id for a in read_split(tree.root, "train").annotations]
    assert ids[0] == "a"
    assert ids[1:] in ([], ["b c"], ["b"])


def test_boxes_of_a_pixel_or_less_are_dropped_with_one_counted_warning(tree):
    for k in range(5):
        tree.add(f"a{k}", CAT, ("cat", (4, 3, 4, 3)), ("cat", (4, 8, 6, 3)))
    tree.split("train", [f"a{k}" for k in range(5)])
    with pytest.warns(UserWarning, match="10 of 15 boxes have no area") as caught:
        split = read_split(tree.root, "train")
    assert len(caught) == 1
    message = str(caught[0].message)
    assert str(tree.root) in message
    assert "a0.xml object 2 (cat)" in message
    assert "a4.xml" not in message
    assert split.dropped == 10
    assert all(len(a.boxes) == len(a.labels) == len(a.difficult) == 1 for a in split.annotations)


def _object(text):
    return f"<annotation><size><width>9</width><height>9</height></size>{text}</annotation>"


def _box(number):
    return (
        f"<object><name>cat</name><bndbox><xmin>{number}</xmin><ymin>1</ymin><xmax>9</xmax>"
        "<ymax>9</ymax></bndbox></object>"
    )


BAD_XML = {
    "not XML": ("<annotation>\n<size>\n</annotation>", ["line 3"]),
    "empty": ("", ["line 1"]),
    "not UTF-8": ("<annotation>\udcfc</annotation>", ["line 1", "save it again as UTF-8"]),
    "CVAT's own": ("<annotations/>", ["<annotations>", "export it as Pascal VOC"]),
    "cut off": ("<annotation><object>", ["line 1"]),
    "unknown encoding": ("<?xml version='1.0' encoding='klingon'?><annotation/>", ["klingon"]),
    "not an annotation": ("<html></html>", ["<html>", "VOC"]),
    "no bndbox": (_object("<object><name>cat</name></object>"), ["object 1 (cat)", "<bndbox>"]),
    "no name": (_object("<object><bndbox/></object>"), ["object 1", "<name>"]),
    "no xmin": (_object(_box(1).replace("xmin", "left")), ["<xmin>", "missing"]),
    "bad number": (_object(_box("1,5")), ["object 1 (cat)", "<xmin>", "'1,5'"]),
    "empty number": (_object(_box("")), ["<xmin>", "''"]),
    "NaN": (_object(_box("nan")), ["<xmin>", "'nan'"]),
    "infinite": (_object(_box("-inf")), ["<xmin>", "'-inf'"]),
    "bad difficult": (
        _object(_box(1).replace("<name>", "<difficult>?</difficult><name>")),
        ["<difficult>", "'?'"],
    ),
    "bad size": ("<annotation><size><width>x</width></size></annotation>", ["<width>", "'x'"]),
    "half a size": ("<annotation><size><width>5</width></size></annotation>", ["<height>"]),
    "unknown class": (_object(_box(1).replace("cat", "catt")), ["'catt'", "did you mean 'cat'"]),
    "strange class": (_object(_box(1).replace("cat", "zebu")), ["'zebu'", "dog"]),
}


@pytest.mark.parametrize(("text", "needles"), BAD_XML.values(), ids=BAD_XML)
def test_a_bad_annotation_is_one_line_that_names_the_file(tree, text, needles):
    tree.add("good", CAT)
    tree.image("bad.jpg", (9, 9))
    xml = tree.xml("bad", text)
    tree.split("train", ["good", "bad"])
    with pytest.raises(UserError) as caught:
        read_split(tree.root, "train", ["cat", "dog"])
    message = str(caught.value)
    assert "\n" not in message
    for needle in [str(xml), *needles]:
        assert needle in message


BAD_SPLITS = {
    "empty": (b" \n\n", ["train.txt", "empty"]),
    "duplicate id": (b"a\nb\na\n", ["train.txt", "'a'", "twice"]),
    "id without annotation": (b"a\nz\n", ["train.txt", "'z'", "Annotations/z.xml"]),
    "id without image": (b"a\nn\n", ["Annotations/n.xml", "JPEGImages/n.jpg", ".png"]),
    "not text": (b"a\xff\xfe\xfa", ["train.txt", "UTF-8"]),
    "no objects at all": (b"e\n", ["train.txt", "DATASETS.CLASSES"]),
}


@pytest.mark.parametrize(("text", "needles"), BAD_SPLITS.values(), ids=BAD_SPLITS)
def test_a_bad_split_is_one_line_that_names_the_file(tree, write_annotation, text, needles):
    tree.add("a", CAT)
    tree.add("b", CAT)
    tree.add("e")
    tree.xml("n", write_annotation(CAT))
    tree.split("train", text)
    with pytest.raises(UserError) as caught:
        read_split(tree.root, "train")
    message = str(caught.value)
    assert "\n" not in message
    for needle in [str(tree.root), *needles]:
        assert needle in message


def test_an_image_without_a_readable_header_and_size_is_named(tree):
    xml = tree.xml("a", "<annotation/>")
    (tree.root / "JPEGImages" / "a.jpg").write_bytes(b"no image")
    tree.split("train", ["a"])
    with pytest.raises(UserError, match=f"{xml}.*a.jpg"):
        read_split(tree.root, "train", ["cat"])


def test_a_missing_split_names_those_that_exist(tree):
    for name in ("train", "val", "aeroplane_train"):
        tree.split(name, ["a"])
    with pytest.raises(UserError, match=r"tset\.txt.*there is: train, val, aeroplane_train"):
        read_split(tree.root, "tset")


def test_a_class_list_with_a_class_twice_is_refused(tree):
    tree.add("a", CAT)
    tree.split("train", ["a"])
    with pytest.raises(UserError, match="twice: cat, cat"):
        read_split(tree.root, "train", ["cat", "cat"])


@pytest.mark.parametrize("folder", ["Annotations", "ImageSets/Main", "JPEGImages"])
def test_a_missing_folder_prints_the_tree_and_the_official_archives(tree, folder):
    (tree.root / folder).rmdir()
    with pytest.raises(UserError) as caught:
        read_split(tree.root, "train")
    message = str(caught.value)
    assert f"{tree.root}: no folder {folder}" in message
    assert "tree/ImageSets/Main/<split>.txt" in message
    assert "https://thor.robots.ox.ac.uk/pascal/VOC/voc2007/VOCtest_06-Nov-2007.tar" in message
    assert "6cd6e144f989b92b3379bac3b3de84fd" in message


@pytest.mark.parametrize("place", ["VOC2007", "VOCdevkit/VOC2007"])
def test_a_devkit_is_found_under_its_root_or_is_the_root(new_tree, tmp_path, place):
    new_tree(place)
    assert find_devkit(tmp_path, 2007) == tmp_path / place
    assert find_devkit(tmp_path / place, 2007) == tmp_path / place


def test_a_missing_devkit_says_where_to_get_it(tmp_path):
    with pytest.raises(UserError) as caught:
        find_devkit(tmp_path, 2012)
    message = str(caught.value)
    for needle in (str(tmp_path), "VOC2012/Annotations", "DETECTRON2_DATASETS", "DATASETS.ROOT"):
        assert needle in message


def test_voc_names_join_the_devkits_of_the_environment(new_tree, tmp_path, monkeypatch):
    for name, image_id in (("VOC2007", "000001"), ("VOC2012", "2007_000027")):
        devkit = new_tree(name)
        devkit.add(image_id, CAT)
        devkit.split("trainval", [image_id])
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path))
    split = read_dataset(["voc_2007_trainval", "voc_2012_trainval"], None, None)
    assert split.name == "voc_2007_trainval+voc_2012_trainval"
    assert split.class_names == VOC_CLASSES
    assert [a.image_id for a in split.annotations] == ["000001", "2007_000027"]
    assert [a.labels.tolist() for a in split.annotations] == [[VOC_CLASSES.index("cat")]] * 2
    overridden = read_dataset(["voc_2007_trainval"], tmp_path, ["dog", "cat"])
    assert overridden.class_names == ("dog", "cat")


def test_joined_custom_splits_have_the_classes_of_all(tree):
    tree.add("a", ("dog", (1, 1, 5, 5)))
    tree.add("b", ("ant", (1, 1, 5, 5)), ("dog", (1, 1, 5, 5)))
    tree.split("one", ["a"])
    tree.split("two", ["b"])
    split = read_dataset(["one", "two"], tree.root, [])
    assert split.class_names == ("ant", "dog")
    assert [a.labels.tolist() for a in split.annotations] == [[1], [0, 1]]


def test_the_same_image_in_two_joined_splits_is_refused(tree):
    tree.add("a", CAT)
    tree.split("train", ["a"])
    tree.split("trainval", ["a"])
    with pytest.raises(UserError, match=r"train \+ trainval.*'a' occurs twice"):
        read_dataset(["train", "trainval"], tree.root, None)


def test_different_class_lists_are_joined_only_under_a_given_one(new_tree, tmp_path):
    devkit, custom = new_tree("VOC2007"), new_tree(".")
    devkit.add("000001", CAT)
    devkit.split("train", ["000001"])
    custom.add("x", ("helmet", (1, 1, 5, 5)))
    custom.split("mine", ["x"])
    with pytest.raises(UserError, match=r"different classes.*mine: helmet.*DATASETS\.CLASSES"):
        read_dataset(["voc_2007_train", "mine"], tmp_path, None)
    joined = read_dataset(["voc_2007_train", "mine"], tmp_path, ["helmet", "cat"])
    assert [a.labels.tolist() for a in joined.annotations] == [[1], [0]]


def test_a_custom_split_without_root_names_the_key():
    with pytest.raises(UserError, match=r"'mine'.*DATASETS\.ROOT"):
        read_dataset(["mine"], None, None)
    with pytest.raises(UserError, match="no data set"):
        read_dataset([], None, None)


def test_bccd_has_4888_boxes_of_which_two_are_a_pixel(bccd):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        split = read_dataset(["trainval", "test"], bccd, None)
    assert len(caught) == 1  # both are in trainval
    assert "BloodImage_00338.xml" in str(caught[0].message)
    assert "BloodImage_00343.xml" in str(caught[0].message)
    assert split.class_names == ("Platelets", "RBC", "WBC")
    assert len(split.annotations) == 364
    assert split.dropped == 2
    assert sum(len(a.boxes) for a in split.annotations) == 4886
    assert not any(a.difficult.any() for a in split.annotations)
    assert {(a.width, a.height) for a in split.annotations} == {(640, 480)}


def test_ids_with_an_ending_are_answered_with_the_id(tree, write_annotation):
    tree.xml("a", write_annotation(CAT))
    tree.image("a.jpg")
    tree.split("train", ["a.jpg"])
    with pytest.raises(UserError, match=r"id 'a\.jpg' has an ending.*write 'a'"):
        read_split(tree.root, "train")


def test_an_id_may_name_a_folder_but_none_outside(tree, write_annotation):
    for folder in ("Annotations/v", "JPEGImages/v"):
        (tree.root / folder).mkdir()
    tree.xml("v/a", write_annotation(CAT))
    tree.image("v/a.png")
    tree.split("train", ["v/a"])
    (a,) = read_split(tree.root, "train").annotations
    assert a.path == tree.root / "JPEGImages/v/a.png" and a.image_id == "v/a"
    tree.split("train", ["v/../v/a"])
    with pytest.raises(UserError, match="has no annotation"):
        read_split(tree.root, "train")


def test_an_id_with_a_space_in_a_folder_is_read_bare_and_in_quotes(tree, write_annotation):
    for folder in ("Annotations/v 1", "JPEGImages/v 1"):
        (tree.root / folder).mkdir()
    tree.xml("v 1/a", write_annotation(CAT))
    tree.image("v 1/a.jpg")
    for line in ("v 1/a", '"v 1/a"', '"v 1/a" 1'):
        tree.split("train", [line])
        (a,) = read_split(tree.root, "train").annotations
        assert a.image_id == "v 1/a"


def test_ids_that_are_paths_are_answered_with_the_id(tree):
    tree.add("a", CAT)
    for line in ("/x/JPEGImages/a.jpg", "C:\\x\\a.jpg", "/x/a"):
        tree.split("train", [line])
        with pytest.raises(UserError, match=r"is a path, .*write 'a' instead of it"):
            read_split(tree.root, "train")


def test_lists_of_single_classes_are_no_splits(tree):
    for name, text in (("default", b"a\n"), ("cat_default", b"a  1\n"), ("my_default", b"a\n")):
        tree.split(name, text)
    assert split_names(tree.root) == ["default", "my_default"]
    (tree.root / "ImageSets/Main/default.txt").unlink()
    (tree.root / "ImageSets/Main/my_default.txt").unlink()
    assert split_names(tree.root) == ["cat_default"]


@pytest.mark.parametrize(
    ("word", "is_difficult"),
    [("Unspecified", False), ("False", False), ("no", False), ("true", True), ("2", True)],
)
def test_difficult_may_be_a_word(tree, write_annotation, word, is_difficult):
    text = write_annotation((*CAT, True)).replace("<difficult>1<", f"<difficult>{word}<")
    tree.xml("a", text)
    tree.image("a.jpg")
    tree.split("train", ["a"])
    assert read_split(tree.root, "train").annotations[0].difficult.tolist() == [is_difficult]


def test_no_other_ids_image_is_taken_in_place_of_a_missing_one(tree, write_annotation):
    tree.xml("a", write_annotation(CAT, head="<filename>b.jpg</filename>"))
    tree.xml("b", write_annotation(CAT))
    tree.image("b.jpg")
    tree.split("train", ["a", "b"])
    with pytest.raises(UserError, match=r"a\.xml: image .*a\.jpg is missing"):
        read_split(tree.root, "train")


def test_everything_that_is_wrong_is_said_at_once(tree, write_annotation):
    names = [f"i{number}" for number in range(9)]
    for name in names[:4]:
        tree.xml(name, "<annotation><object/></annotation>")
        tree.image(f"{name}.jpg")
    tree.split("train", names)
    with pytest.raises(UserError) as refusal:
        read_split(tree.root, "train")
    text = str(refusal.value)
    assert all(f"{name}.xml: object 1" in text for name in names[:4]) and "'i4'" in text
    assert text.endswith("and 4 more of the kind")

"""Writes a split, as it was read, in the forms in which labelling tools export it."""

import json
import shutil

import yaml


def coco(splits, category_ids=lambda k: 7 * k + 3):
    """COCO's lists of one split."""
    (split,) = splits
    images, annotations = [], []
    for number, a in enumerate(split.annotations, 100):
        images.append(
            {"id": number, "file_name": a.path.name, "width": a.width, "height": a.height}
        )
        for box, label, difficult in zip(a.boxes, a.labels, a.difficult, strict=True):
            x1, y1, x2, y2 = box.tolist()
            annotations.append(
                {
                    "id": len(annotations) + 1, "image_id": number, "area": (x2 - x1) * (y2 - y1),
                    "category_id": category_ids(int(label)), "iscrowd": int(difficult),
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                }
            )  # fmt: skip
    categories = [{"id": category_ids(k), "name": name} for k, name in enumerate(split.class_names)]
    return {"images": images, "annotations": annotations, "categories": categories[::-1]}


def labels(annotation, digits=6):
    """The lines of a YOLO label file."""
    lines = []
    for box, label in zip(annotation.boxes, annotation.labels, strict=True):
        x1, y1, x2, y2 = box.tolist()
        w, h = annotation.width, annotation.height
        numbers = ((x1 + x2) / 2 / w, (y1 + y2) / 2 / h, (x2 - x1) / w, (y2 - y1) / h)
        lines.append(f"{label} " + " ".join(f"{number:.{digits}f}" for number in numbers))
    return "\n".join(lines) + "\n" * bool(lines)


def _copy(split, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for a in split.annotations:
        shutil.copy(a.path, folder)


def _label(split, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for a in split.annotations:
        (folder / f"{a.path.stem}.txt").write_text(labels(a))


def _dump(path, split):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(coco([split])))


def coco_official(root, splits):
    for split in splits:
        _dump(root / f"annotations/instances_{split.name}.json", split)
        _copy(split, root / split.name)


def coco_roboflow(root, splits):
    for split in splits:
        _dump(root / split.name / "_annotations.coco.json", split)
        _copy(split, root / split.name)


def coco_beside(root, splits):
    for split in splits:
        _dump(root / f"{split.name}.json", split)
        _copy(split, root / "images")


def yolo_ultralytics(root, splits):
    names = splits[0].class_names
    content = {"path": ".", "names": dict(enumerate(names))}
    for split in splits:
        content[split.name] = f"images/{split.name}"
        _copy(split, root / "images" / split.name)
        _label(split, root / "labels" / split.name)
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def yolo_roboflow(root, splits):
    content = {"names": list(splits[0].class_names), "nc": len(splits[0].class_names)}
    for split in splits:
        content[split.name] = f"../{split.name}/images"
        _copy(split, root / split.name / "images")
        _label(split, root / split.name / "labels")
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def yolo_darknet(root, splits):
    for split in splits:
        _copy(split, root / "obj_train_data")
        _label(split, root / "obj_train_data")
        _list(split, root / f"{split.name}.txt", "data/obj_train_data/")
    (root / "obj.names").write_text("\n".join(splits[0].class_names) + "\n")


def _xml(split, folder):
    folder.mkdir(parents=True, exist_ok=True)
    for a in split.annotations:
        shutil.copy(a.path.parents[1] / "Annotations" / f"{a.image_id}.xml", folder)


def _list(split, path, place, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{place}{a.path.name}{end}" for a in split.annotations), newline="")


def coco_datumaro(root, splits):
    """Beside the boxes, files of the other tasks, without images."""
    for split in splits:
        _dump(root / f"annotations/instances_{split.name}.json", split)
        nothing = {"images": [], "annotations": [], "categories": []}
        (root / f"annotations/labels_{split.name}.json").write_text(json.dumps(nothing))
        _copy(split, root / "images" / split.name)


def yolo_roboflow_darknet(root, splits):
    """All files of a split in its folder, with the classes in each."""
    for split in splits:
        _copy(split, root / split.name)
        _label(split, root / split.name)
        names = "\n".join(splits[0].class_names)
        (root / split.name / "_darknet.labels").write_text(names)


def yolo_cvat(root, splits):
    """CVAT's subsets are Train, Validation and Test."""
    for split in splits:
        folder = root / f"obj_{split.name.title()}_data"
        _copy(split, folder)
        _label(split, folder)
        _list(split, root / f"{split.name.title()}.txt", f"data/{folder.name}/")
    (root / "obj.names").write_text("\n".join(splits[0].class_names) + "\n")


def yolo_colab(root, splits):
    """The paths are those of another machine, and of a split that was not exported."""
    content = {"names": list(splits[0].class_names), "test": "/content/cells/test/images"}
    for split in splits:
        content[split.name] = f"/content/cells/images/{split.name}"
        _copy(split, root / "images" / split.name)
        _label(split, root / "labels" / split.name)
    (root / "data.yaml").write_text(yaml.safe_dump(content))


def yolo_windows(root, splits):
    """Backslashes, a byte order mark and carriage returns."""
    lines = [f"names: [{', '.join(splits[0].class_names)}]"]
    for split in splits:
        lines.append(f"{split.name}: C:\\cells\\{split.name}.txt")
        _copy(split, root / "images" / split.name)
        _label(split, root / "labels" / split.name)
        place = f"C:\\cells\\images\\{split.name}\\"
        _list(split, root / f"{split.name}.txt", place, end="\r\n")
    (root / "data.yaml").write_text("\ufeff" + "\r\n".join(lines), newline="")


def voc_roboflow(root, splits):
    for split in splits:
        _copy(split, root / split.name)
        _xml(split, root / split.name)


def voc_tensorflow(root, splits):
    """As in the tutorials of TensorFlow's object detection."""
    for split in splits:
        _copy(split, root / "images" / split.name)
        _xml(split, root / "images" / split.name)


def voc_kaggle(root, splits):
    """Annotations by split, images together."""
    for split in splits:
        _copy(split, root / "images")
        _xml(split, root / "annotations" / split.name)


def voc_open_images(root, splits):
    for split in splits:
        _copy(split, root / split.name / "images")
        _xml(split, root / split.name / "pascal")


def voc_lower_case(root, splits):
    """A devkit's lists with the folders' names that people prefer."""
    for split in splits:
        _copy(split, root / "images")
        _xml(split, root / "annotations")
        ids = "".join(f"{a.image_id}\n" for a in split.annotations)
        path = root / f"ImageSets/Main/{split.name}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(ids)


FORMS = {
    form.__name__: form
    for form in (
        coco_official, coco_roboflow, coco_beside, coco_datumaro,
        yolo_ultralytics, yolo_roboflow, yolo_darknet, yolo_roboflow_darknet, yolo_cvat,
        yolo_colab, yolo_windows,
        voc_roboflow, voc_tensorflow, voc_kaggle, voc_open_images, voc_lower_case,
    )
}  # fmt: skip


def litter(root):
    """What macOS, Windows and Jupyter leave in folders and archives."""
    for path in [path for path in root.rglob("*") if path.is_file()]:
        for place in (path.parent, root / "__MACOSX" / path.parent.relative_to(root)):
            place.mkdir(parents=True, exist_ok=True)
            (place / f"._{path.name}").write_bytes(b"\0\5\26\7\0\2\0\0Mac OS X  \xb0\xff")
        copies = path.parent / ".ipynb_checkpoints"
        copies.mkdir(exist_ok=True)
        shutil.copy(path, copies / f"{path.stem}-checkpoint{path.suffix}")
        (path.parent / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
        (path.parent / "Thumbs.db").write_bytes(b"\xd0\xcf\x11\xe0")


def label_studio(root, splits):
    """YOLO without splits."""
    for split in splits:
        _copy(split, root / "images")
        _label(split, root / "labels")
    (root / "classes.txt").write_text("\n".join(splits[0].class_names))
    (root / "notes.json").write_text(json.dumps({"categories": [], "info": {}}))


def label_img(root, splits):
    """YOLO without splits, all files in one folder."""
    for split in splits:
        _copy(split, root)
        _label(split, root)
    (root / "classes.txt").write_text("\n".join(splits[0].class_names))


def voc_beside(root, splits):
    """XML files beside images, without splits."""
    for split in splits:
        _copy(split, root)
        _xml(split, root)


def voc_pets(root, splits):
    """As the Oxford-IIIT Pet data, of whose own lists nothing is read."""
    for split in splits:
        _copy(split, root / "images")
        _xml(split, root / "annotations/xmls")
    (root / "annotations/trainval.txt").write_text("a 1 1 1\n")


def coco_single(root, splits):
    """One file for all images, as Label Studio's result.json."""
    (split,) = splits
    _dump(root / "result.json", split)
    _copy(split, root / "images")


WITHOUT_SPLITS = {
    form.__name__: form for form in (label_studio, label_img, voc_beside, voc_pets, coco_single)
}

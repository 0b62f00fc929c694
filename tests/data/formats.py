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
        names = [f"data/obj_train_data/{a.path.name}\n" for a in split.annotations]
        (root / f"{split.name}.txt").write_text("".join(names))
    (root / "obj.names").write_text("\n".join(splits[0].class_names) + "\n")


def voc_roboflow(root, splits):
    for split in splits:
        _copy(split, root / split.name)
        for a in split.annotations:
            shutil.copy(a.path.parents[1] / "Annotations" / f"{a.image_id}.xml", root / split.name)


FORMS = {
    form.__name__: form
    for form in (
        coco_official, coco_roboflow, coco_beside,
        yolo_ultralytics, yolo_roboflow, yolo_darknet,
        voc_roboflow,
    )
}  # fmt: skip


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
        for a in split.annotations:
            shutil.copy(a.path.parents[1] / "Annotations" / f"{a.image_id}.xml", root)


def coco_single(root, splits):
    """One file for all images, as Label Studio's result.json."""
    (split,) = splits
    _dump(root / "result.json", split)
    _copy(split, root / "images")


WITHOUT_SPLITS = {
    form.__name__: form for form in (label_studio, label_img, voc_beside, coco_single)
}

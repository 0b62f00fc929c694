"""Reading the annotations of a large data set: seconds and memory, in VOC's and COCO's format.

    python benchmarks/annotations.py
    python benchmarks/annotations.py --images 20000 --objects 7

Makes a data set whose image files are empty, since no image is opened: sizes are stated. Each
format is read by a process of its own, whose highest memory includes what the imports take, which a
process that reads nothing shows.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tract_det.cli import run
from tract_det.commands.bench import print_and_keep
from tract_det.data.datasets import read_dataset
from tract_det.data.voc import VOC_CLASSES

WIDTH, HEIGHT = 500, 375
OBJECT = (
    "<object><name>{}</name><difficult>0</difficult><bndbox><xmin>{}</xmin><ymin>{}</ymin>"
    "<xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"
)
ANNOTATION = (
    "<annotation><filename>{}.jpg</filename>"
    f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>{{}}</annotation>"
)


def make(root: Path, images: int, objects: int) -> None:
    """The same data in `root/voc` and `root/coco`, with so many objects in each image."""
    rng = np.random.default_rng(0)
    tree, coco = root / "voc", root / "coco"
    for folder in (tree / "Annotations", tree / "ImageSets/Main", tree / "JPEGImages"):
        folder.mkdir(parents=True)
    (coco / "annotations").mkdir(parents=True)
    (coco / "train").symlink_to(tree / "JPEGImages")
    ids = [f"{number:06d}" for number in range(images)]
    entries: list[dict[str, object]] = []
    for number, name in enumerate(ids):
        corner = rng.integers(0, (WIDTH - 2, HEIGHT - 2), (objects, 2))
        edges = np.minimum(corner + rng.integers(2, 200, (objects, 2)), (WIDTH, HEIGHT))
        labels = rng.integers(0, len(VOC_CLASSES), objects)
        parts = []
        for (x1, y1), (x2, y2), label in zip(corner.tolist(), edges.tolist(), labels, strict=True):
            parts.append(OBJECT.format(VOC_CLASSES[label], x1 + 1, y1 + 1, x2, y2))
            entries.append(
                {
                    "id": len(entries) + 1,
                    "image_id": number,
                    "category_id": int(label) + 1,
                    "bbox": [x1, y1, x2 - x1, y2 - y1],
                    "area": (x2 - x1) * (y2 - y1),
                    "iscrowd": 0,
                }
            )
        (tree / "Annotations" / f"{name}.xml").write_text(ANNOTATION.format(name, "".join(parts)))
        (tree / "JPEGImages" / f"{name}.jpg").touch()
    (tree / "ImageSets/Main/train.txt").write_text("\n".join(ids))
    listed = [
        {"id": number, "file_name": f"{name}.jpg", "width": WIDTH, "height": HEIGHT}
        for number, name in enumerate(ids)
    ]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(VOC_CLASSES)]
    content = {"images": listed, "annotations": entries, "categories": categories}
    (coco / "annotations/instances_train.json").write_text(json.dumps(content))


def read(root: Path | None) -> tuple[float, float, float]:
    """Seconds of the clock, seconds of the processor and highest MiB of a process that reads."""
    began, processor = time.perf_counter(), time.process_time()
    if root is not None:
        read_dataset(["train"], root, VOC_CLASSES)
    seconds = time.perf_counter() - began, time.process_time() - processor
    # Not `ru_maxrss`: a process inherits that of the one which started it.
    status = Path("/proc/self/status").read_text()
    return *seconds, int(status.partition("VmHWM:")[2].split()[0]) / 1024


def measure(images: int, objects: int) -> Iterator[str]:
    """The lines of the table, as they are measured."""
    yield f"{images:,} images, {images * objects:,} objects; Python {platform.python_version()}"
    yield ""
    yield "| format | seconds | of the processor | highest memory, MiB |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        make(Path(folder), images, objects)
        for name in ("nothing", "voc", "coco"):
            root = None if name == "nothing" else Path(folder) / name
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                clock, processor, memory = pool.apply(read, (root,))
            yield f"| {name} | {clock:.1f} | {processor:.1f} | {memory:,.0f} |"


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=100_000, help="default: %(default)s")
    parser.add_argument("--objects", type=int, default=3, help="in each; default: %(default)s")
    parser.add_argument("--output", type=Path, help="file for the table")
    args = parser.parse_args()
    print_and_keep(measure(args.images, args.objects), args.output)


if __name__ == "__main__":
    run(main)

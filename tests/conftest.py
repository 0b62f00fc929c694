import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

REPO = Path(__file__).resolve().parent.parent

# The tests run in several processes, and tiny tensors gain nothing from threads.
os.environ.setdefault("OMP_NUM_THREADS", "1")
torch.set_num_threads(1)
# Training runs inside the tests' own process leave its allocator alone.
MALLOC = "MALLOC_TRIM_THRESHOLD_"
os.environ.setdefault(MALLOC, "131072")


def pytest_terminal_summary(terminalreporter):
    """Says how many tests ran against detectron2, which is not on PyPI and may not be there."""
    reports = [r for kind in terminalreporter.stats.values() for r in kind if hasattr(r, "when")]
    ours = [r for r in reports if r.nodeid.startswith("tests/d2/")]
    if ours:
        ran = {r.nodeid for r in ours if r.when == "call" and "test_here.py" not in r.nodeid}
        where = importlib.util.find_spec("detectron2")
        place = Path(where.origin).parent if where else "which is not installed"
        terminalreporter.write_line(f"{len(ran)} tests ran against detectron2 ({place})")


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def photo_like(generator, *shape):
    """Standardised images with a photograph's 1/f spectrum: neighbouring pixels correlate."""
    *rest, height, width = shape
    noise = torch.randn(*rest, height, width, generator=generator, dtype=torch.float64)
    fy = torch.fft.fftfreq(height)[:, None]
    fx = torch.fft.rfftfreq(width)[None]
    spectrum = 1 / (fy**2 + fx**2).sqrt().clamp(min=1 / max(height, width))
    images = torch.fft.irfft2(torch.fft.rfft2(noise) * spectrum, s=(height, width))
    return ((images - images.mean()) / images.std()).float()


def run_python(*args, env=None, timeout=600, cwd=None):
    """Runs Python with these arguments; one thread a process unless `env` says otherwise."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", MALLOC):
        environment.pop(name, None)
    environment |= env or {}
    return subprocess.run(
        [sys.executable, *map(str, args)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=timeout,
        cwd=cwd or REPO,
        check=False,
    )


def write_voc_tree(root, *, train=8, test=5, size=(96, 96), classes=("disc", "box"), seed=0):
    """A small tree in VOC layout: bright discs and boxes on noise; splits `train` and `test`."""
    rng = np.random.default_rng(seed)
    for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    names = {
        "train": [f"a{i:03d}" for i in range(train)],
        "test": [f"b{i:03d}" for i in range(test)],
    }
    width, height = size
    yy, xx = np.mgrid[:height, :width]
    for name in names["train"] + names["test"]:
        pixels = rng.integers(0, 80, (height, width, 3)).astype(np.uint8)
        objects = ""
        for _ in range(2):
            label = classes[rng.integers(len(classes))]
            w, h = rng.integers(24, 48, 2)
            x, y = rng.integers(0, width - w), rng.integers(0, height - h)
            inside = (xx >= x) & (xx < x + w) & (yy >= y) & (yy < y + h)
            if label == classes[0]:
                inside &= ((xx - x - w / 2) / (w / 2)) ** 2 + ((yy - y - h / 2) / (h / 2)) ** 2 <= 1
            pixels[inside] = rng.integers(150, 256, 3)
            objects += (
                f"<object><name>{label}</name><difficult>0</difficult><bndbox><xmin>{x + 1}</xmin>"
                f"<ymin>{y + 1}</ymin><xmax>{x + w}</xmax><ymax>{y + h}</ymax></bndbox></object>"
            )
        Image.fromarray(pixels).save(root / "JPEGImages" / f"{name}.png")
        (root / "Annotations" / f"{name}.xml").write_text(
            f"<annotation><filename>{name}.png</filename><size><width>{width}</width>"
            f"<height>{height}</height><depth>3</depth></size>{objects}</annotation>"
        )
    for split, ids in names.items():
        (root / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(ids) + "\n")
    return root


# A detector that trains a step in a fraction of a second.
TINY = {
    "MODEL.BACKBONE.NAME": "resnet18_fpn",
    "MODEL.BACKBONE.NORM": "GN",
    "MODEL.FPN.OUT_CHANNELS": "32",
    "MODEL.ROI_BOX_HEAD.FC_DIM": "32",
    "MODEL.ANCHOR_GENERATOR.SIZES": "[16,32,48,64,96]",
    "MODEL.RPN.POST_NMS_TOPK_TRAIN": "60",
    "MODEL.RPN.POST_NMS_TOPK_TEST": "20",
    "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": "32",
    "MODEL.ROI_HEADS.SCORE_THRESH_TEST": "0.0",
    "INPUT.MIN_SIZE_TRAIN": "[]",
    "INPUT.MIN_SIZE_TEST": "0",
    "DATASETS.TRAIN": "train",
    "DATASETS.TEST": "test",
    "DATALOADER.NUM_WORKERS": "0",
    "MODEL.TRACT.ENABLED": "False",
    "SOLVER.OPTIMIZER": "SGD",
    "SOLVER.IMS_PER_BATCH": "4",
    "SOLVER.BASE_LR": "0.01",
    "SOLVER.WARMUP_ITERS": "0",
    "SOLVER.MAX_ITER": "4",
    "LOG_PERIOD": "1",
}


def tiny_options(root, output, **changes):
    """TINY as command line pairs; `MODEL__TRACT__ENABLED=True` changes a key."""
    options = {**TINY, "DATASETS.ROOT": root, "OUTPUT_DIR": output}
    options.update({key.replace("__", "."): value for key, value in changes.items()})
    return [str(part) for pair in options.items() for part in pair]


@pytest.fixture(scope="session")
def voc_tree(tmp_path_factory):
    return write_voc_tree(tmp_path_factory.mktemp("voc"))

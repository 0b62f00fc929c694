"""A tiny image folder, and the options of a tiny classifier's run on it."""

import numpy as np
from PIL import Image


def write_image_folder(root, *, train=8, val=23, size=32, classes=("ant", "bee", "cat", "dog")):
    """Noise with a tint for each class; `train` images of each class, `val` in all."""
    rng = np.random.default_rng(0)
    counts = {"train": [train] * len(classes)}
    counts["val"] = [len(range(k, val, len(classes))) for k in range(len(classes))]
    for part, numbers in counts.items():
        for k, (name, number) in enumerate(zip(classes, numbers, strict=True)):
            (root / part / name).mkdir(parents=True)
            for i in range(number):
                pixels = rng.integers(0, 256, (size, size, 3))
                pixels[..., k % 3] = pixels[..., k % 3] * (k + 1) // 8
                Image.fromarray(pixels.astype(np.uint8)).save(root / part / name / f"{i:03d}.png")
    return root


# No batch norm, so that ranks and micro-batches make the same step.
TINY = {
    "MODEL.NAME": "resnet10",
    "MODEL.WIDTH": "16",
    "MODEL.NORM": "GN",
    "MODEL.SMALL_IMAGES": "True",
    "INPUT.SIZE": "32",
    "INPUT.RESIZE_TEST": "0",
    "INPUT.CROP": "pad",
    "DATASETS.NAME": "imagefolder",
    "DATASETS.LIMIT": "0",
    "DATALOADER.NUM_WORKERS": "0",
    "MODEL.TRACT.ENABLED": "True",
    "SOLVER.IMS_PER_BATCH": "8",
    "SOLVER.BASE_LR": "0.05",
    "SOLVER.WARMUP_EPOCHS": "0",
    "SOLVER.MAX_ITER": "4",
    "TEST.IMS_PER_BATCH": "5",
    "TEST.EVAL_EPOCHS": "0",
    "LOG_PERIOD": "1",
}


def options(root, output, **changes):
    """TINY as command line pairs; `MODEL__TRACT__ENABLED=False` changes a key."""
    keys = {**TINY, "DATASETS.ROOT": root, "OUTPUT_DIR": output}
    keys.update({key.replace("__", "."): value for key, value in changes.items()})
    return [str(part) for pair in keys.items() for part in pair]

"""What the tests of `tools/pretrain_net.py` share: a tiny image folder and a tiny run."""

import json
import os
import subprocess
import sys

import numpy as np
import torch
from PIL import Image

from tests.conftest import REPO, run_python
from tests.tools.test_train_net import port

TOOL = REPO / "tools/pretrain_net.py"


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


def launch(ranks):
    """The arguments that start so many processes by the deepspeed launcher."""
    if ranks == 1:
        return []
    return ["-m", "deepspeed.launcher.runner", "--num_gpus", ranks, "--master_port", port()]


def train(root, output, *flags, ranks=1, **changes):
    """A run to its end."""
    done = run_python(*launch(ranks), TOOL, *flags, *options(root, output, **changes))
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def interrupt(root, output, at, number, *, ranks=1, **changes):
    """A run that gets a signal once it says `at`; gives what it said and its exit code."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    arguments = [*launch(ranks), TOOL, *options(root, output, **changes)]
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env=environment, cwd=REPO, start_new_session=True,
    )  # fmt: skip
    said = ""
    for line in process.stdout:
        said += line
        if at in line:
            os.killpg(process.pid, number)
    return said, process.wait()


def weights(output, name="model_final.pth"):
    return torch.load(output / name, weights_only=True)["model"]


def results(output):
    return json.loads((output / "results.json").read_text())


def log(output, key="loss"):
    """The values of a figure in `metrics.jsonl` by step."""
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return {line["iteration"]: line[key] for line in lines if key in line}


def assert_same_bits(a, b, names):
    for name in names:
        ours, theirs = weights(a, name), weights(b, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items()), name

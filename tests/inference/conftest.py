"""A detector and a classifier that a training has left, and their data; all to be read only."""

from pathlib import Path

import pytest

from tests.conftest import tiny_options, write_voc_tree
from tests.training.image_folder import options, write_image_folder
from tests.training.runs import run_here


@pytest.fixture(scope="package")
def tree(tmp_path_factory) -> Path:
    return write_voc_tree(tmp_path_factory.mktemp("voc"))


@pytest.fixture(scope="package")
def detector_run(tree, tmp_path_factory) -> Path:
    """The output of a training with TrAct and a frozen stage, which resizes its images."""
    output = tmp_path_factory.mktemp("detector")
    changes = {
        "MODEL__TRACT__ENABLED": True, "INPUT__MIN_SIZE_TEST": 80, "INPUT__MAX_SIZE_TEST": 100,
        "MODEL__BACKBONE__NORM": "BN", "MODEL__FPN__OUT_CHANNELS": 16, "SOLVER__MAX_ITER": 2,
    }  # fmt: skip
    run_here("train", *tiny_options(tree, output, **changes))
    return output


@pytest.fixture(scope="package")
def photographs(tmp_path_factory) -> Path:
    return write_image_folder(tmp_path_factory.mktemp("images"))


@pytest.fixture(scope="package")
def classifier_run(photographs, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("classifier")
    changes = {"MODEL__NORM": "BN", "SOLVER__MAX_ITER": 3, "TEST__IMS_PER_BATCH": 32}
    run_here("pretrain", *options(photographs, output, INPUT__RESIZE_TEST=36, **changes))
    return output

"""What the trainers' tests share."""

import pytest

from tests.training.image_folder import write_image_folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images of four classes, 32 for training; to be read only."""
    return write_image_folder(tmp_path_factory.mktemp("images"))

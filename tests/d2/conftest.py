"""The tests of this folder run if detectron2 can be imported."""

import importlib.util

REASON = "detectron2 is not installed (see its INSTALL page)"


def pytest_ignore_collect(collection_path):
    """Without detectron2, collects only test_here.py, the one file that does not import it."""
    if importlib.util.find_spec("detectron2") is None:
        return collection_path.name.startswith("test_") and collection_path.name != "test_here.py"
    return None

"""`benchmarks/integrations.py`: what TrAct costs in a trainer of another library."""

import re

import pytest

pytest.importorskip("lightning", reason="Lightning is not installed: pip install lightning")

from tests.conftest import run_python


@pytest.mark.slow
def test_the_ratio_is_that_of_steps_by_turns(tmp_path):
    page = tmp_path / "page.md"
    arguments = ("--batch", 2, "--size", 32, "--turns", 2, "--output", page)
    done = run_python("-m", "tract_det.cli", "bench", "integrations", *arguments)
    assert done.returncode == 0, done.stderr[-2000:]
    text = page.read_text()
    low, high = map(float, re.search(r"\(from (\S+) to (\S+) over", text).groups())
    assert 0 < low <= float(re.search(r"ratio: (\S+)", text)[1]) <= high

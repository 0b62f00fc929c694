"""Where a run was made."""

import subprocess

import pytest
import torch

from tests.conftest import REPO
from tract_det.engine import provenance
from tract_det.errors import UserError

CPU = torch.device("cpu")


def test_a_start_states_what_is_needed_to_repeat_it():
    start = provenance.describe(CPU)
    assert torch.__version__.startswith(start["versions"]["torch"].partition("+")[0])
    assert f"{torch.get_num_threads()} of" in start["hardware"]
    assert start["processes"] == 1 and start["date"].endswith("+00:00")


def test_the_commit_is_that_of_the_checkout():
    command = ["git", "-C", str(REPO), "rev-parse", "HEAD"]
    head = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    commit = provenance.describe(CPU)["commit"]
    assert head.startswith(commit.rstrip("+")) and len(commit) >= 10


def test_a_resumed_run_keeps_its_first_start(tmp_path):
    for resume in (False, True, True):
        provenance.record(tmp_path, CPU, resume=resume)
    assert len(provenance.read(tmp_path)) == 3
    provenance.record(tmp_path, CPU, resume=False)
    assert len(provenance.read(tmp_path)) == 1


def test_a_run_from_before_has_no_record(tmp_path):
    assert provenance.read(tmp_path) == []


@pytest.mark.parametrize("text", ["", '[{"date": "2026', "5", "[1]"])
def test_a_damaged_record_is_named_with_the_mend(tmp_path, text):
    (tmp_path / "provenance.json").write_text(text)
    with pytest.raises(UserError, match=r"provenance.json is damaged: .*: delete it"):
        provenance.read(tmp_path)

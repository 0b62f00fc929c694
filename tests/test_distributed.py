"""What the ranks agree on."""

import re

import pytest

from tests.conftest import REPO, run_python
from tests.training.runs import free_port
from tract_det.distributed import AnyRank


def test_a_rank_alone_learns_of_its_flag_at_once():
    is_set = AnyRank()
    assert [is_set(flag) for flag in (False, True)] == [False, True]


@pytest.mark.parametrize("ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_all_ranks_learn_of_one_ranks_flag_at_the_next_call(ranks):
    launch = [
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        ranks,
        "--master-port",
        free_port(),
    ]
    done = run_python(*launch, REPO / "tests/agree.py")
    assert done.returncode == 0, done.stderr
    assert sorted(re.findall(r"<(\d) at (\d)>", done.stdout)) == [
        (str(rank), "4") for rank in range(ranks)
    ]

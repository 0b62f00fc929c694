"""DeepSpeed's door: what it sets in the process."""

import platform

import pytest
import torch
from torch import nn

from tests.conftest import run_python
from tests.counts import Waits
from tract_det.engine import ds
from tract_det.errors import UserError

FAULTS = """
import resource, torch
from tract_det.engine import ds
from tract_det.errors import UserError
ds.start("cpu")
def step():
    return torch.ones(64, 1024, 256).sum()  # 64 MiB
for _ in range(20):  # the heap finds its size
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's settings")
def test_memory_that_a_step_frees_serves_the_next_one_on_a_cpu():
    def faults(**env):
        done = run_python("-c", FAULTS, env=env)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.splitlines()[-1])

    pages = 10 * 64 * 2**20 // 4096
    assert faults() < pages / 10
    assert faults(MALLOC_TRIM_THRESHOLD_="131072") > pages / 2  # the user's own setting stands


THREADS = """
import pathlib, torch
from torch import nn
from tract_det.engine import ds
from tract_det.errors import UserError
def threads():
    names = [path.read_text() for path in pathlib.Path("/proc/self/task").glob("*/comm")]
    return sum("gloo" in name for name in names)
def train():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ds.initialize(model, optimizer, ds.ds_config(batch_size=2, accumulation=1))
    return threads()
ds.start("cpu")
print("threads", train())
ds.stop()
print("threads", threads())
"""


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc")
def test_no_thread_of_a_process_group_outlives_it():
    """One that is still there at the exit may abort the process when all its work is done."""
    done = run_python("-c", THREADS)
    assert done.returncode == 0, done.stderr
    before, after = (int(x.split()[1]) for x in done.stdout.splitlines() if "threads" in x)
    if before == 0:
        pytest.skip("this torch gives its threads no names")
    assert after == 0


@pytest.fixture
def process():
    """A process group of this process alone; DeepSpeed accepts only one in a process."""
    ds.start("cpu")
    yield
    ds.stop()


def test_torch_is_its_own_again_after_a_run_with_sharded_weights():
    """Else a process that has trained cannot export: TorchScript writes only torch's linear."""
    linear = torch.nn.functional.linear
    ds.start("cpu")
    model = nn.Linear(7, 5)
    config = ds.ds_config(batch_size=1, accumulation=1, extra={"zero_optimization": {"stage": 3}})
    ds.initialize(model, torch.optim.SGD(model.parameters(), lr=0.1), config)
    assert torch.nn.functional.linear is not linear
    ds.stop()
    assert torch.nn.functional.linear is linear


@pytest.mark.parametrize("bound", [0.3, 1.7, 1e4])
def test_gradients_are_clipped_as_deepspeed_clips_them_but_without_waiting(bound, process):
    from deepspeed.runtime.utils import clip_grad_norm_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 13, 3), nn.Linear(7, 31), nn.Linear(31, 5))
    frozen = model[1].bias.requires_grad_(False)
    config = ds.ds_config(batch_size=1, accumulation=1, clip_norm=bound)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p is not frozen], lr=0.1)
    engine = ds.initialize(model, optimizer, config)
    gradients = [torch.randn_like(p) for p in model.parameters()]

    def clipped(clip):
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = None if parameter is frozen else gradient.clone()
        clip()
        return [p.grad for p in model.parameters() if p is not frozen]

    with Waits() as waits:
        ours = clipped(engine.clip_fp32_gradients)
    assert waits.counts == {}
    theirs = clipped(lambda: clip_grad_norm_(parameters=model.parameters(), max_norm=bound))
    assert all(map(torch.equal, ours, theirs))
    untouched = [g for g, p in zip(gradients, model.parameters(), strict=True) if p is not frozen]
    assert all(map(torch.equal, ours, untouched)) == (bound == 1e4)


def test_deepspeed_waits_for_the_device_only_where_it_is_told_to():
    """Its timer of each pass, and the norm of the gradients where nothing is clipped by it."""
    make = {"batch_size": 2, "accumulation": 1}
    assert ds.ds_config(**make)["timers"]["throughput"] == {"enabled": False}
    timers = {"throughput": {"enabled": True}}
    assert ds.ds_config(**make, extra={"timers": timers})["timers"] == timers

    def zero(clip_norm=0.0, **options):
        return ds.ds_config(**make, clip_norm=clip_norm, extra={"zero_optimization": options})[
            "zero_optimization"
        ]

    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    offers_it = "compute_grad_norm" in DeepSpeedZeroConfig.model_fields
    assert zero(stage=2) == {"stage": 2} | ({"compute_grad_norm": False} if offers_it else {})
    assert zero(stage=2, compute_grad_norm=True) == {"stage": 2, "compute_grad_norm": True}
    for needs_it in ({"stage": 0}, {"stage": 3}, {"stage": 1, "offload_optimizer": {}}):
        assert zero(**needs_it) == needs_it
    assert zero(clip_norm=1.0, stage=2) == {"stage": 2}


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (
            {"wall_clock_brakdown": True},
            r"DEEPSPEED\.wall_clock_brakdown: this version of DeepSpeed",
        ),
        ({"zero_optimization": {"stag": 1}}, "DEEPSPEED: DeepSpeed refuses it: stag: Extra inputs"),
        ({"zero_optimization": {"reduce_bucket_size": "a"}}, "refuses it: reduce_bucket_size: "),
        ({"amp": {"enabled": True}}, "DeepSpeed refuses it: .*AMP"),
    ],
)
def test_a_key_that_deepspeed_does_not_take_is_refused_in_a_line(extra, words):
    ds.start("cpu")
    with pytest.raises(UserError, match=words) as refusal:
        ds.check_config(ds.ds_config(batch_size=1, accumulation=1, extra=extra))
    assert "\n" not in str(refusal.value)
    ds.check_config(ds.ds_config(batch_size=1, accumulation=1, extra={"prescale_gradients": False}))
    ds.stop()


def test_no_check_waits_for_the_compilation_of_an_operator_that_is_not_called(monkeypatch):
    """DeepSpeed builds it where it joins the ranks, which the check of its keys does first."""
    import deepspeed

    operators = deepspeed.ops.__compatible_ops__
    monkeypatch.setitem(operators, "deepspeed_shm_comm", True)
    ds.start("cpu")
    ds.check_config(ds.ds_config(batch_size=1, accumulation=1))
    assert not operators["deepspeed_shm_comm"]
    ds.stop()

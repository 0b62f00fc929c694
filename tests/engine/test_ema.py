import torch
from torch import nn
from torchvision.ops import FrozenBatchNorm2d

from tract_det.engine.ds import autocast_forward
from tract_det.engine.ema import Ema


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def walk(net, ema, steps):
    """The values of every float tensor after each step."""
    history = []
    for iteration in range(1, steps + 1):
        with torch.no_grad():
            for parameter in net.parameters():
                parameter.add_(torch.randn_like(parameter))
        net(torch.randn(8, 3))
        ema.update(net, iteration)
        history.append({k: v.clone() for k, v in net.state_dict().items()})
    return history


def test_it_is_the_decaying_mean_from_the_first_step_on_buffers_included():
    net = model()
    ema = Ema(net, decay=0.7)
    history = walk(net, ema, 5)
    for key, value in ema.model.state_dict().items():
        if not value.is_floating_point():
            assert value == history[-1][key]
            continue
        expected = history[0][key].double()
        for state in history[1:]:
            expected = 0.7 * expected + 0.3 * state[key].double()
        torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-6)


def test_what_does_not_learn_stays_to_the_last_bit():
    """Frozen weights and a frozen batch norm's statistics, whatever the decay."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), FrozenBatchNorm2d(4), nn.Conv2d(4, 4, 1))
    net[0].requires_grad_(False)
    for buffer in net[1].buffers():
        buffer.copy_(torch.rand_like(buffer))
    start = {k: v.clone() for k, v in net.state_dict().items()}
    ema = Ema(net, decay=0.3)
    for iteration in range(1, 30):
        with torch.no_grad():
            net[2].weight.add_(torch.randn_like(net[2].weight))
        ema.update(net, iteration)
    same = [k for k, v in ema.model.state_dict().items() if torch.equal(v, start[k])]
    assert same == [k for k in start if k != "2.weight"]


def test_between_periods_it_stands_still():
    net = model()
    ema = Ema(net, decay=0.5, period=3)
    history = walk(net, ema, 5)
    assert torch.equal(ema.model.state_dict()["0.weight"], history[2]["0.weight"])


def test_warm_up_follows_faster_at_the_start():
    slow, fast = model(), model()
    slow_ema, fast_ema = Ema(slow, decay=0.999), Ema(fast, decay=0.999, warmup=True)
    torch.manual_seed(1)
    walk(slow, slow_ema, 4)
    torch.manual_seed(1)
    walk(fast, fast_ema, 4)
    gaps = [
        float((ema.model.state_dict()["0.weight"] - net.state_dict()["0.weight"]).norm())
        for net, ema in ((slow, slow_ema), (fast, fast_ema))
    ]
    assert gaps[1] < gaps[0]


def test_its_forward_in_bf16_is_its_own_not_the_models():
    net = nn.Sequential(nn.Linear(3, 4))
    autocast_forward(net, torch.device("cpu"))
    ema = Ema(net, decay=0.9)
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.zero_()
    out = ema.model(torch.ones(1, 3))
    assert out.dtype == torch.bfloat16
    assert out.abs().sum() > 0
    assert net(torch.ones(1, 3)).abs().sum() == 0

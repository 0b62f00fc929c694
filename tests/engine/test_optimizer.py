import torch
from torch import nn

from tract_det.engine.optimizer import build_optimizer, parameter_groups


def test_every_trainable_parameter_is_in_one_group_with_its_own_decay():
    shared = nn.Linear(4, 4)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), shared, shared, nn.GroupNorm(2, 4))
    model[0].bias.requires_grad_(False)
    groups = parameter_groups(
        model, weight_decay=0.1, weight_decay_norm=0.0, weight_decay_bias=0.01
    )
    by_decay = {group["weight_decay"]: group["params"] for group in groups}
    assert [tuple(p.shape) for p in by_decay[0.1]] == [(4, 3, 3, 3), (4, 4)]
    assert len(by_decay[0.0]) == 4
    assert len(by_decay[0.01]) == 1 and by_decay[0.01][0] is shared.bias


def test_equal_decays_share_a_group():
    groups = parameter_groups(
        nn.Conv2d(3, 4, 3), weight_decay=0.1, weight_decay_norm=0.1, weight_decay_bias=0.1
    )
    assert len(groups) == 1


def test_names_choose_the_optimizer():
    groups = parameter_groups(
        nn.Linear(2, 2), weight_decay=0.1, weight_decay_norm=0.0, weight_decay_bias=0.0
    )
    assert isinstance(build_optimizer(groups, name="AdamW", lr=0.1), torch.optim.AdamW)
    sgd = build_optimizer(groups, name="SGD", lr=0.1, momentum=0.8, nesterov=True)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]

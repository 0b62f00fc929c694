import copy

import pytest
import torch
from timm.optim import muon
from torch import nn

from tract_det.engine.choices import OPTIMIZERS
from tract_det.engine.optimizer import (
    Fallback,
    Rule,
    StemRule,
    TwoRules,
    build_optimizer,
    parameter_groups,
)
from tract_det.errors import UserError


def groups_of(model, stem=None, decay=0.1):
    return parameter_groups(
        model, weight_decay=decay, weight_decay_norm=0.0, weight_decay_bias=0.0, stem=stem
    )


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


class Scaled(nn.Module):
    """A layer scale and a position embedding, as timm's models have them."""

    def __init__(self):
        super().__init__()
        self.pos_embed = nn.Parameter(torch.zeros(1, 4, 8))
        self.gamma = nn.Parameter(torch.ones(8))
        self.weight = nn.Parameter(torch.zeros(8, 8))

    def no_weight_decay(self):
        return {"pos_embed"}


def test_a_scale_and_what_the_model_itself_spares_decay_like_biases():
    model = nn.Sequential(Scaled())  # the name that it spares is its own, not the wrapper's
    spared = next(group for group in groups_of(model) if group["weight_decay"] == 0)
    assert {id(p) for p in spared["params"]} == {id(model[0].pos_embed), id(model[0].gamma)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_name_chooses_the_optimizer_and_it_lowers_the_loss(name, generator):
    model = nn.Linear(4, 2)
    optimizer = build_optimizer(groups_of(model), Rule(name, nesterov=True), lr=0.02)
    assert type(optimizer).__name__.upper() == name.upper()
    x = torch.randn(16, 4, generator=generator)
    y = x[:, :2] * 3
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]


def test_settings_arrive():
    groups = groups_of(nn.Linear(2, 2))
    sgd = build_optimizer(groups, Rule("SGD", momentum=0.8, nesterov=True), lr=0.1)
    assert sgd.defaults["momentum"] == 0.8 and sgd.defaults["nesterov"]
    adam = build_optimizer(groups_of(nn.Linear(2, 2)), Rule("AdamW", betas=(0.8, 0.9)), lr=0.1)
    assert adam.defaults["betas"] == (0.8, 0.9)


@pytest.mark.parametrize("name", ["LAMB", "Muon"])
def test_what_needs_whole_weights_is_refused_where_zero_would_hand_it_slices(name):
    groups = groups_of(nn.Linear(2, 2))
    with pytest.raises(UserError, match=rf"SOLVER.OPTIMIZER {name} .* stage 1"):
        build_optimizer(groups, Rule(name), lr=0.1, zero_stage=1)
    with pytest.raises(UserError, match=rf"SOLVER.OPTIMIZER {name} .* stage 1"):
        build_optimizer(groups, Rule("SGD"), lr=0.1, stem=Rule(name), zero_stage=1)


class Attending(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 2)
        self.depthwise = nn.Conv2d(8, 8, 2, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.position = nn.Parameter(torch.ones(1, 4, 8))
        self.table = nn.Embedding(5, 8)
        self.attention = nn.MultiheadAttention(8, 2)
        self.head = nn.Linear(8, 4)


def test_muon_takes_hidden_matrices_and_leaves_the_rest_to_adamw_at_its_own_rate():
    model = Attending()
    fallback = Fallback(["head"], lr_scale=0.015)
    groups = parameter_groups(
        model, weight_decay=0.1, weight_decay_norm=0.0, weight_decay_bias=0.0, fallback=fallback
    )
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    taken = {names[id(p)] for group in groups if "use_muon" in group for p in group["params"]}
    assert taken == {"stem.weight", "attention.in_proj_weight", "attention.out_proj.weight"}
    left = [group for group in groups if "use_fallback" in group]
    assert sum(len(group["params"]) for group in groups) == len(names)
    assert {group["lr_scale"] for group in left} == {0.015}
    optimizer = build_optimizer(groups, Rule("Muon", momentum=0.95, nesterov=True), lr=0.02)
    assert [g["nesterov"] for g in optimizer.param_groups] == ["use_muon" in g for g in groups]


def test_the_step_of_muon_is_orthogonal_and_that_of_the_rest_is_adamws(generator):
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    before = [p.detach().clone() for p in model.parameters()]
    groups = parameter_groups(
        model, weight_decay=0.0, weight_decay_norm=0.0, weight_decay_bias=0.0,
        fallback=Fallback(["1"], 0.1),
    )  # fmt: skip
    optimizer = build_optimizer(groups, Rule("Muon"), lr=0.02)
    for group in optimizer.param_groups:
        group["lr"] = 0.02 * group.get("lr_scale", 1.0)
    for parameter in model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
    optimizer.step()
    hidden, *rest = [(p.detach() - b) for p, b in zip(model.parameters(), before, strict=True)]
    singular = torch.linalg.svdvals(hidden) / 0.02
    assert singular.min() > 0.5 and singular.max() < 1.5
    assert muon.zeropower_via_newtonschulz(hidden, 1, [(1, 0, 0)]).dtype == torch.bfloat16
    for change in rest:  # AdamW's first step is its rate, whatever the gradient
        torch.testing.assert_close(change.abs(), torch.full_like(change, 0.002), rtol=1e-3, atol=0)


@pytest.mark.parametrize("channels", [1, 3])
def test_a_faster_stem_under_muon_keeps_the_optimizer_that_it_had(channels):
    """Filters of one channel are no matrix, so that Muon leaves them to AdamW at its rate."""

    def group_of_stem(stem=None):
        model = nn.Sequential(nn.Conv2d(channels, 8, 2), nn.Linear(8, 4))
        groups = parameter_groups(
            model, weight_decay=0.1, weight_decay_norm=0.0, weight_decay_bias=0.0, stem=stem,
            fallback=Fallback(["1"], lr_scale=0.015),
        )  # fmt: skip
        return next(g for g in groups if any(p is model[0].weight for p in g["params"]))

    slow, fast = group_of_stem(), group_of_stem(StemRule("0", Rule("Muon"), lr_scale=10.0))
    assert ("use_muon" in slow) == (channels == 3) == ("use_fallback" not in slow)
    for key in ("use_muon", "use_fallback", "nesterov"):
        assert fast.get(key) == slow.get(key)
    assert fast["lr_scale"] == pytest.approx(10 * slow.get("lr_scale", 1.0))


STEM = StemRule("0", Rule("SGD", momentum=0.5), lr_scale=10.0, weight_decay=0.3)


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))


def step(model, optimizer, seed):
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed))
    optimizer.zero_grad()
    (model(x) ** 2).sum().backward()
    optimizer.step()


def two_rules(model, lr=0.001):
    optimizer = build_optimizer(groups_of(model, STEM), Rule("Adam"), lr=lr, stem=STEM.rule)
    assert isinstance(optimizer, TwoRules)
    return optimizer


def test_a_stem_by_sgd_inside_adam_is_two_optimizers_side_by_side():
    ours, theirs = net(), net()
    optimizer = two_rules(ours)
    sgd = torch.optim.SGD([theirs[0].weight], lr=0.01, momentum=0.5, weight_decay=0.3)
    adam = torch.optim.Adam(
        [
            {"params": [theirs[2].weight], "weight_decay": 0.1},
            {"params": [theirs[0].bias, theirs[2].bias]},
        ],
        lr=0.001,
    )

    class Both:
        def zero_grad(self):
            sgd.zero_grad()
            adam.zero_grad()

        def step(self):
            sgd.step()
            adam.step()

    for seed in range(5):
        step(ours, optimizer, seed)
        step(theirs, Both(), seed)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def test_two_rules_go_on_from_their_saved_state():
    whole, parts = net(), net()
    optimizer, first = two_rules(whole), two_rules(parts)
    for seed in range(4):
        step(whole, optimizer, seed)
    for seed in range(2):
        step(parts, first, seed)
    second = two_rules(parts)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for seed in range(2, 4):
        step(parts, second, seed)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_stem_of_the_same_rule_needs_no_second_optimizer():
    stem = StemRule("0", Rule("SGD"), lr_scale=0.1)
    optimizer = build_optimizer(groups_of(net(), stem), Rule("SGD"), lr=1.0, stem=stem.rule)
    assert isinstance(optimizer, torch.optim.SGD)
    own = [group for group in optimizer.param_groups if group.get("stem")]
    assert len(own) == 1 and own[0]["lr_scale"] == 0.1 and own[0]["weight_decay"] == 0.1


def test_muon_iterates_in_float32_on_a_cpu(generator):
    """bfloat16 would leave three digits of the step."""
    weight = nn.Parameter(torch.zeros(6, 9))
    optimizer = build_optimizer([{"params": [weight]}], Rule("Muon", momentum=0.0), lr=1.0)
    weight.grad = torch.randn(6, 9, generator=generator)
    X = weight.grad.double() / weight.grad.double().norm()
    for a, b, c in muon.resolve_ns_coefficients("quintic", muon._COEFFICIENTS):
        A = X @ X.mT
        X = a * X + (b * A + c * A @ A) @ X
    optimizer.step()
    torch.testing.assert_close(-weight.detach(), X.float(), rtol=1e-4, atol=1e-5)

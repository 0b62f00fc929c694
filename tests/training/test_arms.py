"""What the arms do in a run: whitened stems, every layer by TrAct's rule, norms of patches."""

import pytest
import torch
import torch.nn.functional as F

from tests.conftest import tiny_options
from tests.reference import tract_gradient
from tests.training.image_folder import TINY, options
from tests.training.runs import log, results, run_here, weights
from tract_det import TrActLayer
from tract_det.cli import call
from tract_det.config import classification as classification_config
from tract_det.errors import UserError
from tract_det.modeling.whitening import patch_covariance, whitening_weight
from tract_det.training import assembly, classification, classifiers


def without_arm_keys(pairs):
    """Options of a tiny run without what an arm sets, so that the arm decides."""
    arms_own = ("MODEL.TRACT.ENABLED", "SOLVER.OPTIMIZER")
    keys = dict(zip(pairs[::2], pairs[1::2], strict=True))
    return [part for key, value in keys.items() if key not in arms_own for part in (key, value)]


def train(root, output, arm, *flags, **changes):
    pairs = without_arm_keys(options(root, output, **{"SOLVER__MAX_ITER": 2, **changes}))
    return run_here("pretrain", "--arm", arm, *flags, *pairs)


def configured(folder, arm, *pairs):
    keys = {**TINY, "DATASETS.ROOT": str(folder)}
    given = without_arm_keys([part for pair in keys.items() for part in pair])
    return classification_config.load_cfg("CIFAR/cpu_small.yaml", [*given, *pairs], arm)


def built(cfg):
    """The model as a run has it before its first step, and the random state at that time."""
    split, _ = classification.read_data(cfg)
    torch.manual_seed(cfg.SEED)
    model = classifiers.build_classifier(cfg, None, split.class_names, False)
    if cfg.MODEL.STEM_INIT:
        sample = assembly.sample_of(len(split), cfg.SEED)
        images = classification.plain_images(cfg, split, model.meta, sample)
        assembly.init_stem(cfg, model, images)
    assembly.put_tract(cfg, model.model, model.input_variance)
    return model, split, torch.get_rng_state()


@pytest.mark.parametrize("arm", ["whitened", "tract+whitened"])
def test_a_whitened_stem_is_all_that_differs_from_the_plain_arm_before_the_first_step(folder, arm):
    plain, _, plain_state = built(configured(folder, "plain"))
    ours, split, state = built(configured(folder, arm))
    before, after = plain.model.state_dict(), ours.model.state_dict()
    assert [key for key in before if not torch.equal(before[key], after[key])] == ["conv1.weight"]
    assert torch.equal(plain_state, state)
    cfg = configured(folder, arm)
    images = torch.cat(list(classification.plain_images(cfg, split, ours.meta, range(len(split)))))
    covariance = patch_covariance([images], ours.model.conv1)
    expected = whitening_weight(covariance, before["conv1.weight"])
    torch.testing.assert_close(after["conv1.weight"], expected, rtol=1e-4, atol=1e-5)


def test_the_seed_chooses_the_images_that_are_whitened_and_leaves_the_random_state():
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, again, other = (assembly.sample_of(1000, seed) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 256 and first == sorted(first)
    assert assembly.sample_of(5, 0) == [0, 1, 2, 3, 4]
    assert torch.equal(torch.get_rng_state(), state)


def test_a_whitened_stem_may_be_frozen_alone_and_its_weights_evaluate(folder, tmp_path):
    train(folder, tmp_path / "out", "whitened_frozen", MODEL__NORM="BN")
    ours, _, _ = built(configured(folder, "whitened_frozen", "MODEL.NORM", "BN"))
    before, after = ours.model.state_dict(), weights(tmp_path / "out")
    still = {key for key in after if torch.equal(before[key], after[key])}
    assert still == {key for key in after if key.startswith(("conv1.", "bn1."))}
    train(
        folder, tmp_path / "again", "whitened_frozen", "--eval-only", MODEL__NORM="BN",
        MODEL__WEIGHTS=tmp_path / "out/model_final.pth",
    )  # fmt: skip
    assert results(tmp_path / "again") == results(tmp_path / "out")


def test_a_detector_has_a_whitened_stem_of_its_images_without_their_padding(voc_tree, tmp_path):
    pairs = without_arm_keys(
        tiny_options(voc_tree, tmp_path, SOLVER__MAX_ITER=1, INPUT__MIN_SIZE_TEST=80)
    )
    printed = run_here("train", "--arm", "whitened_frozen", *pairs)
    assert "'backbone.body.conv1' is initialised by whitening filters" in printed
    stem = weights(tmp_path)["backbone.body.conv1.weight"].flatten(1)
    torch.testing.assert_close(stem[1::2], -stem[::2])
    assert all(torch.isfinite(torch.tensor(list(log(tmp_path).values()))))


def test_a_whitened_stem_with_weights_is_refused(folder, tmp_path):
    pairs = without_arm_keys(options(folder, tmp_path / "out", MODEL__WEIGHTS="some.pth"))
    message = r"MODEL\.STEM_INIT whitened would undo the first layer of MODEL\.WEIGHTS some\.pth"
    with pytest.raises(UserError, match=message):
        call("pretrain", ["--arm", "whitened", *pairs])


def test_foof_gives_every_layer_tracts_rule_in_units_of_its_own_input(folder, generator):
    """The gradient of each is compared with TrAct's by an explicit inverse."""
    model, _, _ = built(configured(folder, "foof"))
    layers = {n: m for n, m in model.model.named_modules() if isinstance(m, TrActLayer)}
    plain = [m for m in model.model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert list(layers.values()) == plain and len(plain) == 13
    seen = {}
    for name, layer in layers.items():
        layer.register_forward_hook(
            lambda _, args, out, name=name: seen.__setitem__(name, (args[0].detach(), out))
        )
    loss = model.network(torch.randn(4, 3, 32, 32, generator=generator), torch.arange(4))
    outputs = [out for _, out in seen.values()]
    dZs = torch.autograd.grad(loss["loss_cls"], outputs, retain_graph=True)
    loss["loss_cls"].backward()
    for (name, layer), gradient in zip(layers.items(), dZs, strict=True):
        X = seen[name][0]
        if X.ndim == 4:
            conv = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
            X = F.unfold(X, *conv).transpose(1, 2).flatten(0, 1)
        dZ = gradient.movedim(1, -1).flatten(0, -2)
        mean_square = float(X.double().square().mean())
        expected, _, _ = tract_gradient(X, dZ, 0.1 * mean_square)
        error = layer.weight.grad.flatten(1) - expected
        assert error.norm() <= 1e-4 * expected.norm(), name


def test_foof_trains_and_logs_each_layer(folder, tmp_path):
    printed = train(folder, tmp_path, "foof", SOLVER__ACCUMULATION=2)
    assert "TrAct on 13 layers, lambda 0.1 of the patches' mean square" in printed
    assert list(log(tmp_path, "tract_lambda/model.layer1.0.conv1")) == [1, 2]


@pytest.mark.parametrize("arm", ["muon", "tract+muon"])
def test_muon_trains_and_goes_on_from_its_checkpoint(folder, tmp_path, arm):
    changes = {"SOLVER__BASE_LR": 0.02, "SOLVER__LR_SCHEDULER_NAME": "WarmupMultiStepLR"}
    train(folder, tmp_path / "whole", arm, SOLVER__MAX_ITER=3, **changes)
    train(folder, tmp_path / "parts", arm, SOLVER__MAX_ITER=2, **changes)
    train(folder, tmp_path / "parts", arm, "--resume", SOLVER__MAX_ITER=3, **changes)
    whole, parts = weights(tmp_path / "whole"), weights(tmp_path / "parts")
    assert all(torch.equal(value, parts[key]) for key, value in whole.items())


@pytest.mark.parametrize("arm", ["muon", "tract+muon"])
def test_muon_under_zero_is_refused(folder, tmp_path, arm):
    pairs = options(folder, tmp_path, DEEPSPEED__zero_optimization__stage=1)
    with pytest.raises(UserError, match=r"SOLVER\.OPTIMIZER Muon orthogonalises .* ZeRO stage 1"):
        call("pretrain", ["--arm", arm, *without_arm_keys(pairs)])


@pytest.mark.parametrize("arm", ["patch_norm", "dual_patch_norm"])
def test_the_norm_of_patches_is_for_vits_and_its_stem_learns_by_the_plain_gradient(folder, arm):
    vit = ("MODEL.NAME", "vit_cifar", "MODEL.NORM", "BN", "MODEL.WIDTH", "64")
    cfg = configured(folder, arm, *vit)
    model, _, _ = built(cfg)
    kind = {"patch_norm": "layer_norm", "dual_patch_norm": "dual"}[arm]
    assert model.meta["patch_norm"] == cfg.MODEL.PATCH_NORM == kind
    assert not any(isinstance(module, TrActLayer) for module in model.network.modules())
    with pytest.raises(UserError, match=f"PATCH_NORM {kind}: resnet10 has no plain patch"):
        built(configured(folder, arm))


@pytest.mark.parametrize("arm", ["strong", "tract+strong"])
def test_the_strong_recipe_is_evaluated_by_its_moving_average_as_well(folder, tmp_path, arm):
    printed = train(folder, tmp_path, arm, SOLVER__MAX_ITER=2)
    assert {"top1", "ema"} <= results(tmp_path).keys()
    assert ("TrAct on 'conv1'" in printed) == (arm == "tract+strong")

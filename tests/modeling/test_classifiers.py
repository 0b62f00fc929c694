"""Classifiers are the library's own, but for what an option changes."""

import copy

import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import nn

from tract_det import apply_tract, find_stem
from tract_det.errors import UserError
from tract_det.modeling.checkpointing import CheckpointedSequential
from tract_det.modeling.classification_loss import ClassifierWithLoss
from tract_det.modeling.classifiers import build_classifier, check_image_size
from tract_det.modeling.patch_norm import PatchNorm

TINY_VIT = "timm:test_vit"  # timm's own for tests: 10 blocks of 64, 16 x 16 patches


def shapes(model):
    return {key: tuple(value.shape) for key, value in model.state_dict().items()}


def test_names_and_shapes_are_the_librarys():
    with torch.device("meta"):
        for name in ("vgg11", "vgg16_bn", "resnet18", "resnet50", "mobilenet_v2", "vit_b_16"):
            ours = shapes(build_classifier(name, 7))
            theirs = shapes(torchvision.models.get_model(name, weights=None, num_classes=7))
            assert ours == theirs
        ours = shapes(build_classifier("timm:deit3_small_patch16_224", 7))
        assert ours == shapes(timm.create_model("deit3_small_patch16_224", num_classes=7))


def test_googlenet_gives_logits_alone_in_training():
    with torch.device("meta"):
        assert build_classifier("googlenet", 7)(torch.randn(2, 3, 64, 64)).shape == (2, 7)


def test_a_scaled_resnet_of_the_published_width_is_torchvisions():
    from tract_det.modeling.resnets import _BLOCKS, ScaledResNet

    for name in ("resnet18", "resnet50"):
        theirs = torchvision.models.get_model(name, weights=None, num_classes=5)
        ours = ScaledResNet(*_BLOCKS[name], num_classes=5)
        assert shapes(ours) == shapes(theirs)
        assert list(dict(ours.named_modules())) == list(dict(theirs.named_modules()))
        ours.load_state_dict(theirs.state_dict())
        images = torch.randn(1, 3, 32, 32)
        assert torch.equal(ours.eval()(images), theirs.eval()(images))


def test_a_narrow_resnet_has_its_width_and_is_drawn_as_torchvisions():
    torch.manual_seed(0)
    model = build_classifier("resnet10", 10, small_images=True, width=16)
    assert model.conv1.weight.shape == (16, 3, 3, 3) and model.conv1.stride == (1, 1)
    assert model.fc.weight.shape == (10, 128)
    assert model.layer1(model.maxpool(torch.randn(1, 16, 32, 32))).shape == (1, 16, 32, 32)
    for conv in (m for m in model.modules() if isinstance(m, nn.Conv2d)):
        fan_out = conv.weight[:, 0].numel()
        assert conv.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.2)
    assert not any(p.is_meta for p in model.parameters())


@pytest.mark.parametrize("name", ["resnet18", "vgg11", "vgg16_bn", "timm:vit_tiny_patch16_224"])
def test_small_images_keep_the_names_of_the_stem(name):
    with torch.device("meta"):
        small = build_classifier(name, 10, small_images=True, image_size=32)
        large = build_classifier(name, 10)
        images = torch.randn(2, 3, 32, 32)
        assert small(images).shape == (2, 10)
    assert find_stem(small) == find_stem(large)
    if name.startswith("vgg"):
        theirs = shapes(large)
        assert {k: v for k, v in shapes(small).items() if k in theirs} == {
            k: v for k, v in theirs.items() if k.startswith("features.")
        }
        assert small.classifier.weight.shape == (10, 512)
    elif name.startswith("timm"):
        assert small.patch_embed.proj.kernel_size == (4, 4)
        assert small.patch_embed.num_patches == 64


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "resnet19"}, r"MODEL.NAME resnet19: torchvision has no .* names: .*resnet18"),
        ({"name": "timm:deit3_smal_patch16_224"}, r"timm has no .*timm:deit3_small_patch16_224"),
        ({"name": "mnasnet1_0", "small_images": True}, r"MODEL.SMALL_IMAGES True: mnasnet1_0 has"),
        ({"name": "timm:resnet50d", "small_images": True}, r"MODEL.SMALL_IMAGES True: timm:resnet"),
        ({"name": "timm:nasnetalarge", "small_images": True}, r"timm:nasnetalarge has no form"),
        ({"name": "resnext50_32x4d", "width": 16}, r"MODEL.WIDTH is 16, but resnext50_32x4d"),
        ({"name": "vgg11", "width": 16}, r"MODEL.WIDTH is 16, but vgg11"),
        ({"name": "vgg11", "norm": "GN"}, r"MODEL.NORM is GN but vgg11 has no batch norms"),
        ({"name": "timm:efficientnet_b0", "norm": "GN"}, r"do more than a batch norm"),
        ({"name": "resnet18", "drop_rate": 0.1}, r"MODEL.DROP_RATE is 0.1, but resnet18"),
        ({"name": "resnet18", "drop_path_rate": 0.1}, r"MODEL.DROP_PATH_RATE is 0.1"),
        ({"name": "resnet18", "patch_norm": "dual"}, r"MODEL.PATCH_NORM dual: resnet18 has no"),
        ({"name": "timm:resnet18", "patch_norm": "layer_norm"}, r"timm:resnet18 has no plain"),
        ({"name": "alexnet", "small_images": True}, r"alexnet has no form for small images"),
        ({"name": "vit_b_16", "image_size": 30}, r"INPUT.SIZE is 30, which MODEL.NAME vit_b_16 re"),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else "",
)
def test_what_a_model_does_not_have_is_refused_by_name(options, message):
    name = options.pop("name")
    with torch.device("meta"), pytest.raises(UserError, match=message):
        build_classifier(name, 10, **options)


@pytest.mark.parametrize(
    ("name", "fits", "refused"),
    [("alexnet", 63, 32), ("vgg11", 32, 16), ("inception_v3", 75, 64), (TINY_VIT, 32, 40)],
)
def test_a_size_that_a_model_refuses_is_named_in_one_line(name, fits, refused):
    model = build_classifier(name, 3, image_size=fits)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    random = torch.get_rng_state()
    check_image_size(model, name, fits)
    with pytest.raises(UserError) as caught:
        check_image_size(model, name, refused)
    assert f"INPUT.SIZE is {refused}, which MODEL.NAME {name} refuses (" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert model.training and torch.equal(random, torch.get_rng_state())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_syncbn_is_refused_without_cuda():
    if torch.cuda.is_available():
        assert isinstance(build_classifier("resnet18", 2, norm="SyncBN").bn1, nn.SyncBatchNorm)
        return
    with pytest.raises(UserError, match=r"MODEL.NORM SyncBN needs CUDA"):
        build_classifier("resnet18", 2, norm="SyncBN")


def test_group_norm_takes_the_place_of_every_batch_norm():
    for name, width in (("resnet10", 16), ("resnet18", 64), ("vgg11_bn", 64)):
        model = build_classifier(name, 4, norm="GN", width=width, small_images=True)
        norms = [m for m in model.modules() if isinstance(m, nn.GroupNorm)]
        assert norms and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
        assert {norm.num_groups for norm in norms} == {min(32, norms[0].num_channels)} | {32}
        assert not any("running" in key for key in model.state_dict())


def test_the_dropout_rate_is_the_one_asked_for_and_zero_by_default():
    with torch.device("meta"):
        for rate in (0.0, 0.5):
            model = build_classifier("vgg11", 4, drop_rate=rate)
            assert {m.p for m in model.modules() if isinstance(m, nn.Dropout)} == {rate}
        model = build_classifier("timm:deit3_small_patch16_224", 4, drop_path_rate=0.1)
    assert model.blocks[-1].drop_path1.drop_prob == pytest.approx(0.1)


def test_patch_norm_is_layer_norm_of_each_flattened_patch(generator):
    images = torch.randn(2, 3, 8, 12, generator=generator) * 5 + 3
    norm = PatchNorm(3, (4, 4), affine=True)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(48, generator=generator))
        norm.bias.copy_(torch.randn(48, generator=generator))
    normed = norm(images)
    patches = F.unfold(images, 4, stride=4).transpose(1, 2)
    expected = F.layer_norm(patches, (48,), norm.weight, norm.bias, 1e-6).transpose(1, 2)
    torch.testing.assert_close(normed, F.fold(expected, (8, 12), 4, stride=4))
    plain = F.unfold(PatchNorm(3, (4, 4), affine=False)(images), 4, stride=4)
    torch.testing.assert_close(plain.mean(1), torch.zeros(2, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(plain.var(1, correction=0), torch.ones(2, 6))


def vit_like(library):
    """A builder of a small ViT of either library, and the name of its embedding."""
    if library == "timm":
        return lambda **options: build_classifier(TINY_VIT, 5, image_size=32, **options)

    def small_vit(**options):
        from tract_det.modeling.patch_norm import add_patch_norm

        model = torchvision.models.VisionTransformer(32, 8, 2, 2, 32, 32, num_classes=5)
        if options.get("patch_norm"):
            add_patch_norm(model, options["patch_norm"], "vit")
        return model

    return small_vit


@pytest.mark.parametrize("library", ["timm", "torchvision"])
@pytest.mark.parametrize("kind", ["layer_norm", "dual"])
def test_patch_norms_surround_the_embedding_and_leave_its_name(library, kind, generator):
    build = vit_like(library)
    torch.manual_seed(0)
    plain, normed = build(), build(patch_norm=kind)
    state = plain.state_dict()
    result = normed.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    added = {key.rsplit(".", 2)[-2] for key in result.missing_keys}
    assert added == (set() if kind == "layer_norm" else {"patch_norm", {"timm": "norm", "torchvision": "embed_norm"}[library]})  # fmt: skip  # noqa: E501
    assert find_stem(normed) == find_stem(plain)
    # Contrast and brightness of a patch are gone: that is the point of the norm.
    images = torch.randn(2, 3, 32, 32, generator=generator)
    normed.eval()
    torch.testing.assert_close(normed(images), normed(images * 7 + 3), atol=1e-4, rtol=1e-3)
    stem = normed.get_submodule(find_stem(normed))
    seen = []
    hook = stem.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    normed(images)
    hook.remove()
    size = stem.kernel_size[0]
    patches = F.unfold(seen[0], size, stride=size)
    torch.testing.assert_close(patches.mean(1), torch.zeros_like(patches[:, 0]), atol=1e-5, rtol=0)


def test_dual_patch_norm_normalises_what_comes_out_of_the_embedding(generator):
    model = vit_like("timm")(patch_norm="dual").eval()
    images = torch.randn(2, 3, 32, 32, generator=generator)
    tokens = model.patch_embed(images)
    mean, variance = tokens.mean(-1), tokens.var(-1, correction=0)
    torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-4, rtol=0)
    torch.testing.assert_close(variance, torch.ones_like(mean), atol=1e-2, rtol=0)


@pytest.mark.parametrize("kind", ["layer_norm", "dual"])
def test_tract_learns_under_a_patch_norm(kind, generator):
    model = ClassifierWithLoss(vit_like("timm")(patch_norm=kind))
    apply_tract(model)
    images = torch.randn(4, 3, 32, 32, generator=generator)
    model(images, torch.tensor([0, 1, 2, 3]))["loss_cls"].backward()
    stem = model.get_submodule(find_stem(model))
    assert stem.weight.grad.isfinite().all() and stem.weight.grad.abs().sum() > 0


CHECKPOINTED = [
    ("resnet10", {"width": 16, "small_images": True}),
    ("vgg11_bn", {"small_images": True}),
    ("mobilenet_v2", {}),
    ("torchvision-vit", {}),
    (TINY_VIT, {"image_size": 32}),
]


@pytest.mark.parametrize(("name", "options"), CHECKPOINTED, ids=[name for name, _ in CHECKPOINTED])
def test_checkpointing_changes_no_gradient_no_statistic_and_no_key(name, options, generator):
    torch.manual_seed(0)
    if name == "torchvision-vit":
        from tract_det.modeling.checkpointing import checkpoint_activations

        plain = vit_like("torchvision")()
        kept = copy.deepcopy(plain)
        checkpoint_activations(kept, name)
    else:
        plain = build_classifier(name, 4, **options)
        kept = build_classifier(name, 4, checkpointing=True, **options)
        kept.load_state_dict(plain.state_dict())
    assert list(kept.state_dict()) == list(plain.state_dict())
    images = torch.randn(4, 3, 32, 32, generator=generator)
    targets = torch.tensor([0, 1, 2, 3])
    for model in (plain, kept):
        for _ in range(2):  # the second time a batch norm's count would tell
            torch.manual_seed(1)  # the dropout is the same
            ClassifierWithLoss(model)(images, targets)["loss_cls"].backward()
    for (key, one), other in zip(plain.named_parameters(), kept.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, msg=key)
    for key, buffer in plain.named_buffers():
        assert torch.equal(buffer, kept.get_buffer(key)), key


def test_checkpointing_keeps_less_and_runs_the_stem_once(generator):
    def saved_and_stem_runs(checkpointing):
        model = build_classifier("vgg11_bn", 4, small_images=True, checkpointing=checkpointing)
        elements, runs = [0], []
        model.features[0].register_forward_hook(lambda *_: runs.append(1))
        pack = lambda t: elements.append(t.numel()) or t  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = model(torch.randn(2, 3, 32, 32, generator=generator)).sum()
            saved = sum(elements)
        loss.backward()
        return saved, len(runs)

    plain, kept = saved_and_stem_runs(False), saved_and_stem_runs(True)
    assert kept[0] < plain[0] / 2 and kept[1] == plain[1] == 1


def test_a_copy_of_a_checkpointed_model_runs_its_own_layers(generator):
    model = build_classifier("resnet10", 4, width=16, checkpointing=True)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert isinstance(twin.layer1, CheckpointedSequential)
    assert (twin(torch.randn(2, 3, 32, 32, generator=generator)) == 0).all()


def test_training_gives_the_loss_and_evaluation_the_logits(generator):
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 5))
    model = ClassifierWithLoss(inner, smoothing=0.1)
    images, labels = torch.randn(6, 3, 2, 2, generator=generator), torch.arange(6) % 5
    losses = model(images, labels)
    assert list(losses) == ["loss_cls"]
    expected = F.cross_entropy(inner(images), labels, label_smoothing=0.1)
    assert torch.equal(losses["loss_cls"], expected)
    soft = F.one_hot(labels, 5).float()
    torch.testing.assert_close(model(images, soft)["loss_cls"], expected)
    assert torch.equal(model.eval()(images), inner(images))
    assert [key.removeprefix("model.") for key in model.state_dict()] == list(inner.state_dict())
    with pytest.raises(ValueError, match="needs targets"):
        model.train()(images)


def test_binary_cross_entropy_is_deits(generator):
    # DeiT-III trains on `targets > 0` of what mixup and CutMix made.
    logits = torch.randn(3, 5, generator=generator)
    model = ClassifierWithLoss(nn.Identity(), bce=True)
    labels = torch.tensor([0, 4, 2])
    mixed = 0.7 * F.one_hot(labels, 5) + 0.3 * F.one_hot(labels.flip(0), 5)
    expected = F.binary_cross_entropy_with_logits(logits, (mixed > 0).float())
    assert torch.equal(model(logits, mixed)["loss_cls"], expected)
    one_hot = F.one_hot(labels, 5).float()
    expected = F.binary_cross_entropy_with_logits(logits, one_hot)
    assert torch.equal(model(logits, labels)["loss_cls"], expected)


def test_binary_cross_entropy_smooths_what_is_there_and_what_is_not(generator):
    logits = torch.randn(3, 5, generator=generator)
    labels = torch.tensor([0, 4, 2])
    smooth = F.one_hot(labels, 5) * 0.9 + 0.1 / 5
    expected = F.binary_cross_entropy_with_logits(logits, smooth)
    own = ClassifierWithLoss(nn.Identity(), smoothing=0.1, bce=True)(logits, labels)["loss_cls"]
    torch.testing.assert_close(own, expected)


def test_binary_cross_entropy_counts_both_of_two_mixed_classes():
    logits, shares = torch.tensor([[0.3, -0.2]]), torch.tensor([[0.7, 0.3]])
    expected = F.binary_cross_entropy_with_logits(logits, torch.ones(1, 2))
    loss = ClassifierWithLoss(nn.Identity(), bce=True)(logits, shares)["loss_cls"]
    torch.testing.assert_close(loss, expected)

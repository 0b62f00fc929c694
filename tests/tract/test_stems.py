"""The stem of timm's and Hugging Face's model families: found by name, and learning by TrAct."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import reference
from tests.tract.meta import meta
from tract_det import (
    TrActConv2d,
    TrActError,
    TrActLayer,
    apply_tract,
    find_stem,
)

LAMBDA = 0.1

# Stem -> one model of each family that has it.
STEMS = {
    "stem.conv": (
        "caformer_s18 davit_tiny mobilevit_xxs nf_resnet26 poolformer_s12 regnetx_002 "
        "resnetv2_50 resnetv2_50x1_bit rexnet_100"
    ),
    "patch_embed.proj": (
        "beit_base_patch16_224 cait_xxs24_224 deit3_small_patch16_224 eva02_tiny_patch14_224 "
        "hiera_tiny_224 pvt_v2_b0 swin_tiny_patch4_window7_224 vit_tiny_patch16_224"
    ),
    "stem.0": "convmixer_768_32 convnext_atto edgenext_xx_small selecsls42 visformer_tiny",
    "conv1": "hrnet_w18_small legacy_xception res2net50_14w_8s skresnet18",
    "conv_stem": "efficientnet_b0 ghostnet_050 mobilenetv3_small_050 tf_efficientnet_b0",
    "stem.conv1": "dm_nfnet_f0 efficientformer_l1 maxvit_tiny_tf_224",
    "conv1.0": "resnest14d resnet26d",
    "base_layer.0": "dla34",
    "body.conv1.conv": "tresnet_m",
    "embeds.proj": "naflexvit_base_patch16_gap",
    "encoder.patch_embed.input_proj": "gemma4_vit_167m",
    "features.0": "vgg11",
    "features.0.conv": "inception_v4",
    "features.conv0": "densenet121",
    "features.conv1_1.conv": "dpn48b",
    "layer0.conv1": "legacy_seresnet18",
    "patch_embed.backbone.conv": "vit_tiny_r_s16_p8_224",
    "patch_embed.conv": "pit_ti_224",
    "patch_embed.conv.0": "volo_d1_224",
    "patch_embed.proj.0.0": "xcit_nano_12_p8_224",
    "patch_embed1.proj": "coat_lite_tiny",
    "patch_embeds.0.proj": "twins_svt_small",
    "stem.0.conv": "xception41",
    "stem.conv1.c": "repvit_m0_9",
    "stem.conv1.conv": "botnet26t_256",
    "stem.conv1.linear": "levit_128s",
    "stem.in_conv.conv": "efficientvit_b0",
    "stem.proj": "mixer_s32_224",
}
TIMM = {name: stem for stem, names in STEMS.items() for name in names.split()}

SEVERAL = {
    "crossvit_9_240": ["patch_embed.0.proj", "patch_embed.1.proj"],
    "fastvit_t8": ["stem.0.conv_kxk.0.conv", "stem.0.conv_scale.conv"],
    "mobileone_s0": ["stem.conv_kxk.0.conv", "stem.conv_scale.conv"],
    "repvgg_a0": ["stem.conv_kxk.conv", "stem.conv_1x1.conv"],
}

# Small enough to run: model, arguments, image size.
SMALL = [
    ("ghostnet_050", {}, 32),
    ("hrnet_w18_small", {}, 64),
    ("levit_128s", {}, 224),
    ("lcnet_035", {}, 32),
    ("nf_regnet_b0", {}, 32),
    ("regnetx_002", {}, 32),
    ("resnetv2_50x1_bit", {}, 33),
    ("test_convnext", {}, 32),
    ("test_efficientnet", {}, 32),
    ("test_nfnet", {}, 32),
    ("test_resnet", {}, 31),
    ("test_vit", {}, 160),
    ("tf_mobilenetv3_small_minimal_100", {}, 33),
    ("vit_tiny_r_s16_p8_224", {"depth": 1, "img_size": 64}, 64),
]

# Model class, arguments of its configuration, stem.
SIZES = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
VIT = {**SIZES, "intermediate_size": 32, "image_size": 32, "patch_size": 8}
STAGES = {"hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}
SWIN = {
    "window_size": 4,
    "image_size": 32,
    "patch_size": 4,
    "embed_dim": 8,
    "depths": [1],
    "num_heads": [2],
}
SEGFORMER = {"depths": [1] * 4, "hidden_sizes": [8, 8, 10, 16]}
PATCHES = "embeddings.patch_embeddings"
HUGGING_FACE = [
    ("ViTForImageClassification", VIT, f"vit.{PATCHES}.projection"),
    ("DeiTModel", VIT, f"{PATCHES}.projection"),
    ("BeitModel", VIT, f"{PATCHES}.projection"),
    ("Dinov2Model", VIT, f"{PATCHES}.projection"),
    ("SwinModel", SWIN, f"{PATCHES}.projection"),
    ("ConvNextModel", STAGES, PATCHES),
    ("ResNetModel", STAGES | {"embedding_size": 8}, "embedder.embedder.convolution"),
    ("BitModel", STAGES | {"embedding_size": 8, "num_groups": 2}, "embedder.convolution"),
    ("MobileNetV1Model", {"depth_multiplier": 0.25}, "conv_stem.convolution"),
    ("MobileNetV2Model", {"depth_multiplier": 0.25}, "conv_stem.first_conv.convolution"),
    ("SegformerModel", SEGFORMER, "stages.0.patch_embeddings.proj"),
    ("CLIPVisionModel", VIT, "embeddings.patch_embedding"),
    ("SiglipVisionModel", VIT, "embeddings.patch_embedding"),
]


def on_meta(name, **keywords):
    timm = pytest.importorskip("timm")
    with meta():
        return timm.create_model(name, **keywords).eval()


class CalledError(Exception):
    """The name of a layer, and its input."""


def first_called(model, *args, **keywords):
    """The layer with parameters that a forward pass calls first, and its input."""

    def stop(name):
        def hook(module, inputs):
            raise CalledError(name, inputs[0])

        return hook

    leaves = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
        or (list(module.parameters(recurse=False)) and not list(module.children()))
    ]
    hooks = [module.register_forward_pre_hook(stop(name)) for name, module in leaves]
    with pytest.raises(CalledError) as called:
        model(*args, **keywords)
    for hook in hooks:
        hook.remove()
    return called.value.args


def photographs(batch, size):
    """Standardised images whose neighbouring pixels correlate."""
    coarse = torch.randn(batch, 3, size // 4, size // 4)
    images = F.interpolate(coarse, (size, size), mode="bilinear") + 0.3 * torch.randn(
        batch, 3, size, size
    )
    return (images - images.mean()) / images.std()


def effective(stem):
    """A float64 leaf with the values of the weight, and the weight that reaches the convolution."""
    leaf = stem.weight.detach().double().requires_grad_()
    if "Std" not in type(stem).__name__ and "Standard" not in type(stem).__name__:
        return leaf, leaf
    flat = leaf.flatten(1)
    variance = flat.var(1, keepdim=True, unbiased=False)
    weight = (flat - flat.mean(1, keepdim=True)) * (variance + stem.eps).rsqrt()
    if hasattr(stem, "gain"):
        weight = weight * stem.gain.detach().double().flatten(1) * stem.scale
    return leaf, weight.reshape_as(leaf)


def padded(stem, images):
    """The images as they reach the convolution."""
    if "Same" in type(stem).__name__:
        from timm.layers.padding import pad_same

        return pad_same(images, stem.kernel_size, stem.stride, stem.dilation)
    return images


def learn(model, stem, run):
    """Runs forward and backward; returns the outputs, the stem's input and its `dZ`."""
    captured = {}

    def keep(module, inputs, output):
        captured.update(input=inputs[0].detach())
        output.register_hook(lambda dZ: captured.update(dZ=dZ))

    hook = stem.register_forward_hook(keep)
    outputs = run(model)
    hook.remove()
    torch.manual_seed(1)
    (outputs * torch.randn_like(outputs)).sum().backward()
    return outputs.detach(), captured["input"], captured["dZ"]


def check_stem(model, name, run):
    """With TrAct, outputs, parameters and keys stay, and the stem gets the oracle's gradient."""
    model.eval()
    before, keys = run(model).detach(), list(model.state_dict())
    parameters = list(model.parameters())
    apply_tract(model, LAMBDA)
    stem = model.get_submodule(name).train()
    after, images, dZ = learn(model, stem, run)
    assert torch.equal(after, before)
    assert list(model.state_dict()) == keys
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))

    leaf, weight = effective(stem)
    if isinstance(stem, nn.Linear):
        rows = images.flatten(0, -2), dZ.flatten(0, -2)
        solved, plain, damped = (part[None] for part in reference.tract_gradient(*rows, LAMBDA))
    else:
        solved, plain, damped = reference.conv_gradient(stem, padded(stem, images), dZ, LAMBDA)
    gradient = stem.weight.grad.double()
    if weight is leaf:
        residual = gradient.reshape(solved.shape) @ damped - plain
        assert residual.norm() <= 1e-5 * plain.norm()
    else:
        weight.backward(solved.reshape(weight.shape))
        assert (gradient - leaf.grad).norm() <= 1e-5 * leaf.grad.norm()


@pytest.mark.parametrize("name", TIMM)
def test_the_stem_of_a_timm_family_is_the_layer_that_sees_the_pixels(name):
    model = on_meta(name)
    assert find_stem(model) == TIMM[name]
    images = torch.empty(1, *model.pretrained_cfg["input_size"], device="meta")
    with meta():
        called, input = first_called(model, images)
    assert called == TIMM[name] and input.numel() >= images.numel()
    assert isinstance(apply_tract(model).get_submodule(TIMM[name]), TrActLayer)
    del model.pretrained_cfg  # the order of the modules leads to the same layer
    assert find_stem(model) == TIMM[name]


@pytest.mark.parametrize("name", SEVERAL)
def test_several_layers_that_see_the_pixels_are_all_named(name):
    model = on_meta(name)
    with pytest.raises(TrActError) as error:
        apply_tract(model)
    assert "2 layers of" in str(error.value)
    assert all(f"'{stem}'" in str(error.value) for stem in SEVERAL[name])
    for stem in SEVERAL[name]:
        apply_tract(model, stem=stem)
        assert type(model.get_submodule(stem)) is TrActConv2d


def test_a_timm_model_that_declares_no_first_layer_is_refused():
    with pytest.raises(TrActError, match=r"no single layer of CSATv2.*stem="):
        find_stem(on_meta("csatv2"))


@pytest.mark.parametrize(
    ("name", "stem"),
    [
        ("nfnet_l0", "stem_conv1"),
        ("resnet18", "conv1"),
        ("tf_efficientnet_b0", "conv_stem"),
        ("vgg11", "features_0"),
        ("vit_tiny_patch16_224", "model.patch_embed.proj"),
    ],
)
def test_the_stem_inside_a_timm_feature_extractor(name, stem):
    assert find_stem(on_meta(name, features_only=True)) == stem


def test_several_stems_inside_a_timm_feature_extractor():
    with pytest.raises(
        TrActError, match=r"'stem_0\.conv_kxk\.0\.conv', 'stem_0\.conv_scale\.conv'"
    ):
        find_stem(on_meta("fastvit_t8", features_only=True))


def test_the_declaration_of_a_timm_model_counts_within_it_and_not_beyond():
    model = on_meta("resnet18")
    assert find_stem(nn.Sequential(nn.Identity(), model)) == "1.conv1"
    with meta():
        assert find_stem(nn.Sequential(nn.Conv2d(3, 3, 1), model)) == "0"


class Declared(nn.Module):
    """Registers its head first, but declares which layer comes first."""

    def __init__(self, first_conv):
        super().__init__()
        self.head, self.stem = nn.Linear(4, 2), nn.Conv2d(3, 4, 3)
        self.pretrained_cfg = {"first_conv": first_conv}


@pytest.mark.parametrize(
    ("first_conv", "stem"),
    [("stem", "stem"), (("stem",), "stem"), (None, "head"), ("gone", "head")],
)
def test_a_declared_layer_takes_precedence_over_the_order_of_modules(first_conv, stem):
    assert find_stem(Declared(first_conv)) == stem


def test_a_parametrized_convolution_is_not_passed_over():
    stem = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    model = nn.Sequential(stem, nn.Conv2d(4, 4, 3))
    assert find_stem(model) == "0"
    with pytest.raises(TrActError, match=r"'0' is a .*ParametrizedConv2d"):
        apply_tract(model)


@pytest.mark.parametrize(("name", "keywords", "size"), SMALL, ids=[name for name, *_ in SMALL])
def test_a_timm_model_keeps_its_outputs_and_learns_as_the_oracle(name, keywords, size):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model, images = timm.create_model(name, **keywords), photographs(3, size)
    check_stem(model, find_stem(model), lambda model: model(images))


@pytest.mark.parametrize(
    ("name", "keywords", "stem"), HUGGING_FACE, ids=[case[0] for case in HUGGING_FACE]
)
def test_a_hugging_face_model_keeps_its_outputs_and_learns_as_the_oracle(name, keywords, stem):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model_class = getattr(transformers, name)
    model = model_class(model_class.config_class(**keywords)).eval()
    images = photographs(2, 32)
    called, input = first_called(model, pixel_values=images)
    assert find_stem(model) == called == stem
    assert input.shape[-1] >= 32
    check_stem(model, stem, lambda model: model(pixel_values=images)[0])


def test_the_backbone_inside_a_hugging_face_detector():
    transformers = pytest.importorskip("transformers")
    backbone = transformers.ResNetConfig(**STAGES, embedding_size=8, out_features=["stage4"])
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
    )
    with meta():
        model = transformers.DetrForObjectDetection(config)
    assert find_stem(model).endswith("model.embedder.embedder.convolution")


def test_a_text_tower_is_refused_and_the_convolution_is_named():
    transformers = pytest.importorskip("transformers")
    with meta():
        model = transformers.CLIPModel(transformers.CLIPConfig())
    with pytest.raises(TrActError, match=r"Embedding.*'vision_model\.embeddings\.patch_embedding'"):
        find_stem(model)

"""What the tests of detectron2's models share: configs, batches, and the stem looked at closely."""

from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg
from torch import nn

from tests import reference
from tract_det import find_stem
from tract_det.d2 import add_tract_config

CONFIGS = Path(detectron2.__file__).parent / "model_zoo" / "configs"  # as an installation has them


def tract_cfg(file=None, *pairs):
    """detectron2's cfg with TrAct on and nothing frozen, on the CPU."""
    cfg = get_cfg()
    add_tract_config(cfg)
    if file is not None:
        cfg.merge_from_file(str(file), allow_unsafe=True)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TRACT.ENABLED = "cpu", 0, True
    cfg.merge_from_list(list(pairs))
    return cfg


def pixels(generator, *sizes):
    """detectron2's batched inputs: images in [0, 255] whose neighbouring pixels correlate."""
    made = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator) * 255
        image = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        noise = 8 * torch.randn(3, height, width, generator=generator)
        made.append({"image": (image + noise).clamp(0, 255).round().to(torch.uint8)})
    return made


def watched(layer):
    """Collects the input and the output gradient of a TrAct layer's convolution."""
    seen = {}

    def keep(images, output):
        seen["images"] = images.detach()
        output.register_hook(lambda dZ: seen.update(dZ=dZ))
        return output

    if hasattr(layer, "convolve"):  # the convolution inside a layer
        inner = layer.convolve
        layer.convolve = lambda size, x, *args, **kw: keep(x, inner(size, x, *args, **kw))
    else:
        layer.register_forward_hook(lambda _, args, output: keep(args[0], output))
    return seen


def error_of_stem(model, images):
    """Relative error of the stem's gradient against the slow one in float64, after a backward."""
    layer = model.get_submodule(find_stem(model))
    seen = watched(layer)
    layer.weight.grad = None
    features = model(images)
    values = features.values() if isinstance(features, dict) else [features]
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator)).mean() for f in values).backward()
    wanted, *_ = reference.conv_gradient(layer, seen["images"], seen["dZ"], layer.lambda_)
    got = layer.weight.grad.double().reshape(wanted.shape)
    return float((got - wanted).norm() / wanted.norm())

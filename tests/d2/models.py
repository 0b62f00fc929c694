"""Helpers for tests of detectron2's models: configs, batches, the error of the stem's gradient."""

from pathlib import Path

import detectron2
import torch
from detectron2.config import get_cfg
from torch import nn

from tests import reference
from tract_det import find_stem
from tract_det.d2 import add_tract_config

CONFIGS = (
    Path(detectron2.__file__).parent / "model_zoo" / "configs"
)  # where an installation has them


def tract_cfg(file=None, *pairs):
    """detectron2's cfg with TrAct enabled and nothing frozen, on the CPU."""
    cfg = get_cfg()
    add_tract_config(cfg)
    if file is not None:
        cfg.merge_from_file(str(file), allow_unsafe=True)
    cfg.MODEL.DEVICE, cfg.MODEL.BACKBONE.FREEZE_AT, cfg.MODEL.TRACT.ENABLED = "cpu", 0, True
    cfg.merge_from_list(list(pairs))
    return cfg


def pixels(generator, *sizes):
    """detectron2's batched inputs: images in [0, 255] whose neighbouring pixels correlate."""
    batch = []
    for height, width in sizes:
        coarse = torch.rand(1, 3, height // 8 + 2, width // 8 + 2, generator=generator) * 255
        image = nn.functional.interpolate(coarse, size=(height, width), mode="bilinear")[0]
        noise = 8 * torch.randn(3, height, width, generator=generator)
        batch.append({"image": (image + noise).clamp(0, 255).round().to(torch.uint8)})
    return batch


def watched(layer):
    """A dict that receives the input and the output gradient of a TrAct layer's convolution."""
    record = {}

    def keep(images, output):
        record["images"] = images.detach()
        output.register_hook(lambda dZ: record.update(dZ=dZ))
        return output

    if hasattr(layer, "convolve"):  # the convolution inside a layer
        convolve = layer.convolve
        layer.convolve = lambda size, x, *args, **kw: keep(x, convolve(size, x, *args, **kw))
    else:
        layer.register_forward_hook(lambda _, args, output: keep(args[0], output))
    return record


def error_of_stem(model, images):
    """Relative error of the stem's gradient against the slow float64 reference."""
    layer = model.get_submodule(find_stem(model))
    record = watched(layer)
    layer.weight.grad = None
    features = model(images)
    values = features.values() if isinstance(features, dict) else [features]
    generator = torch.Generator().manual_seed(1)
    sum((f * torch.randn(f.shape, generator=generator)).mean() for f in values).backward()
    expected, *_ = reference.conv_gradient(layer, record["images"], record["dZ"], layer.lambda_)
    gradient = layer.weight.grad.double().reshape(expected.shape)
    return float((gradient - expected).norm() / expected.norm())

r"""Converts weights between the forms of torchvision, timm and detectron2.

    tract-det convert output/model_final.pth R-50.pkl
    tract-det convert output/model_final.pth R-50-bgr.pkl --format BGR
    tract-det convert R-50.pkl resnet50.pth
    tract-det convert vgg16.pth vgg16.safetensors --to timm
    tract-det convert resnet50.pth R-50.pkl \
        --pixel-mean 123.675 116.28 103.53 --pixel-std 58.395 57.12 57.375

IN is a file in one of these forms, a file of `tract-det pretrain`, or a name of torchvision's
weights such as ResNet50_Weights.IMAGENET1K_V2. ResNets and VGGs exist in every form, other models
only in that of their own library; a whole Faster R-CNN on them goes to detectron2 (.pkl) and back
(.pth). Every tensor keeps its bits, and the pixel statistics travel in the file. A detectron2
config has to agree with its file: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT and
MODEL.RESNETS.STRIDE_IN_1X1. detectron2's VGGs are those of `tract_det.d2`. In a checkout,
`tools/convert_weights.py` is the same program.
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from tract_det.errors import UserError
from tract_det.modeling.choices import CHANNELS, FORMS

if TYPE_CHECKING:
    from tract_det.modeling.weight_files import Weights

_SUFFIXES = {".pth": "torchvision", ".safetensors": "timm", ".pkl": "detectron2"}


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("input", metavar="IN", help="file, or name of torchvision's weights")
    parser.add_argument("output", metavar="OUT", type=Path, help="file: .pth, .safetensors or .pkl")
    parser.add_argument("--to", choices=FORMS, help="form of OUT (default: by its suffix)")
    parser.add_argument("--format", choices=CHANNELS, help="channels that a .pkl takes (RGB)")
    known = parser.add_argument_group("what IN does not say itself")
    known.add_argument(
        "--input-format", choices=CHANNELS, default="", help="channels of a detectron2 file"
    )
    known.add_argument(
        "--stride-in-3x3",
        action="store_true",
        help="the bottlenecks of a detectron2 file have their stride in the 3x3 convolution",
    )
    for name in ("mean", "std"):
        known.add_argument(
            f"--pixel-{name}", type=float, nargs=3, metavar=("R", "G", "B"), help="in [0, 255]"
        )
    args = parser.parse_args(argv)
    natural = _SUFFIXES.get(args.output.suffix)
    if natural is None:
        parser.error(f"OUT {args.output}: its name must end in {', '.join(_SUFFIXES)}")
    args.to = args.to or natural
    if args.to != natural and (args.to, args.output.suffix) != ("timm", ".pth"):
        parser.error(f"--to {args.to} does not go into {args.output.suffix}")
    if args.format and args.to != "detectron2":
        parser.error(f"--format goes with detectron2: {args.to}'s models take RGB")
    if bool(args.pixel_mean) != bool(args.pixel_std):
        parser.error("--pixel-mean and --pixel-std go together")
    return args


def _add_statistics(weights: "Weights", mean: list[float] | None, std: list[float] | None) -> None:
    """Completes the weights' pixel statistics by those of the command line, in place."""
    if "pixel_mean" in weights.meta:
        if mean:
            raise UserError(
                f"IN {weights.source} says itself that its pixel mean is "
                f"{weights.meta['pixel_mean']}: leave --pixel-mean and --pixel-std out"
            )
    elif not mean or not std:
        raise UserError(
            f"IN {weights.source} does not say which pixel statistics it was trained with: give "
            "--pixel-mean and --pixel-std (RGB in [0, 255])"
        )
    else:
        weights.meta.update(pixel_mean=mean, pixel_std=std)


def _in_torchvisions_form(weights: "Weights", args: argparse.Namespace) -> "Weights":
    """The weights with torchvision's names, if they are those of a detectron2 detector in a .pth.

    Raises:
        UserError: they are another detector's, or OUT cannot hold a detector.
    """
    from tract_det.modeling.detector_forms import is_detectron2_detector
    from tract_det.modeling.detectron2_files import as_torchvision

    if weights.is_detector and args.to == "timm":
        raise UserError(f"IN {args.input} is a whole detector, which timm does not have")
    if not is_detectron2_detector(weights.state):
        return weights
    options = {"channels": args.input_format, "stride_in_3x3": args.stride_in_3x3}
    state, meta = as_torchvision(weights.state, weights.meta, f"IN {args.input}", **options)
    return replace(weights, state=state, meta=meta)


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Reads, converts, writes.

    Raises:
        UserError: for anything wrong with the files.
    """
    args = _parse(parser, argv)
    from tract_det.modeling.weight_files import read_weights, write_weights

    weights = read_weights(
        args.input, key="IN", channels=args.input_format, stride_in_3x3=args.stride_in_3x3
    )
    weights = _in_torchvisions_form(weights, args)
    _add_statistics(weights, args.pixel_mean, args.pixel_std)
    channels = args.format or "RGB"
    names = write_weights(
        args.output,
        weights.state,
        weights.meta,
        args.to,
        channels=channels,
        source=f"IN {args.input}",
    )
    print(
        f"wrote {args.output}: {len(names)} tensors in {args.to}'s form, {channels}, pixel "
        f"mean {weights.meta['pixel_mean']}, std {weights.meta['pixel_std']} (RGB)"
    )
    if missing := len(weights.state) - len(names):
        print(f"left out: {missing} tensors of IN's classifier, which are NaN")

r"""Converts a classifier's weights between the forms of torchvision, timm and detectron2.

    python tools/convert_weights.py output/model_final.pth R-50.pkl
    python tools/convert_weights.py output/model_final.pth R-50-bgr.pkl --format BGR
    python tools/convert_weights.py R-50.pkl resnet50.pth
    python tools/convert_weights.py vgg16.pth vgg16.safetensors --to timm
    python tools/convert_weights.py resnet50.pth R-50.pkl \
        --pixel-mean 123.675 116.28 103.53 --pixel-std 58.395 57.12 57.375

IN is a file of one of these forms, of `tools/pretrain_net.py`, or one of torchvision's names, such
as ResNet50_Weights.IMAGENET1K_V2. ResNets and VGGs have all forms, other models that of the library
that they come from. Every tensor keeps its bits, and the pixel statistics travel in the file.
detectron2's config is to say what its file does: MODEL.PIXEL_MEAN, MODEL.PIXEL_STD, INPUT.FORMAT
and MODEL.RESNETS.STRIDE_IN_1X1. detectron2's VGGs are those of `tract_det.d2`.
"""

import argparse
from pathlib import Path

from tract_det.errors import UserError
from tract_det.modeling.choices import CHANNELS, FORMS
from tract_det.modeling.weight_files import Weights, read_weights, write_weights

_SUFFIXES = {".pth": "torchvision", ".safetensors": "timm", ".pkl": "detectron2"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line; contradictions end the process as argparse's own errors do."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="IN", help="file, or name of torchvision's")
    parser.add_argument("output", metavar="OUT", type=Path, help="file: .pth, .safetensors or .pkl")
    parser.add_argument("--to", choices=FORMS, help="form of OUT (default: by its suffix)")
    parser.add_argument("--format", choices=CHANNELS, help="channels of a .pkl OUT (default: RGB)")
    known = parser.add_argument_group("what IN is, where its file does not say")
    known.add_argument("--input-format", choices=CHANNELS, default="", help="channels of a .pkl")
    known.add_argument(
        "--stride-in-3x3", action="store_true", help="the bottlenecks of a .pkl stride there"
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


def add_statistics(weights: Weights, mean: list[float] | None, std: list[float] | None) -> None:
    """Completes the weights' own pixel statistics by those of the command line, in place."""
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


def main(argv: list[str] | None = None) -> None:
    """Reads, converts, writes.

    Raises:
        UserError: for anything wrong with the files.
    """
    args = parse_args(argv)
    weights = read_weights(
        args.input, key="IN", channels=args.input_format, stride_in_3x3=args.stride_in_3x3
    )
    if weights.is_detector:
        raise UserError(f"IN {args.input} is a whole detector: only classifiers are converted")
    add_statistics(weights, args.pixel_mean, args.pixel_std)
    channels = args.format or "RGB"
    written = write_weights(
        args.output,
        weights.state,
        weights.meta,
        args.to,
        channels=channels,
        source=f"IN {args.input}",
    )
    print(
        f"wrote {args.output}: {len(written)} tensors in {args.to}'s form, {channels}, pixel "
        f"mean {weights.meta['pixel_mean']}, std {weights.meta['pixel_std']} (RGB)"
    )
    if left := len(weights.state) - len(written):
        print(f"left out: {left} tensors of IN's classifier, which are NaN")


if __name__ == "__main__":
    from tract_det.cli import run

    run(main)

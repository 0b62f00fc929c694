r"""Writes a model for other runtimes, and compares it there with the model itself.

    tract-det export --weights output/cells/model_final.pth --format onnx --out cells.onnx \
        --images path/to/photographs
    tract-det export --weights W --format torchscript --size 480x640 --out cells.pt
    tract-det export --weights W --format pt2 --out cells.pt2

A detector takes one image, `image`: uint8 (3, H, W), RGB, 0 to 255, as it is, or as many channels
as it was trained on; resizing and standardisation are within. It gives `boxes` (n, 4) float32, xyxy
in pixels of that image, `labels` (n,) int64, from 0, and `scores` (n,) float32. A classifier takes
`images`: uint8 (B, 3, S, S), RGB, 0 to 255, or of as many channels as it was trained on, resized
and cut to its size S, and gives `probabilities` (B, K).

A detector in onnx or pt2 takes images of any size, or of the one that --size gives; in torchscript
of that one alone. pt2 refuses images whose shorter side has, once resized, no more than 64 pixels.
A classifier has a size of its own. The files hold class names, pixel statistics and these words:
onnx in its metadata, the other two in tract_det.json inside. They compute in float32; pt2 and
torchscript are for the CPU, and need torchvision's operators (`import torchvision`) if they detect.

Then the file is run, onnx by ONNX Runtime, on up to --count of --images, or on made ones, and
compared: equal labels, boxes within 0.5 pixels, scores within 0.001. The result is printed and
written to <OUT>.json; the exit code is 1 if it fails. A file that is there already is replaced.
"""

import argparse
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tract_det.errors import UserError
from tract_det.inference.choices import EXPORT_FORMATS

if TYPE_CHECKING:
    from tract_det.inference.models import Classifier, Detector

_SUFFIXES = {"onnx": ".onnx", "pt2": ".pt2"}  # which their readers look at


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("--weights", type=Path, required=True, help="such as model_final.pth")
    parser.add_argument("--format", choices=EXPORT_FORMATS, required=True)
    parser.add_argument("--out", type=Path, required=True, metavar="FILE")
    parser.add_argument(
        "--size", metavar="HxW", help="of all images of a detector, pixels (default: any)"
    )
    parser.add_argument(
        "--images", nargs="+", metavar="INPUT", help="to compare on: images, folders, patterns"
    )
    parser.add_argument(
        "--count", type=int, default=8, help="how many of them (default: %(default)s)"
    )
    parser.add_argument(
        "--config-file",
        type=Path,
        metavar="FILE",
        help="the run's config.yaml, for weights of earlier versions",
    )
    args = parser.parse_args(argv)
    if args.size:
        match = re.fullmatch(r"(\d{2,5})x(\d{2,5})", args.size)
        if not match or min(map(int, match.groups())) < 32:
            parser.error("--size is HEIGHTxWIDTH in pixels, at least 32, such as 480x640")
        args.size = tuple(map(int, match.groups()))
    suffix = _SUFFIXES.get(args.format, args.out.suffix)
    if args.out.suffix != suffix:
        parser.error(f"--out {args.out}: the name of a file in {args.format} ends in {suffix}")
    if args.count < 1:
        parser.error("--count is a number of images, from 1")
    return args


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Exports and compares; returns 1 if the comparison fails.

    Raises:
        UserError: for anything wrong with the weights, the images or the arguments.
    """
    args = _parse(parser, argv)
    paths = _find(args)  # before torch is imported
    from tract_det.files import write_json
    from tract_det.inference import export, parity
    from tract_det.inference.samples import made, sized

    export.check_installed(args.format)
    model = _load(args)
    content = export.of(model, args.format, args.size)
    images = [_read(model, path) for path in paths] or made(3, args.size, model.channels)
    images = [sized(model, image, args.size) for image in images]
    export.write(content, args.format, args.out)
    print(f"wrote {args.out}; {content.metadata['input']}")
    result = parity.of(model, export.reader(args.format, args.out), images)
    report = args.out.with_name(f"{args.out.name}.json")
    facts = {"format": args.format, "weights": str(args.weights), "on": list(map(str, paths))}
    tolerances = {"box_tolerance": parity.PIXELS, "score_tolerance": parity.SCORE}
    verdict = {"passed": result.passed, **vars(result), **tolerances}
    write_json(report, {**facts, "parity": verdict, **content.metadata})
    print(f"{result}; on {'these images' if paths else 'made images'}, see {report}")
    if not result.results:
        print("nothing was detected, so nothing was compared: give --images")
    return 0 if result.passed else 1


def _find(args: argparse.Namespace) -> list[Path]:
    if not args.images:
        return []
    from tract_det.inference.inputs import find_inputs

    inputs = find_inputs(args.images, without=args.out)
    return [file.path for file in inputs if not file.is_video][: args.count]


def _load(args: argparse.Namespace) -> "Detector | Classifier":
    """The model on the CPU, in float32."""
    from tract_det.inference.loading import load_model
    from tract_det.inference.models import Detector

    model = load_model(args.weights, "cpu", config_file=args.config_file)
    is_detector = isinstance(model, Detector)
    model.meta = {**model.meta, "amp": False}
    if "detectron2" in model.meta:
        raise UserError(
            f"--weights {args.weights} is a model of detectron2's: use its own exporter"
        )
    if args.size and not is_detector:
        raise UserError(
            f"--size goes with a detector: {args.weights} is a classifier for "
            f"{model.meta['image_size']} x {model.meta['image_size']} pixels, leave it out"
        )
    if is_detector and args.format == "torchscript" and not args.size:
        raise UserError("--format torchscript has one size of images: give --size HxW")
    return model


def _read(model: "Detector | Classifier", path: Path) -> Any:
    """`(C, H, W)` uint8."""
    from tract_det.data.images import read_upright

    return read_upright(path, model.meta["max_pixels"], model.channels)

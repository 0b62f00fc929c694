r"""Detects objects in images and videos with a detector's weights; nothing else is needed.

    tract-det detect --weights output/cells/model_final.pth photographs --out found
    tract-det detect --weights W a.jpg "b/*.png" clip.mp4 --out found --format images voc
    tract-det detect --weights W cells/JPEGImages --out found --format comp4 --split test
    tract-det evaluate --root cells --split test --detections found/comp4 --ignore-other-images

INPUT is an image, a folder (searched with the folders in it, but for hidden ones), a glob pattern
or a video, and there may be several. --out gets, by --format:

    images   images/<name>.jpg and videos/<name>.mp4 (without sound), with what is detected on them
    voc      voc/<name>.xml, a VOC annotation for each image: to be corrected, or trained on
    coco     coco.json, a COCO result file; category_id is the position of the class, from 1, and
             category_name the class
    comp4    comp4/comp4_det_<split>_<class>.txt, the VOC challenge's files

and always detect.json: every file with its name, size and number of detections. `tract-det
evaluate` reads coco and comp4. A name is that of the file without suffix; where several files share
it, as much more of the path as tells them apart, with % for what a file name cannot have. A video's
frames are <name>.mp4#000001 and so on.

Without --score-threshold, pictures and annotations show detections from a score of 0.5 on, while
coco and comp4 have all that the model gives, as an evaluation needs them.

Files that cannot be read are named together at the end; the others are done, and the exit code is
1. A folder that holds results is refused, unless --overwrite moves them into previous-N there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from tract_det.errors import UserError
from tract_det.inference.choices import FORMATS

_NAMED = 20  # unreadable files in the message; detect.json has all


def _parse(parser: argparse.ArgumentParser, argv: Sequence[str]) -> argparse.Namespace:
    parser.add_argument("inputs", nargs="+", metavar="INPUT", help="image, folder, pattern, video")
    parser.add_argument("--weights", type=Path, required=True, help="such as model_final.pth")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="for the results")
    parser.add_argument(
        "--format",
        nargs="+",
        choices=FORMATS,
        default=["images", "coco"],
        help="what to write (default: images coco)",
    )
    parser.add_argument(
        "--score-threshold", type=float, metavar="S", help="drop detections with a lower score"
    )
    parser.add_argument(
        "--split", default="test", help="in the names of comp4's files (default: %(default)s)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        metavar="N",
        help="images of one forward pass (default: as many as in the model's evaluation)",
    )
    parser.add_argument(
        "--workers", type=int, default=2, help="processes that read images (default: %(default)s)"
    )
    parser.add_argument("--device", help="cuda, cuda:1, cpu (default: a GPU if there is one)")
    parser.add_argument("--overwrite", action="store_true", help="move older results aside")
    parser.add_argument(
        "--config-file",
        type=Path,
        metavar="FILE",
        help="the run's config.yaml, for weights of earlier versions",
    )
    args = parser.parse_args(argv)
    if args.score_threshold is not None and not 0 <= args.score_threshold <= 1:
        parser.error("--score-threshold is a number from 0 to 1")
    if args.batch_size is not None and args.batch_size < 1:
        parser.error("--batch-size is a number of images, from 1")
    if args.workers < 0:
        parser.error("--workers is a number of processes, or 0")
    return args


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> None:
    """Detects, and writes the results.

    Raises:
        UserError: for anything wrong with the inputs, the weights or the folder; and at the end,
            naming the files that could not be read.
    """
    args = _parse(parser, argv)
    from tract_det.inference.inputs import find_inputs

    inputs = find_inputs(args.inputs, without=args.out)  # before torch is imported
    from tract_det.inference.detecting import Settings, detect_files, prepare_folder
    from tract_det.inference.loading import load_detector

    detector = load_detector(args.weights, args.device, config_file=args.config_file)
    prepare_folder(args.out, overwrite=args.overwrite)
    settings = Settings(
        formats=args.format,
        score_threshold=args.score_threshold,
        batch_size=args.batch_size,
        workers=args.workers,
        split=args.split,
    )
    unreadable = detect_files(detector, inputs, args.out, settings)
    print(f"wrote {args.out}: {len(inputs) - len(unreadable)} of {len(inputs)} files")
    if unreadable:
        others = len(unreadable) - _NAMED
        more = f"; and {others} more, see {args.out / 'detect.json'}" if others > 0 else ""
        raise UserError(
            f"{len(unreadable)} of {len(inputs)} files could not be read, the others are done: "
            + "; ".join(unreadable[:_NAMED])
            + more
        )

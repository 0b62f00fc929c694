"""Runs a detector over files, and leaves what it detects in a folder."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from tract_det.data.images import read_upright, shown
from tract_det.data.workers import data_loader
from tract_det.errors import UserError
from tract_det.files import ASIDE, atomically, file_name_part, move_aside, write_json
from tract_det.inference.choices import SHOWN
from tract_det.inference.inputs import Input
from tract_det.inference.models import Detections, Detector
from tract_det.inference.outputs import ResultFiles, draw, write_image, write_voc
from tract_det.inference.video import CorruptVideoError, Frame, import_av, read_frames, write_frames
from tract_det.version import __version__

IMAGES, VIDEOS, VOC, COMP4 = "images", "videos", "voc", "comp4"  # folders of the results
COCO, RECORD = "coco.json", "detect.json"  # files of the results


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What is written.

    Attributes:
        formats: of `choices.FORMATS`.
        score_threshold: detections with a lower score are left out of everything; None = of
            pictures and VOC annotations those below `SHOWN`, of results for an evaluation none.
        batch_size: images of one forward pass; None = as many as in the model's evaluation.
        workers: processes that read images; 0 = this one does.
        split: in the names of the challenge's files.
    """

    formats: Sequence[str]
    score_threshold: float | None = None
    batch_size: int | None = None
    workers: int = 2
    split: str = "test"

    @property
    def shown(self) -> float:
        """The lowest score in pictures and annotations."""
        return SHOWN if self.score_threshold is None else self.score_threshold


def prepare_folder(out: Path, *, overwrite: bool) -> None:
    """Refuses a folder that holds results, or moves them into `previous-N` there.

    Raises:
        UserError: it holds results, and `overwrite` is not set.
    """
    names = (IMAGES, VIDEOS, VOC, COMP4, COCO, RECORD)
    results = [path for name in names if (path := out / name).exists()]
    if results and not overwrite:
        raise UserError(
            f"--out {out} holds results already ({results[0].name}): give another folder, or "
            f"--overwrite to move them into {ASIDE}N there"
        )
    if results:
        move_aside(out, results)


def detect_files(
    detector: Detector, inputs: Sequence[Input], out: Path, settings: Settings
) -> list[str]:
    """Detects in all files, and writes the results of those that can be read.

    Args:
        detector: the model.
        inputs: images and videos.
        out: folder of the results; created if it does not exist.
        settings: what to write.

    Returns:
        For each file that cannot be read, its path and the reason.

    Raises:
        UserError: a result cannot be written, or a video needs PyAV, which is not installed.
    """
    images = [file for file in inputs if not file.is_video]
    videos = [file for file in inputs if file.is_video]
    if videos and detector.channels != 3:
        raise UserError(
            f"{videos[0].path} is a video, of three channels, and the model takes images of "
            f"{detector.channels}: leave it out"
        )
    if videos:
        import_av()  # before anything is detected
    job = _Job(detector, out, settings)
    with tqdm(total=len(inputs), unit="file", disable=not sys.stderr.isatty()) as bar:
        for batch in _batches(images, detector, settings):
            job.detect_images(batch)
            bar.update(len(batch))
        for video in videos:
            job.detect_video(video)
            bar.update()
    job.finish()
    return job.unreadable


class _Job:
    """Detects, and writes what is detected.

    Attributes:
        unreadable: for each file that cannot be read, its path and the reason.
    """

    def __init__(self, detector: Detector, out: Path, settings: Settings) -> None:
        self.detector, self.out, self.settings = detector, out, settings
        self.unreadable: list[str] = []
        self._results = ResultFiles(detector.class_names)
        self._done: list[dict[str, Any]] = []

    def detect_images(self, batch: "_Batch") -> None:
        """Detects in the images of a batch that are some."""
        self.unreadable += [image for _, image in batch if isinstance(image, str)]
        images = [(file, image) for file, image in batch if not isinstance(image, str)]
        for (file, image), detections in zip(
            images, self._detect([image for _, image in images]), strict=True
        ):
            self._keep(file.id, file.path, _size(image), detections)
            if "images" in self.settings.formats:
                confident = detections.above(self.settings.shown)
                write_image(self.out / IMAGES, file.id, draw(shown(image), confident))

    def detect_video(self, file: Input) -> None:
        """Detects in every frame of a video, which is kept whole or not at all."""
        frames: list[tuple[tuple[int, int], Detections]] = []
        annotated = self._annotated(file.path, frames)
        name = file_name_part(file.annotated_video.removesuffix(".mp4"))
        path = self.out / VIDEOS / f"{name}.mp4"
        try:
            if "images" in self.settings.formats:
                atomically(path, lambda temporary: write_frames(temporary, annotated))
            else:
                for _ in annotated:
                    pass
        except CorruptVideoError as error:
            self.unreadable.append(str(error))
            return
        for number, (size, detections) in enumerate(frames, 1):
            self._keep(f"{file.id}#{number:06d}", file.path, size, detections)

    def _annotated(
        self, path: Path, frames: list[tuple[tuple[int, int], Detections]]
    ) -> Iterator[Frame]:
        """The frames with their detections drawn; size and detections are added to `frames`."""
        stream = read_frames(path)
        size = self.settings.batch_size or self.detector.meta["batch_size"]
        is_drawn = "images" in self.settings.formats
        while batch := list(islice(stream, size)):
            for frame, detections in zip(
                batch, self._detect([f.image for f in batch]), strict=True
            ):
                frames.append((_size(frame.image), detections))
                confident = detections.above(self.settings.shown)
                yield frame._replace(image=draw(frame.image, confident)) if is_drawn else frame

    def _detect(self, images: Sequence[Tensor]) -> list[Detections]:
        return self.detector.detect(images, self.settings.score_threshold or 0.0)

    def _keep(
        self, image_id: str, path: Path, size: tuple[int, int], detections: Detections
    ) -> None:
        """Notes the detections of an image or a frame; a VOC annotation is written at once."""
        self._results.add(image_id, detections)
        if "voc" in self.settings.formats:
            confident = detections.above(self.settings.shown)
            write_voc(self.out / VOC, image_id, path, size, confident)
        self._done.append(
            {
                "id": image_id,
                "path": str(path),
                "width": size[0],
                "height": size[1],
                "detections": len(detections),
            }
        )

    def finish(self) -> None:
        """Writes the files that hold all images."""
        settings = self.settings
        if "comp4" in settings.formats:
            self._results.write_challenge(self.out / COMP4, settings.split)
        if "coco" in settings.formats:
            self._results.write_coco(self.out / COCO)
        record = {
            "version": __version__,
            "class_names": self.detector.class_names,
            "score_threshold": settings.score_threshold,
            "images": self._done,
            "unreadable": self.unreadable,
        }
        write_json(self.out / RECORD, record)


def _size(image: Tensor) -> tuple[int, int]:
    """Width and height in pixels."""
    return image.shape[-1], image.shape[-2]


_Batch = list[tuple[Input, Tensor | str]]  # an image, or why it is none


class _Files(Dataset):
    """Images with their files."""

    def __init__(self, files: Sequence[Input], max_pixels: int, channels: int) -> None:
        self.files, self.max_pixels, self.channels = files, max_pixels, channels

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Input, Tensor | str]:
        file = self.files[index]
        try:
            return file, read_upright(file.path, self.max_pixels, self.channels)
        except UserError as error:
            return file, str(error)


def _batches(files: Sequence[Input], detector: Detector, settings: Settings) -> Iterator[_Batch]:
    """The images in batches, read by worker processes."""
    size = settings.batch_size or detector.meta["batch_size"]
    indices = [
        list(range(len(files))[start : start + size]) for start in range(0, len(files), size)
    ]
    workers = min(settings.workers, len(indices) - 1)  # not for one batch
    dataset = _Files(files, detector.meta["max_pixels"], detector.channels)
    return iter(data_loader(dataset, indices, list, max(0, workers), persistent=False))

"""Reads and writes videos through PyAV, which brings FFmpeg's libraries: the extra `video`."""

from collections.abc import Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from tract_det.errors import UserError, shortened
from tract_det.inference.outputs import frame_of

_CODECS = ("libx264", "mpeg4")  # the first that this build of FFmpeg has


class CorruptVideoError(UserError):
    """The file is no video, or a damaged one."""


class Frame(NamedTuple):
    """A frame, upright, and when it is shown.

    Attributes:
        image: `(3, H, W)` uint8 RGB.
        seconds: from the video's start.
    """

    image: Tensor
    seconds: Fraction


def import_av() -> Any:
    """PyAV.

    Raises:
        UserError: it is not installed.
    """
    try:
        import av
    except ModuleNotFoundError as error:
        raise UserError(
            "a video needs PyAV, which is not installed: pip install 'tract-det[video]'"
        ) from error
    return av


def read_frames(path: Path) -> Iterator[Frame]:
    """The frames of a video, one by one, turned as players show them.

    Raises:
        CorruptVideoError: it is no video, or is damaged at the frame that comes next.
    """
    av = import_av()
    count = 0
    stream = _decoded(av, path)
    while True:
        try:
            frame = next(stream, None)
        except (OSError, ValueError, IndexError) as error:  # PyAV's errors are the first two
            reason = shortened(str(error) or type(error).__name__, 200)
            raise CorruptVideoError(
                f"{path}: the video cannot be read behind frame {count} ({reason}): repair it"
            ) from error
        if frame is None and not count:
            raise CorruptVideoError(f"{path}: the video has no frames: give another")
        if frame is None:
            return
        count += 1
        yield frame


def _decoded(av: Any, path: Path) -> Iterator[Frame]:
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        rate = stream.average_rate or Fraction(25)
        for number, frame in enumerate(container.decode(stream)):
            pixels = np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))
            has_time = frame.pts is not None and frame.time_base
            seconds = frame.pts * frame.time_base if has_time else number / rate
            yield Frame(frame_of(pixels), Fraction(seconds))


def write_frames(path: Path, frames: Iterable[Frame]) -> None:
    """Writes frames of one size as an MP4, without sound; an odd side loses its last pixel."""
    av = import_av()
    codec = next(name for name in _CODECS if name in av.codecs_available)
    clock = Fraction(1, 90_000)
    with av.open(str(path), "w", format="mp4") as container:
        stream, last = None, -1
        for image, seconds in frames:
            height, width = (side // 2 * 2 for side in image.shape[-2:])
            if stream is None:
                stream = container.add_stream(codec, rate=30)
                stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
                stream.codec_context.time_base = clock
            pixels = image[:, : stream.height, : stream.width].permute(1, 2, 0).contiguous().numpy()
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            last = max(last + 1, round(seconds / clock))
            frame.pts, frame.time_base = last, clock
            container.mux(stream.encode(frame))
        if stream is not None:
            container.mux(stream.encode())

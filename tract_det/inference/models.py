"""Detectors and classifiers that take images of any origin and give what is in them."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.transforms import v2

from tract_det.data.classification_transforms import classification_test
from tract_det.data.images import read_as_decoded, read_upright
from tract_det.errors import UserError
from tract_det.inference.images import Images, as_list, as_tensor
from tract_det.modeling.detectron2_files import Meta


@dataclass(frozen=True)
class Detections:
    """What is in one image, in order of falling scores. The tensors are on the CPU.

    Attributes:
        boxes: `(n, 4)` float32, xyxy pixel edges of the image as it was given.
        scores: `(n,)` float32 in [0, 1].
        labels: `(n,)` int64, 0..K-1.
        names: the class of each.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    names: list[str]

    def __len__(self) -> int:
        return len(self.names)

    def above(self, threshold: float) -> "Detections":
        """Those with at least this score."""
        kept = self.scores >= threshold
        names = [name for name, is_kept in zip(self.names, kept.tolist(), strict=True) if is_kept]
        return Detections(self.boxes[kept], self.scores[kept], self.labels[kept], names)


@dataclass(frozen=True)
class Classes:
    """What one image shows.

    Attributes:
        probabilities: `(K,)` float32, on the CPU. Of a model that was trained with a sigmoid for
            each class they need not add up to 1.
        class_names: K names.
    """

    probabilities: Tensor
    class_names: Sequence[str]

    def top(self, k: int = 5) -> list[tuple[str, float]]:
        """The most probable classes with their probabilities, at most `k`."""
        values, labels = self.probabilities.topk(min(k, len(self.class_names)))
        names = [self.class_names[label] for label in labels.tolist()]
        return list(zip(names, values.tolist(), strict=True))


class _Model:
    """What detectors and classifiers have in common.

    Attributes:
        network: the model, in evaluation mode.
        meta: what its file says of it.
        channels: C, of the images.
        class_names: K names.
        device: where it computes.
    """

    def __init__(self, network: nn.Module, meta: Meta, device: torch.device) -> None:
        memory_format = torch.channels_last if meta["channels_last"] else torch.preserve_format
        self.network = network.to(device).to(memory_format=memory_format)
        self.meta, self.device, self._memory_format = meta, device, memory_format
        self.channels = len(meta["pixel_mean"])
        self.class_names: tuple[str, ...] = tuple(meta["class_names"])

    def _autocast(self) -> torch.autocast:
        """The precision that the model was evaluated in."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.meta["amp"])


class Detector(_Model):
    """A detector: `detector(images)` gives the detections of each image.

    What comes of a file is, to the last bit, what the evaluation of a training detects in it: in
    the same precision and in batches of the same size, if it is given the same images in order.
    """

    def __call__(
        self, images: Images, *, batch_size: int | None = None, score_threshold: float = 0.0
    ) -> Any:
        """Detects.

        Args:
            images: one, or several of them: paths (files are turned upright by their EXIF
                orientation), Pillow images (taken as they are), uint8 arrays `(H, W, 3)`, or
                tensors `(3, H, W)`, uint8 or float in [0, 1]. All are RGB, or of as many channels
                as the model; sizes may differ.
            batch_size: images of one forward pass; None = as many as in the evaluation. Another
                number changes rounding, and so does the padding to a common size.
            score_threshold: detections with a lower score are dropped, besides those that the model
                drops itself.

        Returns:
            `Detections` of a single image; a list of them of several images.

        Raises:
            UserError: an image cannot be read, or is none.
        """
        several, is_single = as_list(images)
        read = partial(read_upright, max_pixels=self.meta["max_pixels"], channels=self.channels)
        results: list[Detections] = []
        for part in _parts(several, batch_size or self.meta["batch_size"]):
            batch = [as_tensor(image, read, self.channels) for image in part]
            results += self.detect(batch, score_threshold)
        return results[0] if is_single else results

    @torch.inference_mode()
    def detect(self, batch: Sequence[Tensor], score_threshold: float = 0.0) -> list[Detections]:
        """The detections of a batch of tensors `(C, H, W)`, in one forward pass."""
        if not batch:
            return []
        with self._autocast():
            outputs = self.network([image.to(self.device) for image in batch])
        return [self._detections(output, score_threshold) for output in outputs]

    def _detections(self, output: dict[str, Tensor], score_threshold: float) -> Detections:
        boxes, scores, labels = (output[key].cpu() for key in ("boxes", "scores", "labels"))
        labels = labels - 1  # the model counts the background as 0
        names = [self.class_names[label] for label in labels.tolist()]
        detections = Detections(boxes.float(), scores.float(), labels, names)
        return detections.above(score_threshold) if score_threshold > 0 else detections


class Classifier(_Model):
    """A classifier: `classifier(images)` gives the probabilities of the classes for each image."""

    def __init__(self, network: nn.Module, meta: Meta, device: torch.device) -> None:
        super().__init__(network, meta, device)
        transform = classification_test(
            meta["image_size"],
            resize=meta["resize"],
            interpolation=meta["interpolation"],
            mean=meta["pixel_mean"],
            std=meta["pixel_std"],
            standardize=meta["standardize"],
            value_range=meta["value_range"],
        )
        *to_size, self.to_input = transform.transforms
        self.to_size = v2.Compose(to_size)

    def __call__(self, images: Images, *, batch_size: int | None = None) -> Any:
        """Classifies.

        Args:
            images: as for `Detector`; files are taken as they are stored, as in the evaluation.
            batch_size: likewise.

        Returns:
            `Classes` of a single image; a list of them of several images.

        Raises:
            UserError: an image cannot be read, or is none.
        """
        several, is_single = as_list(images)
        results: list[Classes] = []
        for part in _parts(several, batch_size or self.meta["batch_size"]):
            batch = torch.stack([self.pixels(image) for image in part])
            results += [Classes(row, self.class_names) for row in self.probabilities(batch)]
        return results[0] if is_single else results

    def pixels(self, image: Any) -> Tensor:
        """An image resized and cut to `(C, S, S)`, in [0, 255]: uint8, or float if it was."""
        max_pixels = self.meta["max_pixels"]
        read = partial(read_as_decoded, max_pixels=max_pixels, channels=self.channels)
        tensor = as_tensor(image, read, self.channels)
        try:
            return self.to_size(tensor * 255 if tensor.is_floating_point() else tensor)
        except UserError as error:
            raise UserError(f"{error}, or give larger images") from error

    @torch.inference_mode()
    def probabilities(self, batch: Tensor) -> Tensor:
        """`(B, C, S, S)` pixels, as `pixels` gives them, to `(B, K)` on the CPU."""
        inputs = self.to_input(batch).to(self.device, memory_format=self._memory_format)
        with self._autocast():
            logits = self.network(inputs).float()
        return (logits.sigmoid() if self.meta["loss"] == "bce" else logits.softmax(1)).cpu()


def _parts(images: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [images[start : start + size] for start in range(0, len(images), size)]

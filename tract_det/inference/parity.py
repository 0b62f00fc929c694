"""Whether an exported model gives what the model itself gives, on images."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tract_det.inference.export import Run
from tract_det.inference.models import Classifier, Detector

PIXELS, SCORE = 0.5, 1e-3  # the largest differences that pass


@dataclass(frozen=True)
class Parity:
    """The comparison.

    Attributes:
        images: how many were compared.
        results: detections, or images with their most probable class, of the model itself.
        unmatched: of either side without one of the same label in tolerance on the other side.
        box_difference: the largest of a corner, in pixels, among those that match.
        score_difference: the largest of a score or probability, likewise.
    """

    images: int
    results: int
    unmatched: int
    box_difference: float
    score_difference: float

    @property
    def passed(self) -> bool:
        """Whether all have their match."""
        return self.unmatched == 0

    def __str__(self) -> str:
        verdict = "passed" if self.passed else "FAILED"
        return (
            f"parity {verdict}: {self.results} results on {self.images} images, {self.unmatched} "
            f"without match; largest difference of boxes {self.box_difference:.2g} pixels, of "
            f"scores {self.score_difference:.2g}"
        )


def of(model: Detector | Classifier, run: Run, images: Sequence[Tensor]) -> Parity:
    """Compares what an exported file gives with what the model itself gives.

    A detection whose score decides by less than `SCORE` whether the model gives it, by its
    threshold or by the number of detections that it keeps, may be missing on one side. Classes
    whose probabilities are as close may change places.

    Args:
        model: itself.
        run: gives boxes, labels and scores of an image, or the probabilities of a batch.
        images: `(3, H, W)` uint8; for a classifier as `Classifier.pixels` gives them.
    """
    if isinstance(model, Classifier):
        return _of_classifier(model, run, images)
    return _of_detector(model, run, images)


def _of_detector(detector: Detector, run: Run, images: Sequence[Tensor]) -> Parity:
    parts = [_compare(detector, image, run) for image in images]
    return Parity(
        len(parts),
        sum(part.results for part in parts),
        sum(part.unmatched for part in parts),
        max((part.box_difference for part in parts), default=0.0),
        max((part.score_difference for part in parts), default=0.0),
    )


def _compare(detector: Detector, image: Tensor, run: Run) -> Parity:
    reference, (boxes, labels, scores) = detector.detect([image])[0], run(image)
    settings = detector.meta["box_head"]
    edge = settings["score_thresh"]
    for side in (reference.scores, scores):
        if len(side) >= settings["detections_per_image"]:
            edge = max(edge, side.min().item())
    distance = (reference.boxes[:, None] - boxes[None]).abs().amax(2)
    difference = (reference.scores[:, None] - scores[None]).abs()
    is_match = (distance <= PIXELS) & (difference <= SCORE)
    is_match &= reference.labels[:, None] == labels[None]
    largest, taken, unmatched = [0.0, 0.0], torch.zeros(len(scores), dtype=torch.bool), 0
    for row, score in enumerate(reference.scores.tolist()):
        free = is_match[row] & ~taken
        if free.any():
            best = int(torch.where(free, distance[row] + difference[row], torch.inf).argmin())
            taken[best] = True
            pair = (distance[row, best].item(), difference[row, best].item())
            largest = [max(old, new) for old, new in zip(largest, pair, strict=True)]
        elif score > edge + SCORE:
            unmatched += 1
    unmatched += int((~taken & (scores > edge + SCORE)).sum())
    return Parity(1, len(reference), unmatched, *largest)


def _of_classifier(classifier: Classifier, run: Run, images: Sequence[Tensor]) -> Parity:
    reference = torch.cat([classifier.probabilities(image[None]) for image in images])
    other = torch.cat([run(image[None])[0] for image in images])
    difference = (reference - other).abs().amax(1)
    own_top, other_top = reference.argmax(1), other.argmax(1)
    rows = torch.arange(len(reference))
    is_clear = reference[rows, own_top] - reference[rows, other_top] > SCORE
    wrong = (difference > SCORE) | ((own_top != other_top) & is_clear)
    return Parity(len(reference), len(reference), int(wrong.sum()), 0.0, difference.max().item())

"""Average precision of samples of a split in which each image counts any number of times.

Resampling images with replacement gives each of them a weight: the number of times it was drawn.
An image drawn twice counts twice, as if the split had it twice; nothing is matched again.

Only true positives raise the recall, and the precision envelope at one of them is the highest
precision at it or at a later one. So the curve is computed there alone, from the weight of the
detections that go before. That differs little between IoU thresholds: it is summed for the first,
and corrected for the others by what they ignore or count beyond it.

Shapes: B samples, I images, T IoU thresholds, D detections of a class; M of them are true positives
at any threshold or corrections, S are true positives at one threshold.
"""

import numpy as np

from tract_det.evaluation.ranking import Ranking

# Numbers of an intermediate array, at most: few samples at a time stay in a processor's cache.
_CACHED = 1 << 19


def weighted_ap(
    ranking: Ranking, recalls: np.ndarray, weights: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """AP of a class in each sample.

    Args:
        ranking: the class's detections.
        recalls: (R,) float, evenly spaced from 0 to 1, up to rounding.
        weights: (B, I) int, how often each image counts; None = each once, in one sample.

    Returns:
        The mean of the interpolated precision at `recalls`, and the area under the envelope: (B, T)
        float each, in 0..1; NaN for a sample without objects of the class.
    """
    if weights is None:
        num_images = 1 + max(ranking.image.max(initial=0), ranking.object_image.max(initial=0))
        weights = np.ones((1, num_images), dtype=np.int32)
    shape = len(weights), len(ranking.true_positive)
    interpolated, area = np.full(shape, np.nan), np.full(shape, np.nan)
    num_objects = _count_objects(ranking.object_image, weights)
    sampled = np.flatnonzero(num_objects)  # the samples that have objects
    curves = _Curves(ranking)
    step = max(1, _CACHED // max(1, curves.longest))
    for start in range(0, len(sampled), step):
        block = sampled[start : start + step]
        interpolated[block], area[block] = curves.ap(recalls, weights[block], num_objects[block])
    return interpolated, area


def _count_objects(object_image: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Number of objects in each sample, (B,) int."""
    step = max(1, _CACHED // max(1, len(object_image)))
    blocks = [weights[start : start + step] for start in range(0, len(weights), step)]
    counts = [block.take(object_image, axis=1).sum(axis=1) for block in blocks]
    return np.concatenate([np.empty(0, dtype=np.int64), *counts])


class _Curves:
    """What of a ranking does not depend on the weights."""

    def __init__(self, ranking: Ranking) -> None:
        is_true = ranking.true_positive
        counted = is_true | ranking.false_positive  # (T, D)
        base = counted[0]
        key = np.flatnonzero(is_true.any(axis=0) | (counted != base).any(axis=0))  # (M,)
        last = key[-1] + 1 if len(key) else 0  # what comes later changes no curve
        self.key_image = ranking.image[key]
        self.base_image = ranking.image[:last][base[:last]]
        self.base_before = np.cumsum(base[:last])[key]  # (M,), up to and including each
        self.true = [np.flatnonzero(row[key]) for row in is_true]  # (S,) positions in `key` each
        sign = counted[:, key].astype(np.int8) - base[key]  # (T, M), 1, 0 or -1
        self.corrections = [np.flatnonzero(row) for row in sign]
        self.signs = [row[at] for row, at in zip(sign, self.corrections, strict=True)]

    @property
    def longest(self) -> int:
        """The greatest number of detections that are summed."""
        return len(self.base_image)

    def ap(
        self, recalls: np.ndarray, weights: np.ndarray, num_objects: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """See `weighted_ap`; all samples have objects."""
        interpolated, area = np.zeros((2, len(weights), len(self.true)))
        # `take` is several times faster than an index of the second axis.
        base = _running_sum(weights.take(self.base_image, axis=1)).take(self.base_before, axis=1)
        key = weights.take(self.key_image, axis=1)  # (B, M), as the above
        for threshold, true in enumerate(self.true):
            if not len(true):
                continue
            weight = key.take(true, axis=1)  # (B, S)
            counted = base.take(true, axis=1)
            at = self.corrections[threshold]
            if len(at):
                correction = _running_sum(key.take(at, axis=1) * self.signs[threshold])
                counted += correction.take(np.searchsorted(at, true, side="right"), axis=1)
            true_positives = np.cumsum(weight, axis=1, dtype=np.int32)
            precision = true_positives / np.maximum(counted, 1)
            envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            area[:, threshold] = np.einsum("bs,bs->b", weight, envelope) / num_objects
            reached = _reached(true_positives / num_objects[:, None], recalls)
            reached[:, 1:] -= reached[:, :-1].copy()
            interpolated[:, threshold] = np.einsum("bs,bs->b", reached, envelope) / len(recalls)
        return interpolated, area


def _running_sum(weights: np.ndarray) -> np.ndarray:
    """(B, n) to (B, n + 1): the sums of the first 0, 1, ..., n."""
    total = np.zeros((len(weights), weights.shape[1] + 1), dtype=np.int32)
    np.cumsum(weights, axis=1, out=total[:, 1:])
    return total


def _reached(recall: np.ndarray, recalls: np.ndarray) -> np.ndarray:
    """How many of the (R,) recalls each recall reaches. (B, S) float in 0..1 -> (B, S) int."""
    # The recalls are evenly spaced up to rounding: all before the nearest one below are reached.
    nearest = (recall * (len(recalls) - 1) + 1e-6).astype(np.int32)
    return nearest + (recall >= recalls.take(nearest))

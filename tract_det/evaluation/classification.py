"""Top-1 and top-5 accuracy over all ranks, from integer counts of images, and the mistakes."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tract_det.distributed import gather
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.bootstrap import Means, draws
from tract_det.evaluation.metrics import DIVERGED_MEND, TOP_K
from tract_det.evaluation.wilson import LEVEL, wilson_interval

_MOST_CELLS = 25  # classes of a confusion matrix that is kept whole


class TopK:
    """Counts the images of a split whose class is among the k highest scores, for k in `TOP_K`.

    Of two classes with equal scores the one that comes first in the class list ranks higher, so
    that the counts do not depend on a sorting algorithm.

    Args:
        images: number of images in the split.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.evaluated = 0
        self.skipped = 0  # this rank's images that could not be read
        self.correct = dict.fromkeys(TOP_K, 0)
        self._ranks: dict[str, int] = {}  # 0 = the class of the image has the highest score

    def add(self, logits: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Adds a batch. Each image of the split must be added exactly once, on any rank.

        Args:
            logits: `(B, num_classes)`.
            labels: `(B,)`, 0..num_classes-1.
            ids: names of the images, for error messages and `by_image`.

        Raises:
            DivergedError: a logit is not finite.
        """
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0])
            name = f" of {ids[first]}" if ids else ""
            raise DivergedError(f"a score{name} is not finite: {DIVERGED_MEND}")
        score = logits.gather(1, labels[:, None])
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        rank = ((logits > score) | ((logits == score) & before)).sum(dim=1)  # 0 = highest
        self.evaluated += len(labels)
        for k in TOP_K:
            self.correct[k] += int((rank < k).sum())
        self._ranks.update(zip(ids, rank.tolist(), strict=False))

    def by_image(self) -> tuple[list[str], np.ndarray]:
        """Which images are right. Every rank must call it.

        Returns:
            The I names, sorted, and (I, `len(TOP_K)`) bool: whether the class is among the k
            highest scores.
        """
        ranks = sorted(entry for of_rank in gather(self._ranks) for entry in of_rank.items())
        positions = np.array([rank for _, rank in ranks]).reshape(-1, 1)
        return [name for name, _ in ranks], positions < np.array(TOP_K)

    def evaluate(self) -> dict[str, Any]:
        """Sums the counts of all ranks. Every rank must call it.

        Returns:
            On every rank `images` (the number evaluated), `top1` and `top5` in per cent, both as
            counts under `correct` and with 95 % intervals under `intervals`, and, if any image was
            skipped, their number as `skipped`.

        Raises:
            UserError: the ranks together did not account for each image of the split, or evaluated
                none.
        """
        ranks = gather((self.evaluated, self.skipped, self.correct))
        counts, skips, corrects = zip(*ranks, strict=True)
        evaluated, num_skipped = sum(counts), sum(skips)
        if evaluated + num_skipped != self.images or not evaluated:
            raise UserError(
                f"{evaluated} images were evaluated and {num_skipped} skipped, the split has "
                f"{self.images}: give each image to exactly one rank"
            )
        correct = {f"top{k}": sum(rank_correct[k] for rank_correct in corrects) for k in TOP_K}
        percent = {name: 100 * count / evaluated for name, count in correct.items()}
        intervals = {name: _interval(count, evaluated) for name, count in correct.items()}
        results = {
            "images": evaluated,
            **percent,
            "correct": correct,
            "intervals": {"level": LEVEL, **intervals},
        }
        return results | ({"skipped": num_skipped} if num_skipped else {})


def sampled_accuracies(correct: np.ndarray, bootstrap: int) -> Means:
    """The accuracies over so many samples of the images; see `bootstrap.draws`.

    Args:
        correct: (I, `len(TOP_K)`) bool, see `TopK.by_image`.
        bootstrap: number of samples.

    Returns:
        `top1` and `top5` in per cent, (bootstrap,) float each; {} for 0 samples.
    """
    if not bootstrap:
        return {}
    values = 100 * correct.astype(float) / len(correct)
    sampled = np.array([counts @ values for counts in draws(len(correct), bootstrap)])
    return {f"top{k}": sampled[:, column] for column, k in enumerate(TOP_K)}


def _interval(count: int, images: int) -> tuple[float, float]:
    """The 95 % interval of an accuracy, in per cent."""
    low, high = wilson_interval(count, images)
    return 100 * low, 100 * high


class Mistakes:
    """Collects what a report shows of a classifier's classes and mistakes, over all ranks.

    Args:
        class_names: the K names that labels index.
        images: how many of the worst images are kept.
    """

    def __init__(self, class_names: Sequence[str], images: int = 12) -> None:
        self.class_names, self.images = list(class_names), images
        self._pairs: Counter[tuple[int, int]] = Counter()
        self._worst: list[tuple[float, str, int, int, float]] = []

    def add(self, logits: Tensor, labels: Tensor, ids: Sequence[str]) -> None:
        """Adds a batch.

        Args:
            logits: `(B, K)`.
            labels: `(B,)`.
            ids: names of the images.
        """
        scores = logits.float().softmax(dim=1)
        predicted = logits.argmax(dim=1)  # as `TopK` ranks them: scores may have been rounded
        losses = -scores.gather(1, labels[:, None])[:, 0].clamp_min(1e-30).log()
        self._pairs.update(zip(labels.tolist(), predicted.tolist(), strict=True))
        wrong = (predicted != labels).nonzero()[:, 0].tolist()
        for i in wrong:
            label, guess = int(labels[i]), int(predicted[i])
            self._worst.append((float(losses[i]), ids[i], label, guess, float(scores[i, guess])))
        self._worst = self._highest(self._worst)

    def _highest(
        self, mistakes: list[tuple[float, str, int, int, float]]
    ) -> list[tuple[float, str, int, int, float]]:
        """Those with the highest loss; of equal losses the first by name."""
        return sorted(mistakes, key=lambda mistake: (-mistake[0], mistake[1]))[: self.images]

    def by_class(self) -> dict[str, dict[str, Any]]:
        """The accuracy of each class. Every rank must call it.

        Returns:
            By name the number of its `images` and, if there are any, `top1` with its 95 %
            `interval`, in per cent.
        """
        images, correct = Counter[int](), Counter[int]()
        for (label, guess), count in self._pairs.items():
            images[label] += count
            correct[label] += count * (label == guess)
        ranks = gather((images, correct))
        images = sum((rank_images for rank_images, _ in ranks), Counter[int]())
        correct = sum((rank_correct for _, rank_correct in ranks), Counter[int]())
        classes: dict[str, dict[str, Any]] = {}
        for label, name in enumerate(self.class_names):
            classes[name] = {"images": images[label]}
            if images[label]:
                accuracy = 100 * correct[label] / images[label]
                interval = _interval(correct[label], images[label])
                classes[name] |= {"top1": accuracy, "interval": interval}
        return classes

    def figures(self) -> dict[str, Any]:
        """What the mistakes are. Every rank must call it.

        Returns:
            `confused`, the pairs of classes that are confused most (`true`, `predicted`, `count`);
            `confusion` with `classes` and the `matrix` of counts, rows being true classes, where
            there are at most 25 classes; `worst`, the images with the highest cross-entropy
            (`image`, `loss`, `true`, `predicted`, and the `score` of the prediction in per cent).
        """
        ranks = gather((self._pairs, self._worst))
        pairs = sum((rank_pairs for rank_pairs, _ in ranks), Counter())
        worst = self._highest([mistake for _, mistakes in ranks for mistake in mistakes])
        wrong = sorted(
            ((count, *pair) for pair, count in pairs.items() if pair[0] != pair[1]),
            key=lambda entry: (-entry[0], entry[1:]),
        )
        names = self.class_names
        figures: dict[str, Any] = {
            "classes": names,
            "confused": [
                {"true": names[label], "predicted": names[guess], "count": count}
                for count, label, guess in wrong[:20]
            ],
            "worst": [
                {
                    "image": image,
                    "loss": loss,
                    "true": names[label],
                    "predicted": names[guess],
                    "score": 100 * score,
                }
                for loss, image, label, guess, score in worst
            ],
        }
        if len(names) <= _MOST_CELLS:
            matrix = [
                [pairs[label, guess] for guess in range(len(names))] for label in range(len(names))
            ]
            figures["confusion"] = {"classes": names, "matrix": matrix}
        return figures

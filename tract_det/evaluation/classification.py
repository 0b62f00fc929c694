"""Top-1 and top-5 accuracy over all ranks, from integer counts of images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tract_det.distributed import gather
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.metrics import DIVERGED_MEND, TOP_K


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
        self.correct = dict.fromkeys(TOP_K, 0)

    def add(self, logits: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Adds a batch. Each image of the split must be added exactly once, on any rank.

        Args:
            logits: `(B, num_classes)`.
            labels: `(B,)`, 0..num_classes-1.
            ids: names of the images, for error messages.

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

    def evaluate(self, skipped: int = 0) -> dict[str, Any]:
        """Sums the counts of all ranks. Every rank must call it.

        Args:
            skipped: number of this rank's images that could not be read.

        Returns:
            On every rank `images` (the number evaluated), `top1` and `top5` in per cent, both as
            counts under `correct`, and, if any image was skipped, their number as `skipped`.

        Raises:
            UserError: the ranks together did not account for each image of the split, or evaluated
                none.
        """
        ranks = gather((self.evaluated, skipped, self.correct))
        counts, skips, corrects = zip(*ranks, strict=True)
        evaluated, num_skipped = sum(counts), sum(skips)
        if evaluated + num_skipped != self.images or not evaluated:
            raise UserError(
                f"{evaluated} images were evaluated and {num_skipped} skipped, the split has "
                f"{self.images}: give each image to exactly one rank"
            )
        correct = {f"top{k}": sum(rank_correct[k] for rank_correct in corrects) for k in TOP_K}
        percent = {name: 100 * count / evaluated for name, count in correct.items()}
        results = {"images": evaluated, **percent, "correct": correct}
        return results | ({"skipped": num_skipped} if num_skipped else {})

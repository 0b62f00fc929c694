"""Top-1 and top-5 over all ranks, counted in whole images."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from tract_det.distributed import gather
from tract_det.errors import UserError

KS = (1, 5)


class TopK:
    """Counts the images of a split whose class is among the k most likely, k = 1 and 5.

    A class of equal score counts as more likely if it comes first in the class list, so that the
    counts do not depend on a sorting algorithm.

    Args:
        images: number of images in the split.
    """

    def __init__(self, images: int) -> None:
        self.images = images
        self.seen = 0
        self.correct = dict.fromkeys(KS, 0)

    def add(self, logits: Tensor, labels: Tensor, ids: Sequence[str] = ()) -> None:
        """Takes a batch; each image of the split is to be added once, on any rank.

        Args:
            logits: `(B, num_classes)`.
            labels: `(B,)`, 0..num_classes-1.
            ids: the images' names, for messages.

        Raises:
            UserError: a logit is not finite.
        """
        finite = logits.isfinite().all(dim=1)
        if not finite.all():
            first = int(finite.logical_not().nonzero()[0])
            name = f" of {ids[first]}" if ids else ""
            raise UserError(f"a score{name} is not finite: check MODEL.WEIGHTS")
        own = logits.gather(1, labels[:, None])
        before = torch.arange(logits.shape[1], device=logits.device) < labels[:, None]
        rank = ((logits > own) | ((logits == own) & before)).sum(dim=1)  # 0 = the most likely
        self.seen += len(labels)
        for k in KS:
            self.correct[k] += int((rank < k).sum())

    def evaluate(self, skipped: int = 0) -> dict[str, Any]:
        """`images`, `top1` and `top5` in per cent, and both as counts under `correct`.

        Every rank must call it, and gets the same.

        Args:
            skipped: this rank's images that could not be read. Their sum over the ranks is given
                back as `skipped`, where there are any, and is not part of `images`.

        Raises:
            UserError: the ranks did not see as many images as the split has, or none at all.
        """
        own: dict[str, Any] = {"seen": self.seen, "skipped": skipped, "correct": self.correct}
        ranks = gather(own)
        seen, left = (sum(one[key] for one in ranks) for key in ("seen", "skipped"))
        if seen + left != self.images or not seen:
            raise UserError(
                f"{seen} images were evaluated and {left} skipped, the split has {self.images}: "
                "give each image to exactly one rank"
            )
        correct = {f"top{k}": sum(one["correct"][k] for one in ranks) for k in KS}
        percent = {name: 100 * count / seen for name, count in correct.items()}
        return {"images": seen, **percent, "correct": correct} | ({"skipped": left} if left else {})

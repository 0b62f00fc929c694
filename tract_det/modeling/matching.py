"""Which anchors and proposals count in a detector's loss, and the numbers that stand for a box.

The definitions are torchvision's, and the results are the same to the bit. Only the way differs: on
a GPU each number that is read, each `nonzero` and each constant that is copied there costs a pause.
Here nothing waits for the device, except for one short transfer for all images of a batch.
"""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision.models.detection import _utils as torchvision_utils


def positions(mask: Tensor, count: int) -> Tensor:
    """Where a mask is set, ascending: `mask.nonzero()` for a number that is known.

    Args:
        mask: `(n,)` bool.
        count: how often it is set.

    Returns:
        `(count,)` int64.
    """
    ranks = torch.where(mask, mask.cumsum(0) - 1, count)  # all others share the surplus place
    places = torch.empty(count + 1, dtype=torch.int64, device=mask.device)
    return places.scatter_(0, ranks, torch.arange(len(mask), device=mask.device))[:count]


class Samples(NamedTuple):
    """The chosen anchors or proposals, as positions among those of all images in turn.

    Attributes:
        positive: `(objects of all images,)`, ascending.
        negative: `(background of all images,)`, ascending.
        objects: how many objects of each image.
        sizes: how many objects and background together of each image.
    """

    positive: Tensor
    negative: Tensor
    objects: list[int]
    sizes: list[int]


class BalancedSampler:
    """Chooses the anchors or proposals of each image that count in the loss.

    At most `positive_fraction` of `batch_size_per_image` are objects, the rest is background
    (Faster R-CNN, section 3.1.3).

    Attributes:
        seeds: for the images to come, one each; empty = torch's global generator.
    """

    def __init__(self, batch_size_per_image: int, positive_fraction: float, salt: int) -> None:
        self.batch_size_per_image = batch_size_per_image
        self.positive_fraction = positive_fraction
        self.salt = salt  # so that the two samplers of a detector draw differently
        self.seeds: list[int] = []

    def sample(self, labels: Sequence[Tensor]) -> Samples:
        """Draws from all images, one after the other.

        Args:
            labels: `(anchors,)` for each image: positive for an object, 0 for background, negative
                for an anchor to ignore.
        """
        together = torch.cat(list(labels))
        kinds = torch.stack([together >= 1, together == 0])
        parts = kinds.split([len(image) for image in labels], dim=1)
        # The one transfer: how many candidates of both kinds each image has.
        counts = torch.stack([part.sum(1) for part in parts]).T.tolist()
        objects, background = (
            positions(kind, sum(count)).split(count)
            for kind, count in zip(kinds, counts, strict=True)
        )
        positive, negative = [], []
        for image_objects, image_background in zip(objects, background, strict=True):
            generator = self._generator(together.device)
            quota = int(self.batch_size_per_image * self.positive_fraction)
            positive.append(_draw(image_objects, quota, generator))
            quota = self.batch_size_per_image - len(positive[-1])
            negative.append(_draw(image_background, quota, generator))
        chosen = [len(image) for image in positive]
        return Samples(
            torch.cat(positive).sort().values,
            torch.cat(negative).sort().values,
            chosen,
            [count + len(image) for count, image in zip(chosen, negative, strict=True)],
        )

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """The same as masks `(anchors,)`: each image's objects, and its background.

        That is the form in which torchvision's own detectors ask for them.
        """
        samples, sizes = self.sample(labels), [len(image) for image in labels]
        nothing = torch.zeros(sum(sizes), dtype=torch.bool, device=samples.positive.device)
        positive, negative = (
            list(nothing.index_fill(0, chosen, True).split(sizes)) for chosen in samples[:2]
        )
        return positive, negative

    def _generator(self, device: torch.device) -> torch.Generator | None:
        """The generator of the next image."""
        if not self.seeds:
            return None
        return torch.Generator(device).manual_seed(2 * self.seeds.pop(0) + self.salt)


def _draw(candidates: Tensor, quota: int, generator: torch.Generator | None) -> Tensor:
    order = torch.randperm(len(candidates), generator=generator, device=candidates.device)
    return candidates[order[:quota]]


class Matcher(torchvision_utils.Matcher):
    """Matches anchors and proposals with objects by their IoU."""

    def set_low_quality_matches_(
        self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor
    ) -> None:
        """Gives every object the anchors that fit it best, however badly, in place.

        Args:
            matches: `(anchors,)` an object, or negative.
            all_matches: `(anchors,)` the object that fits best.
            match_quality_matrix: `(objects, anchors)` IoU.
        """
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        is_best = (match_quality_matrix == best).any(dim=0)
        matches.copy_(torch.where(is_best, all_matches, matches))


class BoxCoder(torchvision_utils.BoxCoder):
    """Boxes as shifts of the center and logarithmic growth of the sides, weighted.

    Both are relative to an anchor or a proposal. Reference: Girshick et al., "Rich feature
    hierarchies", CVPR 2014, appendix C.
    """

    def encode_single(self, reference_boxes: Tensor, proposals: Tensor) -> Tensor:
        """The four numbers `(n, 4)` that turn proposals into reference boxes, both `(n, 4)`."""
        return torchvision_utils.encode_boxes(reference_boxes, proposals, self.weights)

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """`(n, 4 * classes)` boxes from as many numbers and the proposals `(n, 4)`."""
        corners = []
        for axis, (shift_weight, growth_weight) in enumerate(
            zip(self.weights[:2], self.weights[2:], strict=True)
        ):
            sides = boxes[:, axis + 2] - boxes[:, axis]
            centers = boxes[:, axis] + 0.5 * sides
            shifts = rel_codes[:, axis::4] / shift_weight
            growth = (rel_codes[:, axis + 2 :: 4] / growth_weight).clamp(max=self.bbox_xform_clip)
            new_centers = shifts * sides[:, None] + centers[:, None]
            half_sides = 0.5 * (growth.exp() * sides[:, None])
            corners.append((new_centers - half_sides, new_centers + half_sides))
        return torch.stack(list(itertools.chain(*zip(*corners, strict=True))), dim=2).flatten(1)

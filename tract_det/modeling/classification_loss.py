"""A classifier's loss: softmax or binary cross-entropy, with label smoothing."""

import torch.nn.functional as F
from torch import Tensor, nn


class ClassifierWithLoss(nn.Module):
    """A classifier that computes its own loss in training, as a detector does.

    Args:
        model: images to logits `(B, C)`.
        smoothing: label smoothing of the targets (Szegedy et al. 2016).
        bce: binary cross-entropy with a sigmoid for each class, in place of the softmax's
            cross-entropy: every class in an image's target counts as fully present, so that an
            image mixed of two has both (Wightman et al. 2021; DeiT-III). The loss is the mean over
            images and classes.
    """

    def __init__(self, model: nn.Module, smoothing: float = 0.0, bce: bool = False) -> None:
        super().__init__()
        self.model, self.smoothing, self.bce = model, smoothing, bce

    def forward(self, images: Tensor, targets: Tensor | None = None) -> Tensor | dict[str, Tensor]:
        """`{"loss_cls": loss}` in training, the logits `(B, C)` in evaluation.

        Args:
            images: a batch, standardised.
            targets: labels `(B,)`, or each class's share `(B, C)`; needed in training.
        """
        logits = self.model(images)
        if not self.training:
            return logits
        if targets is None:
            raise ValueError("in training the classifier needs targets")
        logits = logits.float()
        if not self.bce:
            loss = F.cross_entropy(logits, targets, label_smoothing=self.smoothing)
        else:
            present = _present(targets, logits.shape[1], self.smoothing)
            loss = F.binary_cross_entropy_with_logits(logits, present)
        return {"loss_cls": loss}


def _present(targets: Tensor, num_classes: int, smoothing: float) -> Tensor:
    """Which classes each image shows, `(B, C)`: 1 or 0 before smoothing.

    Args:
        targets: labels `(B,)`, or shares `(B, C)` that are not smoothed yet: smoothed shares are
            all above 0, so every class would count as present.
        num_classes: C.
        smoothing: of the result.
    """
    if targets.dim() == 1:
        targets = F.one_hot(targets, num_classes).float()
    return (targets > 0).float() * (1 - smoothing) + smoothing / num_classes

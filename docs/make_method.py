"""Draws `docs/method.png`: how far one step moves the pre-activations, direction by direction.

    python docs/make_method.py

The patches are those of a 7x7/2 stem over the quick start's drawn shapes, standardised as in its
training. Nothing is trained.
"""

from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F

from tract_det.data.datasets import read_dataset
from tract_det.data.detection import DetectionDataset
from tract_det.pixels import IMAGENET_MEAN, IMAGENET_STD

matplotlib.use("Agg")
from matplotlib import pyplot as plt

PICTURE = Path(__file__).resolve().parent / "method.png"
IMAGES = 64
LAMBDA = 0.1
SHOWN = (0, 2, 9, 29, 99)  # directions that are drawn as patches


def patches() -> torch.Tensor:
    """Standardised 7x7 patches, `(N, K)` with `K = 3 * 7 * 7`, float64."""
    dataset = DetectionDataset(read_dataset(["shapes_train"], None, None))
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    rows = []
    for index in range(IMAGES):
        image = dataset[index][0].as_subclass(torch.Tensor)
        x = (image / 255 - mean / 255) / (std / 255)
        rows.append(F.unfold(x[None].double(), 7, stride=2)[0].T)
    return torch.cat(rows)


def draw(path: Path) -> None:
    """Draws the picture."""
    X = patches()
    eigenvalues, directions = torch.linalg.eigh(X.T @ X / len(X))
    eigenvalues, directions = eigenvalues.flip(0).clamp_min(1e-12), directions.flip(1)
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    number = np.arange(1, len(eigenvalues) + 1)
    tract = eigenvalues / (eigenvalues + LAMBDA)
    axes.loglog(
        number, eigenvalues, color="tab:gray", lw=2, label="plain: the eigenvalue $g$ of $G$"
    )
    axes.loglog(
        number,
        tract,
        color="tab:blue",
        lw=2,
        label=rf"TrAct: $g / (g + \lambda)$, $\lambda$ = {LAMBDA}",
    )
    axes.axhline(LAMBDA, color="tab:blue", lw=0.8, ls=":")
    axes.text(1.05, LAMBDA * 1.15, r"$\lambda$", color="tab:blue")
    axes.set_xlabel("direction of the patches, by the contrast that the images have in it")
    axes.set_ylabel("how far a step moves\nthe pre-activations along it")
    axes.set_ylim(float(eigenvalues[-1]) / 2, 30 * float(eigenvalues[0]))  # room for the patches
    axes.set_xlim(left=0.8)
    axes.legend(frameon=False, loc="lower left")
    axes.spines[["top", "right"]].set_visible(False)
    for i in SHOWN:
        filter_ = directions[:, i].reshape(3, 7, 7).permute(1, 2, 0)
        filter_ *= filter_.sum().sign()  # eigenvectors have no sign of their own
        pixels = 0.5 + 0.5 * filter_ / filter_.abs().max()
        x, _ = axes.transLimits.transform((np.log10(number[i]), 0))
        inset = axes.inset_axes((x - 0.03, 0.86, 0.06, 0.12))
        inset.imshow(pixels.numpy())
        inset.set_xticks([])
        inset.set_yticks([])
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)


if __name__ == "__main__":
    draw(PICTURE)
    print(f"wrote {PICTURE}")

"""Data sets of random samples for the tests of loaders."""

import random

import numpy as np
import torch
from torch.utils.data import Dataset
from torchvision import tv_tensors

from tract_det.errors import UserError


class Noisy(Dataset):
    """Images and targets made of random numbers from all three generators."""

    def __init__(self, n=24):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        noise = torch.rand(3).double() + np.random.rand() + random.random()
        image = tv_tensors.Image((noise[:, None, None] * 60).to(torch.uint8).expand(3, 4, 4))
        boxes = tv_tensors.BoundingBoxes(torch.rand(1, 4), format="XYXY", canvas_size=(4, 4))
        return image, {"boxes": boxes, "labels": torch.tensor([1]), "index": index, "noise": noise}


class Broken(Noisy):
    def __getitem__(self, index):
        raise UserError("/data/JPEGImages/x.jpg: the image cannot be read: replace it")

"""Faster R-CNN on torchvision parts, and the weights that go into it."""

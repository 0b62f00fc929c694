"""Augmentation for detectors moves pixels and boxes together."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision import tv_tensors

from tract_det.data.detection_transforms import detection_train


def sample(height=30, width=40):
    boxes = tv_tensors.BoundingBoxes(
        torch.tensor([[4.0, 6.0, 14.0, 16.0], [0.0, 0.0, width, height]]),
        format="XYXY",
        canvas_size=(height, width),
    )
    image = torch.zeros(3, height, width, dtype=torch.uint8)
    image[:, 6:16, 4:14] = 200
    labels = torch.tensor([1, 2])
    return tv_tensors.Image(image), {"boxes": boxes, "labels": labels, "image_id": "a", "index": 3}


@pytest.mark.parametrize("min_size", [(), (0,)])
def test_without_sizes_and_chances_nothing_changes(min_size):
    image, target = sample()
    out, out_target = detection_train(min_size=min_size, max_size=0, flip=0.0)(image, target)
    assert torch.equal(out, image)
    assert torch.equal(out_target["boxes"], target["boxes"])
    assert out_target["labels"].tolist() == [1, 2]
    assert (out_target["image_id"], out_target["index"]) == ("a", 3)


def test_mirroring_moves_pixels_and_boxes_together():
    image, target = detection_train(min_size=(), max_size=0, flip=1.0)(*sample())
    assert target["boxes"].tolist() == [[26, 6, 36, 16], [0, 0, 40, 30]]
    x1, y1, x2, y2 = (int(v) for v in target["boxes"][0])
    assert int(image[:, y1:y2, x1:x2].min()) == 200
    assert int((image > 0).sum()) == 3 * 10 * 10


@settings(max_examples=25, deadline=None)
@given(st.integers(20, 90), st.integers(20, 90), st.sampled_from([(32,), (32, 48)]))
def test_the_shorter_side_is_one_of_the_sizes_unless_the_longer_is_limited(h, w, sizes):
    image, target = detection_train(min_size=sizes, max_size=64)(*sample(h, w))
    height, width = image.shape[-2:]
    assert image.dtype == torch.uint8
    assert max(height, width) <= 64
    # RandomShortestSize rounds down
    assert min(height, width) in {s - d for s in sizes for d in (0, 1)} or max(height, width) >= 63
    assert target["boxes"].canvas_size == (height, width)
    assert target["boxes"][1].tolist() == pytest.approx([0, 0, width, height], abs=1e-3)


def test_colours_change_and_boxes_do_not():
    torch.manual_seed(0)
    image, target = sample()
    out, out_target = detection_train(min_size=(), max_size=0, flip=0.0, color_jitter=0.5)(
        image, target
    )
    assert out.dtype == torch.uint8
    assert not torch.equal(out, image)
    assert torch.equal(out_target["boxes"], target["boxes"])

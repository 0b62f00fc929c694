"""Evaluates detections in the PASCAL VOC challenge's files: no model and no images are needed.

    python tools/evaluate_voc.py --root datasets/cells --split test --detections output/detections

The same as `tract-det evaluate`.
"""

from tract_det.cli import tool

if __name__ == "__main__":
    tool("evaluate")

"""Converts weights between the forms of torchvision, timm and detectron2.

    python tools/convert_weights.py output/model_final.pth R-50.pkl

The same as `tract-det convert`.
"""

from tract_det.cli import tool

if __name__ == "__main__":
    tool("convert")

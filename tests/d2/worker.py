"""A program whose worker processes receive a `cfg` that only the parent has configured.

    python tests/d2/worker.py OUTPUT

Each rank writes the class name of its stem into OUTPUT.
"""

import sys
from pathlib import Path

from detectron2.engine import launch
from detectron2.modeling import build_model
from detectron2.utils import comm

from tract_det import find_stem
from tract_det.d2 import add_tract_config, config_file


def main(cfg, output):
    model = build_model(cfg)
    name = type(model.get_submodule(find_stem(model))).__name__
    (Path(output) / f"rank{comm.get_rank()}").write_text(name)


if __name__ == "__main__":
    from detectron2.config import get_cfg

    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file("BCCD-Detection/faster_rcnn_R_18_FPN.yaml"))
    cfg.merge_from_file(config_file("arms/tract.yaml"))
    cfg.MODEL.DEVICE = "cpu"
    launch(main, 2, dist_url="auto", args=(cfg, sys.argv[1]))

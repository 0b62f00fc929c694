r"""Trains Faster R-CNN, with or without TrAct, on data in VOC layout, and reports mAP.

    tract-det train                                            # quick start: drawn shapes, minutes
    tract-det train --config-file BCCD-Detection/faster_rcnn_R_18_FPN.yaml --arm tract \
        DATASETS.ROOT path/to/BCCD
    tract-det train --config-file FILE --resume                # goes on where OUTPUT_DIR stopped
    tract-det train --config-file FILE --eval-only MODEL.WEIGHTS output/model_final.pth
    deepspeed --num_gpus 8 --module tract_det.cli train --config-file FILE
    torchrun --nproc-per-node 8 -m tract_det.cli train --config-file FILE

In a checkout, `tools/train_net.py` is the same program. Config files inherit with `_BASE_`; a
second --config-file overrides the first, an arm both, and `KEY VALUE` pairs at the end override all
but what an arm switches. The arms: `frozen`, the stem and the first stage frozen; `plain`, nothing
frozen, TrAct off; `tract`, TrAct on the stem; and others, which their files in configs/arms
explain. `tract+muon` lays two over each other. The keys needed most:

    DATASETS.ROOT, .TRAIN, .TEST, .CLASSES   the data: a folder in VOC layout, its splits, classes
    MODEL.WEIGHTS                            start from, or evaluate, these weights
    MODEL.TRACT.LAMBDA, .UNIT                damping of TrAct
    MODEL.BACKBONE.NAME, .FREEZE_AT          backbone; 0 = nothing frozen
    SOLVER.MAX_ITER, .BASE_LR                steps, learning rate
    SOLVER.IMS_PER_BATCH, .ACCUMULATION      images per step over all ranks, micro-batches per step
    SOLVER.AMP.ENABLED                       bf16 autocast
    INPUT.MIN_SIZE_TRAIN, .MIN_SIZE_TEST     shorter side of the images, pixels
    OUTPUT_DIR, SEED, LOG_PERIOD, TEST.EVAL_PERIOD

All keys, with their meaning and defaults: tract_det/config/detection.py and shared.py.
"""

import argparse
from collections.abc import Sequence

from tract_det.training.command import run_task


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Trains or evaluates; returns the exit code."""
    return run_task("detection", parser, argv, default="quickstart/shapes.yaml")

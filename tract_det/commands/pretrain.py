"""Trains an image classifier, with or without TrAct, and reports its top-1 and top-5.

    tract-det pretrain DATASETS.ROOT path/to/cifar10           # 10,000 images, minutes on a CPU
    tract-det pretrain --config-file CIFAR/cpu_small.yaml --arm tract DATASETS.ROOT path/to/cifar10
    tract-det pretrain --config-file FILE --resume             # goes on where OUTPUT_DIR stopped
    tract-det pretrain --config-file FILE --eval-only MODEL.WEIGHTS output/model_final.pth
    deepspeed --num_gpus 8 --module tract_det.cli pretrain --config-file FILE
    torchrun --nproc-per-node 8 -m tract_det.cli pretrain --config-file FILE

In a checkout, `tools/pretrain_net.py` is the same program. Config files inherit with `_BASE_`; a
second --config-file overrides the first, an arm both, and `KEY VALUE` pairs at the end override all
but what an arm switches. The arms: `plain`, nothing frozen, TrAct off; `tract`, TrAct on the stem;
`frozen`, the stem and the first stage frozen; and others, which their files in configs/arms
explain. `tract+muon` lays two over each other. The keys needed most:

    DATASETS.NAME, .ROOT                     imagefolder, cifar10, ...; the folder that holds it
    MODEL.NAME                               a classifier of torchvision, or timm:NAME
    MODEL.WEIGHTS                            start from, or evaluate, these weights
    MODEL.TRACT.LAMBDA, .UNIT                damping of TrAct
    SOLVER.EPOCHS, .BASE_LR                  length, learning rate
    SOLVER.IMS_PER_BATCH, .ACCUMULATION      images per step over all ranks, micro-batches per step
    SOLVER.AMP.ENABLED                       bf16 autocast
    INPUT.SIZE                               side of the images, pixels
    OUTPUT_DIR, SEED, LOG_PERIOD, TEST.EVAL_EPOCHS

All keys, with their meaning and defaults: tract_det/config/classification.py and shared.py. The
weights go into a detector by MODEL.WEIGHTS of `tract-det train`.
"""

import argparse
from collections.abc import Sequence

from tract_det.training.command import run_task


def main(parser: argparse.ArgumentParser, argv: Sequence[str]) -> int:
    """Trains or evaluates; returns the exit code."""
    return run_task("classification", parser, argv, default="CIFAR/cpu_small.yaml")

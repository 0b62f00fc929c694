"""A program of a detectron2 user: DefaultTrainer with TrAct, under detectron2's own launcher.

    python tests/d2/program.py ROOT CLASS,CLASS,... OUTPUT PROCESSES KEY VALUE ...

Its steps do not depend on how a batch is spread over processes: it has no flips, and it uses every
anchor and proposal.
"""

import json
import sys
from pathlib import Path

import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer, default_setup, launch
from detectron2.engine import defaults as detectron2_defaults
from torch.nn.parallel import DistributedDataParallel

from tract_det.d2 import VOCEvaluator, add_tract_config, config_file, register_voc


def create_ddp_model(model, **keywords):
    """In place of detectron2's function, which passes a GPU number even for a model on the CPU."""
    if not torch.distributed.is_initialized():
        return model
    return DistributedDataParallel(model, broadcast_buffers=False)


def configure(output, classes, *pairs):
    cfg = get_cfg()
    add_tract_config(cfg)
    cfg.merge_from_file(config_file("BCCD-Detection/faster_rcnn_R_18_FPN.yaml"))
    cfg.merge_from_file(config_file("arms/tract.yaml"))
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = ("program_train",), ("program_test",)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.RESNETS.NORM = "FrozenBN"
    cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32, 64
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = len(classes)
    cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE, cfg.MODEL.RPN.LOSS_WEIGHT = 20000, 50.0
    cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 1.0, 30
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1000
    cfg.MODEL.ROI_HEADS.PROPOSAL_APPEND_GT = False  # every image has the same number of proposals
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (96,), "none"
    cfg.DATALOADER.NUM_WORKERS = 0
    # Small steps: rounding decides which pixel of a pooling window gets the gradient, and the
    # difference grows from step to step.
    cfg.SOLVER.BASE_LR, cfg.SOLVER.WARMUP_ITERS = 0.0003, 0
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS = 20, ()
    cfg.TEST.EVAL_PERIOD, cfg.SEED, cfg.OUTPUT_DIR = 0, 3, str(output)
    cfg.merge_from_list(list(pairs))
    return cfg


class Trainer(DefaultTrainer):
    @classmethod
    def build_evaluator(cls, cfg, dataset_name):
        return VOCEvaluator(dataset_name)


def main(root, classes, output, pairs):
    for split in ("train", "test"):
        register_voc(f"program_{split}", root, split, classes)
    cfg = configure(output, classes, *pairs)
    default_setup(cfg, None)
    detectron2_defaults.create_ddp_model = create_ddp_model
    trainer = Trainer(cfg)
    model = getattr(trainer.model, "module", trainer.model)
    stem = model.backbone.bottom_up.stem.conv1
    before = stem.weight.detach().clone()
    trainer.train()
    if torch.distributed.is_initialized() and torch.distributed.get_rank():
        return
    torch.save(
        {"before": before, "model": model.state_dict(), "layer": type(stem).__name__},
        Path(output) / "trained.pth",
    )
    (Path(output) / "figures.json").write_text(json.dumps(trainer._last_eval_results))


if __name__ == "__main__":
    root, classes, output, processes, *pairs = sys.argv[1:]
    arguments = (root, tuple(classes.split(",")), output, pairs)
    torch.set_num_threads(1)
    launch(main, int(processes), dist_url="auto", args=arguments)

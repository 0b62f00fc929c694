"""Trains Faster R-CNN, with or without TrAct, on data in VOC layout, and reports mAP.

    python tools/train_net.py                                     # quick start: drawn shapes
    python tools/train_net.py --config-file FILE --arm tract      # frozen, plain or tract
    deepspeed --num_gpus 8 tools/train_net.py --config-file FILE  # many processes; torchrun as well
    python tools/train_net.py --config-file FILE --resume         # goes on where OUTPUT_DIR stopped
    python tools/train_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE.pth
    python tools/train_net.py --config-file FILE SOLVER.MAX_ITER 500 OUTPUT_DIR output/short

The same as `tract-det train`.
"""

from tract_det.cli import tool

if __name__ == "__main__":
    tool("train")

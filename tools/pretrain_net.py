"""Trains an image classifier, with or without TrAct, and reports its top-1 and top-5.

    python tools/pretrain_net.py DATASETS.ROOT path/to/cifar10    # 10,000 images, minutes on a CPU
    python tools/pretrain_net.py --config-file configs/CIFAR/cpu_small.yaml --arm tract
    deepspeed --num_gpus 8 tools/pretrain_net.py --config-file FILE   # many processes; or torchrun
    python tools/pretrain_net.py --config-file FILE --resume      # goes on where OUTPUT_DIR stopped
    python tools/pretrain_net.py --config-file FILE --eval-only MODEL.WEIGHTS FILE.pth
    python tools/pretrain_net.py --config-file FILE SOLVER.EPOCHS 5 OUTPUT_DIR output/short

The same as `tract-det pretrain`.
"""

from tract_det.cli import tool

if __name__ == "__main__":
    tool("pretrain")

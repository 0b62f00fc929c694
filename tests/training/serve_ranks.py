"""Runs on every rank: does the cases that `runs.TwoRanks` puts into a folder, one by one.

deepspeed --num_gpus 2 tests/training/serve_ranks.py FOLDER
"""

import itertools
import json
import os
import sys
import time
import traceback
from pathlib import Path

from tract_det.cli import call

IDLE = 300  # seconds without a case after which the tests are taken to be gone


def serve(folder: Path, rank: str) -> None:
    for number in itertools.count():
        case_file, began = folder / f"{number}.json", time.monotonic()
        while not case_file.exists():
            if time.monotonic() - began > IDLE or not folder.is_dir():
                return
            time.sleep(0.02)
        case = json.loads(case_file.read_text())
        os.environ["MASTER_PORT"] = str(case["port"])  # a new group for every case
        try:
            code = call(case["verb"], case["arguments"])
        except BaseException:
            traceback.print_exc()
            sys.stdout.flush()
            os._exit(1)  # the other rank may be waiting for this one
        sys.stdout.flush()
        half = folder / f"{number}.{rank}.half"
        half.write_text(str(code))
        half.rename(folder / f"{number}.{rank}.done")


if __name__ == "__main__":
    serve(Path(sys.argv[-1]), os.environ["RANK"])

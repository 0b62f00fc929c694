"""The console command: its verbs, its help, and what it refuses before anything heavy is loaded."""

import re
import subprocess
import sys

import pytest

from tests.conftest import REPO, run_python
from tract_det.cli import VERBS, one_line

TOOLS = {
    "train_net": "train",
    "pretrain_net": "pretrain",
    "evaluate_voc": "evaluate",
    "convert_weights": "convert",
    "visualize": "visualize",
}
HEAVY = ("torch", "torchvision", "timm", "deepspeed", "matplotlib", "detectron2")


def loaded_after(*arguments):
    """Exit code, output, and the heavy packages that the console command has imported."""
    program = f"""
import sys
from tract_det.cli import main
try:
    main({list(map(str, arguments))!r})
finally:
    print("loaded:", *[name for name in {HEAVY!r} if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    printed, _, loaded = done.stdout.rpartition("loaded:")
    return done.returncode, printed + done.stderr, loaded.split()


def test_help_lists_every_verb_and_loads_nothing_heavy():
    code, printed, loaded = loaded_after("--help")
    assert code == 0 and loaded == []
    assert all(f"\n  {verb} " in printed for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_loads_nothing_heavy(verb):
    code, printed, loaded = loaded_after(verb, "--help")
    assert code == 0 and loaded == []
    assert printed.startswith(f"usage: tract-det {verb}")


@pytest.mark.parametrize("verb", ["train", "pretrain"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--config-file", "nowhere.yaml"], "error: config file nowhere.yaml does not exist"),
        (["SOLVER.BASE_LRR", "1"], "error: unknown key 'SOLVER.BASE_LRR': did you mean"),
        (["SOLVER.BASE_LR", "-1"], "error: SOLVER.BASE_LR is -1.0"),
        (["MODEL.TRACT.LAMBDA", "0"], "error: MODEL.TRACT.LAMBDA is 0.0"),
    ],
)
def test_a_wrong_configuration_is_refused_before_anything_heavy_is_loaded(verb, arguments, message):
    code, printed, loaded = loaded_after(verb, *arguments)
    assert code == 1 and loaded == []
    assert printed.startswith(message) and printed.count("\n") == 1


def test_help_names_the_keys_that_a_user_needs_and_they_exist():
    from tract_det.config import classification, detection
    from tract_det.config.machinery import value_at

    for verb, module in (("train", detection), ("pretrain", classification)):
        _, printed, _ = loaded_after(verb, "--help")
        keys = set()
        for line in printed.splitlines():
            words = line.strip().split("  ")[0].replace(",", "").split()
            if re.match(r"    [A-Z_]+(\.| |$)", line) and "path/to" not in line:
                section = words[0].rpartition(".")[0]
                keys |= {section + word if word.startswith(".") else word for word in words}
        assert len(keys) > 10, keys
        for key in keys:
            value_at(module.get_cfg(), key)


def test_an_unknown_verb_is_refused_with_those_there_are():
    code, printed, _ = loaded_after("trian")
    assert code == 2 and "train" in printed and "Traceback" not in printed


def test_the_launchers_argument_may_stand_before_the_verb():
    code, printed, _ = loaded_after("--local_rank=0", "train", "--help")
    assert code == 0 and printed.startswith("usage: tract-det train")


@pytest.mark.parametrize(("name", "verb"), TOOLS.items())
def test_a_tool_of_the_checkout_is_its_verb(name, verb):
    done = run_python(REPO / "tools" / f"{name}.py", "--help")
    _, printed, _ = loaded_after(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.partition("\n\n")[2] == printed.partition("\n\n")[2]


def test_a_tool_is_a_docstring_and_a_call():
    tools = sorted((REPO / "tools").glob("*.py"))
    assert {path.stem for path in tools} == set(TOOLS)
    assert all(len(path.read_text().splitlines()) <= 30 for path in tools)


def test_benchmark_programs_are_found_by_their_name():
    code, printed, _ = loaded_after("bench", "stem", "--help")
    assert code == 0 and "--repeats" in printed
    code, printed, _ = loaded_after("bench", "nothing")
    assert code == 2 and all(repr(name) in printed for name in ("data", "stem", "train"))


def test_an_error_of_a_worker_process_is_its_own_line():
    wrapped = ValueError(
        "Caught UserError in DataLoader worker process 0.\nOriginal Traceback (most recent call "
        "last):\n  File x\ntract_det.errors.UserError: a001.png: broken\n"
    )
    assert one_line(wrapped) == "a001.png: broken"


def test_the_library_is_imported_when_it_is_first_used():
    program = (
        "import sys, tract_det; assert 'torch' not in sys.modules; tract_det.apply_tract; "
        "assert 'torch' in sys.modules; assert set(tract_det.__all__) <= set(dir(tract_det))"
    )
    subprocess.run([sys.executable, "-c", program], check=True)

"""configs/paper.yaml: every experiment of the paper is a command with the number that it prints."""

import re
import shlex
import sys

import pytest

from tests.conftest import REPO, run_python
from tract_det.cli import call
from tract_det.config import classification, detection
from tract_det.config.paper import find_rows, read_rows
from tract_det.errors import UserError

ROWS = read_rows()
RUNNABLE = [row for row in ROWS.values() if not row.not_carried]


def load(row):
    """The configuration of a row, as its command line gives it."""
    arguments = row.arguments()
    assert arguments[0] == "--config-file" and arguments[2] == "--arm"
    module = detection if row.verb == "train" else classification
    return module.load_cfg(arguments[1], arguments[4:], arguments[3])


def test_every_table_and_figure_of_the_paper_has_rows():
    sources = " ".join(row.source for row in ROWS.values())
    expected = {f"table {n}" for n in (2, 3, 4, 5)} | {"tables 1, 6 and 7", "section 4.6"}
    expected |= {"fig. 3 left", "fig. 3 right", "fig. 10 left", "fig. 10 right", "figs. 5, 11"}
    expected |= {f"fig. {n}" for n in (4, 6, 7, 8, 9)}
    assert {source for source in expected if source not in sources} == set()


def papers_lambda(row):
    """As the paper says it: in the figure, or 0.2 for ViT-S of 800 epochs; else the default."""
    printed = re.search(r"tract-(0\.\d+|1\.6)$", row.name)
    if printed:
        return float(printed[1])
    is_long = "small-800" in row.name or "small/800" in row.name or row.name.startswith("transfer")
    return 0.2 if is_long or row.group == "run-time/deit3-small" else 0.1


@pytest.mark.parametrize("row", RUNNABLE, ids=lambda row: row.name)
def test_a_row_loads_and_has_its_arm_its_folder_and_the_papers_lambda(row):
    cfg = load(row)
    assert row.arm == cfg.ARM and f"output/paper/{row.name}" == cfg.OUTPUT_DIR
    assert row.paper and row.what and row.source
    if row.arm == "tract":
        assert papers_lambda(row) == cfg.MODEL.TRACT.LAMBDA
        # "input": the layer uses this number. VOC's lambda is not in the paper.
        is_ours = row.verb == "train" or row.source == "not in the paper"
        unit = "standardised" if is_ours else "input"
        assert unit == cfg.MODEL.TRACT.UNIT


def test_a_row_that_starts_from_another_ones_weights_names_a_row():
    later = [row for row in RUNNABLE if row.after]
    assert len(later) == 14
    for row in later:
        start = ROWS[row.after]
        for seed in ("0", "3"):
            assert f"{start.output(seed)}/model_final.pth" in row.arguments(seed)


def test_every_seed_of_a_row_has_a_folder_of_its_own(capsys):
    row = ROWS["deit3-finetuned/small-400/tract"]
    assert row.output("0") != row.output("1") and row.output() == f"output/paper/{row.name}"
    call("paper", [row.name, "SEED", "1"])
    printed = capsys.readouterr().out
    assert "# starts from the weights of deit3-small/400/tract: run that first" in printed
    words = shlex.split(printed.splitlines()[-1])
    assert words == ["tract-det", "pretrain", *row.arguments("1"), "SEED", "1"]
    assert f"OUTPUT_DIR output/paper/{row.name}-seed1" in printed


def test_the_numbers_of_table_7_have_the_means_and_counts_of_table_1():
    """36 models: 75.90 plain, 76.39 TrAct, 75.94 TrAct in 133 epochs; 33 better."""
    numbers = {
        variant: {
            row.group: float(row.paper)
            for row in ROWS.values()
            if row.name.startswith("cifar100/") and row.variant == variant
        }
        for variant in ("plain-200", "tract-200", "tract-133")
    }
    plain = numbers["plain-200"]
    assert {len(values) for values in numbers.values()} == {36}
    means = [round(sum(values.values()) / 36, 2) for values in numbers.values()]
    assert means == [75.90, 76.39, 75.94]
    better = [model for model, value in numbers["tract-200"].items() if value > plain[model]]
    assert len(better) == 33


@pytest.mark.parametrize(
    ("name", "number"),
    [
        ("imagenet-resnet50/30/plain", "71.96 (90.70)"),
        ("imagenet-resnet50/90/tract-0.1", "76.20 (93.12)"),
        ("deit3-finetuned/base-400/tract", "83.58 (96.52)"),
        ("transfer/flowers102/tract", "95.58"),
        ("voc2007/vgg16/plain", "0.659 +- 0.005"),
        ("run-time/cifar10-vit/tract", "1197 s"),
    ],
)
def test_a_number_is_the_papers_to_the_digit(name, number):
    assert ROWS[name].paper == number


def test_the_learning_rates_are_those_of_the_paper():
    rates = {row.group: load(row).SOLVER.BASE_LR for row in RUNNABLE}
    for length, rate in ((100, 1e-3), (200, 10**-3.2), (400, 10**-3.5), (800, 10**-3.5)):
        assert rates[f"cifar10-vit/{length}"] == pytest.approx(rate, rel=1e-4)
    for length, rate in ((100, 1e-2), (200, 1e-2), (400, 1e-3), (800, 1e-3)):
        assert rates[f"cifar10-resnet18-adam/{length}"] == rate
        assert rates[f"cifar10-resnet18-sgd/{length}"] == 0.08
    assert [rates[f"imagenet-resnet50/{n}"] for n in (30, 60, 90)] == [0.141, 0.1, 0.1]


def test_the_milestones_scale_with_the_length():
    for epochs in (30, 60, 90):
        plan = load(ROWS[f"imagenet-resnet50/{epochs}/plain"])
        assert [round(at * epochs, 9) for at in plan.SOLVER.STEPS] == [epochs / 3, 2 * epochs / 3]


def test_the_list_the_rows_of_one_experiment_and_a_command(capsys):
    assert call("paper", []) == 0
    listing = capsys.readouterr().out
    assert all(row.group in listing for row in ROWS.values())
    assert "plain-200 76.13, tract-200 76.67, tract-133 75.86" in listing
    assert "not carried" in listing
    assert call("paper", ["transfer"]) == 0
    assert capsys.readouterr().out.count("transfer/") == 4
    assert call("paper", ["cifar100/ResNet18/tract-200", "DATASETS.ROOT", "my data"]) == 0
    note, number, command = capsys.readouterr().out.splitlines()
    assert note.startswith("# CIFAR-100") and number == "# tables 1, 6 and 7: 76.67 top-1"
    row = ROWS["cifar100/ResNet18/tract-200"]
    words = ["tract-det", "pretrain", *row.arguments(), "DATASETS.ROOT", "my data"]
    assert shlex.split(command) == words
    assert call("paper", ["cifar100/ResNet18/tract-200", "--resume", "LOG_PERIOD", "5"]) == 0
    assert "tract-det pretrain --resume --config-file" in capsys.readouterr().out


def test_a_row_that_is_not_there_not_carried_or_not_one_is_refused():
    with pytest.raises(UserError, match="no row 'voc/vgg16': did you mean voc2007/vgg16"):
        find_rows("voc/vgg16")
    with pytest.raises(UserError, match=r"NASNet/plain-200 is not carried: .*paper: 77\.76"):
        call("paper", ["cifar100/NASNet/plain-200"])
    with pytest.raises(UserError, match="'SEED' has no value"):
        call("paper", ["voc2007/vgg16/plain", "SEED"])
    with pytest.raises(UserError, match="--run takes one row, such as transfer/cifar10/plain"):
        call("paper", ["transfer", "--run"])


def test_a_row_s_run_takes_the_place_of_the_command(monkeypatch):
    """So a signal to the command is one to the training, which then saves a checkpoint."""
    started = []
    monkeypatch.setattr("os.execv", lambda program, command: started.append((program, command)))
    call("paper", ["cifar100/ResNet18/tract-200", "--run", "SEED", "1"])
    ((program, command),) = started
    assert program == sys.executable and command[:4] == [program, "-m", "tract_det.cli", "pretrain"]
    assert command[-4:] == [
        "OUTPUT_DIR",
        "output/paper/cifar100/ResNet18/tract-200-seed1",
        "SEED",
        "1",
    ]


@pytest.mark.slow
def test_a_row_runs_from_the_command_line(tmp_path, voc_tree):
    done = run_python(
        "-m", "tract_det.cli", "paper", "voc2007/vgg16/tract", "--run",
        "MODEL.WEIGHTS", "", "DATASETS.ROOT", voc_tree, "DATASETS.TRAIN", "train",
        "DATASETS.TEST", "test", "INPUT.MIN_SIZE_TRAIN", "[64]", "INPUT.MIN_SIZE_TEST", "64",
        "SOLVER.MAX_ITER", "2", "TEST.EVAL_PERIOD", "0", "OUTPUT_DIR", tmp_path,
        cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert "tract-det train --config-file PascalVOC-Detection" in done.stdout
    assert (tmp_path / "model_final.pth").is_file()

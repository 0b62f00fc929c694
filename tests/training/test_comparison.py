"""The runs of a comparison: which there are, with which keys, and what their folders say."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from torch import nn

from tests.training.image_folder import write_image_folder
from tract_det.config.classification import load_cfg
from tract_det.config.files import flat
from tract_det.engine import checkpoint, provenance
from tract_det.errors import UserError
from tract_det.evaluation.samples import write_samples
from tract_det.training import comparison_runs
from tract_det.training.comparison import (
    Design,
    Variant,
    baseline_of,
    build,
    parse_sweep,
    parse_sweeps,
    refuse_other_settings,
)
from tract_det.training.comparison_estimate import seconds_beside
from tract_det.training.comparison_runs import groups, has_results, missing, report, run_missing

CLASSIFIER = "CIFAR/cpu_small.yaml"
DETECTOR = "quickstart/shapes.yaml"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))  # 32 for training


def design(output, images=None, config=CLASSIFIER, **changes):
    pairs = changes.pop("pairs", [])
    if images:
        pairs = ["DATASETS.ROOT", str(images), "SOLVER.IMS_PER_BATCH", "8", *pairs]
    options = {
        "arms": ["plain", "tract"], "sweeps": {}, "lengths": [], "seeds": 2, "baseline": "",
    } | changes  # fmt: skip
    return Design([config], pairs=pairs, output=output, **options)


def test_every_arm_has_every_length_and_seed(tmp_path, images):
    runs = build(design(tmp_path, images, lengths=[2.0, 1.0])).runs
    kinds = [(run.variant.arm, run.epochs, run.seed) for run in runs]
    assert sorted(kinds) == [
        (arm, length, seed) for arm in ("plain", "tract") for length in (1, 2) for seed in (0, 1)
    ]
    assert len({run.folder for run in runs}) == 8
    assert [run.steps for run in runs if run.epochs == 2] == [8] * 4


def test_runs_of_a_seed_differ_in_their_arm_alone(tmp_path, images):
    plain, tract = (flat(run.cfg) for run in build(design(tmp_path, images)).runs[:2])
    different = {key for key in plain if plain[key] != tract[key]}
    assert different == {"ARM", "MODEL.TRACT.ENABLED", "OUTPUT_DIR"}


def test_the_length_of_the_config_is_the_default_and_sets_no_key(tmp_path, images):
    run = build(design(tmp_path, images)).runs[0]
    assert run.epochs == 5 and "SOLVER.EPOCHS" not in run.arguments


def test_a_detector_s_length_is_in_epochs_of_its_own_data(tmp_path):
    runs = build(design(tmp_path, config=DETECTOR, lengths=[3.0, 6.0])).runs
    short, long = runs[0].cfg, runs[-1].cfg
    assert (short.SOLVER.MAX_ITER, long.SOLVER.MAX_ITER) == (300, 600)  # 400 images, 4 a step
    assert short.TEST.EVAL_PERIOD == 60 and long.TEST.EVAL_PERIOD == 100


def test_steps_of_the_schedule_follow_a_detector_s_length(tmp_path):
    pairs = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "[400,500]"]
    pairs += ["MODEL.TRACT.STOP_AT", "200"]
    run = build(design(tmp_path, config=DETECTOR, lengths=[3.0], pairs=pairs)).runs[0]
    assert run.cfg.SOLVER.STEPS == [200, 250] and run.cfg.MODEL.TRACT.STOP_AT == 100


def test_steps_in_epochs_follow_a_classifier_s_length(tmp_path, images):
    pairs = ["SOLVER.LR_SCHEDULER_NAME", "WarmupMultiStepLR", "SOLVER.STEPS", "[2,4]"]
    run = build(design(tmp_path, images, lengths=[10.0], pairs=pairs)).runs[0]
    assert run.cfg.SOLVER.EPOCHS == 10 and run.cfg.SOLVER.STEPS == [4, 8]


def test_a_period_that_the_user_sets_is_kept(tmp_path, images):
    run = build(design(tmp_path, images, pairs=["TEST.EVAL_EPOCHS", "2.5"])).runs[0]
    assert run.cfg.TEST.EVAL_EPOCHS == 2.5


def test_keys_of_tract_are_swept_only_where_tract_is_on(tmp_path, images):
    sweeps = {"MODEL.TRACT.LAMBDA": ["0.1", "1"], "SOLVER.BASE_LR": ["0.1", "0.2"]}
    planned = build(design(tmp_path, images, sweeps=sweeps, seeds=1))
    names = [variant.name for variant in planned.variants]
    assert names == [
        "plain BASE_LR=0.1", "plain BASE_LR=0.2",
        "tract LAMBDA=0.1 BASE_LR=0.1", "tract LAMBDA=0.1 BASE_LR=0.2",
        "tract LAMBDA=1 BASE_LR=0.1", "tract LAMBDA=1 BASE_LR=0.2",
    ]  # fmt: skip
    assert planned.baselines[planned.variants[3]].name == "plain BASE_LR=0.2"
    assert planned.runs[4].cfg.MODEL.TRACT.LAMBDA == 1


def test_a_swept_value_that_the_arm_has_anyway_is_the_same_run(tmp_path, images):
    sweeps = {"MODEL.TRACT.LAMBDA": ["0.1", "1"]}
    planned = build(design(tmp_path, images, sweeps=sweeps, seeds=1))
    assert [variant.folder for variant in planned.variants] == ["plain", "tract", "tract+LAMBDA=1"]
    first = build(design(tmp_path, images, seeds=1))
    for run in first.runs:
        write_run(first, run, 50.0)
    assert [run.variant.name for run in missing(planned)] == ["tract LAMBDA=1"]


def test_the_baseline_is_judged_by_nothing():
    plain, tract = Variant("plain"), Variant("tract", (("SOLVER.BASE_LR", "1"),))
    assert baseline_of(plain, [plain, tract], "plain") is None
    assert baseline_of(tract, [plain, tract], "plain") == plain
    other = Variant("tract", (("SOLVER.BASE_LR", "2"),))
    assert baseline_of(other, [tract, other], "tract") == tract


def test_a_sweep_s_value_may_have_commas_in_brackets():
    assert parse_sweep("SOLVER.STEPS=[1,2],[3]") == ("SOLVER.STEPS", ["[1,2]", "[3]"])
    for text in ("SOLVER.BASE_LR", "=1", "SOLVER.BASE_LR=1,,2", "SOLVER.BASE_LR=1,1"):
        with pytest.raises(UserError, match="--sweep"):
            parse_sweep(text)


def test_no_sweep_of_a_key_is_lost_to_another_of_the_same_key():
    assert parse_sweeps(["A=1,2", "B=3"]) == {"A": ["1", "2"], "B": ["3"]}
    with pytest.raises(UserError, match="--sweep A is there twice"):
        parse_sweeps(["A=1", "A=2"])


def test_a_key_that_no_config_has_yet_and_a_long_value_can_be_swept(tmp_path, images):
    sweeps = {"DEEPSPEED.comment": ["a", "b" * 300]}
    for run in build(design(tmp_path, images, arms=["plain"], sweeps=sweeps)).runs:
        assert all(len(part) < 256 for part in run.folder.parts) and not run.folder.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pairs": ["SEED", "3"]}, "SEED is set by the comparison: use --seeds"),
        ({"pairs": ["OUTPUT_DIR", "x"]}, "use --output"),
        ({"baseline": "frozen"}, "--baseline frozen is none of the arms plain, tract"),
        ({"arms": ["plane"]}, "there is no such arm"),
        ({"sweeps": {"SOLVER.BASE_RL": ["1"]}}, "did you mean 'SOLVER.BASE_LR'"),
        ({"arms": ["plain", "plain"]}, "an arm is there twice"),
        ({"sweeps": {"MODEL.TRACT.LAMBDA": ["0.1", "0.10"]}}, "would share the folder"),
        ({"lengths": [2.0, 2.0000001]}, "would share the folder"),
        ({"lengths": [2.0, 2.1]}, "--lengths 2 and 2.1 are the same training: 8 x 8 images"),
        ({"sweeps": {"SEED": ["0", "1"]}}, "SEED is set by the comparison: use --seeds"),
        ({"sweeps": {"OUTPUT_DIR": ["a", "b"]}}, "use --output"),
        ({"sweeps": {"SOLVER.EPOCHS": ["1", "2"]}}, "--sweep SOLVER.EPOCHS: .*--lengths"),
        ({"sweeps": {"DATASETS.LIMIT": ["8", "16"]}}, "--sweep DATASETS.LIMIT: .*same images"),
        (
            {"arms": ["plain"], "sweeps": {"MODEL.TRACT.LAMBDA": ["0.1"]}},
            "--sweep MODEL.TRACT.LAMBDA: none of the arms plain has TrAct on",
        ),
    ],
)
def test_mistakes_are_refused_before_the_first_run(tmp_path, images, changes, message):
    with pytest.raises(UserError, match=message):
        build(design(tmp_path, images, **changes))


def test_frozen_is_an_arm_where_there_are_weights(tmp_path, images):
    assert {run.variant.arm for run in build(design(tmp_path, images, arms=[])).runs} == {
        "plain", "tract",
    }  # fmt: skip
    pairs = ["MODEL.WEIGHTS", "weights.pth"]
    planned = build(design(tmp_path, images, arms=[], pairs=pairs))
    assert [variant.arm for variant in planned.variants] == ["frozen", "plain", "tract"]


# Folders


def write_run(planned, run, final):
    """What the trainer leaves, without the training."""
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(run.cfg.dump())
    entries = [
        {"iteration": run.steps // 2, "images_per_second": 10.0, planned.metric: final / 2},
        {
            "iteration": run.steps,
            "images_per_second": 10.0,
            planned.metric: final,
            "stem_turn": 12.0 + run.seed,
        },
    ]
    lines = "".join(json.dumps(entry) + "\n" for entry in entries)
    (run.folder / "metrics.jsonl").write_text(lines)
    (run.folder / "results.json").write_text("{}")


@pytest.fixture
def jobs(monkeypatch):
    """Those that would be started."""
    started = []
    monkeypatch.setattr(comparison_runs, "run_jobs", lambda jobs, *_, **__: started.extend(jobs))
    return started


def test_only_missing_runs_are_made(tmp_path, images):
    planned = build(design(tmp_path, images))
    for run in planned.runs[:3]:
        write_run(planned, run, 50.0)
    assert missing(planned) == list(planned.runs[3:])


def test_more_seeds_arms_and_lengths_add_runs_to_those_that_are_there(tmp_path, images):
    planned = build(design(tmp_path, images))
    for run in planned.runs:
        write_run(planned, run, 50.0)
    more = build(
        design(tmp_path, images, seeds=3, lengths=[5.0, 7.0], arms=["plain", "tract", "frozen"])
    )
    assert len(missing(more)) == 3 * 2 * 3 - 4


def test_a_diverged_run_is_not_made_again_and_counts_as_failed(tmp_path, images):
    planned = build(design(tmp_path, images))
    for run in planned.runs[1:]:
        write_run(planned, run, 50.0)
    planned.runs[0].folder.mkdir(parents=True)
    (planned.runs[0].folder / "diverged.txt").write_text("the loss is not finite at step 2")
    assert not missing(planned)
    (plain, tract), records = groups(planned)
    assert plain.runs[0] is None and list(tract.runs) == [0, 1]
    assert [record["status"] for record in records] == ["diverged", *["finished"] * 3]


def test_a_run_with_other_settings_is_not_taken_for_this_one(tmp_path, images):
    planned = build(design(tmp_path, images))
    write_run(planned, planned.runs[0], 50.0)
    other = build(design(tmp_path, images, pairs=["SOLVER.BASE_LR", "0.05"]))
    with pytest.raises(UserError, match=r"SOLVER.BASE_LR 0.1, and this one has 0.05.*--output"):
        missing(other)
    harmless = ["DATALOADER.NUM_WORKERS", "0", "TEST.EVAL_EPOCHS", "2.0", "LOG_PERIOD", "1"]
    assert len(missing(build(design(tmp_path, images, pairs=harmless)))) == 3


def note_images(planned, run, **changes):
    """The record of its images that a run leaves."""
    start = provenance.describe(torch.device("cpu")) | {"images": dict(planned.images)} | changes
    (run.folder / "provenance.json").write_text(json.dumps([start]))


def test_a_run_on_other_images_is_not_taken_for_this_one(tmp_path, images):
    planned = build(design(tmp_path / "out", images))
    for run in planned.runs:
        write_run(planned, run, 50.0)
        note_images(planned, run)
    moved = tmp_path / "moved"
    shutil.copytree(images, moved)
    assert not missing(build(design(tmp_path / "out", moved)))
    for part, name in (("evaluation", "val"), ("training", "train")):
        for image in (moved / name).rglob("*.png"):
            image.write_bytes(image.read_bytes() + b"other, of the same name")
        with pytest.raises(UserError, match=f"other {part} images than those of .*{moved}.*--out"):
            missing(build(design(tmp_path / "out", moved)))


def test_runs_by_other_code_are_said_before_others_are_added(tmp_path, images, jobs, capsys):
    planned = build(design(tmp_path, images))
    for run in planned.runs[:3]:
        write_run(planned, run, 50.0)
        note_images(planned, run)
    run_missing(planned, [{}], None)
    assert "warning" not in capsys.readouterr().out
    note_images(planned, planned.runs[1], commit="0123456789")
    run_missing(planned, [{}], None)
    printed = capsys.readouterr().out
    assert re.search(r"warning: runs in .* were made by .* commit 0123456789, .*--output", printed)


def test_a_run_from_before_a_key_was_added_still_counts(tmp_path, images):
    run = build(design(tmp_path, images)).runs[0]
    tree = yaml.safe_load(run.cfg.dump())
    del tree["INPUT"]["ROTATION"]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    refuse_other_settings(run)


@pytest.mark.parametrize("text", [None, "", "SEED: 0\nSOLV"])
def test_a_run_whose_settings_cannot_be_told_is_refused_with_the_mend(tmp_path, images, text):
    planned = build(design(tmp_path, images))
    folder = planned.runs[0].folder
    write_run(planned, planned.runs[0], 50.0)
    (folder / "config.yaml").unlink()
    if text is not None:
        (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"{folder}/config.yaml .*: delete {folder} to make"):
        missing(planned)


def save(folder, step, *, evaluated):
    """A checkpoint of so many steps, of a model of no weights."""
    engine = SimpleNamespace(module=nn.Linear(1, 1), device=torch.device("cpu"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.ds, "whole_model", lambda engine: engine.module)
        patch.setattr(checkpoint.optimizer_state, "part_of", lambda engine: {})
        best = {"best": 50.0, "best_step": 1, "since": 0, "evaluated": evaluated}
        checkpoint.save(
            engine, folder, step, keep=2, shared={"best": best}, per_rank={}, identity={}
        ).result()


def stopped_run(tmp_path, images):
    """A run of four epochs that was stopped after three, evaluated at two."""
    planned = build(design(tmp_path, images, lengths=[4.0], seeds=1, arms=["plain"]))
    (run,) = planned.runs
    write_run(planned, run, 50.0)
    lines = (run.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run.folder / "metrics.jsonl").write_text(lines[0])
    (run.folder / "results.json").unlink()
    save(run.folder, 12, evaluated=8)
    return planned, run.folder


def test_a_stopped_run_goes_on_whatever_last_checkpoint_says(tmp_path, images, jobs):
    planned, folder = stopped_run(tmp_path, images)
    (folder / "last_checkpoint").write_text("")
    run_missing(planned, [{}], None)
    assert "--resume" in jobs[0].command and not list(folder.glob("previous-*"))


def test_a_run_that_cannot_go_on_is_made_again_and_the_reason_said(tmp_path, images, jobs, capsys):
    def cut_metrics(folder):
        (folder / "metrics.jsonl").write_text("")

    def cut_checkpoint(folder):
        for path in folder.glob("checkpoints/*/*"):
            path.write_bytes(b"")

    def lose_evaluation(folder):
        (folder / "results.json").write_text("{}")
        shutil.rmtree(folder / "checkpoints")

    for number, (damage, why) in enumerate(
        [
            (cut_metrics, "metrics.jsonl lacks evaluations before the checkpoint"),
            (cut_checkpoint, "no checkpoint in .* is whole"),
            (lose_evaluation, "metrics.jsonl lacks the last evaluation"),
        ]
    ):
        planned, folder = stopped_run(tmp_path / str(number), images)
        damage(folder)
        run_missing(planned, [{}], None)
        assert "--resume" not in jobs[-1].command
        assert re.search(f"plain, 4 epochs, seed 0 is made again: .*{why}", capsys.readouterr().out)
        assert (folder / "previous-1/config.yaml").is_file()


def test_the_report_has_a_table_verdicts_a_picture_and_every_run(tmp_path, images, capsys):
    planned = build(design(tmp_path, images, seeds=3))
    for run in planned.runs[:-1]:
        bonus = 3 + 0.2 * run.seed if run.variant.arm == "tract" else 0
        write_run(planned, run, 50.0 + run.seed + bonus)
        # The difference is 2 points higher in one half of the samples than in the other.
        values = np.repeat([0.0, 2.0 * (run.variant.arm == "tract")], 500)
        figure = 50.0 + run.seed + bonus
        write_samples(run.folder, ["a", "b"], {"top1": figure}, {"top1": values})
    report(planned, "tract-det compare")
    printed = capsys.readouterr().out
    assert "tract is better than plain by 3.1 points" in printed
    page = (tmp_path / "comparison.md").read_text()
    assert page.startswith("# Comparison of plain, tract\n\n`tract-det compare`")
    assert page[page.index("| arm") :].strip() in printed
    content = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["status"] for run in content["runs"]] == ["finished"] * 5 + ["missing"]
    assert content["runs"][0]["curve"]["values"] == [25.0, 50.0]
    assert content["verdicts"][0].startswith("tract")
    assert (tmp_path / "comparison.png").stat().st_size > 10_000
    words = "for these weights, over all images like the 2 of the test: 2.1 to 4.1 (95 % interval)"
    assert words in content["verdicts"][0]
    interval = content["rows"][1]["over_images"]
    assert interval == pytest.approx({"low": 2.1, "high": 4.1, "images": 2, "n": 2})
    for text in (page, (tmp_path / "comparison.html").read_text()):
        assert "over 2 images" in text and "+2.10 to +4.10" in text
        assert "stem turned" in text and "13°" in text and "12°" in text  # of three seeds, of two
    *_, missing_run = content["verdicts"]
    assert missing_run.startswith("1 of 6 runs are missing here: tract, 5 epochs, seed 2")
    for sentence in content["verdicts"]:
        assert sentence in page and sentence in (tmp_path / "comparison.html").read_text()


def test_nothing_finished_is_said(tmp_path, images):
    with pytest.raises(UserError, match="is finished: nothing to compare yet"):
        report(build(design(tmp_path, images)), "")


def test_a_run_that_ended_unwatched_is_tidied_or_completed_and_not_made_again(
    tmp_path, images, jobs
):
    planned = build(design(tmp_path, images, seeds=1))
    for run in planned.runs:
        write_run(planned, run, 50.0)
        save(run.folder, run.steps, evaluated=run.steps)
    whole, torn = (run.folder for run in planned.runs)
    (whole / "report.html").write_text("the last that a run writes")
    assert run_missing(planned, [{}], None) == 0 and has_results(planned)
    assert [job.name for job in jobs] == [planned.runs[1].name] and "--resume" in jobs[0].command
    assert not (whole / "checkpoints").exists() and (torn / "checkpoints").exists()


def test_runs_beside_each_other_take_as_long_as_the_last_of_them():
    assert seconds_beside([3.0, 3.0, 3.0], 1) == 9
    assert seconds_beside([3.0, 3.0, 3.0], 2) == 6
    assert seconds_beside([3.0], 4) == 3 and seconds_beside([], 2) == 0


def test_that_every_run_diverged_is_said(tmp_path, images):
    planned = build(design(tmp_path, images))
    for run in planned.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "diverged.txt").write_text("the loss is not finite at step 2")
    with pytest.raises(UserError, match="is finished: 4 of 4 diverged"):
        report(planned, "")


def test_a_run_s_configuration_is_that_of_its_command(tmp_path, images):
    for run in build(design(tmp_path, images)).runs:
        _, *arguments = run.arguments
        pairs = arguments[arguments.index(run.variant.arm) + 1 :]
        assert load_cfg(CLASSIFIER, pairs, run.variant.arm) == run.cfg

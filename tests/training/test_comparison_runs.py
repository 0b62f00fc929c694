"""The runs of a comparison as they are found, made and reported."""

import json
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml

from tests.conftest import REPO
from tests.training.comparisons import design, save, write_run
from tests.training.image_folder import write_image_folder
from tract_det.config.classification import get_cfg
from tract_det.engine import provenance
from tract_det.engine.jobs import Ended
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.samples import write_samples
from tract_det.training import comparison_runs
from tract_det.training.comparison import build
from tract_det.training.comparison_folders import has_results, missing, refuse_other_settings
from tract_det.training.comparison_runs import groups, report, run_missing


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return write_image_folder(tmp_path_factory.mktemp("images"))  # 32 for training


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
    with pytest.raises(UserError, match=r"SOLVER.BASE_LR was 0.1, now it is 0.05.*--output"):
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
    refuse_other_settings(run, get_cfg())


@pytest.mark.parametrize("text", [None, "", "SEED: 0\nSOLV", "THRESHOLD: 3"])
def test_a_run_whose_settings_cannot_be_told_is_refused_with_the_mend(tmp_path, images, text):
    planned = build(design(tmp_path, images))
    folder = planned.runs[0].folder
    write_run(planned, planned.runs[0], 50.0)
    (folder / "config.yaml").unlink()
    if text is not None:
        (folder / "config.yaml").write_text(text)
    with pytest.raises(UserError, match=rf"{folder}/config.yaml .*: delete {folder} to make"):
        missing(planned)


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
        values = np.repeat([2.1, 4.1], 500) * (run.variant.arm == "tract")
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


def test_that_every_run_diverged_is_said(tmp_path, images):
    planned = build(design(tmp_path, images))
    for run in planned.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "diverged.txt").write_text("the loss is not finite at step 2")
    with pytest.raises(UserError, match="is finished: 4 of 4 diverged"):
        report(planned, "")


@pytest.fixture
def ending(monkeypatch):
    """Jobs end at once: by the exit codes of the mapping, or else as finished runs."""
    codes = {}

    def run_jobs(jobs, environments, *, lock, on_end):
        for job in jobs:
            job.log.write_text("step 40/100 loss 1.2\n")
            on_end(Ended(job, codes.get(job.name, 0), 1.0))
        return 0

    monkeypatch.setattr(comparison_runs, "run_jobs", run_jobs)
    return codes


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (143, "stopped, its checkpoint is saved"),
        (-9, "killed by SIGKILL; the end of .*log.txt: step 40/100 loss 1.2"),
        (2, "failed: step 40/100 loss 1.2 .see .*log.txt"),
        (0, "failed: step 40/100"),  # without its files
    ],
)
def test_runs_that_have_not_finished_leave_an_exit_code(
    tmp_path, images, ending, capsys, code, words
):
    planned = build(design(tmp_path, images, seeds=1))
    ending[planned.runs[0].name] = DivergedError.exit_code
    ending[planned.runs[1].name] = code
    assert run_missing(planned, [{}], None) == 1
    printed = capsys.readouterr().out
    assert re.search(words, printed) and re.search(
        r"diverged: .*, delete .*plain/5-epochs", printed
    )
    assert [run.variant.arm for run in missing(planned)] == ["tract"]


def test_an_evaluation_without_a_figure_costs_a_run_no_more_than_that(tmp_path, images):
    planned = build(design(tmp_path, images, seeds=1))
    early, late = planned.runs
    for run in planned.runs:
        write_run(planned, run, 50.0)
    path = early.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("25.0", "null"))
    path = late.folder / "metrics.jsonl"
    path.write_text(path.read_text().replace("50.0", "null"))
    assert not missing(planned)
    (plain, tract), records = groups(planned)
    assert plain.runs[0].values.tolist() == [50.0] and tract.runs[0] is None
    assert [record["status"] for record in records] == ["finished", "diverged"]


def test_a_run_of_which_another_process_writes_is_left_alone(tmp_path, images, jobs):
    planned = build(design(tmp_path, images, seeds=1))
    write_run(planned, planned.runs[0], 50.0)
    (planned.runs[0].folder / "results.json").unlink()
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(str(planned.runs[0].folder))],
        stdout=subprocess.PIPE, stdin=subprocess.PIPE, cwd=REPO,
    )  # fmt: skip
    with holder:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match="is in use by process"):
            run_missing(planned, [{}], None)
        holder.stdin.close()
    assert (planned.runs[0].folder / "config.yaml").is_file() and not jobs


HOLD = """
import sys
from pathlib import Path
from tract_det.engine.run_folder import sole_use
with sole_use(Path({!r})):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("stems", [["nothere", "conv1"], ["conv1", "nothere"]])
def test_a_value_that_no_model_can_have_is_refused_before_the_first_run(
    tmp_path, images, jobs, stems
):
    planned = build(design(tmp_path, images, sweeps={"MODEL.TRACT.STEM": stems}, seeds=1))
    with pytest.raises(UserError, match=r"^arm tract STEM=nothere: "):
        run_missing(planned, [{}], None)
    assert not jobs


def test_a_key_that_an_older_run_does_not_have_has_had_its_default(tmp_path, images):
    run = build(design(tmp_path, images, pairs=["SOLVER.STEM.LR_FACTOR", "10.0"])).runs[0]
    tree = yaml.safe_load(run.cfg.dump())
    del tree["SOLVER"]["STEM"]
    run.folder.mkdir(parents=True)
    (run.folder / "config.yaml").write_text(yaml.safe_dump(tree))
    with pytest.raises(UserError, match=r"SOLVER.STEM.LR_FACTOR was 1.0, now it is 10.0"):
        refuse_other_settings(run, get_cfg())

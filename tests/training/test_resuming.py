"""Runs that stop and go on: what they share, what is spared, and what is damaged."""

import json
import os
import pickle
import shutil
import subprocess
import sys
import zipfile

import pytest
import torch

from tests.conftest import REPO, tiny_options
from tests.training.image_folder import options
from tests.training.runs import assert_same_bits, log, results, run_here, weights
from tract_det.cli import call
from tract_det.engine import checkpoint, manifest
from tract_det.errors import DivergedError, UserError
from tract_det.evaluation.runs import read_run

EVERY_STEP = {"SOLVER__MAX_ITER": 4, "SOLVER__CHECKPOINT_EPOCHS": 0.01, "SOLVER__OPTIMIZER": "Adam"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory, folder):
    """A run of four steps with a checkpoint at each."""
    output = tmp_path_factory.mktemp("finished") / "run"
    run_here("pretrain", *options(folder, output, MODEL__EMA__ENABLED=True, **EVERY_STEP))
    return output


def contents(output):
    return {p.relative_to(output): p.read_bytes() for p in output.rglob("*") if p.is_file()}


# Patience

# Nothing is learnt, so that the first evaluation is the best.
PATIENT = {
    "SOLVER__MAX_ITER": 40, "SOLVER__BASE_LR": 1e-30, "SOLVER__PATIENCE": 3, "LOG_PERIOD": 3,
    "TEST__EVAL_EPOCHS": 0.25, "SOLVER__CHECKPOINT_EPOCHS": 0.01, "SOLVER__CHECKPOINT_KEEP": 9,
}  # fmt: skip


@pytest.fixture(scope="module")
def patient(tmp_path_factory, folder):
    output = tmp_path_factory.mktemp("patient") / "run"
    return output, run_here("pretrain", *options(folder, output, **PATIENT))


def test_evaluations_without_a_better_figure_end_the_training_in_order(patient):
    output, printed = patient
    stopped = results(output)["stopped"]
    assert (stopped["step"], stopped["of"]) == (
        4,
        40,
    ) and "the training ends after step 4" in printed
    assert "SOLVER.PATIENCE 3: no top1 above" in stopped["why"] and "of step 1" in stopped["why"]
    assert (output / "model_final.pth").is_file()
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    assert [line["iteration"] for line in lines if "top1" in line] == [1, 2, 3, 4]
    assert [line["iteration"] for line in lines if "loss" in line] == [3, 4]
    assert read_run(output, "top1", steps=40, batch=8, images=32).is_finished


@pytest.mark.parametrize("step", [2, 4])
def test_a_resumed_run_counts_its_evaluations_on(folder, patient, tmp_path, step):
    shutil.copytree(patient[0], tmp_path / "run")
    (tmp_path / "run/last_checkpoint").write_text(f"iter_000000{step}\n")
    (tmp_path / "run/results.json").unlink()
    run_here("pretrain", "--resume", *options(folder, tmp_path / "run", **PATIENT))
    assert results(tmp_path / "run") == results(patient[0])
    for key in ("loss", "top1"):
        assert log(tmp_path / "run", key) == log(patient[0], key)
    count = len((patient[0] / "metrics.jsonl").read_text().splitlines())
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == count


def test_with_more_patience_a_run_goes_on_and_at_its_full_length_nothing_ended_it(
    folder, patient, tmp_path
):
    shutil.copytree(patient[0], tmp_path / "run")
    changes = {**PATIENT, "SOLVER__PATIENCE": 9, "SOLVER__MAX_ITER": 6}
    run_here("pretrain", "--resume", *options(folder, tmp_path / "run", **changes))
    assert "stopped" not in results(tmp_path / "run")
    assert sorted(log(tmp_path / "run", "top1")) == [1, 2, 3, 4, 5, 6]


# Which checkpoint


def test_the_newest_checkpoints_are_kept_and_hold_nothing_but_plain_values(finished):
    names = sorted(path.name for path in (finished / "checkpoints").iterdir())
    assert names == ["iter_0000002", "iter_0000003", "iter_0000004"]
    assert checkpoint.newest(finished).iteration == 4
    for path in (finished / "checkpoints").rglob("*.pt"):
        torch.load(path, weights_only=True)


def flip(path, at):
    """Flips a bit."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1 << (at % 8)
    path.write_bytes(bytes(content))


DAMAGE = {
    "empty": lambda path: path.write_bytes(b""),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "missing": lambda path: path.unlink(),
    "first bit": lambda path: flip(path, 0),
    "a bit": lambda path: flip(path, path.stat().st_size // 3),
    "last bit": lambda path: flip(path, path.stat().st_size - 1),
}


@pytest.mark.parametrize("name", ["model.pt", "rank_0000.pt", "manifest.json"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    finished, tmp_path, capsys, name, damage
):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    DAMAGE[damage](tmp_path / "checkpoints/iter_0000004" / name)
    is_harmless = name == "manifest.json" and damage == "cut"  # the line's end
    assert checkpoint.newest(tmp_path).iteration == (4 if is_harmless else 3)
    printed = capsys.readouterr().out
    assert is_harmless or (
        "iter_0000004 is damaged: " + name in printed and "passed over" in printed
    )


@pytest.mark.parametrize("name", ["model.pt", "rank_0000.pt"])
def test_every_byte_of_a_file_counts(finished, tmp_path, name):
    """Of the archive's own structure too; a prime stride passes over all kinds of places."""
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    path = tmp_path / "checkpoints/iter_0000004" / name
    size = path.stat().st_size
    for at in [
        *range(0, 400, 13),
        *range(400, size - 3000, size // 40),
        *range(size - 3000, size, 41),
    ]:
        flip(path, at)
        with pytest.raises(UserError, match="is damaged"):
            manifest.read(path.parent)
        flip(path, at)
    assert manifest.read(path.parent)


def test_every_bit_of_a_manifest_counts(tmp_path):
    """Or changes nothing that is read. The files are tiny, as they are read again each time."""
    for iteration in (3, 4):
        folder = tmp_path / f"checkpoints/iter_000000{iteration}"
        folder.mkdir(parents=True)
        contents = {"model.pt": {"a": torch.ones(5)}, "rank_0000.pt": {"b": torch.ones(3)}}
        files = checkpoint._write(folder, contents)
        manifest.write(folder, {"files": files, "identity": {"SEED": 0, "the classes": ["a"]}})
    path, sound = folder / "manifest.json", checkpoint.newest(tmp_path)
    whole = path.read_bytes()
    for at in range(0, 8 * len(whole), 3):
        broken = bytearray(whole)
        broken[at // 8] ^= 1 << (at % 8)
        path.write_bytes(bytes(broken))
        newest = checkpoint.newest(tmp_path)
        assert newest == sound or newest.iteration == 3


@pytest.mark.parametrize("pointer", [b"", b"\xff\x00garbage", b"iter_0000009", b"../../etc", None])
def test_a_pointer_that_names_no_checkpoint_is_passed_over(finished, tmp_path, pointer):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    if pointer is not None:
        (tmp_path / "last_checkpoint").write_bytes(pointer)
    assert checkpoint.newest(tmp_path).iteration == 4


def test_from_a_damaged_checkpoint_or_an_older_one_a_run_ends_the_same(folder, finished, tmp_path):
    """The newest is damaged, and the pointer is edited: both go on to the same bits."""
    changes = {"MODEL__EMA__ENABLED": True, **EVERY_STEP}
    shutil.copytree(finished, tmp_path / "damaged")
    flip(tmp_path / "damaged/checkpoints/iter_0000004/model.pt", 5000)
    shutil.copytree(finished, tmp_path / "older")
    (tmp_path / "older/last_checkpoint").write_text("iter_0000002\n")
    for name, step in (("damaged", 3), ("older", 2)):
        output = tmp_path / name
        (output / "model_final.pth").unlink()
        printed = run_here("pretrain", "--resume", *options(folder, output, **changes))
        assert f"at step {step}" in printed
        assert_same_bits(output, finished, ["model_final.pth", "model_final_ema.pth"])
        assert log(output) == log(finished)
        names = sorted(path.name for path in (output / "checkpoints").iterdir())
        assert names == ["iter_0000002", "iter_0000003", "iter_0000004"]


def test_no_whole_checkpoint_is_said_with_every_fault(finished, tmp_path):
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    for path in (tmp_path / "checkpoints").rglob("model.pt"):
        path.unlink()
    with pytest.raises(UserError, match=r"no checkpoint is whole: .*0004.*0003.*0002.*--overwrite"):
        checkpoint.newest(tmp_path)


class Attack:
    def __reduce__(self):
        return (os.system, ("touch executed",))


def test_a_foreign_checkpoint_runs_no_code(finished, tmp_path, monkeypatch):
    """Its checksums fit, as its author has made them."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "checkpoints", tmp_path / "checkpoints")
    target = tmp_path / "checkpoints/iter_0000004"
    with zipfile.ZipFile(target / "model.pt", "w") as archive:
        archive.writestr("archive/data.pkl", pickle.dumps(Attack(), protocol=2))
        archive.writestr("archive/version", "3\n")
    content = json.loads((target / "manifest.json").read_text())["content"]
    content["files"]["model.pt"] = manifest.described(target / "model.pt", from_disk=True)
    manifest.write(target, content)
    with pytest.raises(UserError, match=r"model\.pt is not one of tract_det's checkpoints"):
        checkpoint.newest(tmp_path).shared()
    assert not (tmp_path / "executed").exists()


def test_a_checkpoint_of_deepspeeds_own_form_is_named_as_such(tmp_path):
    (tmp_path / "checkpoints/iter_0000002").mkdir(parents=True)
    (tmp_path / "checkpoints/iter_0000002/mp_rank_00_model_states.pt").touch()
    with pytest.raises(UserError, match="is of an earlier version: finish the run with that"):
        checkpoint.newest(tmp_path)


# Whose folder


def test_a_new_run_spares_an_old_one_until_told_to_move_it_aside(folder, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    before = contents(output)
    arguments = options(folder, output, **EVERY_STEP)
    with pytest.raises(UserError, match=r"holds a run up to step 4: give --resume .*--overwrite"):
        call("pretrain", arguments)
    assert contents(output) == before
    run_here("pretrain", "--overwrite", *arguments)
    assert contents(output / "previous-1") == before
    assert (output / "model_final.pth").is_file() and not (output / ".lock").exists()


def test_a_refused_run_leaves_no_folder(tmp_path):
    with pytest.raises(UserError):
        call("pretrain", options(tmp_path / "missing", tmp_path / "a/b"))
    assert not (tmp_path / "a").exists()


def test_a_second_run_beside_a_living_one_is_refused_and_a_dead_ones_lock_is_free(folder, tmp_path):
    output = tmp_path / "run"
    program = (
        "import sys, time\n"
        "from pathlib import Path\n"
        "from tract_det.engine import run_folder\n"
        "with run_folder.sole_use(Path(sys.argv[1])):\n"
        "    print('locked', flush=True)\n"
        "    time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", program, output], stdout=subprocess.PIPE, text=True, cwd=REPO
    )
    assert owner.stdout.readline() == "locked\n"
    arguments = options(folder, output, SOLVER__MAX_ITER=1)
    try:
        for start in ([], ["--overwrite"], ["--resume"]):
            with pytest.raises(UserError, match=rf"is in use by process {owner.pid} on .* since"):
                call("pretrain", [*start, *arguments])
        assert [path.name for path in output.iterdir()] == [".lock"]
    finally:
        owner.kill()
        owner.wait()
    assert (output / ".lock").is_file()
    run_here("pretrain", *arguments)
    assert (output / "model_final.pth").is_file() and not (output / ".lock").exists()


# What is shared


@pytest.mark.parametrize(
    "changes",
    [
        {"SOLVER__WEIGHT_DECAY": 0.3},
        {"SOLVER__BETAS": "[0.8, 0.99]"},
        {"SOLVER__EPS": 1e-3},
        {"SOLVER__WARMUP_EPOCHS": 1.0},
        {"SOLVER__AMP__ENABLED": True},
        {"MODEL__NORM": "BN"},
        {"MODEL__BACKBONE__FREEZE_AT": 1, "MODEL__TRACT__ENABLED": False},
        {"MODEL__EMA__DECAY": 0.5},
        {"INPUT__FLIP_PROB": 0.1},
        {"SEED": 5},
        {"TEST__BEST_METRIC": "top5"},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_what_a_resumed_run_must_share_is_named(folder, finished, changes):
    before = contents(finished)
    keys = {"MODEL__EMA__ENABLED": True, **EVERY_STEP, **changes}
    with pytest.raises(UserError) as refusal:
        call("pretrain", ["--resume", *options(folder, finished, **keys)])
    for key, value in changes.items():
        assert f"{key.replace('__', '.')} was" in str(refusal.value).replace("[0]", ""), value
    assert contents(finished) == before


def test_lengths_rates_and_readers_may_change(folder, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    changes = {
        **EVERY_STEP, "MODEL__EMA__ENABLED": True, "SOLVER__MAX_ITER": 6, "SOLVER__BASE_LR": 0.0,
        "DATALOADER__NUM_WORKERS": 1, "SOLVER__CHECKPOINT_KEEP": 1, "LOG_PERIOD": 2,
    }  # fmt: skip
    changes["SOLVER__BASE_LR"] = 1e-30
    printed = run_here("pretrain", "--resume", *options(folder, tmp_path / "run", **changes))
    assert "at step 4" in printed
    old, new = weights(finished), weights(tmp_path / "run")
    moved = [k for k, v in new.items() if "running" not in k and "tracked" not in k]
    assert all(torch.allclose(new[key], old[key], atol=1e-6) for key in moved)
    assert [p.name for p in (tmp_path / "run/checkpoints").iterdir()] == ["iter_0000006"]


def test_classes_in_another_order_or_of_other_names_are_refused(voc_tree, tmp_path):
    """Whether the configuration names them or the annotations do."""
    tree, output = tmp_path / "tree", tmp_path / "run"
    shutil.copytree(voc_tree, tree)
    changes = {"SOLVER__MAX_ITER": 1, "DATASETS__CLASSES": "[]"}
    run_here("train", *tiny_options(tree, output, **changes))
    changes["DATASETS__CLASSES"] = "[disc, box]"
    with pytest.raises(UserError, match=r"DATASETS.CLASSES was \[\], now it is \['disc', 'box'\]"):
        call("train", ["--resume", *tiny_options(tree, output, **changes)])
    changes["DATASETS__CLASSES"] = "[]"
    for xml in (tree / "Annotations").glob("*.xml"):
        xml.write_text(xml.read_text().replace(">disc<", ">ball<"))
    with pytest.raises(UserError, match=r"the classes\[0\] was 'box', now it is 'ball'"):
        call("train", ["--resume", *tiny_options(tree, output, **changes)])


# What is left of a run that diverged


def test_a_divergence_leaves_its_losses_and_what_replays_it(folder, tmp_path):
    changes = {
        "SOLVER__BASE_LR": 1e6, "SOLVER__MAX_ITER": 40, "LOG_PERIOD": 40,
        "SOLVER__CHECKPOINT_EPOCHS": 9,
    }  # fmt: skip
    arguments = options(folder, tmp_path / "run", **changes)
    with pytest.raises(DivergedError):
        call("pretrain", arguments)
    replay = json.loads((tmp_path / "run/diverged_rank_0.json").read_text())
    assert len(replay["images"]) == 8 and replay["seed"] == 0 and replay["checkpoint"] == 0
    assert list(log(tmp_path / "run")) == list(range(1, replay["step"]))
    assert replay["replay"].endswith("LOG_PERIOD 1")

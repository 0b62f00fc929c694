"""The table and the verdicts follow the runs."""

import numpy as np

from tract_det.evaluation.comparison import Curve
from tract_det.evaluation.comparison_report import Group, judge, table, unfinished, verdicts


def curve(*values, epochs=None):
    epochs = len(values) if epochs is None else epochs
    return Curve(np.linspace(epochs / len(values), epochs, len(values)), np.array(values, float))


def group(arm, finals, *, baseline="plain", seconds=1.0, epochs=2.0):
    runs = {
        seed: None if final is None else curve(final / 2, final, epochs=epochs)
        for seed, final in enumerate(finals)
    }
    times = {seed: seconds for seed, run in runs.items() if run is not None}
    return Group(arm, epochs, runs, times, baseline)


PLAIN = group("plain", [50, 52, 54], baseline=None)


def cells(*groups):
    header, _, *lines = table(judge(groups), "top1").splitlines()
    names = [cell.strip() for cell in header.strip("|").split("|")]
    return [
        dict(zip(names, (cell.strip() for cell in line.strip("|").split("|")), strict=True))
        for line in lines
    ]


def test_the_differences_are_within_seeds():
    row = cells(PLAIN, group("tract", [53, 55, 57.3]))[1]
    assert row["top1, %"] == "55.10 ± 2.15"
    assert row["against plain"] == "+3.10 (+2.67 to +3.53)"
    only_seed_2 = cells(PLAIN, group("tract", [None, None, 57]))[1]
    assert only_seed_2["against plain"] == "+3.00"  # 57 - 54, not 57 - 52
    assert only_seed_2["runs"] == "1, 2 failed"


def test_the_cost_is_a_ratio_of_training_times():
    assert cells(PLAIN, group("tract", [53, 55, 57], seconds=1.5))[1]["time"].startswith("x 1.50")


def test_a_time_that_is_not_recorded_is_no_ratio():
    assert cells(PLAIN, group("tract", [53, 55, 57], seconds=0.0))[1]["time"] == ""


def test_a_shorter_training_is_also_held_against_the_longest():
    full = group("plain", [60, 62, 64], baseline=None, epochs=4.0)
    short, long = group("tract", [59, 61, 63]), group("tract", [66, 68, 70], epochs=4.0)
    rows = cells(PLAIN, full, short, long)
    assert rows[2]["against plain"].startswith("+9.00")
    assert rows[2]["against plain at 4 epochs"].startswith("-1.00")
    assert rows[3]["against plain at 4 epochs"] == ""
    assert rows[0]["against plain at 4 epochs"].startswith("-10.00")


def test_verdicts_are_on_complete_trainings_of_the_greatest_length():
    full = group("plain", [60, 62, 64], baseline=None, epochs=4.0)
    short, long = group("tract", [59, 61.1, 63]), group("tract", [66, 68, 70.3], epochs=4.0)
    (sentence,) = verdicts(judge([PLAIN, full, short, long]))
    assert sentence.startswith("At 4 epochs: tract is better than plain by 6.1 points")
    assert "speed-up over lengths: 1.8" in sentence


def test_a_speed_up_is_over_the_seeds_that_both_finished():
    """On each seed the arm is the baseline; it has finished but the easiest."""
    tract = group("tract", [None, None, 54])
    assert cells(PLAIN, tract)[1]["speed-up"] == "1.00"
    assert "speed-up within one length: 1.00 (one seed)" in verdicts(judge([PLAIN, tract]))[0]


def test_the_speed_up_over_a_flat_baseline_stands_beside_that_of_the_baseline_itself():
    flat = curve(52, 50, 53, 52)  # it is at its final figure from the first of four evaluations
    plain, tract = (
        Group(arm, 4.0, {0: flat}, {0: 1.0}, baseline)
        for arm, baseline in (("plain", None), ("tract", "plain"))
    )
    rows = cells(plain, tract)
    assert [row["speed-up"] for row in rows] == ["", "> 4.00; plain itself > 4.00"]
    assert "itself" not in cells(PLAIN, group("tract", [50, 52, 54]))[1]["speed-up"]


def test_a_speed_up_without_an_interval_is_called_uncertain():
    """All reach the mean of 50, 52 and 54; without seed 0 it is 53, which seed 2 never reaches."""
    row = cells(PLAIN, group("tract", [60, 60, 52.5]))[1]
    assert row["speed-up"].endswith(" (uncertain)")


def test_runs_that_are_missing_are_named():
    def run(arm, seed, status):
        return {"arm": arm, "epochs": 5.0, "seed": seed, "status": status}

    finished = [run("plain", 0, "finished"), run("plain", 1, "diverged")]
    assert unfinished(finished) == []
    (sentence,) = unfinished(
        [
            *finished,
            run("tract", 0, "missing"),
            run("plain", 2, "missing"),
            run("tract", 3, "missing"),
        ]
    )
    assert sentence == (
        "3 of 5 runs are missing here: tract, 5 epochs, seed 0, 3; plain, 5 epochs, seed 2; the "
        "same command makes them."
    )


def test_an_arm_without_a_finished_run_is_said_to_have_none():
    failed = group("tract", [None, None, None])
    assert verdicts(judge([PLAIN, failed])) == ["tract: no seed was finished by it and by plain."]
    row = cells(PLAIN, failed)[1]
    assert row["runs"] == "0, 3 failed" and row["top1, %"] == "" == row["against plain"]


def test_baselines_that_differ_are_not_named_in_the_heading():
    other = group("plain b", [50, 52, 54], baseline=None)
    row = cells(
        PLAIN, other, group("tract", [53, 55, 57]), group("t", [1, 2, 3], baseline="plain b")
    )
    assert "against its baseline" in row[0]

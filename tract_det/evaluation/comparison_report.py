"""The result of a comparison in words and as a table."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from statistics import geometric_mean, mean
from typing import Any

from tract_det.evaluation.comparison import (
    Arm,
    Curve,
    Difference,
    Interval,
    Summary,
    of_common_seeds,
    paired_difference,
    summarize,
)
from tract_det.evaluation.comparison_words import verdict
from tract_det.evaluation.samples import OverImages, Samples, over_images
from tract_det.evaluation.speed_up import SpeedUp, speed_up, speed_up_of_flat, speed_up_over_lengths
from tract_det.evaluation.student_t import t_interval


@dataclass(frozen=True)
class Group:
    """The runs of an arm at one length.

    Attributes:
        arm: its name.
        epochs: length.
        runs: the run of each seed; None if it failed.
        seconds: training time of each finished run, by seed.
        baseline: the arm that it is judged against; None = it is a baseline.
        samples: the figures of finished runs in samples of the test images, by seed.
        stem_turns: by how many degrees the stem's filters have turned in finished runs, by seed;
            without those where it is unknown.
        hardware: what each finished run was made on, by seed.
    """

    arm: str
    epochs: float
    runs: Mapping[int, Curve | None]
    seconds: Mapping[int, float]
    baseline: str | None
    samples: Mapping[int, Samples | None] = field(default_factory=dict)
    stem_turns: Mapping[int, float] = field(default_factory=dict)
    hardware: Mapping[int, str] = field(default_factory=dict)

    def as_arm(self) -> Arm:
        """For the functions of `comparison`."""
        return Arm(self.arm, self.runs)


@dataclass(frozen=True)
class Cost:
    """Training time of an arm over that of its baseline: geometric mean over n common seeds.

    Attributes:
        ratio: 1.05 is 5 % longer.
        interval: 95 % by Student's t on the logarithms; None for n = 1.
        n: number of pairs.
    """

    ratio: float
    interval: Interval | None
    n: int


@dataclass(frozen=True)
class Row:
    """A group with what is said of it. None where there is no baseline or no finished pair.

    Attributes:
        group: the runs.
        summary: of the final metrics.
        difference: to the baseline at the same length.
        over_images: its interval over the test images, for these weights.
        to_longest: to the baseline at its greatest length, for a shorter group.
        speed_up: within this length.
        baseline_over_itself: the same of a baseline without progress before its end, for which the
            speed-up says nothing; None for others.
        cost: of a run, against the baseline's at the same length; None also where the time of a
            run is not recorded, or where the two were not made on the same hardware.
        stem_turn: the mean of the group's, in degrees; of the weights themselves, also where the
            metric is that of their moving average.
    """

    group: Group
    summary: Summary
    difference: Difference | None
    over_images: OverImages | None
    to_longest: Difference | None
    speed_up: SpeedUp | None
    baseline_over_itself: SpeedUp | None
    cost: Cost | None
    stem_turn: float | None


def judge(groups: Sequence[Group]) -> list[Row]:
    """A row for each group, in their order."""
    by_key = {(group.arm, group.epochs): group for group in groups}
    longest = max(group.epochs for group in groups)
    return [
        _row(
            group,
            by_key.get((group.baseline or "", group.epochs)),
            by_key.get((group.baseline or group.arm, longest)) if group.epochs < longest else None,
        )
        for group in groups
    ]


def _row(group: Group, baseline: Group | None, full: Group | None) -> Row:
    def difference(other: Group | None) -> Difference | None:
        if other is None or not _common(group, other):
            return None
        return paired_difference(group.as_arm(), other.as_arm())

    to_baseline = difference(baseline)
    over_images = speed = over_itself = cost = None
    if baseline is not None and to_baseline is not None:
        arm, control = of_common_seeds(group.as_arm(), baseline.as_arm())
        over_images = _over_images(group, baseline, to_baseline.mean)
        cost = _cost(group, baseline)
        speed, over_itself = speed_up(arm, control), speed_up_of_flat(control)
    return Row(
        group,
        summarize(group.as_arm()),
        to_baseline,
        over_images,
        difference(full),
        speed,
        over_itself,
        cost,
        mean(group.stem_turns.values()) if group.stem_turns else None,
    )


def _common(group: Group, other: Group) -> list[int]:
    """The seeds that both finished."""
    return [seed for seed in group.as_arm().curves if seed in other.as_arm().curves]


def _over_images(group: Group, baseline: Group, difference: float) -> OverImages | None:
    pairs = [
        (group.samples.get(seed), baseline.samples.get(seed)) for seed in _common(group, baseline)
    ]
    return over_images(pairs, difference)


def _cost(group: Group, baseline: Group) -> Cost | None:
    seeds = _common(group, baseline)
    if not all(side.seconds[seed] for side in (group, baseline) for seed in seeds):
        return None  # the time of a run is not recorded
    if any(group.hardware.get(seed) != baseline.hardware.get(seed) for seed in seeds):
        return None
    ratios = [group.seconds[seed] / baseline.seconds[seed] for seed in seeds]
    if len(ratios) == 1:
        return Cost(ratios[0], None, 1)
    low, high = t_interval([math.log(ratio) for ratio in ratios])
    return Cost(geometric_mean(ratios), (math.exp(low), math.exp(high)), len(ratios))


def as_values(row: Row) -> dict[str, Any]:
    """A row for JSON, without the curves of its runs."""
    group = row.group
    values = {field.name: getattr(row, field.name) for field in fields(row)[1:]}
    return {"arm": group.arm, "epochs": group.epochs, "baseline": group.baseline, **values}


def verdicts(rows: Sequence[Row]) -> list[str]:
    """A sentence on each arm that has a baseline: at the greatest length of both, and over lengths.

    Args:
        rows: of all arms and lengths, as `judge` makes them.
    """
    lengths = {row.group.epochs for row in rows}
    sentences = []
    for arm in dict.fromkeys(row.group.arm for row in rows if row.group.baseline):
        of_arm = [row for row in rows if row.group.arm == arm]
        judged = [row for row in of_arm if row.difference is not None]
        if not judged:
            baseline = of_arm[0].group.baseline
            sentences.append(f"{arm}: no seed was finished by it and by {baseline}.")
            continue
        row = max(judged, key=lambda row: row.group.epochs)
        key = row.group.baseline, row.group.epochs
        control = next(
            other.group.as_arm() for other in rows if (other.group.arm, other.group.epochs) == key
        )
        over_lengths = _over_lengths([other.group.as_arm() for other in of_arm], control)
        sentence = verdict(row.group.as_arm(), control, row.speed_up, over_lengths, row.over_images)
        at = f"At {row.group.epochs:g} epochs: " if len(lengths) > 1 else ""
        sentences.append(at + sentence)
    return sentences


def _over_lengths(arms: Sequence[Arm], control: Arm) -> SpeedUp | None:
    """The speed-up over complete trainings; None where there are not enough of them."""
    arms = [arm for arm in arms if arm.curves]
    # Trainings that ended early are not of the lengths that were to be compared.
    is_whole = not any(side.early for side in (*arms, control))
    if len(arms) < 2 or not is_whole or not _have_common_seed([*arms, control]):
        return None
    return speed_up_over_lengths(arms, control)


def without_samples(groups: Sequence[Group]) -> list[str]:
    """A sentence on the runs that leave an arm without its interval over images, if others have it.

    Samples that no run has were not asked for (TEST.BOOTSTRAP 0).
    """
    lacking = {
        group.arm: [seed for seed in group.as_arm().curves if not group.samples.get(seed)]
        for group in groups
    }
    if not any(lacking.values()) or not any(
        sample for group in groups for sample in group.samples.values()
    ):
        return []
    which = "; ".join(
        f"{arm}, seed {', '.join(map(str, seeds))}" for arm, seeds in lacking.items() if seeds
    )
    return [
        f"Runs without the metric's samples (TEST.BOOTSTRAP), so that their arm has no interval "
        f"over images: {which}."
    ]


def unfinished(records: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence on the runs that are missing from the means, if there are any."""
    seeds: dict[tuple[str, float], list[int]] = {}
    for run in records:
        if run["status"] == "missing":
            seeds.setdefault((run["arm"], run["epochs"]), []).append(run["seed"])
    if not seeds:
        return []
    which = "; ".join(
        f"{arm}, {epochs:g} epochs, seed {', '.join(map(str, numbers))}"
        for (arm, epochs), numbers in seeds.items()
    )
    return [
        f"{sum(map(len, seeds.values()))} of {len(records)} runs are missing here: {which}; the "
        "same command makes them."
    ]


def hardware_of(starts: Sequence[Mapping[str, Any]]) -> str:
    """What a run was made on, by the starts that its provenance has; "" if that is not known."""
    return " or ".join(dict.fromkeys(start["hardware"] for start in starts))


def origin(records: Sequence[Mapping[str, Any]]) -> str:
    """Commits, hardware, versions and dates of the finished runs, in a sentence."""
    starts = [start for run in records if run["status"] == "finished" for start in run["starts"]]
    if not starts:
        return "Where these runs were made is not recorded."

    def distinct(values: Iterable[str]) -> str:
        return " or ".join(dict.fromkeys(value for value in values if value))

    dates = sorted(start["date"][:10] for start in starts)
    versions = (
        ", ".join(f"{name} {version}" for name, version in start["versions"].items())
        for start in starts
    )
    return (
        f"Commit {distinct(start['commit'] for start in starts) or 'unknown'}; "
        f"{distinct(start['hardware'] for start in starts)}; {distinct(versions)}; "
        f"{distinct((dates[0], dates[-1])).replace(' or ', ' to ')}."
    )


def _have_common_seed(arms: Iterable[Arm]) -> bool:
    return bool(set.intersection(*(set(arm.curves) for arm in arms)))


def table(rows: Sequence[Row], metric: str) -> str:
    """In Markdown: a line for each row."""
    head, *lines = table_cells(rows, metric)
    table = [head, ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in table)


def table_cells(rows: Sequence[Row], metric: str) -> list[list[str]]:
    """The cells of the table: of its heading, then of each row."""
    longest = max(row.group.epochs for row in rows)
    baselines = {row.group.baseline for row in rows if row.group.baseline}
    control = baselines.pop() if len(baselines) == 1 else "its baseline"
    has_lengths = any(row.group.epochs < longest for row in rows)
    header = ["arm", "epochs", "runs", f"{metric}, %", f"against {control}"]
    if has_lengths:
        header.append(f"against {control} at {longest:g} epochs")
    header += ["speed-up", "time"]
    images = {row.over_images.images for row in rows if row.over_images}
    if images:
        header.insert(5, f"over {' or '.join(f'{n:,}' for n in sorted(images))} images")
    has_turns = any(row.stem_turn is not None for row in rows)
    header += ["stem turned"] * has_turns
    lines = [header]
    for row in rows:
        cells = [row.group.arm, f"{row.group.epochs:g}", _runs(row.summary), _final(row.summary)]
        cells.append(in_points(row.difference))
        if images:
            over = row.over_images
            cells.append(f"{_signed(over.low)} to {_signed(over.high)}" if over else "")
        if has_lengths:
            cells.append(in_points(row.to_longest))
        cells += [_speed_up_cell(row), _ratio(row.cost)]
        if has_turns:
            cells.append("" if row.stem_turn is None else f"{row.stem_turn:.0f}°")
        lines.append(cells)
    return lines


def _runs(summary: Summary) -> str:
    return f"{summary.n}" + (f", {summary.failed} failed" if summary.failed else "")


def _final(summary: Summary) -> str:
    if not summary.n:
        return ""
    return f"{summary.mean:.2f}" + (f" ± {summary.sd:.2f}" if summary.n > 1 else "")


def in_points(difference: Difference | None) -> str:
    """A difference with its interval, as far as there is one."""
    if difference is None:
        return ""
    if difference.interval is None:
        return _signed(difference.mean)
    low, high = difference.interval
    return f"{_signed(difference.mean)} ({_signed(low)} to {_signed(high)})"


def _signed(points: float) -> str:
    return f"{round(points, 2) + 0.0:+.2f}"  # -0.0 + 0.0 is 0.0


def _speed_up_cell(row: Row) -> str:
    speed, over_itself = row.speed_up, row.baseline_over_itself
    if speed is None:
        return ""
    cell = _factor(speed)
    if speed.interval is not None:
        cell += f" ({speed.interval[0]:.2f} to {speed.interval[1]:.2f})"
    elif speed.low == speed.high and speed.n > 1:
        cell += " (uncertain)"
    return f"{cell}; {row.group.baseline} itself {_factor(over_itself)}" if over_itself else cell


def _factor(speed: SpeedUp) -> str:
    if speed.low == speed.high:
        return f"{speed.low:.2f}"
    low = f"{speed.low:.2f}" if speed.low else ""
    high = f"{speed.high:.2f}" if math.isfinite(speed.high) else ""
    return (
        f"{low} to {high}" if low and high else f"> {low}" if low else f"< {high}" if high else ""
    )


def _ratio(cost: Cost | None) -> str:
    if cost is None:
        return ""
    if cost.interval is None:
        return f"x {cost.ratio:.2f}"
    return f"x {cost.ratio:.2f} ({cost.interval[0]:.2f} to {cost.interval[1]:.2f})"

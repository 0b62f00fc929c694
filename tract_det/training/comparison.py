"""The runs of a comparison: arms, swept keys, lengths and seeds, each run with its command.

Runs that share seed and length share initial weights and the order of the data, whatever their arm.
The length of a run is counted in epochs, for detectors as well, so that arms with other batches
see as many images.
"""

import importlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fvcore.common.config import CfgNode

from tract_det.config import tasks
from tract_det.config.arms import the_one
from tract_det.config.files import find_configs, flat, run_name
from tract_det.errors import UserError
from tract_det.files import file_name_part
from tract_det.training.session import fingerprints
from tract_det.training.task import Split, Task

LoadCfg = Callable[..., CfgNode]

# What a comparison sets itself, with what to use instead.
_TAKEN = {"SEED": "--seeds", "OUTPUT_DIR": "--output", "ARM": "--arms"}
_LENGTHS = ("SOLVER.MAX_ITER", "SOLVER.EPOCHS")
# What is the same for all runs, so that their curves and figures can be compared.
_OF_EVALUATION = ("TEST.EVAL_PERIOD", "TEST.EVAL_EPOCHS", "TEST.BEST_METRIC")
# Beside DATASETS, what selects the images of an epoch.
_SELECTING = (
    "DATALOADER.FILTER_EMPTY_ANNOTATIONS",
    "DATALOADER.USE_DIFFICULT",
    "INPUT.EXIF",  # YOLO's boxes depend on it
)


@dataclass(frozen=True)
class Variant:
    """An arm with values of the swept keys.

    Attributes:
        arm: its name.
        settings: the swept keys that it has, with their values as typed.
        changes: those among them that are not what the arm has anyway.
    """

    arm: str
    settings: tuple[tuple[str, str], ...] = ()
    changes: tuple[tuple[str, str], ...] = ()

    @property
    def name(self) -> str:
        """`tract`, or `tract LAMBDA=0.05`."""
        return " ".join([self.arm, *_in_words(self.settings)])

    @property
    def model(self) -> tuple[tuple[str, str] | str, ...]:
        """Variants for which this is equal build the same model, and their steps cost the same."""
        return self.arm, *(pair for pair in self.settings if pair[0] != "MODEL.TRACT.LAMBDA")

    @property
    def folder(self) -> str:
        """`tract`, or `tract+LAMBDA=0.05`; a value that the arm has anyway leaves no trace."""
        return file_name_part("+".join([self.arm, *_in_words(self.changes)]).replace("/", "_"))


def _in_words(settings: Iterable[tuple[str, str]]) -> Iterator[str]:
    return (f"{_short(key)}={value}" for key, value in settings)


def _short(key: str) -> str:
    for section in ("MODEL.TRACT.", "MODEL.", "SOLVER."):
        if key.startswith(section):
            return key.removeprefix(section)
    return key


@dataclass(frozen=True)
class PlannedRun:
    """A run, finished or not.

    Attributes:
        variant: arm and swept values.
        epochs: length, to four digits.
        steps: length in optimizer steps.
        seed: SEED.
        folder: OUTPUT_DIR.
        arguments: what follows `tract-det` on the command line.
        cfg: the configuration that they make.
    """

    variant: Variant
    epochs: float
    steps: int
    seed: int
    folder: Path
    arguments: list[str]
    cfg: CfgNode

    @property
    def name(self) -> str:
        """For messages."""
        return f"{self.variant.name}, {self.epochs:g} epochs, seed {self.seed}"


@dataclass(frozen=True)
class Design:
    """What is to be compared.

    Attributes:
        config_files: as for `--config-file`.
        arms: names; [] = frozen, plain and tract, or plain and tract from random weights.
        sweeps: values, as typed, of each swept key.
        lengths: in epochs; [] = the config's own.
        seeds: number of seeds, counted from 0.
        baseline: the arm that the others are judged against; "" = plain, or else the first one.
        pairs: `KEY VALUE` of all runs.
        output: folder of the runs; None = output/compare/<config>.
    """

    config_files: Sequence[str]
    arms: Sequence[str]
    sweeps: Mapping[str, Sequence[str]]
    lengths: Sequence[float]
    seeds: int
    baseline: str
    pairs: Sequence[str]
    output: Path | None


@dataclass(frozen=True)
class Comparison:
    """The runs of a design.

    Attributes:
        task: of all runs.
        runs: those of a seed together, so that what is done can be compared early.
        variants: those of the runs, in order.
        baselines: what each variant is judged against; None for a baseline.
        training: the images of an epoch.
        images: fingerprints of these and of those for evaluation; see `session.fingerprints`.
        metric: the figure that is compared, TEST.BEST_METRIC.
        output: the folder.
    """

    task: Task
    runs: Sequence[PlannedRun]
    variants: Sequence[Variant]
    baselines: Mapping[Variant, Variant | None]
    training: Split
    images: Mapping[str, str]
    metric: str
    output: Path


def parse_sweep(text: str) -> tuple[str, list[str]]:
    """`KEY=a,b,c`; a value in brackets may have commas.

    Raises:
        UserError: there is no key or no value.
    """
    key, equals, rest = text.partition("=")
    values, depth = [""], 0
    for character in rest:
        depth += (character in "[(") - (character in "])")
        if character == "," and depth == 0:
            values.append("")
        else:
            values[-1] += character
    values = [value.strip() for value in values]
    if not (key and equals and all(values)):
        raise UserError(f"--sweep takes KEY=a,b,c, such as MODEL.TRACT.LAMBDA=0.05,0.1: not {text}")
    if len(set(values)) < len(values):
        raise UserError(f"--sweep {text}: a value is there twice")
    return key, values


def parse_sweeps(texts: Iterable[str]) -> dict[str, list[str]]:
    """The values of each swept key; see `parse_sweep`.

    Raises:
        UserError: a text is no sweep, or a key is there twice.
    """
    sweeps: dict[str, list[str]] = {}
    for text in texts:
        key, values = parse_sweep(text)
        if key in sweeps:
            raise UserError(f"--sweep {key} is there twice: give all its values in one")
        sweeps[key] = values
    return sweeps


def build(design: Design) -> Comparison:
    """Plans all runs, and checks every configuration and the data before the first one starts.

    Raises:
        UserError: for whatever a run would be refused, and for keys that the comparison sets.
    """
    _refuse_keys(design)
    name = tasks.task_of(design.config_files)
    load_cfg = tasks.loader_of(name)
    task: Task = importlib.import_module(f"tract_det.training.{name}").TASK
    first = load_cfg(design.config_files, design.pairs)
    arms = [the_one([arm]) for arm in design.arms] or _usual_arms(first)
    if len(set(arms)) < len(arms):
        raise UserError(f"--arms {','.join(arms)}: an arm is there twice")
    baseline = the_one([design.baseline]) or ("plain" if "plain" in arms else arms[0])
    if baseline not in arms:
        raise UserError(f"--baseline {baseline} is none of the arms {', '.join(arms)}: add it")
    variants = _variants(design, arms, load_cfg)
    task.check(first)
    training, test = task.read_data(first)
    images = len(training)
    steps = task.plan(first, images).max_iter
    lengths = sorted(design.lengths) or [steps * first.SOLVER.IMS_PER_BATCH / images]
    paths = [path for name in design.config_files for path in find_configs(name)[0]]
    output = design.output or Path("output/compare", run_name(paths))
    files = [part for name in design.config_files for part in ("--config-file", str(name))]
    runs = []
    for epochs, variant in itertools.product(lengths, variants):
        of_all_seeds = _pairs(design, task, load_cfg, variant, images, epochs)
        whole = load_cfg(design.config_files, of_all_seeds, variant.arm)
        task.check(whole)
        max_iter = task.plan(whole, images).max_iter
        for seed in range(design.seeds):
            folder = output / variant.folder / f"{_rounded(epochs):g}-epochs" / f"seed{seed}"
            pairs = [*of_all_seeds, "SEED", str(seed), "OUTPUT_DIR", str(folder)]
            cfg = _with(whole, SEED=seed, OUTPUT_DIR=str(folder))
            arguments = [tasks.VERBS[name], *files, "--arm", variant.arm, *pairs]
            length = _rounded(epochs)
            runs.append(PlannedRun(variant, length, max_iter, seed, folder, arguments, cfg))
    runs.sort(key=lambda run: run.seed)
    _refuse_shared_folders(runs)
    _refuse_equal_lengths(runs)
    baselines = {variant: baseline_of(variant, variants, baseline) for variant in variants}
    prints = fingerprints(training, test)
    metric = first.TEST.BEST_METRIC
    return Comparison(task, runs, variants, baselines, training, prints, metric, output)


def _refuse_keys(design: Design) -> None:
    """Refuses keys that the comparison sets, and sweeps whose values it would not compare.

    Raises:
        UserError: names the key, and what to use instead.
    """
    for key in (*design.pairs[::2], *design.sweeps):
        if key in _TAKEN:
            raise UserError(f"{key} is set by the comparison: use {_TAKEN[key]}")
    for key in design.sweeps:
        if key in _LENGTHS:
            raise UserError(f"--sweep {key}: lengths are compared by --lengths, in epochs")
        if key in _OF_EVALUATION:
            raise UserError(f"--sweep {key}: all runs are evaluated alike; give it as KEY VALUE")
        if key.startswith("DATASETS.") or key in _SELECTING:
            raise UserError(
                f"--sweep {key}: all runs of a comparison have the same images; give each value a "
                "comparison of its own, by --output"
            )


def _with(cfg: CfgNode, **values: Any) -> CfgNode:
    """A frozen copy with other values of these keys."""
    copy = cfg.clone()
    copy.defrost()
    for key, value in values.items():
        copy[key] = value
    copy.freeze()
    return copy


def _refuse_shared_folders(runs: Iterable[PlannedRun]) -> None:
    """Refuses runs that would write into one folder, such as those of LAMBDA 0.1 and 0.10.

    Raises:
        UserError: names both runs and the folder.
    """
    by_folder: dict[Path, PlannedRun] = {}
    for run in runs:
        other = by_folder.setdefault(run.folder, run)
        if other is not run:
            raise UserError(
                f"'{other.name}' and '{run.name}' would share the folder {run.folder}: leave one "
                "of the two values out of --sweep or --lengths"
            )


def _refuse_equal_lengths(runs: Iterable[PlannedRun]) -> None:
    """Refuses lengths that are the same number of steps: they are the same training, made twice.

    Raises:
        UserError: names both lengths.
    """
    by_steps: dict[tuple[Variant, int], PlannedRun] = {}
    for run in runs:
        other = by_steps.setdefault((run.variant, run.steps), run)
        if other.epochs != run.epochs:
            raise UserError(
                f"--lengths {other.epochs:g} and {run.epochs:g} are the same training: "
                f"{run.steps} x {run.cfg.SOLVER.IMS_PER_BATCH} images; leave one of them out"
            )


def _pairs(
    design: Design, task: Task, load_cfg: LoadCfg, variant: Variant, images: int, epochs: float
) -> list[str]:
    """The `KEY VALUE` of a run, without those of its seed."""
    pairs = [*design.pairs, *itertools.chain(*variant.settings)]
    cfg = load_cfg(design.config_files, pairs, variant.arm)
    for key, value in task.length(cfg, images, epochs, _evaluation_period(epochs)).items():
        if not (key.startswith("TEST.") and key in design.pairs):  # the user's own period
            pairs += [key, str(value)]
    return pairs


def _usual_arms(cfg: CfgNode) -> list[str]:
    return ["frozen", "plain", "tract"] if cfg.MODEL.WEIGHTS else ["plain", "tract"]


def _variants(design: Design, arms: Sequence[str], load_cfg: LoadCfg) -> list[Variant]:
    """Every arm with every combination of the swept values; TrAct's keys only where it is on."""
    variants = []
    for arm in arms:
        unswept = load_cfg(design.config_files, design.pairs, arm)
        is_tract = unswept.MODEL.TRACT.ENABLED
        keys = [key for key in design.sweeps if is_tract or not key.startswith("MODEL.TRACT.")]
        for values in itertools.product(*(design.sweeps[key] for key in keys)):
            settings = tuple(zip(keys, values, strict=True))
            pairs = [*design.pairs, *itertools.chain(*settings)]
            before, now = flat(unswept), flat(load_cfg(design.config_files, pairs, arm))
            changes = [pair for pair in settings if now.get(pair[0]) != before.get(pair[0])]
            variants.append(Variant(arm, settings, tuple(changes)))
    for key in design.sweeps:
        if not any(key in dict(variant.settings) for variant in variants):
            raise UserError(
                f"--sweep {key}: none of the arms {', '.join(arms)} has TrAct on: add tract to "
                "--arms"
            )
    return variants


def _evaluation_period(epochs: float) -> float:
    """In epochs: an evaluation an epoch, but five of a run at least and ten at most."""
    return _rounded(max(epochs / 10, min(1.0, epochs / 5)))


def _rounded(epochs: float) -> float:
    return float(f"{epochs:.4g}")


def baseline_of(variant: Variant, variants: Sequence[Variant], arm: str) -> Variant | None:
    """The variant of the baseline's arm that a variant is judged against.

    It has the same values of the swept keys that both arms have. A variant of the same arm as the
    baseline is judged against the first one. None for the baseline itself.
    """
    candidates = [other for other in variants if other.arm == arm]
    if variant.arm == arm:
        return candidates[0] if variant != candidates[0] else None
    settings = dict(variant.settings)
    return next(
        other
        for other in candidates
        if all(settings.get(key, value) == value for key, value in other.settings)
    )

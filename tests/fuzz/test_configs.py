"""Damaged configurations are refused in a line of words.

More cases than the suite has: `FUZZ_CASES=10000 python -m pytest -n0 tests/fuzz`.
"""

import random

import pytest

from tests.conftest import REPO
from tests.fuzz.mutations import VALUES, damaged
from tests.fuzz.refusals import cases, refusal
from tract_det.config import classification, detection
from tract_det.config.files import flat

CASES = cases(250)
SEEDS = {
    detection: sorted((REPO / "configs").glob("[BPq]*/*.yaml")),
    classification: sorted((REPO / "configs").glob("[CIT]*/*.yaml")),
}


def dump(load, *args):
    """Reads a configuration and writes it as text."""
    load(*args).dump()


@pytest.mark.parametrize("module", SEEDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_a_damaged_file_is_read_or_refused_in_a_line(module, tmp_path):
    rng = random.Random(0)
    for _ in range(CASES):
        source = rng.choice(SEEDS[module])
        path = tmp_path / "damaged.yaml"
        data = source.read_bytes().replace(b"_BASE_: ", f"_BASE_: {source.parent}/".encode())
        path.write_bytes(damaged(data, rng))
        refusal(dump, module.load_cfg, path)


@pytest.mark.parametrize("module", SEEDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_any_value_of_any_key_is_taken_or_refused_in_a_line(module):
    rng = random.Random(1)
    keys = list(flat(module.get_cfg()))
    for _ in range(CASES):
        refusal(
            dump, module.load_cfg, rng.choice(SEEDS[module]), [rng.choice(keys), rng.choice(VALUES)]
        )


@pytest.mark.parametrize("module", SEEDS, ids=lambda module: module.__name__.rpartition(".")[2])
def test_every_number_and_every_list_has_a_range(module):
    leaves = flat(module.get_cfg())
    wanted = {
        key
        for key, value in leaves.items()
        if type(value) in (int, float, list) and not key.startswith("DEEPSPEED.")
    }
    assert wanted == set(module.RANGES)


def test_a_few_bytes_that_stand_for_billions_are_refused_at_once(tmp_path):
    path = tmp_path / "bomb.yaml"
    lines = ["a: &a [x, x, x, x, x, x, x, x, x, x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]")
    path.write_text("\n".join(lines))
    assert "too many values" in refusal(dump, detection.load_cfg, path)
    path.write_text("MODEL: &m\n  TRACT: *m\n")
    assert "holds itself" in refusal(dump, detection.load_cfg, path)
    path.write_text("_BASE_: bomb.yaml\n")
    assert "is a _BASE_ of itself" in refusal(dump, detection.load_cfg, path)

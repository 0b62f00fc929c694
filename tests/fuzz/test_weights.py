"""Damaged and hostile weights and checkpoints are read or refused in a line; no code runs.

More cases than the suite has: `FUZZ_CASES=10000 python -m pytest -n0 tests/fuzz`.
"""

import pickle
import random
import resource
import shutil
from collections import OrderedDict
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.fuzz.mutations import Attack, damaged
from tests.fuzz.refusals import cases, refusal
from tract_det.engine import checkpoint, manifest
from tract_det.modeling.classifiers import build_classifier
from tract_det.modeling.loading import load_into_classifier
from tract_det.modeling.weight_files import read_weights

CASES = cases(100)


@cache
def network():
    return build_classifier("resnet10", 2, width=2)


# What a state dict may have in place of a tensor, or beside it.
VALUES = (
    *(None, 7, "text", b"bytes", [], {}, [[1], [2]], {"a": {"b": 1}}, float("nan"), True),
    *(torch.tensor(float("nan")), torch.zeros(0), torch.zeros(()), torch.ones(3, dtype=torch.bool)),
    *(torch.ones(2, 2).to_sparse(), torch.ones(5, dtype=torch.complex64), torch.ones(4).half()),
    *(torch.zeros(1).expand(10**12), torch.full((4, 3, 3, 3), torch.inf), torch.Size([3])),
    *(torch.ones(3, device="meta"), OrderedDict(a=1), torch.float32, torch.device("cpu")),
    *(nn.Parameter(torch.ones(4)), range(3), {1, 2}, Path("x"), Attack()),
)


def mutated(state, rng):
    """A file's content with other values, keys and levels."""
    content = {"model": dict(state), "meta": {"class_names": ["a"], "pixel_mean": [1.0, 2.0, 3.0]}}
    for _ in range(rng.randint(1, 3)):
        place = rng.choice([content, content["model"], content["meta"]])
        if not isinstance(place, dict) or not place:
            continue
        key = rng.choice([*place, "epoch", "state_dict", "", "module.conv1.weight", 7, None])
        place[key] = rng.choice(VALUES)
        if not all(isinstance(content.get(part), dict) for part in ("model", "meta")):
            break
    return rng.choice([content, content.get("model"), {"state_dict": content.get("model")}])


def load(path):
    load_into_classifier(network(), read_weights(str(path)), ("a", "b"))


@pytest.fixture
def limited(tmp_path, monkeypatch):
    """A folder to work in, and a limit of memory: what asks for more is a finding."""
    monkeypatch.chdir(tmp_path)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    limits = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (used + 2**30, limits[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, limits)
    assert not (tmp_path / Attack.TRACE).exists()


def test_strange_contents_of_a_weights_file_are_read_or_refused_in_a_line(limited):
    rng, state = random.Random(0), network().state_dict()
    for _ in range(CASES):
        torch.save(mutated(state, rng), limited / "w.pth")
        refusal(load, limited / "w.pth")


@pytest.mark.parametrize("suffix", [".pth", ".pkl", ".safetensors"])
def test_a_damaged_weights_file_is_read_or_refused_in_a_line(limited, suffix):
    rng, path = random.Random(1), limited / f"w{suffix}"
    if suffix == ".pkl":
        arrays = {key: value.numpy() for key, value in network().state_dict().items()}
        path.write_bytes(pickle.dumps({"model": arrays, "__author__": "x"}))
    elif suffix == ".pth":
        torch.save(network().state_dict(), path)
    else:
        from safetensors.torch import save_file

        save_file(network().state_dict(), path)
    whole = path.read_bytes()
    for _ in range(CASES):
        path.write_bytes(damaged(whole, rng))
        refusal(load, path)


def test_a_damaged_checkpoint_is_passed_over_or_is_as_it_was(limited):
    rng = random.Random(2)
    folder = limited / "checkpoints/iter_0000002"
    folder.mkdir(parents=True)
    files = checkpoint._write(folder, {"model.pt": {"a": torch.ones(50)}, "rank_0000.pt": {"b": 1}})
    manifest.write(folder, {"files": files, "identity": {"SEED": 0}})
    shutil.copytree(folder, folder.with_name("iter_0000001"))
    sound = checkpoint.newest(limited)
    for _ in range(CASES):
        path = folder / rng.choice(["model.pt", "rank_0000.pt", "manifest.json"])
        whole = path.read_bytes()
        path.write_bytes(damaged(whole, rng))
        newest = checkpoint.newest(limited)
        assert newest == sound or newest.iteration == 1
        newest.shared(), newest.of_ranks()
        path.write_bytes(whole)

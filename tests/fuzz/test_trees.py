"""Damaged data sets of detection are read or refused in a line, by a process with limits.

Besides bytes and lines, values change as their format knows them: of JSON and XML a part of the
tree, of YOLO a word, of an array its header. What is read is sound: finite boxes, known classes.
More cases than the suite has: `FUZZ_CASES=10000 python -m pytest -n0 tests/fuzz`.
"""

import json
import random
import xml.etree.ElementTree as ET
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import yaml

from tests.conftest import write_voc_tree
from tests.data.formats import FORMS
from tests.fuzz.limits import SECONDS, assert_survives, run_limited
from tests.fuzz.mutations import VALUES, Attack, damaged
from tests.fuzz.refusals import cases, refusal
from tract_det.data.datasets import read_dataset
from tract_det.data.images import read_header, read_upright
from tract_det.data.voc import read_split

CASES = cases(60)

# What stands in the place of a value of JSON, YAML or XML.
STRANGE = (
    *(None, True, False, 0, -1, 7, 1.5, -0.0, 1e308, -1e308, float("nan"), float("inf"), 10**400),
    *("", " ", "disc", "\u2028", "\x7f", "\ud800", "a\nb", "a\0b", "../../x", "/", "x" * 5000),
    "\N{ROMAN NUMERAL FIVE}",
    *([], {}, [[]], [1], [1, 2, 3, 4], {"id": 1}, ["disc", "disc"], {0: "disc"}, {"0": "box"}),
)
LINKS = tuple(pairwise("abcdefghi"))  # of values that hold each other, to no end
BOMB = (
    "a: &a [x, x, x, x, x, x, x, x, x]\n"
    + "".join(
        f"{new}: &{new} [*{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}, *{old}]\n"
        for old, new in LINKS
    )
    + "names: *i\n"
)


def places(tree):
    """Every place in nested lists and mappings, as (container, key)."""
    found = []
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        items = node.items() if isinstance(node, dict) else enumerate(node)
        for key, value in list(items):
            found.append((node, key))
            if isinstance(value, dict | list):
                waiting.append(value)
    return found


def another_tree(tree, rng):
    """A copy in which a value is another, is missing, stands twice, or holds more."""
    tree = deepcopy(tree)
    for _ in range(rng.randint(1, 3)):
        node, key = rng.choice(places(tree) or [({}, "x")])
        way = rng.randrange(4)
        if way == 0 and isinstance(node, dict):
            del node[key]
        elif way == 1 and isinstance(node, list):
            node.append(deepcopy(node[key]))
        elif way == 2:
            node[key] = [node[key]]
        else:
            node[key] = deepcopy(rng.choice(STRANGE))
    return tree


def another_json(data, rng):
    return json.dumps(another_tree(json.loads(data), rng), indent=1).encode()


def another_yaml(data, rng):
    if rng.random() < 0.02:
        return BOMB.encode()
    return yaml.safe_dump(another_tree(yaml.safe_load(data), rng), allow_unicode=True).encode()


def another_xml(data, rng):
    """An element has another text or tag, is missing, stands twice or within itself."""
    root = ET.fromstring(data)
    for _ in range(rng.randint(1, 3)):
        parent = rng.choice([element for element in root.iter() if len(element)] or [root])
        if not len(parent):
            break
        child = rng.choice(list(parent))
        way = rng.randrange(6)
        if way == 0:
            parent.remove(child)
        elif way == 1:
            parent.append(deepcopy(child))
        elif way == 2:
            child.append(deepcopy(parent))
        elif way == 3:
            child.tag = rng.choice(("object", "name", "xmin", "size", "part", "bndbox"))
        else:
            strange = rng.choice((*VALUES, *map(str, STRANGE)))
            child.text = "".join(c for c in strange if c.isprintable() or c == " ")
    text = ET.tostring(root, encoding="unicode")
    head = rng.choice(
        ("", "", "\ufeff", '<?xml version="1.0" encoding="utf-16"?>', "<!-- x -->", LAUGHS)
    )
    return (head + text).encode("utf-8", "surrogatepass")


LAUGHS = (
    '<!DOCTYPE x [<!ENTITY a "aaaaaaaaaa">'
    + "".join(f'<!ENTITY {new} "{f"&{old};" * 10}">' for old, new in LINKS)
    + '<!ENTITY z SYSTEM "file:///etc/hostname">]>'
)


def another_word(data, rng):
    """A word of a line is another, or there are more or fewer of them."""
    lines = data.decode(errors="replace").split("\n")
    i = rng.randrange(len(lines))
    words = lines[i].split(" ")
    j = rng.randrange(len(words))
    new = rng.choice((*VALUES, *map(str, STRANGE), "0.5", "1", "-0.1", "1.01", "640"))
    words[j : j + rng.randint(0, 1)] = [new] * rng.randint(0, 3)
    lines[i] = " ".join(words)
    return "\n".join(lines).encode("utf-8", "surrogatepass")


def another_header(data, rng):
    """The header of an array says something else than what follows it."""
    end = data.index(b"\n")
    old = (b"(24, 36, 5)", b"|u1", b"False")
    new = (
        *(b"(24, 36, 9)", b"(24, 36)", b"(0, 36, 5)", b"(-4, 36, 5)", b"(999999999, 36, 5)"),
        *(b"()", b"(24,)", b"(2, 12, 36, 5)", b"<u2", b"<f4", b"|O", b"|b1", b"<U3", b"True"),
        *(b"(99999999999999999999, 1)", b"(24.0, 36, 5)", b"[('a', '|u1')]", b"'", b"__import__"),
    )
    part = rng.choice(old)
    return data[:end].replace(part, rng.choice(new)) + data[end:]


WAYS = {".json": another_json, ".yaml": another_yaml, ".xml": another_xml, ".npy": another_header}


def damage(path, whole, rng):
    """The content of a file, damaged in a way that its format knows, or in its bytes."""
    way = WAYS.get(path.suffix, another_word) if rng.random() < 0.7 else damaged
    return way(whole, rng)


def assert_sound(split):
    for a in split.annotations:
        n = len(a.labels)
        assert a.boxes.shape == (n, 4) and a.difficult.shape == (n,)
        assert np.isfinite(a.boxes).all() and (np.abs(a.boxes) <= 1e9).all()
        assert (a.boxes[:, 2:] > a.boxes[:, :2]).all()
        assert n == 0 or 0 <= a.labels.min() <= a.labels.max() < len(split.class_names)
        assert a.width > 0 and a.height > 0 and a.path.is_file()


def fuzz_tree(root, patterns):
    """Damages each of the files in turn, and reads the tree; some must be read, some refused."""
    files = [path for pattern in patterns for path in sorted(root.glob(pattern))[:2]]
    rng, outcomes = random.Random(str(patterns)), set()
    for case in range(CASES):
        path = files[case % len(files)]
        whole = path.read_bytes()
        print(root.name, path.name, case, flush=True)
        content = damage(path, whole, rng)
        path.write_bytes(content)
        outcomes.add(bool(refusal(lambda: assert_sound(read_dataset(["train"], root, None)))))
        path.write_bytes(whole)
    assert outcomes == {False, True}


def tree_of(form, folder):
    split = read_split(write_voc_tree(folder / "voc", train=3, test=1), "train")
    root = folder / form
    FORMS[form](root, [split])
    return root


def voc(folder):
    root = write_voc_tree(folder / "tree", train=3, test=1)
    fuzz_tree(root, ["Annotations/*.xml", "ImageSets/Main/train.txt"])
    fuzz_tree(tree_of("voc_roboflow", folder), ["*/*.xml"])


def coco(folder):
    root = tree_of("coco_official", folder)
    (path,) = root.glob("annotations/*.json")
    # A value a line, so that damage to a line leaves the others.
    path.write_text(json.dumps(json.loads(path.read_text()), indent=1))
    fuzz_tree(root, ["annotations/*.json"])


def yolo(folder):
    fuzz_tree(tree_of("yolo_ultralytics", folder), ["*.yaml", "labels/*/*.txt"])
    fuzz_tree(tree_of("yolo_darknet", folder / "d"), ["*.txt", "obj.names", "*/*.txt"])


def arrays(folder):
    path, rng = folder / "image.npy", random.Random(0)
    np.save(path, np.random.default_rng(0).integers(0, 256, (24, 36, 5), dtype=np.uint8))
    whole, outcomes = path.read_bytes(), set()
    for case in range(CASES):
        print(path.name, case, flush=True)
        if case % 20 == 0:
            np.save(path, np.array([Attack()]))
        else:
            path.write_bytes(damage(path, whole, rng))
        for read in (read_header, lambda file: read_upright(file, channels=5)):
            outcomes.add(bool(refusal(read, path)))
    assert outcomes == {False, True}


KINDS = {kind.__name__: kind for kind in (voc, coco, yolo, arrays)}


@pytest.mark.parametrize("kind", KINDS)
def test_damaged_data_are_read_soundly_or_refused_in_a_line(kind, tmp_path):
    printed = assert_survives("test_trees", kind, tmp_path)
    assert printed.count("\n") >= CASES
    assert not (tmp_path / Attack.TRACE).exists()


if __name__ == "__main__":
    run_limited(KINDS, 20 + SECONDS * CASES // 10)

"""The documentation says what is there: its links, commands and Python blocks, and its keys."""

import re
import shlex
from itertools import pairwise

import pytest

from docs import make_keys
from tests.conftest import REPO
from tests.pages import PAGES, blocks, python_blocks, read, without_blocks
from tract_det import cli
from tract_det.config import tasks
from tract_det.config.files import find_config
from tract_det.errors import UserError

LINKING = [*PAGES, "CHANGELOG.md"]
LINKING += sorted(str(page.relative_to(REPO)) for page in REPO.glob("benchmarks/*.md"))


def anchors(text):
    """Those of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", LINKING)
def test_every_link_within_the_repository_leads_somewhere(name):
    page = REPO / name
    for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page.read_text())):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def commands():
    """The words of the commands that call this project's programs."""
    for page in PAGES:
        for block in blocks(page):
            for command in block.commands() if block.language in ("", "inline") else ():
                if re.search(r"tools/\w+\.py|\btract-det [a-z]", command):
                    yield shlex.split(command)


COMMANDS = list(commands())
VERB_OF = {
    "tools/train_net.py": "train", "tools/pretrain_net.py": "pretrain",
    "tools/evaluate_voc.py": "evaluate", "tools/convert_weights.py": "convert",
    "tools/visualize.py": "visualize",
}  # fmt: skip


def split(words):
    """The verb of a command and the words behind it."""
    # `srun bash -c` takes a command as one word.
    words = [part for word in words for part in (word.split() if "tools/" in word else [word])]
    for i, word in enumerate(words):
        if word in VERB_OF:
            return VERB_OF[word], words[i + 1 :]
        if word == "tract-det":
            return words[i + 1], words[i + 2 :]
    raise AssertionError(words)


def test_the_pages_show_commands():
    assert len(COMMANDS) > 15


@pytest.mark.parametrize("words", COMMANDS, ids=[" ".join(words)[:60] for words in COMMANDS])
def test_every_command_names_a_verb_and_configurations_and_keys_that_exist(words):
    verb, arguments = split(words)
    assert verb in cli.VERBS
    files = [after for word, after in pairwise(arguments) if word == "--config-file"]
    pairs = arguments[
        next((i for i, word in enumerate(arguments) if is_key(word)), len(arguments)) :
    ]
    if verb not in ("train", "pretrain", "compare") or files == ["FILE"]:
        return
    arm = next((after for word, after in pairwise(arguments) if word == "--arm"), "")
    assert all(find_config(file) for file in files)
    task = {"train": "detection", "pretrain": "classification"}.get(verb) or tasks.task_of(files)
    tasks.loader_of(task)(files or ["quickstart/shapes.yaml"], pairs, arm)


def is_key(word):
    return re.fullmatch(r"[A-Z][A-Z0-9_]*(\.[A-Za-z0-9_]+)*", word) is not None and word != "FILE"


def settings():
    """The `KEY VALUE` pairs in the text, as words; detectron2's page has that library's keys."""
    for page in PAGES:
        for text in re.findall(r"`([A-Z][A-Z_]*\.[^`]+ [^`]+)`", without_blocks(read(page))):
            words = shlex.split(text)
            if is_key(words[0]) and page != "tract_det/d2/README.md":
                yield words


@pytest.mark.parametrize("words", [*settings()], ids=" ".join)
def test_every_setting_in_the_text_is_one_of_a_detector_or_a_classifier(words):
    averaged = ["MODEL.EMA.ENABLED", "True", *words]
    try:
        tasks.loader_of("detection")("quickstart/shapes.yaml", averaged)
    except UserError:
        tasks.loader_of("classification")("CIFAR/cpu_small.yaml", averaged)


def test_the_blocks_for_the_library_run_one_after_the_other():
    scope = {}
    for block in python_blocks("README.md"):
        if block.heading == "As a library":
            exec(block.code, scope)
    assert "TrActConv2d" in repr(scope["model"].conv1)


def test_the_page_of_keys_is_what_the_configurations_make():
    assert make_keys.PAGE.read_text() == make_keys.page(), "run python docs/make_keys.py"


def test_every_key_has_a_meaning():
    rows = re.findall(r"^\| `(.+?)` \| `.*` \| *(.*?) *\|$", make_keys.page(), re.M)
    assert len(rows) > 100
    assert not [key for key, meaning in rows if not meaning]

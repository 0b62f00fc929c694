"""The documentation says what is there: its links, commands and Python blocks, and its keys."""

import re
import shlex
from itertools import pairwise

import pytest

from docs import make_keys
from tests.conftest import REPO
from tract_det import cli
from tract_det.config import tasks
from tract_det.config.files import find_config

PAGES = [
    REPO / name
    for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md", "tract_det/d2/README.md")
] + sorted([*REPO.glob("docs/*.md"), *REPO.glob("benchmarks/*.md")])
TEXTS = {str(page.relative_to(REPO)): page.read_text() for page in PAGES}


def anchors(text):
    """Those of a page's headings, as code hosts make them."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("name", TEXTS)
def test_every_link_within_the_repository_leads_somewhere(name):
    page = REPO / name
    for link in re.findall(r"\]\(([^)\s]+)\)", re.sub(r"```.*?```", "", TEXTS[name], flags=re.S)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def blocks(text, language):
    """The code blocks of a language, which stands behind their opening fence."""
    fenced = re.findall(r"^```(\S*)\n(.*?)^```$", text, re.M | re.S)
    return [code for word, code in fenced if word == language]


def commands():
    """The lines of shell blocks that call this project's programs, as (page, words)."""
    for name, text in TEXTS.items():
        if name.startswith(("benchmarks/", "CHANGELOG")):
            continue  # they show what was run at their time
        for block in blocks(text, ""):
            for line in block.replace("\\\n", " ").splitlines():
                if re.search(r"tools/\w+\.py|\btract-det \w", line):
                    yield name, shlex.split(line, comments=True)


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


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS], ids=[" ".join(words)[:60] for _, words in COMMANDS]
)
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


@pytest.mark.parametrize("name", ["README.md"])
def test_the_python_blocks_run_one_after_the_other(name):
    scope = {}
    for block in blocks(TEXTS[name], "python"):
        # tests/d2/test_readme.py runs those for detectron2, tests/inference those with weights.
        if "tract_det.d2" not in block and "load_detector" not in block:
            exec(block, scope)
    assert "TrActConv2d" in repr(scope["model"].conv1)


def test_the_page_of_keys_is_what_the_configurations_make():
    assert make_keys.PAGE.read_text() == make_keys.page(), "run python docs/make_keys.py"


def test_every_key_has_a_meaning():
    rows = re.findall(r"^\| `(.+?)` \| `.*` \| *(.*?) *\|$", make_keys.page(), re.M)
    assert len(rows) > 100
    assert not [key for key, meaning in rows if not meaning]

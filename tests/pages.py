"""The pages of the documentation: their code blocks, and the commands in their text."""

import re
from dataclasses import dataclass

from tests.conftest import REPO

# Those whose code is to be run. Measurements show what was run at their time.
PAGES = ["README.md", "CONTRIBUTING.md", "tract_det/d2/README.md"]
PAGES += sorted(str(path.relative_to(REPO)) for path in REPO.glob("docs/*.md"))

FENCED = r"^```(?P<language>\S*)\n(?P<code>.*?)^```$"
PROGRAM = r"(?:\w+=\S+ )*(?:tract-det|deepspeed|torchrun|jupyter|datum|pip|python)"
# A command in the text has arguments: `tract-det train` alone is a name.
COMMAND = rf"`(?P<command>{PROGRAM}\s[^`\s]+\s[^`]+)`"
PART = re.compile(rf"{FENCED}|^#+ (?P<heading>[^\n]+)$|{COMMAND}", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """Code on a page.

    Attributes:
        page: path from the repository's root.
        heading: the one above it.
        language: what stands behind the opening fence, "" for a shell's lines; "inline" = a command
            in the text.
        code: what is between the fences or backticks.
    """

    page: str
    heading: str
    language: str
    code: str

    def commands(self):
        """A shell's commands, each on one line, without comments."""
        lines = self.code.replace("\\\n", " ").splitlines()
        lines = [re.sub(r"(^|\s)# .*", "", " ".join(line.split())).strip() for line in lines]
        return [command for line in lines for command in line.split(" && ") if command]


def read(page):
    return (REPO / page).read_text()


def without_blocks(text):
    return re.sub(FENCED, "", text, flags=re.M | re.S)


def blocks(page):
    """All code of a page, in its order."""
    found, heading = [], ""
    for part in PART.finditer(read(page)):
        if part["heading"]:
            heading = part["heading"]
        elif part["command"]:
            found.append(Block(page, heading, "inline", " ".join(part["command"].split())))
        else:
            found.append(Block(page, heading, part["language"], part["code"]))
    return found


def python_blocks(page):
    return [block for block in blocks(page) if block.language == "python"]

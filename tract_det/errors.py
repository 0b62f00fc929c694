"""The errors that a tool prints as a single line, without a traceback."""

import re
from collections.abc import Mapping
from reprlib import Repr
from typing import Any

_LONGEST = 2_000
_ELLIPSIS = "\N{HORIZONTAL ELLIPSIS}"
# Characters that would steer a terminal, break a line or cannot be encoded.
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


class UserError(ValueError):
    """The user can mend this: the message names the file, key or module, and says how.

    A message with very long names from the data loses its middle: the file or key stands at its
    beginning, the mend at its end. Control characters from the data are shown as a box.

    Attributes:
        exit_code: that of a program which ends by it.
    """

    exit_code = 1

    def __str__(self) -> str:
        lines = super().__str__().split("\n")
        message = "\n".join(CONTROLS.sub("\N{REPLACEMENT CHARACTER}", line) for line in lines)
        if len(message) <= _LONGEST:
            return message
        return f"{message[: _LONGEST // 2]} {_ELLIPSIS} {message[-_LONGEST // 2 :]}"


class DivergedError(UserError):
    """A loss or an output is not finite; with the same settings it would be so again.

    Attributes:
        facts: what is known of the step, by name: plain values.
    """

    exit_code = 3

    def __init__(self, message: str, facts: Mapping[str, Any] | None = None) -> None:
        super().__init__(message)
        self.facts = dict(facts or {})


def shortened(text: str, length: int = 40) -> str:
    """A text of the user's in one line of at most so many characters: for messages and tables."""
    line = "".join(c if c.isprintable() else " " for c in text)
    return line if len(line) <= length else line[: length - 1] + _ELLIPSIS


_BRIEF = Repr()
_BRIEF.maxlevel = 2  # YAML's aliases make trees that are endless when written out
_BRIEF.maxstring = _BRIEF.maxother = 80


def brief(value: Any) -> str:
    """A value from a file as Python writes it, on a line: long and deep ones lose their middle."""
    try:
        return shortened(_BRIEF.repr(value), 100)
    except ValueError:  # a whole number of thousands of digits
        return f"a {type(value).__name__} too long to be shown"

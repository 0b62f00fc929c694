"""How many cases a fuzzer tries, and what a refusal is."""

import os

from tract_det.errors import UserError


def cases(default):
    """FUZZ_CASES, or what the suite has time for."""
    return int(os.environ.get("FUZZ_CASES", str(default)))


def refusal(read, *args):
    """The line that refuses what is read, "" where nothing does; another error is a finding."""
    try:
        read(*args)
    except UserError as error:
        assert 10 < len(str(error)) < 2_100 and "\n" not in str(error), repr(str(error))
        return str(error)
    return ""

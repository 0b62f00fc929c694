"""What every tool shares: an error that the user can mend is one line and exit code 1."""

import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import NoReturn

from tract_det.errors import UserError
from tract_det.tract import TrActError

USER_ERRORS = (UserError, TrActError)


def one_line(error: BaseException) -> str:
    """The error's own message, also where a data-loader worker wrapped it in a traceback."""
    text = str(error).strip()
    if not text.startswith("Caught "):
        return text
    # torch appends the worker's formatted traceback; its end is "<module>.<Class>: <message>".
    last = re.split(r"^[\w.]*Error: ", text, flags=re.MULTILINE)[-1]
    return last.strip()


def run(main: Callable[[], int | None]) -> NoReturn:
    """Runs a tool's `main` and leaves the process with the exit code that it returns.

    With `TRACT_DET_DEBUG=1` in the environment the traceback of a user's error is shown as well.
    """
    is_main = os.environ.get("RANK", "0") == "0"
    if not is_main:
        warnings.simplefilter("ignore")  # the main rank says the same
    warnings.formatwarning = lambda message, *_, **__: f"warning: {message}\n"
    try:
        code = main() or 0
    except USER_ERRORS as error:
        if os.environ.get("TRACT_DET_DEBUG"):
            traceback.print_exc()
        who = "" if is_main else f"[rank {os.environ['RANK']}] "
        print(f"{who}error: {one_line(error)}", file=sys.stderr, flush=True)
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    if code and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        # The other ranks may be waiting for this one in a collective, where an orderly exit would
        # join them; the launcher ends them when this process is gone.
        os._exit(code)
    sys.exit(code)

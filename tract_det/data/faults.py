"""Collects what is wrong with a data set, so that all of it is said at once."""

from collections.abc import Iterator
from contextlib import contextmanager

from tract_det.errors import UserError

_SHOWN = 5


class Faults:
    """What was refused so far."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Notes a UserError raised within, and goes on."""
        try:
            yield
        except UserError as error:
            self.note(error)

    def note(self, error: UserError) -> None:
        """Notes an error. In loops over very many entries it is faster than `noted`."""
        self.messages.append(str(error))

    def refuse(self) -> None:
        """Refuses the data if anything was noted.

        Raises:
            UserError: The first few faults, and the number of the others.
        """
        if not self.messages:
            return
        others = len(self.messages) - _SHOWN
        more = f"; and {others} more of the kind" if others > 0 else ""
        raise UserError("; ".join(self.messages[:_SHOWN]) + more)

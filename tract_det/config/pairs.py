"""`KEY VALUE` pairs at the end of a command line."""

from collections.abc import Sequence

from tract_det.errors import UserError


def refuse_half_pairs(words: Sequence[str]) -> None:
    """Refuses words that are no pairs: a key without a value, or an option among them.

    Raises:
        UserError: the message names the word.
    """
    for word in words[::2]:
        if word.startswith("--"):
            raise UserError(f"{word} stands behind KEY VALUE pairs: give options before them")
    if len(words) % 2:
        raise UserError(f"overrides are KEY VALUE pairs: '{words[-1]}' has no value")

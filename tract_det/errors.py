"""The errors that a tool prints as a single line, without a traceback."""


class UserError(ValueError):
    """The user can mend this: the message names the file, key or module, and says how.

    Attributes:
        exit_code: that of a program which ends by it.
    """

    exit_code = 1


class DivergedError(UserError):
    """A loss or an output is not finite; with the same settings it would be so again."""

    exit_code = 3

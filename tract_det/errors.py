"""The one error that a tool prints as a single line, without a traceback."""


class UserError(ValueError):
    """The user can mend this: the message names the file, key or module, and says how."""

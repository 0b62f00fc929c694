"""The verbs of `tract-det`, one module each.

A verb's docstring is its help text; `main(parser, argv)` declares its arguments, parses them, does
the work and returns the exit code (None = 0). What is heavy is imported in `main`, once the
arguments are known to be right.
"""

"""Configurations: their keys, defaults and checks. Imports no torch."""

"""Data sets, transforms and loaders. Imports no model."""

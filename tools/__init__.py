"""The tools; `python -m tract_det.tools.<name>` where the package is installed."""

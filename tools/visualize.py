"""Draws pictures of training runs: curves of several runs in one, and their stems' filters.

    python tools/visualize.py output/plain output/tract --out pictures

The same as `tract-det visualize`.
"""

from tract_det.cli import tool

if __name__ == "__main__":
    tool("visualize")

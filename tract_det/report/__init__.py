"""report.html: one page that shows a training run, opens offline, and needs nothing beside it.

`folder` reads what a run has left, `svg` draws it, `page` fills the template. `comparison` does the
same for what `tract-det compare` has left, as comparison.html.
"""

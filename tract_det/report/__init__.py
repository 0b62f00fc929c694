"""report.html: one page that shows a training run, opens offline, and needs nothing beside it.

`folder` reads what a run has left, `figures` and `svg` draw it, `page` fills the template.
"""

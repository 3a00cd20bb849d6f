"""How Sphinx builds the pages of this folder into a site: `make docs`."""

project = "nmoe"
extensions = ["myst_parser"]
html_theme = "furo"
html_title = "nmoe"
nitpicky = True
myst_heading_anchors = 4

"""Sphinx's settings for the documentation; ``build.py`` lays the pages out and runs it."""

project = "Konsil"
html_title = "Konsil"
extensions = ["myst_parser"]
myst_heading_anchors = 4  # as on code hosts, so that links work there, too
myst_enable_extensions: list[str] = []
smartquotes = False  # --option stays --option
nitpicky = True
suppress_warnings = ["misc.highlighting_failure"]  # outputs and excerpts are not always whole programs
html_theme = "furo"
html_static_path = ["static"]
html_css_files = ["site.css"]
html_copy_source = False
html_show_sphinx = False
html_show_copyright = False
pygments_style = "a11y-high-contrast-light"
pygments_dark_style = "a11y-high-contrast-dark"

"""Sphinx configuration: MyST pages, numpydoc docstrings."""

import moelora

project = "moelora"
author = "the moelora developers"
release = version = moelora.__version__

extensions = ["myst_parser", "numpydoc", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.mathjax"]
myst_enable_extensions = ["dollarmath"]
numpydoc_show_class_members = False
autodoc_typehints = "none"  # the docstrings say types, with shapes
html_theme = "furo"
exclude_patterns = ["_build"]

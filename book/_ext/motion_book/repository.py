"""The repository's address stands in ``pyproject.toml`` alone; buttons and links derive from it."""

from __future__ import annotations

import tomllib
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.util import logging

LOG = logging.getLogger(__name__)


def setup(app: Sphinx) -> None:
    """Fill in the theme's repository options before it reads them."""
    app.connect("config-inited", _configure)


def address(root: Path) -> str:
    """Return ``[project.urls] Repository`` of a source tree, or "" if it has none."""
    file = root / "pyproject.toml"
    if not file.is_file():
        return ""
    project = tomllib.loads(file.read_text(encoding="utf-8")).get("project", {})
    return str(project.get("urls", {}).get("Repository", "")).rstrip("/")


def _configure(app: Sphinx, config) -> None:
    found = address(Path(app.srcdir))
    options = config.html_theme_options
    if not found:
        LOG.warning("pyproject.toml names no [project.urls] Repository: no buttons on the pages")
        for button in ("use_repository_button", "use_issues_button", "launch_buttons"):
            options.pop(button, None)
        options.pop("repository_url", None)
        return
    options["repository_url"] = found
    options["repository_branch"] = "main"
    options["path_to_docs"] = ""
    options["use_repository_button"] = options["use_issues_button"] = True
    options["launch_buttons"] = {
        "colab_url": "https://colab.research.google.com",
        "binderhub_url": "https://mybinder.org",
    }

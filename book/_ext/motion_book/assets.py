"""Puts everything a page needs beside it, so that no reader's browser asks another site.

Three things would otherwise come from a CDN: MathJax, the two scripts of ipywidgets (left out: the
recorded pages carry no widget state), and the chart runtime of the explorers.
"""

from __future__ import annotations

import importlib.util
import shutil
from pathlib import Path

from sphinx.application import Sphinx
from sphinx.errors import ExtensionError

from toolkit.core.io import write_text

HERE = Path(__file__).resolve().parent
STATIC = HERE.parents[1] / "_static"
MATHJAX = "sphinx-mathjax-offline"
# what formulas need, in parts: the ready bundle is half as large again, mostly its menu
MATHJAX_LOADS = ("input/tex", "output/chtml", "a11y/assistive-mml")
MATHJAX_PARTS = (
    "startup.js", "core.js", "input/tex.js", "input/tex/extensions", "output/chtml.js",
    "output/chtml/fonts", "a11y/assistive-mml.js",
)  # fmt: skip


def setup(app: Sphinx) -> None:
    """Register static files and the step that writes the runtimes."""
    app.connect("config-inited", _configure)
    app.connect("builder-inited", _write)
    app.connect("html-page-context", _drop_thebe, priority=900)
    app.add_css_file("house.css", priority=900)
    for script in ("explorer.js", "ledger.js"):
        app.add_js_file(script, loading_method="defer")


def _configure(app: Sphinx, config) -> None:
    config.html_static_path.append(str(STATIC))
    config.mathjax_path = "mathjax/startup.js"
    config.mathjax3_config = {**(config.mathjax3_config or {}), "loader": {"load": MATHJAX_LOADS}}
    config.nb_ipywidgets_js = {}
    config.html_favicon = config.html_favicon or str(STATIC / "favicon.svg")
    config.html_context.setdefault("default_mode", "auto")
    config.html_theme_options.setdefault("show_toc_level", 2)
    config.html_theme_options["navbar_persistent"] = []  # the side bar has the search already


def _drop_thebe(app: Sphinx, pagename: str, templatename: str, context: dict, doctree) -> None:
    """Leave out the live-code scripts that jupyter-book always adds: they name a CDN, and twice."""
    context["script_files"] = [
        script
        for script in context.get("script_files", [])
        if "thebe" not in f"{script.filename} {script.attributes.get('body', '')}"
    ]


def _write(app: Sphinx) -> None:
    if app.builder.format != "html":
        return
    static = Path(app.outdir) / "_static"
    static.mkdir(parents=True, exist_ok=True)
    from toolkit.core.show.explorers import page_script

    write_text(static / "explorer.js", page_script())
    _write_runtime(static / "vega-runtime.js")
    _copy_mathjax(static / "mathjax")


def _write_runtime(target: Path) -> None:
    """Write the chart runtime; its first line names the version, so it is made once."""
    import vl_convert

    stamp = f"// Vega, Vega-Lite and Vega-Embed, bundled by vl-convert {vl_convert.__version__}\n"
    if target.is_file():
        with target.open(encoding="utf-8") as file:
            if file.readline() == stamp:
                return
    from toolkit.core.show.runtime import runtime

    # in a function, so that nothing but its three names reaches the page
    write_text(target, f"{stamp}(() => {{{runtime()}}})();\n")


def _copy_mathjax(target: Path) -> None:
    found = importlib.util.find_spec(MATHJAX)
    if found is None or not found.submodule_search_locations:
        raise ExtensionError(
            f"{MATHJAX} is not installed: without it formulas would need the network. "
            "Install the book's requirements."
        )
    source = Path(next(iter(found.submodule_search_locations))) / "static" / "mathjax"
    for part in MATHJAX_PARTS:
        place = source / part
        files = [place] if place.is_file() else sorted(p for p in place.rglob("*") if p.is_file())
        for file in files:
            copy = target / file.relative_to(source)
            if not copy.is_file() or copy.stat().st_size != file.stat().st_size:
                copy.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, copy)

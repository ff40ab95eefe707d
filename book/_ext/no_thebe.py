"""Leaves sphinx-thebe's scripts out of the pages: jupyter-book always loads it, and nothing here uses it.

It would name a foreign host on every page and declare the same constant twice, which browsers report as an error.
"""

from typing import Any

from sphinx.application import Sphinx


def drop_scripts(app: Sphinx, page: str, template: str, context: dict[str, Any], doctree: object) -> None:
    """Take the scripts out of one page."""
    context["script_files"] = [script for script in context["script_files"] if not _is_thebe(script)]


def _is_thebe(script: Any) -> bool:
    return "sphinx-thebe" in str(script.filename) or "THEBE_JS_URL" in str(script.attributes.get("body"))


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("html-page-context", drop_scripts)
    return {"parallel_read_safe": True}

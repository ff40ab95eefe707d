"""Every build reads every notebook again, so that a page never shows numbers from older code or an older store.

Sphinx alone skips a page whose file has not changed, also where notebooks are to be executed by force.
"""

from collections.abc import Iterable

from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment


def notebooks(app: Sphinx, env: BuildEnvironment, *changes: Iterable[str]) -> list[str]:
    """The chapters that are notebooks."""
    return [page for page in env.found_docs if env.doc2path(page).endswith(".ipynb")]


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("env-get-outdated", notebooks)
    return {"parallel_read_safe": True}

"""Docstrings are plain prose: `code` is code, and a star, a bar or an underscore stands for itself.

Sphinx reads docstrings as reStructuredText, where |h| or grad_ outside of backticks would be markup.
"""

import re

from sphinx.application import Sphinx

CODE = re.compile(r"(`+)([^`]+)\1")
MARKUP = re.compile(r"[\\*|]|_(?=_*(?!\w))")


def to_rst(paragraph: str) -> str:
    """One paragraph of plain prose as reStructuredText; an indented block or a doctest stays as it is."""
    if paragraph.startswith(("    ", ">>>")):
        return paragraph
    text = ""
    end = 0
    for code in CODE.finditer(paragraph):
        prose = MARKUP.sub(r"\\\g<0>", paragraph[end : code.start()])
        text += _glue(text, prose) + prose
        text += _glue(text, "`") + f"``{code[2]}``"
        end = code.end()
    rest = MARKUP.sub(r"\\\g<0>", paragraph[end:])
    return text + _glue(text, rest) + rest


def _glue(left: str, right: str) -> str:
    """An invisible separator between code and a word that touches it, as in `name`s."""
    touches = (left.endswith("``") and right[:1].isalnum()) or (left[-1:].isalnum() and right.startswith("`"))
    return "\\ " if touches else ""


def rewrite(app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Rewrite a docstring in place."""
    lines[:] = "\n\n".join(map(to_rst, "\n".join(lines).split("\n\n"))).split("\n")


def setup(app: Sphinx) -> dict[str, bool]:
    app.connect("autodoc-process-docstring", rewrite)
    return {"parallel_read_safe": True}

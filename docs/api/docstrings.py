"""Docstrings for the site: ``>>>`` examples become code blocks, ``a, b: text`` one entry per name, and ``Returns``
gets the return type, without which griffe would read text before a colon as a type."""

from __future__ import annotations

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"^( *)>>> .*(?:\n\1\S.*)*", re.MULTILINE)
SEVERAL = re.compile(r"^( +)(\*{0,2}[a-z_]\w*(?:, \*{0,2}[a-z_]\w*)+): (.*(?:\n\1 +\S.*)*)", re.MULTILINE)

ALIAS = re.compile(r"\b_[A-Z]\w*")
BASE = re.compile(r"Annotated\[(\w+),")
RETURNS = re.compile(r"^( *Returns:\n +)", re.MULTILINE)


def for_the_site(docstring: str, returns: Any = None) -> str:
    """The docstring with each example, up to the next empty line, between fences, one entry per name, and the return
    type."""
    if returns is not None:
        docstring = RETURNS.sub(lambda found: f"{found[1]}{returns}: ", docstring)
    docstring = EXAMPLE.sub(lambda found: f"{found[1]}```pycon\n{found[0]}\n{found[1]}```", docstring)
    return SEVERAL.sub(lambda found: "\n".join(f"{found[1]}{n}: {found[3]}" for n in found[2].split(", ")), docstring)


class Docstrings(griffe.Extension):
    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        if obj.docstring:
            obj.docstring.value = for_the_site(obj.docstring.value, getattr(obj, "returns", None))

    def on_attribute_instance(self, *, attr: griffe.Attribute, **kwargs: Any) -> None:
        """Show a private alias, such as ``_Rank``, as the type that it annotates."""
        for name in ALIAS.findall(str(attr.annotation or "")):
            alias = attr.module.members.get(name)
            if found := BASE.search(str(getattr(alias, "value", ""))):
                attr.annotation = str(attr.annotation).replace(name, found[1])

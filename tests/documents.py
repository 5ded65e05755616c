"""The README and the pages of docs/ as programs: their blocks of Python in order, and what they print."""

from __future__ import annotations

import contextlib
import functools
import io
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def blocks(page: str) -> list[tuple[str, str]]:
    """The language and body of each code block of ``page``, a path from the repository's root."""
    text = re.sub(r'^--8<-- "(.*):(.*)"$', _section, (ROOT / page).read_text(), flags=re.MULTILINE)
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def _section(found: re.Match[str]) -> str:
    """What a page includes of another one, as the site does."""
    text = (ROOT / found[1]).read_text()
    return text.split(f"[start:{found[2]}] -->")[1].split(f"<!-- --8<-- [end:{found[2]}]")[0]


@functools.cache
def ran(page: str, after: str | None = None) -> tuple[dict[str, Any], str]:
    """The names that the program of ``page`` defines, and what it prints; it starts with the names of ``after``."""
    names = dict(ran(after)[0]) if after else {}
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        for i, code in enumerate(body for language, body in blocks(page) if language == "python"):
            exec(compile(code, f"{page}, block {i + 1}", "exec"), names)
    return names, out.getvalue()

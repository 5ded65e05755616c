"""Reading error messages: every test of one calls `message`, and says with `expect` what must be in it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def message(error: type[Exception], call: Callable[[], Any]) -> str:
    """What ``call`` says when it raises ``error``, notes included."""
    with pytest.raises(error) as caught:
        call()
    return "\n".join([str(caught.value), *getattr(caught.value, "__notes__", ())])


def expect(text: str, *parts: str) -> None:
    """Every part stands in the text."""
    missing = [part for part in parts if part not in text]
    assert not missing, f"{missing} not in:\n{text}"

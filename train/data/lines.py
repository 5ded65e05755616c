"""Text files: what their bytes say, and where a line ends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from shlex import quote

from train.config import ConfigError


def decode(content: bytes, name: str, first: int = 1) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
      name: of the file, for the error.
      first: the number of the line with which ``content`` begins; only the first one of a file may have a mark.

    Raises:
      ConfigError: if it is not UTF-8, naming the line.
    """
    try:
        text = content.decode("utf-8-sig" if first == 1 else "utf-8")
    except UnicodeDecodeError as error:
        marked = first == 1 and content.startswith((b"\xff\xfe", b"\xfe\xff"))
        line = first + content.count(b"\n", 0, error.start)
        raise ConfigError(
            f"{name}, line {line}: expected UTF-8, got "
            f"{'the byte order mark of UTF-16' if marked else f'the byte 0x{content[error.start]:02x}'}. Convert it "
            f"first, for example from {'UTF-16' if marked else 'Latin-1'}: "
            f"iconv -f {'utf-16' if marked else 'latin1'} -t utf-8 {quote(name)} > {quote(f'utf8-{Path(name).name}')}"
        ) from error
    if (at := text.find("\0")) >= 0:
        line = first + text.count("\n", 0, at)
        raise ConfigError(
            f"{name}, line {line}: expected text in UTF-8, got a NUL byte: is it UTF-16, or no text at all?"
        )
    return text


def lines(text: str) -> list[str]:
    r"""The lines of a text: only \n and \r\n end one, so that other separators, such as U+2028, stay in their line."""
    found = text.replace("\r\n", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found


def stream(file: Iterable[bytes], name: str) -> Iterator[str]:
    """The lines of an open file with what ends them, one at a time; see `decode`."""
    for number, line in enumerate(file, 1):
        yield decode(line, name, number)

"""Text files: what their bytes say, and where a line ends."""

from __future__ import annotations

from train.config import ConfigError


def decode(content: bytes, name: str) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Args:
      name: of the file, for the error.

    Raises:
      ConfigError: if it is not UTF-8, naming the line.
    """
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            f"{name}, line {line}: expected UTF-8, got the byte 0x{content[error.start]:02x}. Convert it first, for "
            f"example from Latin-1: iconv -f latin1 -t utf-8 {name} > utf8-{name.rpartition('/')[2]}"
        ) from error


def lines(text: str) -> list[str]:
    r"""The lines of a text: only \n and \r\n end one, so that other separators, such as U+2028, stay in their line."""
    found = text.replace("\r\n", "\n").split("\n")
    return found[:-1] if found[-1] == "" else found

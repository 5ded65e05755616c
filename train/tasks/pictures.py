"""Image files or pixel values in, arrays of brightness out: 0 is black, 1 is white."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from train.data.tables import Table, column

WHITE16 = 65535
"""White at 16 bits per pixel."""


class Unreadable(ValueError):
    """A value that is not a readable image; the message states the reason."""


class Picture(NamedTuple):
    """A picture from a file.

    Attributes:
      image: its first frame, upright.
      animated: whether it has more frames.
    """

    image: Image.Image
    animated: bool


def stored_images(table: Table, name: str) -> Sequence[Any]:
    """The images of a column as stored, to open one at a time."""
    if not isinstance(table.features.get(name), datasets.Image):
        return column(table, name, "task.image")
    raw: Any = table.cast_column(name, datasets.Image(decode=False))
    return column(raw, name, "task.image")


def open_image(value: Any) -> Picture | np.ndarray:
    """A picture, or pixels as float32 [side * side], [side, side] or [side, side, channels].

    Args:
      value: a path, the content of a file, both also as in `datasets` (``{"path": ..., "bytes": ...}``), or numbers.

    Raises:
      Unreadable: if it is none of these, or the file is missing, damaged or of an unknown format.
    """
    if isinstance(value, str | bytes | Mapping):
        return _from_file(value)
    try:
        pixels = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise Unreadable(f"{value!r:.80} is not an image; expected a picture, or its pixels") from error
    side = side_of(pixels)
    if pixels.shape[:2] not in ((side * side,), (side, side)) or pixels.ndim > 3 or side == 0:
        shape = " x ".join(map(str, pixels.shape))
        raise Unreadable(f"{shape} pixels are not a square image; expected side * side numbers, or side rows of side")
    return pixels


def side_of(image: Picture | np.ndarray) -> int:
    """The longer side of a picture, or the side of square pixels."""
    if isinstance(image, Picture):
        return max(image.image.size)
    return image.shape[0] if image.ndim > 1 else math.isqrt(image.size)


def to_array(image: Picture | np.ndarray, side: int, channels: int, brightest: float) -> np.ndarray:
    """An image as float32 [side, side, channels], from 0 to 1.

    A picture is resized to a square by Pillow's bicubic filter, and composited on white. White is the maximum of its
    format: 255, or 65535 for 16 bits.

    Args:
      image: from `open_image`.
      brightest: the value of white for numbers, and for 32-bit or float images, whose formats do not define it.

    Raises:
      Unreadable: if numbers have another size, or are outside the range from 0 to ``brightest``.
    """
    if isinstance(image, np.ndarray):
        return _of_numbers(image, side, channels, brightest)
    picture = image.image
    if picture.mode.startswith(("I", "F")):  # Pillow's `convert` would clip these at 255
        levels = np.asarray(picture).astype(np.float32)
        scaled = _scaled(levels, WHITE16 if picture.mode.startswith("I;16") else brightest)
        if (transparent := picture.info.get("transparency")) is not None:
            scaled[levels == transparent] = 1
        resized = np.asarray(Image.fromarray(scaled).resize((side, side))).clip(0, 1)  # bicubic filters overshoot
        return np.repeat(resized[..., None], channels, axis=-1)
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture)
    picture = picture.convert("L" if channels == 1 else "RGB").resize((side, side))
    return np.asarray(picture, np.float32).reshape(side, side, channels) / 255


def _from_file(value: str | bytes | Mapping[str, Any]) -> Picture:
    if isinstance(value, Mapping):
        path, content = value.get("path"), value.get("bytes")
    else:
        path, content = (value, None) if isinstance(value, str) else (None, value)
    if content is None and not path:
        raise Unreadable("neither a file nor its content")
    try:
        with Image.open(str(path) if content is None else io.BytesIO(content)) as image:
            animated = getattr(image, "is_animated", False)
            image.load()
            return Picture(ImageOps.exif_transpose(image), animated)
    except FileNotFoundError as error:
        raise Unreadable(f"no file at {path}; paths are absolute, or relative to the working directory") from error
    except Exception as error:  # Pillow's plugins raise all kinds of errors for a damaged file
        unknown = isinstance(error, UnidentifiedImageError)
        what = "not a picture in a format that Pillow reads" if unknown else str(error) or type(error).__name__
        raise Unreadable(f"{path}: {what}" if path else what) from error


def _of_numbers(pixels: np.ndarray, side: int, channels: int, brightest: float) -> np.ndarray:
    grid = pixels.reshape(side_of(pixels), side_of(pixels), -1)
    if grid.shape[0] != side or grid.shape[2] not in (1, channels):
        got = " x ".join(map(str, grid.shape))
        raise Unreadable(f"{got} pixels, expected {side} x {side} x {channels}: numbers are not resized, pictures are")
    return np.repeat(_scaled(grid, brightest), channels // grid.shape[2], axis=-1)


def _scaled(levels: np.ndarray, white: float) -> np.ndarray:
    least, most = levels.min(), levels.max()
    if least < 0 or not most <= white:  # also true of NaN
        way = f"; pass --task.brightest {most:g}" if least >= 0 and math.isfinite(most) else ""
        raise Unreadable(f"pixels from {least:g} to {most:g}, expected 0 to task.brightest = {white:g}{way}")
    return levels / white

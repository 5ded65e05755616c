"""A contact sheet: some images of each label, drawn with Pillow, which is imported on use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import ConfigError

TILE, GAP, FONT_SIZE = 64, 6, 14
"""Pixels: the minimum side of an image (the maximum is twice that), the space around it, and the font size."""
MAX_LABELS = 20
"""The maximum number of rows."""
MAX_NAME = 28
"""The maximum length of a label."""
INK, PAPER = (32, 33, 36), (236, 238, 241)


def write_contact_sheet(
    out: Path, images: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str], each: int
) -> None:
    """Write a PNG with a row for each label: its name, its number of images, and the first of them.

    Args:
      out: the file, replaced if it exists.
      images: by the name of their domain, float [n, side, side, channels] from 0 to 1.
      labels: int [n].
      names: of the labels.
      each: images per label, in every domain.

    Raises:
      ConfigError: if ``out`` is not a .png in an existing folder.
    """
    from PIL import Image, ImageDraw, ImageFont

    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"got --out {out}, expected a file whose name ends in .png, in an existing folder")
    font = _font(ImageFont)
    counts = np.bincount(labels, minlength=len(names))
    kept = _kept(counts)
    heads = [f"{_drawable(_short(names[i]), font)}\n{counts[i]:,} image{'s' if counts[i] != 1 else ''}" for i in kept]
    rows = [np.flatnonzero(labels == i)[:each] for i in kept]

    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(pen.multiline_textbbox((0, 0), head, font=font)[2]) for head in heads) + 2 * GAP
    side = _side(next(iter(images.values())).shape[1])
    block = max(map(len, rows)) * (side + GAP) + 2 * GAP
    top = GAP + (2 * FONT_SIZE if len(images) > 1 else 0)
    bottom = 2 * FONT_SIZE if len(kept) < len(names) else 0
    sheet = Image.new("RGB", (left + len(images) * block, top + len(rows) * (side + GAP) + bottom), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (head, found) in enumerate(zip(heads, rows, strict=True)):
        y = top + row * (side + GAP)
        pen.multiline_text((GAP, y + side // 2), head, INK, font, anchor="lm")
        for i, pictures in enumerate(images.values()):
            for column, image in enumerate(found):
                sheet.paste(_tile(pictures[image], side, Image), (left + i * block + column * (side + GAP), y))
    if len(images) > 1:
        for i, domain in enumerate(images):
            pen.text((left + i * block, GAP), _drawable(domain, font), INK, font)
    if bottom:
        pen.text((GAP, sheet.height - 2 * FONT_SIZE), f"and {len(names) - len(kept):,} more labels", INK, font)
    sheet.save(out)


def _kept(counts: np.ndarray) -> list[int]:
    """The labels with a row; if there are too many, those with the most and the fewest images."""
    order: list[int] = np.argsort(-counts, kind="stable").tolist()
    if len(order) > MAX_LABELS:
        order = [i for i in order if counts[i]]
    half = MAX_LABELS // 2
    return sorted(order if len(order) <= MAX_LABELS else [*order[:half], *order[-half:]])


def _side(own: int) -> int:
    """The side of an image on the sheet; small images are enlarged by whole factors, so pixels stay square."""
    return own * -(-TILE // own) if own < TILE else min(own, 2 * TILE)


def _tile(pixels: np.ndarray, side: int, library: Any) -> Any:
    shades = np.round(pixels * 255).astype(np.uint8)
    image = library.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades).convert("RGB")
    return image.resize((side, side), library.Resampling.NEAREST if len(pixels) < side else library.Resampling.LANCZOS)


def _short(name: str) -> str:
    return name if len(name) <= MAX_NAME else f"{name[: MAX_NAME - 1]}\u2026"


def _font(library: Any) -> Any:
    """Matplotlib's font, which covers most alphabets; Pillow's own has Latin letters only."""
    import matplotlib

    return library.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT_SIZE)


def _drawable(text: str, font: Any) -> str:
    """A text with escapes for characters that the font does not have."""
    missing = bytes(font.getmask("\U0010ffff"))
    return "".join(
        one.encode("unicode_escape").decode("ascii") if bytes(font.getmask(one)) == missing else one for one in text
    )

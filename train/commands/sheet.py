"""A contact sheet: some images of each label, drawn with Pillow, which is imported only then."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from train.config import ConfigError

TILE, GAP, FONT = 64, 6, 14
"""Pixels: the side of an image at least (and at most twice that), the space around it, and the size of letters."""

MANY = 20
"""Labels that have a row."""

WIDEST = 28
"""Characters of a label that are shown."""

INK, PAPER = (32, 33, 36), (236, 238, 241)


def write_sheet(
    out: Path, images: Mapping[str, np.ndarray], labels: np.ndarray, names: Sequence[str], each: int
) -> None:
    """Write a PNG with a row for each label: its name, how many images have it, and the first of them.

    Args:
      out: the file; what is there is replaced.
      images: by the name of their domain, float [n, side, side, channels] from 0 to 1.
      labels: int [n].
      names: of the labels.
      each: images of a label, in every domain.

    Raises:
      ConfigError: if there is no such folder.
    """
    from PIL import Image, ImageDraw, ImageFont

    if out.suffix != ".png" or not out.parent.is_dir():
        raise ConfigError(f"show: got --out {out}, expected a file whose name ends in .png, in a folder that there is")
    font = _font(ImageFont)
    often = np.bincount(labels, minlength=len(names))
    # Where there are too many labels, those of the most images and of the fewest.
    order: list[int] = np.argsort(-often, kind="stable").tolist()
    if len(names) > MANY:
        order = [i for i in order if often[i]]
    kept = sorted(order if len(order) <= MANY else [*order[: MANY // 2], *order[-MANY // 2 :]])
    heads = [f"{_drawable(_short(names[i]), font)}\n{often[i]:,} image{'s' if often[i] != 1 else ''}" for i in kept]
    rows = {i: np.flatnonzero(labels == i)[:each] for i in kept}

    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    left = max(int(pen.multiline_textbbox((0, 0), head, font=font)[2]) for head in heads) + 2 * GAP
    side = _side(next(iter(images.values())).shape[1])
    columns = max(map(len, rows.values()))
    block = columns * (side + GAP) + 2 * GAP
    top = GAP + (2 * FONT if len(images) > 1 else 0)
    bottom = 2 * FONT if len(kept) < len(names) else 0
    sheet = Image.new("RGB", (left + len(images) * block, top + len(rows) * (side + GAP) + bottom), PAPER)
    pen = ImageDraw.Draw(sheet)
    for row, (head, found) in enumerate(zip(heads, rows.values(), strict=True)):
        y = top + row * (side + GAP)
        pen.multiline_text((GAP, y + side // 2), head, INK, font, anchor="lm")
        for i, pictures in enumerate(images.values()):
            for column, image in enumerate(found):
                sheet.paste(_tile(pictures[image], side, Image), (left + i * block + column * (side + GAP), y))
    if len(images) > 1:
        for i, domain in enumerate(images):
            pen.text((left + i * block, GAP), _drawable(domain, font), INK, font)
    if bottom:
        pen.text((GAP, sheet.height - 2 * FONT), f"and {len(names) - len(kept):,} labels more", INK, font)
    sheet.save(out)


def _side(own: int) -> int:
    """The side of an image on the sheet: small ones are shown in whole multiples, so that each pixel stays one."""
    return own * -(-TILE // own) if own < TILE else min(own, 2 * TILE)


def _tile(pixels: np.ndarray, side: int, library: Any) -> Any:
    shades = np.round(pixels * 255).astype(np.uint8)
    image = library.fromarray(shades[..., 0] if shades.shape[-1] == 1 else shades).convert("RGB")
    return image.resize((side, side), library.Resampling.NEAREST if len(pixels) < side else library.Resampling.LANCZOS)


def _short(name: str) -> str:
    return name if len(name) <= WIDEST else f"{name[: WIDEST - 1]}\u2026"


def _font(library: Any) -> Any:
    """Matplotlib's font, which covers most alphabets; Pillow's own has Latin letters only."""
    import matplotlib

    return library.truetype(str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), FONT)


def _drawable(text: str, font: Any) -> str:
    """A text with escapes in place of characters that the font does not have."""
    nothing = bytes(font.getmask("\U0010ffff"))
    return "".join(
        one.encode("unicode_escape").decode("ascii") if bytes(font.getmask(one)) == nothing else one for one in text
    )

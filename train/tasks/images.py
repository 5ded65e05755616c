"""Classification of images: pictures, or pixels given as numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from jlora._src.paths import bullets
from train.compute.processes import say
from train.config import ConfigError, Domain, ImageClassification
from train.data.batches import Batch, Examples
from train.data.tables import Table
from train.tasks import pictures
from train.tasks.classify import Classification
from train.tasks.labels import class_numbers, weight_vector

DARK = 1 / 8
"""Where no pixel is brighter, the white of pixels given as numbers is doubtful."""


class Images(Classification):
    """One of several classes for an image."""

    def __init__(self, config: ImageClassification, labels: Sequence[str], channels: int, mean: Any, std: Any):
        self.config, self.labels, self.channels = config, list(labels), channels
        self.weights = weight_vector(config.class_weights, labels)
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def encode(self, table: Table) -> dict[str, Examples]:
        """``image`` in every domain, float32 [n, side, side, channels], normalized; and ``label``."""
        config = self.config
        labels = class_numbers(table, config.label, self.labels)
        plain = self._plain(table)
        return {
            name: {"image": self._normalized(in_domain(plain, domain)), "label": labels}
            for name, domain in (config.domains or {"": Domain()}).items()
        }

    def _plain(self, table: Table) -> np.ndarray:
        """The images from 0 to 1, float32 [n, side, side, channels].

        Raises:
          ConfigError: naming every row that holds no image.
        """
        config = self.config
        assert config.side is not None
        found: list[np.ndarray] = []
        faults: list[str] = []
        animated: list[int] = []
        for row, value in enumerate(pictures.stored(table, config.image)):
            try:
                image = pictures.opened(value)
                found.append(pictures.shown(image, config.side, self.channels, config.brightest))
                if isinstance(image, pictures.Picture) and image.animated:
                    animated.append(row)
            except pictures.Unreadable as error:
                faults.append(f"{table.locate([row])}: {error}")
        if faults:
            more = [f"and {len(faults) - 8:,} more"] if len(faults) > 8 else []
            raise ConfigError(
                f"task.image: {len(faults):,} of {len(table):,} values of the column {config.image!r} cannot be used; "
                f"mend them, or take these rows out:{bullets([*faults[:8], *more])}"
            )
        plain = np.stack(found)
        if animated:
            say(f"{len(animated):,} of {len(plain):,} images move; their first frame is used: {table.locate(animated)}")
        if 0 < (most := float(plain.max())) <= DARK:
            say(
                f"no pixel of {len(plain):,} images is brighter than {most:.2g} of white; where pixels are numbers, "
                f"pass --task.brightest {most * config.brightest:g}"
            )
        return plain

    def _normalized(self, images: np.ndarray) -> np.ndarray:
        return ((images - self._mean) / self._std).astype(np.float32)

    def inputs(self, batch: Batch) -> dict[str, Any]:
        return {"images": batch["image"]}


def in_domain(images: np.ndarray, domain: Domain) -> np.ndarray:
    """Images [n, height, width, channels] from 0 to 1, shown as ``domain`` shows them."""
    images = np.rot90(images, domain.quarter_turns, axes=(1, 2))
    return np.ascontiguousarray(1 - images if domain.invert else images)


def blank(images: np.ndarray) -> int:
    """How many of some images, [n, height, width, channels], have one colour only."""
    return int((np.ptp(images, axis=(1, 2)).max(axis=-1) == 0).sum())


def first_side(table: Table, name: str) -> int:
    """The side of the first image of a column, in pixels.

    Raises:
      ConfigError: if it is none.
    """
    try:
        return pictures.side_of(pictures.opened(pictures.stored(table.select([0]), name)[0]))
    except pictures.Unreadable as error:
        raise ConfigError(f"task.image: the column {name!r}, {table.locate([0])}: {error}") from error

"""Classification of images: image files or pixel values in, normalized arrays out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from train.compute.processes import say
from train.config import ConfigError, Domain, ImageClassification
from train.data.batches import Batch
from train.data.ragged import Examples
from train.data.tables import Table
from train.messages import bulleted
from train.tasks import pictures
from train.tasks.classify import Classification
from train.tasks.encoding import Draft
from train.tasks.labels import class_numbers, weight_vector

DARK = 1 / 8
"""Images without a brighter pixel probably have a different `brightest`."""


class Images(Classification):
    """Assigns a class to an image."""

    def __init__(self, config: ImageClassification, labels: Sequence[str], channels: int, mean: Any, std: Any):
        self.config, self.labels, self.channels = config, list(labels), channels
        self.weights = weight_vector(config.class_weights, labels)
        self._mean, self._std = np.asarray(mean, np.float32), np.asarray(std, np.float32)

    def encode(self, table: Table, draft: Draft | None = None) -> dict[str, Examples]:
        """In memory, per domain, ``image``: float32 [n, side, side, channels], normalized; and ``label``."""
        config = self.config
        labels = class_numbers(table, config.label, self.labels)
        images = self._images(table)
        return {
            name: {"image": self._normalized(in_domain(images, domain)), "label": labels}
            for name, domain in (config.domains or {"": Domain()}).items()
        }

    def _images(self, table: Table) -> np.ndarray:
        """Brightness from 0 to 1, float32 [n, side, side, channels].

        Raises:
          ConfigError: listing every row without a readable image.
        """
        config = self.config
        assert config.side is not None
        found: list[np.ndarray] = []
        faults: list[str] = []
        animated: list[int] = []
        for row, value in enumerate(pictures.stored_images(table, config.image)):
            try:
                image = pictures.open_image(value)
                found.append(pictures.to_array(image, config.side, self.channels, config.brightest))
                if isinstance(image, pictures.Picture) and image.animated:
                    animated.append(row)
            except pictures.Unreadable as error:
                faults.append(f"{table.locate([row])}: {error}")
        if faults:
            raise ConfigError(
                f"task.image: {len(faults):,} of {len(table):,} values of the column {config.image!r} cannot be used; "
                f"repair them, or remove these rows:{bulleted(faults, 8)}"
            )
        images = np.stack(found)
        if animated:
            where = table.locate(animated)
            say(f"{len(animated):,} of {len(images):,} images are animated; their first frame is used: {where}")
        if 0 < (most := float(images.max())) <= DARK:
            say(
                f"no pixel of {len(images):,} images is brighter than {most:.2g} of white; if pixels are numbers, "
                f"pass --task.brightest {most * config.brightest:g}"
            )
        return images

    def _normalized(self, images: np.ndarray) -> np.ndarray:
        return ((images - self._mean) / self._std).astype(np.float32)

    def inputs(self, batch: Batch, smoothing: float = 0.0) -> dict[str, Any]:
        return {"images": batch["image"]}


def in_domain(images: np.ndarray, domain: Domain) -> np.ndarray:
    """Images [n, height, width, channels] from 0 to 1, rotated and inverted according to ``domain``."""
    images = np.rot90(images, domain.quarter_turns, axes=(1, 2))
    return np.ascontiguousarray(1 - images if domain.invert else images)


def count_blank(images: np.ndarray) -> int:
    """The number of images [n, height, width, channels] of a single colour."""
    return int((np.ptp(images, axis=(1, 2)).max(axis=-1) == 0).sum())


def first_side(table: Table, name: str) -> int:
    """The side of a column's first image, in pixels.

    Raises:
      ConfigError: if it is not a readable image.
    """
    try:
        return pictures.side_of(pictures.open_image(pictures.stored_images(table.select([0]), name)[0]))
    except pictures.Unreadable as error:
        raise ConfigError(f"task.image: the column {name!r}, {table.locate([0])}: {error}") from error

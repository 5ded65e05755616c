"""The families by the ``model_type`` of their config.json."""

from __future__ import annotations

from collections.abc import Mapping

from jlora.models._family import Family
from jlora.models.bert.table import BERT, ROBERTA

FAMILIES: Mapping[str, Family] = {"bert": BERT, "roberta": ROBERTA}

"""The families, by the ``model_type`` in a config.json."""

from __future__ import annotations

from collections.abc import Mapping

from jlora.models._family import Family
from jlora.models.bert.table import BERT, ROBERTA
from jlora.models.decoder.table import GEMMA, GEMMA2, LLAMA, MISTRAL, QWEN2, QWEN3
from jlora.models.gpt2.table import GPT2_FAMILY
from jlora.models.vit.table import VIT

FAMILIES: Mapping[str, Family] = {
    "bert": BERT,
    "roberta": ROBERTA,
    "gpt2": GPT2_FAMILY,
    "llama": LLAMA,
    "mistral": MISTRAL,
    "qwen2": QWEN2,
    "qwen3": QWEN3,
    "gemma": GEMMA,
    "gemma2": GEMMA2,
    "vit": VIT,
}

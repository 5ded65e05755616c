"""Tiny checkpoints with tokenizers, made without torch, and data to train them on."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing

from jlora import models

GOOD, BAD = ("fine", "great", "lovely", "warm"), ("poor", "dull", "awful", "cold")
OTHER = (*"a film story plot with and of the actor scene".split(), "<user>", "<assistant>", "<end>", ":")
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
DIGITS = tuple(str(i) for i in range(10)) + ("+", "=")
VOCABULARY = (*SPECIAL, *GOOD, *BAD, *OTHER, *DIGITS)
CHAT = (
    "{% for m in messages %}<{{ m['role'] }}> : {{ m['content'] }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> : {% endif %}"
)
ENCODER = {
    "model_type": "bert",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "hidden_dropout_prob": 0.02,
    "pad_token_id": 0,
}
DECODER = {
    "model_type": "llama",
    "vocab_size": len(VOCABULARY),
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 24,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "eos_token_id": 3,
    "bos_token_id": 2,
}


def write_checkpoint(folder: Path, config: dict[str, Any], *, chat: bool = False, **options: Any) -> Path:
    """Random weights of the network that ``config`` describes, and a tokenizer of `VOCABULARY`."""
    model = models.build(config, **options)
    params = {"params": model.init(jax.random.key(0), models.example_inputs(model))["params"]}
    models.save(folder, model, params)
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(VOCABULARY)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()  # pyright: ignore[reportAttributeAccessIssue]
    tokenizer.post_processor = TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
        single="[CLS] $A [SEP]" if config["model_type"] == "bert" else "[CLS] $A",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "bos_token": "[CLS]", "eos_token": "[SEP]"}
    inputs = ["input_ids", "token_type_ids", "attention_mask"][:: 1 if config["model_type"] == "bert" else 2]
    options = {"model_max_length": 64, "model_input_names": inputs, **({"chat_template": CHAT} if chat else {})}
    about = {"tokenizer_class": "PreTrainedTokenizerFast", **options, **names}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))
    return folder


def sentences(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Sentences of 2 to 9 words, one of which makes them good or bad."""
    rows = []
    for i in range(start, start + count):
        good = i % 2
        words = [OTHER[(i * 7 + j * 3) % 10] for j in range(1 + i % 8)]
        words.insert(i % (len(words) + 1), (GOOD if good else BAD)[i // 2 % 4])
        rows.append({"sentence": " ".join(words), "label": good, "score": float(good), "name": ("bad", "good")[good]})
    return rows


def write_sentiment(folder: Path) -> Path:
    """An encoder checkpoint, and good and bad sentences of many lengths for training and validation."""
    write_checkpoint(folder / "encoder", ENCODER, task="features")
    write_jsonl(folder / "train.jsonl", sentences(64))
    write_jsonl(folder / "validation.jsonl", sentences(20, start=100))
    return folder


def write_jsonl(file: Path, rows: Iterable[dict[str, Any]]) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def sentiment_flags(work: Path, run_dir: Path | None, *more: str) -> list[str]:
    """Flags of a small run on what `write_sentiment` wrote; each of ``more`` may hold several words."""
    options = "--data.limit None --task.max-length 16 --lora.rank 2 --fit.batch-size 8 --eval-batch-size 8"
    where = () if run_dir is None else ("--run-dir", str(run_dir))
    return [
        "configs/sst2_minilm.py", "--model.path", str(work / "encoder"), "--data.train", str(work / "train.jsonl"),
        "--cache-dir", str(work / "cache"), *where, *(word for part in (options, *more) for word in part.split()),
    ]  # fmt: skip

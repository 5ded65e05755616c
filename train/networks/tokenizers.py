"""Tokenizers of checkpoints: loaded, set up for a task, and exported unchanged."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from jlora import models
from jlora.files.buckets import is_in_bucket
from jlora.files.hub_files import JSON_PATTERN, TOKENIZER_FILES
from train.config import CausalLM, ConfigError, Pretrained, SequenceClassification, TaskConfig


def load_tokenizer(path: str, revision: str | None = None) -> Any:
    """The tokenizer of a checkpoint.

    Raises:
      ConfigError: if there is none.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoTokenizer

        folder = models.fetch(path, files=(JSON_PATTERN, *TOKENIZER_FILES)) if is_in_bucket(path) else path
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision)
            # Without its files, transformers returns a tokenizer with an empty vocabulary.
            if set(tokenizer("a b c", add_special_tokens=False)["input_ids"]) <= set(tokenizer.all_special_ids):
                raise ValueError("its vocabulary is empty")
        except (OSError, ValueError, KeyError) as error:
            raise ConfigError(
                f"model.path: {path} has no tokenizer that transformers can read ({str(error).splitlines()[0]}). "
                "Expected the files of its save_pretrained, such as tokenizer.json, next to the weights"
            ) from error
    return tokenizer


def set_up(tokenizer: Any, task: SequenceClassification | CausalLM) -> Any:
    """The tokenizer, modified in place for a task; nothing else modifies it, and it is never exported."""
    if isinstance(task, CausalLM):
        if task.template is not None:
            tokenizer.chat_template = task.template
        return tokenizer
    tokenizer.truncation_side = task.truncation
    if tokenizer.pad_token_id is None:  # GPT-2, for example; the attention mask distinguishes padding from text
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


class CheckpointFiles(NamedTuple):
    """The checkpoint's files for an export; takes the place of a tokenizer in `jlora.models.export`.

    Attributes:
      model: the checkpoint.
      template: the run's own chat template, or None. transformers and vLLM prefer its file to tokenizer_config.json.
      pad_token_id: the run's padding token, for config.json, or None.
    """

    model: Pretrained
    template: str | None
    pad_token_id: int | None

    def save_pretrained(self, folder: Path) -> None:
        """Copy the files of the tokenizer or image processor to ``folder``, byte for byte."""
        source = models.fetch(self.model.path, self.model.revision, TOKENIZER_FILES)
        for file in (source / name for name in TOKENIZER_FILES):
            if file.is_file() and file.resolve() != (folder / file.name).resolve():
                shutil.copyfile(file, folder / file.name)
        if self.template is not None:
            (folder / "chat_template.jinja").write_text(self.template, encoding="utf-8")


def exported_files(model: Pretrained, task: TaskConfig, tokenizer: Any) -> CheckpointFiles:
    """The files for an export of a run from its checkpoint; ``tokenizer`` is the run's, or None."""
    template = task.template if isinstance(task, CausalLM) else None
    return CheckpointFiles(model, template, None if tokenizer is None else tokenizer.pad_token_id)

"""Bases trained from scratch. The cache and the run directories share one layout:

params/          the parameters (orbax)
records.json     the records of the training
identity.json    everything that determines the base; see `train.pretrain`
SHA256SUMS       of all these files
"""

from __future__ import annotations

import json
import secrets
import shutil
from pathlib import Path
from typing import Any

from jlora.files.buckets import is_in_bucket, upload_folder
from jlora.files.checksums import SUMS, check_sums, write_sums
from jlora.files.json_files import write_json
from jlora.models import TensorError
from train.config import ConfigError
from train.rundir.arrays import load_tree, save_tree
from train.rundir.directory import DRAFT
from train.rundir.records import Record


def save_base(path: Path, params: Any, records: list[Record], identity: dict[str, Any]) -> None:
    """Write a base to ``path``, unless another run has already written the same one."""
    draft = path.with_name(f"{path.name}.{secrets.token_hex(4)}{DRAFT}")
    draft.mkdir(parents=True)
    try:
        save_tree(draft / "params", params)
        write_json(draft / "records.json", records, sort_keys=False)
        write_json(draft / "identity.json", identity)
        write_sums(draft)
        draft.rename(path)
    except OSError:
        if not path.exists():
            raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def has_base(path: Path) -> bool:
    """Whether there is a base at ``path``; in a bucket, one whose last file is there."""
    return (path / SUMS).is_file() if is_in_bucket(path) else path.is_dir()


def copy_base(source: Path, path: Path) -> None:
    """Copy the base at ``source`` to ``path`` in a run directory, replacing an existing one."""
    if is_in_bucket(path):
        upload_folder(source, path, last=SUMS)
        return
    draft = path.with_name(path.name + DRAFT)
    shutil.rmtree(draft, ignore_errors=True)
    shutil.copytree(source, draft)
    shutil.rmtree(path, ignore_errors=True)
    draft.rename(path)


def load_base(path: Path, like: Any, shardings: Any = None) -> Any:
    """The parameters of the base at ``path``, as from `train.rundir.arrays.load_tree`.

    Raises:
      ConfigError: listing each file that is damaged or missing.
    """
    try:
        check_sums(path)
    except TensorError as error:
        raise ConfigError(f"{error}\nOr remove {path}: an unfinished run trains its base again.") from error
    return load_tree(path / "params", like, shardings)


def base_records(path: Path) -> list[Record]:
    """The records of the training of the base at ``path``."""
    return json.loads((path / "records.json").read_text())

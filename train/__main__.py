"""The command line: ``python -m train [CONFIG.py] [--field value ...]``."""

from __future__ import annotations

import dataclasses
import difflib
import re
import runpy
import sys
import traceback
import warnings
from pathlib import Path

import tyro

from train import config as schema
from train.config import ConfigError, TrainConfig, validate

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = ROOT / "configs" / "digits.py"
PROG = "python -m train [CONFIG.py]"
DESCRIPTION = """Train a base network, freeze it, and adapt it with LoRA.

CONFIG.py is a file that defines `config = TrainConfig(...)`; without one, it is configs/digits.py.
Every field of it can be overridden: python -m train configs/digits.py --lora.rank 2 --fit.epochs 5"""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code: 0, or 2 when the user's input cannot be run."""
    try:
        config = parse(sys.argv[1:] if argv is None else argv)
        # Only now, so that `--help` and a misspelt flag need not wait for the libraries that train.
        from train.run import run

        run(config)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def parse(argv: list[str]) -> TrainConfig:
    """The configuration that a command line asks for, validated.

    Raises:
      ConfigError: if the file or the configuration in it cannot be used.
      SystemExit: from tyro, for ``--help`` and for flags that do not exist or do not parse.
    """
    path = DEFAULT_CONFIG
    if argv and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
    default = load_config(path)
    with warnings.catch_warnings():
        # tyro warns of a default of the wrong type; `validate` says the same, and refuses.
        warnings.simplefilter("ignore", UserWarning)
        config = tyro.cli(TrainConfig, prog=PROG, description=DESCRIPTION, args=argv, default=default)
    validate(config)
    return config


def load_config(path: Path) -> TrainConfig:
    """The ``config`` that the Python file ``path`` defines.

    Raises:
      ConfigError: if there is no such file, if running it fails, or if it defines no `TrainConfig` of that name.
    """
    if not path.is_file():
        known = ", ".join(sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").glob("*.py")))
        raise ConfigError(f"no config file at {path}; there are: {known}")
    try:
        config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ConfigError(_describe(path, error)) from error
    if not isinstance(config, TrainConfig):
        got = "nothing of that name" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"{path}: expected `config = TrainConfig(...)`, got {got}")
    return config


def _describe(path: Path, error: Exception) -> str:
    """Where and why a config file fails; for a field that does not exist, also the nearest that does."""
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
    where = f"{path}, line {lines[-1]}" if lines else str(path)
    message = f"{where}: {type(error).__name__}: {error}"
    misspelt = re.search(r"(\w+)\.__init__\(\) got an unexpected keyword argument '(\w+)'", str(error))
    if misspelt:
        kind, name = misspelt.groups()
        fields = _fields_of(kind)
        nearest = difflib.get_close_matches(name, fields, n=1)
        message += f"; did you mean {nearest[0]!r}?" if nearest else f"; {kind} has {', '.join(fields)}"
    return message


def _fields_of(kind: str) -> list[str]:
    """The field names of the dataclass ``kind``, which is a `TrainConfig` or a part of one."""
    return [field.name for field in dataclasses.fields(getattr(schema, kind))]


if __name__ == "__main__":
    sys.exit(main())

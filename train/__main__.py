"""The command line: ``python -m train [fit] [CONFIG.py] [--field value ...]``, and commands for finished runs."""

from __future__ import annotations

import gc

if __name__ == "__main__":  # before the slow imports
    from train.loop.stop import watch_ctrl_c

    watch_ctrl_c()
    gc.disable()  # until `_command` is done with them: collections take a fifth of the time to the first step

import dataclasses
import difflib
import importlib
import io
import re
import runpy
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

try:
    import tyro
except ModuleNotFoundError as error:
    print(f'error: {error}, which jlora alone does not need; run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

from jlora.files.errors import ModelError, PeftError, TensorError
from train import config as schema
from train.commands.options import PlanOptions, ShowOptions
from train.config import ConfigError, TrainConfig
from train.config.sweep import sources

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = ROOT / "configs" / "digits.py"
COMMANDS = {
    "show": "show",
    "plan": "plan",
    "predict": "predict",
    "generate": "generate",
    "eval": "evaluate",
    "export": "export",
    "extract": "extract",
    "merge": "merge",
    "report": "report",
    "inspect": "inspect",
}
"""The function of each command, in the module of that name in `train.commands`; the default command is fit."""
OPTIONS = {"show": ShowOptions, "plan": PlanOptions}
"""Commands on a configuration, with their own flags."""
USER_ERRORS = (ConfigError, ModelError, TensorError, PeftError, OSError, UnicodeDecodeError)
PROG = "python -m train"
RATE = "--learning-rate"
DESCRIPTION = """Adapt a network to a task with LoRA.

CONFIG.py is a file that defines `config = TrainConfig(...)`. Default: configs/digits.py. Every field is a flag, and
switches are turned off with `no-`:
  python -m train configs/digits.py --lora.rank 2 --fit.epochs 5
  python -m train configs/instruct_llama.py --task.no-pack
`--learning-rate 1e-4` sets the learning rate of the mode. Several values train several adapters in one program:
  python -m train CONFIG.py --sweep.rank 4,8,16 --sweep.lr 1e-4,3e-4,1e-3 --sweep.seed 0,1
Each command below has its own --help.

Before training:
  python -m train show CONFIG.py               show the training data (takes the same flags)
  python -m train plan CONFIG.py --topology v5e:2x4   what a step needs on a machine that need not be there
  python -m train inspect CHECKPOINT           show the weights that would be adapted

After training:
  python -m train predict RUN --text "..."     label texts
  python -m train generate RUN --prompt "..."  continue prompts
  python -m train eval RUN                     evaluate, also on other data
  python -m train export RUN --to peft         write for PyTorch (peft, hf) or JAX (orbax)
  python -m train merge RUN RUN --method ties  combine the adapters of runs to a new run directory
  python -m train report RUN [RUN...]          compare runs on a page, report.html

For other checkpoints:
  python -m train extract BASE TUNED --rank 16 write adapters that turn BASE into TUNED"""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code.

    0: done. 1: a bug in the program. 2: the input cannot be used, the training diverged, or a file cannot be read or
    written. `train.loop.stop.EXIT_CODE`: stopped on request; the same command resumes. `train.loop.stop.INTERRUPTED`:
    the same, by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # data may contain characters that the terminal's encoding lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        if argv and argv[0] in COMMANDS:
            _run_command(argv[0], argv[1:])
            return 0
        config = parse(argv)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return _command("fit")(config)


def _run_command(name: str, argv: list[str]) -> None:
    if name in OPTIONS:  # its other flags are those of a configuration
        prog = f"{PROG} {name} [CONFIG.py]"
        options, rest = tyro.cli(OPTIONS[name], prog=prog, args=argv, return_unknown_args=True)
        config = parse(rest)
        if config.sweep and name != "plan":
            raise ConfigError(
                f"sweep: got {config.sweep.flags}, expected none: {name} takes a single run; leave them out (what the "
                "file has is undone by the flag without a value)"
            )
        _command(name)(config, options)
    else:
        tyro.cli(_command(name), prog=f"{PROG} {name}", args=argv, config=(tyro.conf.AvoidSubcommands,))


def _command(name: str) -> Callable[..., Any]:
    """The function of a command. Imports jax and more, for which --help and a misspelled flag should not wait."""
    module = importlib.import_module(f"train.commands.{name}")
    if not gc.isenabled():  # this process runs the program alone: what is imported stays
        gc.freeze()
        gc.enable()
    return getattr(module, COMMANDS.get(name, name))


def parse(argv: list[str]) -> TrainConfig:
    """The configuration of a command line, checked.

    Raises:
      ConfigError: if the file or the configuration cannot be used.
      SystemExit: from tyro, for ``--help``, unknown flags and values that do not parse.
    """
    path, argv = DEFAULT_CONFIG, argv[1:] if argv[:1] == ["fit"] else argv
    if argv and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
    default = load_config(path)
    argv, rate = _split_rate(list(_split_swept(argv)))
    config = _overridden(default, argv)
    if rate is not None:
        own = f"{RATE}.{config.mode}"
        if any(word.partition("=")[0].replace("_", "-") == own for word in argv):
            raise ConfigError(f"got {RATE} and {own}, which are the same with --mode {config.mode}; pass one of them")
        config = _overridden(default, [*argv, own, rate])
    config = dataclasses.replace(config, cache_dir=_expanded(config.cache_dir), run_dir=_expanded(config.run_dir))
    config = _with_data_sets(config)
    config.check()
    return config


def _overridden(default: TrainConfig, argv: list[str]) -> TrainConfig:
    with warnings.catch_warnings():
        # tyro warns of a default of the wrong type; `TrainConfig.check` raises for it.
        warnings.simplefilter("ignore", UserWarning)
        return tyro.cli(
            TrainConfig,
            prog=f"{PROG} [fit] [CONFIG.py]",
            description=DESCRIPTION,
            args=argv,
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )


def _expanded(path: Any) -> Any:
    return Path(path).expanduser() if isinstance(path, str | Path) else path


def _split_swept(argv: list[str]) -> Iterator[str]:
    """The command line with a word for each value of a ``--sweep.`` flag: ``--sweep.rank=4,8`` becomes three words."""
    swept, seen = "", set()
    for word in argv:
        name, given, value = word.partition("=")
        begins = name.startswith("--")
        if begins:
            swept = name.replace("_", "-") if name.startswith("--sweep.") else ""
            if swept in seen:
                raise ConfigError(f"got {swept} twice, expected all its values at once; pass {swept} VALUE,VALUE")
            seen |= {swept} - {""}
        if begins or not swept:
            yield name if swept else word
        if swept and (given or not begins):
            text = value if begins else word
            yield from sources(text) if swept == "--sweep.data" else [one for one in text.split(",") if one] or [text]


def _with_data_sets(config: TrainConfig) -> TrainConfig:
    """The configuration with several sources in ``data.train`` as ``sweep.data``, and with its first one there."""
    found = sources(config.data.train) if isinstance(config.data.train, str) else ()
    if len(found) > 1 and config.sweep.data:
        raise ConfigError(
            f"sweep.data: got it beside {len(found)} sources in data.train, which mean the same; pass one of them"
        )
    data = found if len(found) > 1 else config.sweep.data
    if not data or isinstance(data, str):  # a text is an error of the check
        return config
    return dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, train=data[0]),
        sweep=dataclasses.replace(config.sweep, data=data),
    )


def _split_rate(argv: list[str]) -> tuple[list[str], str | None]:
    """The command line without ``--learning-rate VALUE``, and the value; the rest determines its mode."""
    rest, found, words = [], [], iter(argv)
    for word in words:
        name, given, value = word.partition("=")
        if name.replace("_", "-") == RATE:
            found.append(value if given else next(words, ""))
        else:
            rest.append(word)
    if len(found) > 1 or found == [""]:
        raise ConfigError(f"{RATE}: got {' and '.join(found) or 'nothing'}, expected a number; pass {RATE} 1e-4")
    return rest, found[0] if found else None


def load_config(path: Path) -> TrainConfig:
    """The ``config`` defined in the Python file ``path``.

    Raises:
      ConfigError: if there is no such file, if running it fails, or if it defines no `TrainConfig` of that name with
        parts of the right kinds.
    """
    if not path.is_file():
        if (close := difflib.get_close_matches(str(path), COMMANDS, n=1)) and not path.suffix:
            raise ConfigError(f"unknown command {str(path)!r}; did you mean {close[0]!r}?")
        here = Path.cwd()
        files = sorted(
            file.relative_to(here) if file.is_relative_to(here) else file for file in ROOT.glob("configs/*.py")
        )
        known = ", ".join(map(str, files))
        raise ConfigError(f"no config file at {path}; expected one of {known}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # a bug in the file, which Python would only print
            config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ConfigError(_describe(path, error)) from error
    if not isinstance(config, TrainConfig):
        got = "nothing of that name" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"{path}: expected `config = TrainConfig(...)`, got {got}")
    config.check_parts()
    return config


def _describe(path: Path, error: Exception) -> str:
    """Where and why a config file fails; for an unknown field, also the nearest known one."""
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
    """The field names of the dataclass ``kind``, a `TrainConfig` or a part of one."""
    return [field.name for field in dataclasses.fields(getattr(schema, kind))]


if __name__ == "__main__":
    sys.exit(main())

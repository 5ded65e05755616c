"""The command line: ``python -m train [fit] [CONFIG.py] [--field value ...]``, and commands on what was trained."""

from __future__ import annotations

if __name__ == "__main__":  # before all that takes its time to import
    from train.loop.stop import watch

    watch()

import dataclasses
import difflib
import io
import re
import runpy
import sys
import traceback
import warnings
from pathlib import Path

try:
    import tyro
except ModuleNotFoundError as error:
    print(f'error: {error}, which jlora alone does not need; run: pip install -e ".[train]"', file=sys.stderr)
    sys.exit(2)

from jlora.models import ModelError, TensorError
from train import config as schema
from train.checks import validate, validate_parts
from train.config import ConfigError, TrainConfig

ROOT = Path(__file__).resolve().parents[1]
DEFAULT_CONFIG = ROOT / "configs" / "digits.py"
COMMANDS = ("show", "predict", "generate", "eval", "export", "report", "inspect")
PROG = "python -m train [fit] [CONFIG.py]"
RATE = "--learning-rate"
DESCRIPTION = """Adapt a network to a task with LoRA.

CONFIG.py is a file that defines `config = TrainConfig(...)`; without one, it is configs/digits.py.
Every field of it can be overridden, and a switch is turned off by `no-` before its name:
  python -m train configs/digits.py --lora.rank 2 --fit.epochs 5
  python -m train configs/instruct_llama.py --task.no-pack
`--learning-rate 1e-4` sets the learning rate of the mode that is trained.

What would be learnt can be looked at before, with the same flags and some of its own (--help):
  python -m train show CONFIG.py               examples, their lengths and labels

What was trained is used by other commands, each with its own --help:
  python -m train predict RUN --text "..."     label texts
  python -m train generate RUN --prompt "..."  continue texts
  python -m train eval RUN                     measure it again, or on other data
  python -m train export RUN --to peft         for PyTorch (peft, hf) or JAX (orbax)
  python -m train report RUN [RUN...]          compare runs on a page: report.html
  python -m train inspect CHECKPOINT           what of a checkpoint would be adapted"""


def main(argv: list[str] | None = None) -> int:
    """Run the program and return its exit code.

    0: done. 1: a mistake in the program. 2: the user's input cannot be run, the training diverged, or a file cannot be
    read or written. `train.loop.stop.EXIT_CODE`: stopped when it was asked to, and goes on when it is started again;
    `train.loop.stop.INTERRUPTED`: the same, by Ctrl-C.
    """
    argv = sys.argv[1:] if argv is None else argv
    if isinstance(sys.stdout, io.TextIOWrapper):  # data may hold what the terminal's encoding does not
        sys.stdout.reconfigure(errors="backslashreplace")
    if argv and argv[0] in COMMANDS:
        return command(argv[0], argv[1:])
    try:
        config = parse(argv)
        # Only now, so that `--help` and a misspelt flag need not wait for the libraries that train.
        from train.compute.processes import leave
        from train.experiment import run
        from train.loop.checkpoints import CheckpointError
        from train.loop.stop import Stopped
    except ConfigError as error:
        return _refused(error)
    try:
        run(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except (ConfigError, CheckpointError, ModelError, TensorError, OSError) as error:
        return leave(_refused(error))
    except Exception:  # told as ever; but other processes must not wait for this one
        traceback.print_exc()
        return leave(1)
    return 0


def _refused(error: Exception) -> int:
    print(f"error: {error}", file=sys.stderr)
    return 2


def command(name: str, argv: list[str]) -> int:
    """Run one of the commands and return its exit code, as `main`."""
    from train import commands

    function, prog = commands.COMMANDS[name], f"python -m train {name}"
    try:
        if name == "show":  # has few flags of its own: all others are those of a configuration
            asked, rest = tyro.cli(commands.Asked, prog=f"{prog} [CONFIG.py]", args=argv, return_unknown_args=True)
            function(parse(rest), asked)
        else:
            tyro.cli(function, prog=prog, args=argv, config=(tyro.conf.AvoidSubcommands,))
    except (*commands.USER_ERRORS, OSError, UnicodeDecodeError) as error:
        return _refused(error)
    return 0


def parse(argv: list[str]) -> TrainConfig:
    """The configuration that a command line asks for, validated.

    Raises:
      ConfigError: if the file or the configuration in it cannot be used.
      SystemExit: from tyro, for ``--help`` and for flags that do not exist or do not parse.
    """
    path, argv = DEFAULT_CONFIG, argv[1:] if argv[:1] == ["fit"] else argv
    if argv and not argv[0].startswith("-"):
        path, argv = Path(argv[0]), argv[1:]
    default = load_config(path)
    argv, rate = _split_rate(argv)
    config = _overridden(default, argv)
    if rate is not None:
        own = f"{RATE}.{config.mode}"
        if any(word.partition("=")[0].replace("_", "-") == own for word in argv):
            raise ConfigError(f"got {RATE} and {own}, which are the same with --mode {config.mode}; pass one of them")
        config = _overridden(default, [*argv, own, rate])
    folder = None if config.run_dir is None else Path(config.run_dir).expanduser()
    config = dataclasses.replace(config, cache_dir=Path(config.cache_dir).expanduser(), run_dir=folder)
    validate(config)
    return config


def _overridden(default: TrainConfig, argv: list[str]) -> TrainConfig:
    with warnings.catch_warnings():
        # tyro warns of a default of the wrong type; `validate` says the same, and refuses.
        warnings.simplefilter("ignore", UserWarning)
        return tyro.cli(
            TrainConfig,
            prog=PROG,
            description=DESCRIPTION,
            args=argv,
            default=default,
            config=(tyro.conf.AvoidSubcommands,),
        )


def _split_rate(argv: list[str]) -> tuple[list[str], str | None]:
    """The command line without ``--learning-rate VALUE``, and the value: of which mode it is, the rest of it says."""
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
    """The ``config`` that the Python file ``path`` defines.

    Raises:
      ConfigError: if there is no such file, if running it fails, or if it defines no `TrainConfig` of that name with
        parts of the right kinds.
    """
    if not path.is_file():
        if (close := difflib.get_close_matches(str(path), COMMANDS, n=1)) and not path.suffix:
            raise ConfigError(f"there is no command {str(path)!r}; did you mean {close[0]!r}?")
        known = ", ".join(sorted(str(file.relative_to(ROOT)) for file in (ROOT / "configs").glob("*.py")))
        raise ConfigError(f"no config file at {path}; there are: {known}")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", SyntaxWarning)  # a mistake in the file, which Python would only print
            config = runpy.run_path(str(path)).get("config")
    except Exception as error:
        raise ConfigError(_describe(path, error)) from error
    if not isinstance(config, TrainConfig):
        got = "nothing of that name" if config is None else f"a {type(config).__name__}"
        raise ConfigError(f"{path}: expected `config = TrainConfig(...)`, got {got}")
    validate_parts(config)
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

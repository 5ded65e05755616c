"""What can be done with a configuration, a run or a checkpoint: a command is a function in a file of its own.

The parameters of these functions are the flags of the commands, and their docstrings are the help; those of ``show``
are the fields of `Asked`, beside all flags of a configuration.
"""

from collections.abc import Callable
from typing import Any

from jlora import models, peft
from train.commands.evaluate import evaluate
from train.commands.export import export
from train.commands.generate import generate
from train.commands.inspect import inspect
from train.commands.predict import predict
from train.commands.report import report
from train.commands.show import Asked, show
from train.config import ConfigError

__all__ = ["COMMANDS", "USER_ERRORS", "Asked"]

USER_ERRORS = (ConfigError, models.ModelError, models.TensorError, peft.PeftError)
"""What these raise when they cannot do what was asked."""

COMMANDS: dict[str, Callable[..., Any]] = {
    "show": show,
    "predict": predict,
    "generate": generate,
    "eval": evaluate,
    "export": export,
    "report": report,
    "inspect": inspect,
}

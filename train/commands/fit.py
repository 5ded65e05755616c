"""The command that trains."""

from __future__ import annotations

import sys
import traceback

from jlora.models import ModelError, TensorError
from train.compute.processes import leave
from train.config import ConfigError, TrainConfig
from train.experiment import run
from train.loop.checkpoints import CheckpointError
from train.loop.stop import Stopped
from train.sweep.run import run_sweep


def fit(config: TrainConfig) -> int:
    """Train, and return the exit code; see `train.__main__.main`."""
    try:
        run_sweep(config) if config.sweep else run(config)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except (ConfigError, CheckpointError, ModelError, TensorError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return leave(2)
    except Exception:  # print the traceback; other processes must not wait for this one
        traceback.print_exc()
        return leave(1)
    return 0

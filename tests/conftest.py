"""What every test shares: eight emulated CPU devices, no network, and a quiet, repeatable hypothesis."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"

import hypothesis  # noqa: E402
import jax  # noqa: E402

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_threefry_partitionable", True)

# Every example compiles, so there are few of them; derandomized, so that a run says what the last one said.
hypothesis.settings.register_profile("jlora", max_examples=12, deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("jlora")

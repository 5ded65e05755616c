"""What every test shares: eight emulated CPU devices, no network, and a quiet, repeatable hypothesis."""

from __future__ import annotations

import gc
import itertools
import os
from collections.abc import Iterator
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
# Thousands of tiny programs are compiled once and run once: leave LLVM's optimizations out (XLA's own stay).
_FAST_COMPILE = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

import hypothesis  # noqa: E402
import jax  # noqa: E402
import pytest  # noqa: E402

if jax.__version_info__ < (0, 11):  # later versions have no other emitters, which here compile in half the time
    _FAST_COMPILE += " --xla_cpu_use_fusion_emitters=false"
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FAST_COMPILE}"  # read when the backend starts

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_threefry_partitionable", True)

# Every example compiles, so there are few of them; derandomized, so that a run says what the last one said.
hypothesis.settings.register_profile(
    "jlora",
    max_examples=12,
    deadline=None,
    derandomize=True,
    database=None,
    print_blob=False,
    report_multiple_bugs=False,
)
hypothesis.settings.load_profile("jlora")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Of the cases of a test that is marked ``sampled(n)``, mark all but n as ``slow``; these are spread evenly."""
    for _, group in itertools.groupby(items, lambda item: item.nodeid.partition("[")[0]):
        cases = list(group)
        if (marker := cases[0].get_closest_marker("sampled")) is None:
            continue
        (count,) = marker.args
        kept = {round(i * (len(cases) - 1) / max(count - 1, 1)) for i in range(count)}
        for i, case in enumerate(cases):
            if i not in kept:
                case.add_marker("slow")


@pytest.fixture(scope="module", autouse=True)
def compiled_programs_are_dropped() -> Iterator[None]:
    """A program that XLA:CPU has compiled takes memory maps, of which Linux gives a process 65,530: with the programs
    of all modules at once, a compilation ends in a segmentation fault."""
    yield
    jax.clear_caches()
    gc.collect()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A folder with a small classifier's checkpoint."""
    from jlora import models  # after the configuration above
    from tests.small_checkpoints import network

    models.save(tmp_path, *network())
    return tmp_path

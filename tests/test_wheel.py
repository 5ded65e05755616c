"""The wheel holds `jlora` alone, typed, and works where nothing else of the project is."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FIVE_LINES = """
import jax, jax.numpy as jnp, jlora
params, x = {"w": jnp.ones((4, 3))}, jnp.ones((2, 4))
model = lambda params, x: x @ params["w"]
config = jlora.LoraConfig(rank=2)
uses = jlora.trace(model, params, x)
adapters = jlora.init(jax.random.key(0), params, config, uses)
apply = jlora.lora(model)
assert (apply(jlora.attach(params, adapters), x) == model(params, x)).all()
assert "site" in jlora.__file__, jlora.__file__
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        str(ROOT),
    ]
    subprocess.run(command, check=True)
    (made,) = out.glob("*.whl")
    return made


def test_it_holds_jlora_alone_and_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jlora"}
    assert "jlora/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_it_runs_the_five_lines_elsewhere(wheel: Path, tmp_path: Path) -> None:
    """Installed into an empty folder, away from the checkout, the five lines run."""
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    paths = f"import sys; sys.path[:0] = [{str(site)!r}]\n"
    subprocess.run(
        [sys.executable, "-I", "-c", paths + FIVE_LINES], check=True, cwd=tmp_path, env={"JAX_PLATFORMS": "cpu"}
    )

"""The wheel holds `jlora` alone, typed, and works without extras and without the rest of the project."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BLOCK = """
class Extras:
    "Packages that `pip install jlora` does not bring."

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {names!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)


import sys
sys.meta_path.insert(0, Extras())
"""
NO_DOWNLOAD = """
import jlora
from jlora import models
assert "site" in jlora.__file__, jlora.__file__
try:
    models.load("someone/model")
except models.ModelError as error:
    assert 'pip install "jlora[hub]"' in str(error), error
else:
    raise AssertionError
"""


def brought(requirements: list[str]) -> set[str]:
    """The distributions that pip installs for these, with what those need in turn."""
    found, waiting = set(), [Requirement(line) for line in requirements]
    while waiting:
        requirement = waiting.pop()
        name = requirement.name.lower().replace("_", "-")
        if name not in found and (requirement.marker is None or requirement.marker.evaluate({"extra": ""})):
            found.add(name)
            waiting += [Requirement(line) for line in metadata.requires(name) or ()]
    return found


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(out), str(ROOT)]
    subprocess.run([sys.executable, *command], check=True)
    (made,) = out.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def extras(wheel: Path) -> set[str]:
    """The importable names here that the wheel's own dependencies do not bring."""
    return missing(wheel)


def missing(wheel: Path, *others: str) -> set[str]:
    """The importable names here that neither the wheel's dependencies nor the ``others`` bring."""
    text = zipfile.ZipFile(wheel).read(next(n for n in zipfile.ZipFile(wheel).namelist() if n.endswith("METADATA")))
    lines = [line for line in text.decode().splitlines() if line.startswith("Requires-Dist: ")]
    installed = brought([*(line.removeprefix("Requires-Dist: ") for line in lines), *others])
    owners = metadata.packages_distributions().items()
    return {name for name, of in owners if not {d.lower().replace("_", "-") for d in of} & installed} - {"jlora"}


def test_it_holds_jlora_alone_and_is_typed(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"jlora"}
    assert "jlora/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)


@pytest.mark.slow
def test_it_runs_the_readme_elsewhere_with_the_hub_alone(wheel: Path, extras: set[str], tmp_path: Path) -> None:
    """Installed into an empty folder, away from the checkout, every block of the README runs with the dependencies of
    jlora and its extra `hub`, of which the export's model card is made; a download asks for that extra."""
    assert {"datasets", "huggingface_hub", "matplotlib", "transformers", "tyro", "sklearn", "chex"} <= extras
    assert not {"jax", "flax", "optax", "orbax", "numpy", "safetensors"} & extras
    site = tmp_path / "site"
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(site), str(wheel)], check=True
    )
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    environment = {"JAX_PLATFORMS": "cpu", "TMPDIR": str(tmp_path)}
    for names, program in ((missing(wheel, "huggingface_hub"), "\n".join(blocks)), (extras, NO_DOWNLOAD)):
        program = f"{BLOCK.format(names=names)}sys.path[:0] = [{str(site)!r}]\n{program}"
        subprocess.run([sys.executable, "-I", "-c", program], check=True, cwd=tmp_path, env=environment)


def test_the_program_names_its_extra(extras: set[str]) -> None:
    code = f"{BLOCK.format(names=extras)}import runpy; runpy.run_module('train', run_name='__main__')"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (ended.returncode, 'pip install -e ".[train]"' in ended.stderr) == (2, True), ended.stderr

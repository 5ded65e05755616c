"""Layers: imports point downwards only, and the library stands alone."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
JLORA = {  # a room imports from those above it; of its own files, from those that stand before
    "_src": "types table fields | paths | config",
    "_src.engine": "compat | named_axes mutation gradient probes | product factored staging dependence",
    "_src.engine.rules": "products | arithmetic control_flow | moves | writes | labels | table",
    "_src.engine ": "interpreter trace | lora",
    "files": "safetensors tensor_names | checksums",
    "_src.tree": "state attach labels serialize sharding stack | plan merge | init save",
    "peft": "options | config layout | tensors tied | read write | __init__",
    "models": "_family | _layers decoder.rope | _causal | "
    "bert.modeling gpt2.modeling decoder.modeling vit.modeling | bert.table gpt2.table decoder.table vit.table | "
    "_registry _reading | _network | _checkpoint | _generate | _export | __init__",
    "": "__init__",
}
TRAIN = {
    "": "config | checks",
    "data": "cuts lines | batches formats | sources | tables",
    "networks": "network",
    "compute": "keys flops throughput optimizer processes",
    "tasks": "metrics marked base labels pictures | chat | classify language | images | registry",
    "compute ": "step | layouts",
    "rundir": "arrays codec | directory | records changes | bases claim | finished",
    "loop": "progress stop | evaluate checkpoints extend",
    "report": "console examples writers reading | tables | curves | page",
    " ": "job",
    "loop ": "loop | run_files",
    "  ": "pretrain | summary | experiment",
    "commands": "inputs results sheet | show predict generate evaluate export report inspect | __init__",
    "   ": "__main__",
}


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


@pytest.mark.parametrize(("package", "rooms"), [("jlora", JLORA), ("train", TRAIN)])
def test_every_module_imports_lower_layers_only(package: str, rooms: dict[str, str]) -> None:
    floors = [(room.strip(), floor.split()) for room, names in rooms.items() for floor in names.split("|")]
    level = {f"{room}.{name}".lstrip("."): i for i, (room, names) in enumerate(floors) for name in names}
    files = {".".join(f.relative_to(ROOT / package).with_suffix("").parts): f for f in (ROOT / package).rglob("*.py")}
    files = {name: f for name, f in files.items() if f.name != "__init__.py" or name in level}
    files.pop("assets.make_digits", None)
    assert set(files) == set(level), "give every module a layer"
    upward = [
        f"{name} imports {other}"
        for name, file in files.items()
        for other in (i.removeprefix(f"{package}.") for i in imports(file) if i.startswith(f"{package}."))
        if other in level and level[other] >= level[name]
    ]
    assert not upward, upward


def test_the_library_never_imports_the_program_or_an_optional_package() -> None:
    """jlora imports neither train nor torch, transformers, peft, matplotlib, haiku, equinox, datasets."""
    banned = {"train", "torch", "transformers", "peft", "matplotlib", "haiku", "equinox", "datasets", "tyro"}
    for file in (ROOT / "jlora").rglob("*.py"):
        assert not banned & {i.split(".")[0] for i in imports(file)}, file


def test_importing_starts_no_backend() -> None:
    """`import jlora` touches no device, so that a program can still configure JAX after it."""
    code = "import jlora, jax; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PATH": "", "JAX_PLATFORMS": "cpu"})


def test_all_is_what_is_public() -> None:
    """`__all__` is sorted, complete and importable."""
    import jlora

    assert jlora.__all__ == sorted(jlora.__all__)
    assert all(hasattr(jlora, name) for name in jlora.__all__)

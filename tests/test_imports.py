"""Layers: imports point downwards only, and the library stands alone."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
LAYERS = [
    {"_types", "_compat", "_table", "_fields"},
    {"_paths", "_named"},
    {"_state"},
    {"config", "_product", "_factored", "_mutation", "_gradient", "_probes", "names", "_tensors", "sharding"},
    {"attach", "_staging", "_dependence", "stack", "_serialize", "_sums"},
    {"targets", "merge", "optim"},
    {"init"},
    {"_rules"},
    {"_arithmetic", "_control_flow"},
    {"_rearrange"},
    {"_overwrite"},
    {"_labels"},
    {"_primitives"},
    {"_interpret", "trace"},
    {"apply"},
    {"_peft_options"},
    {"_peft_config", "_peft_layout"},
    {"_peft_read", "_peft_tied"},
    {"checkpoint", "peft"},
    {"__init__"},
    {"models._family"},
    {"models._layers", "models.decoder.rope"},
    {"models._causal"},
    {"models.bert.modeling", "models.gpt2.modeling", "models.decoder.modeling", "models.vit.modeling"},
    {"models.bert.table", "models.gpt2.table", "models.decoder.table", "models.vit.table"},
    {"models._registry", "models._reading"},
    {"models._network"},
    {"models._checkpoint"},
    {"models._generate"},
    {"models._export"},
    {"models.__init__"},
]


def imports(file: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{a.name}" for a in node.names} | {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
    return found


def test_every_module_imports_lower_layers_only() -> None:
    level = {name: i for i, layer in enumerate(LAYERS) for name in layer}
    files = {".".join(f.relative_to(ROOT / "jlora").with_suffix("").parts): f for f in (ROOT / "jlora").rglob("*.py")}
    files = {name: f for name, f in files.items() if not re.fullmatch(r"models\.\w+\.__init__", name)}
    assert set(files) == set(level), "give every module of jlora a layer"
    upward = [
        f"{name} imports {other}"
        for name, file in files.items()
        for other in (i.removeprefix("jlora.") for i in imports(file) if i.startswith("jlora."))
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

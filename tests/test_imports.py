"""Layers: imports point downwards only, and the library stands alone."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import jlora

ROOT = Path(__file__).parents[1]
JLORA = {  # a room imports from those above it; of its own files, from those that stand before
    " ": "messages | fields",
    "_src": "types | quantized | paths config",
    "_src.engine": "compat | mutation gradient location traced_weights observation | dependence | staging",
    "_src.engine.factors": "named_axes | product | adapted_product | stored | split_inputs | factored",
    "_src.engine.rules": "rule | low_rank joins placement | products lookups arithmetic moves writes control_flow | "
    "table",
    "_src.engine ": "interpreter trace rows | lora",
    "_src.algebra": "matrices",
    "_src.inits": "fresh",
    "files": "errors adapters | buckets | drafts | json_files checksums tensor_names | hub_files | safetensors | "
    "quantized_tensors",
    "_src.tree": "state | checks serialize | attach labels merge plan save sharding stack | init select | pool",
    "_src.quantization": "scheme | array | tree loss qwix",
    "_src.inits ": "moments | spectral quantized driven | decompose plain",
    "_src.algebra ": "parts ranks sparse | linear measures | weighted extract",
    "_src.updates": "rule | tied vera",
    "_src ": "api",
    "  ": "optim",
    "peft": "options | config layout | config_file describe keys | tied faults | tensors | read write | __init__",
    "models": "_family _mesh attention.mask attention.plain | attention.chunked attention.tpu attention.gpu | "
    "attention.attend _layers decoder.rope | _causal _encoder _loss | _heads | "
    "bert.modeling gpt2.modeling decoder.modeling vit.modeling | bert.table gpt2.table decoder.table vit.table | "
    "_registry _reading | _network _matching | _quantized | _checkpoint | _generate | _export _extract | __init__",
    "": "__init__",
}
TRAIN = {
    "": "messages",
    "config": "fields | tasks networks sweep | training | __init__",
    "data": "truncation lines cache_folder | ragged delimited json_rows | batches formats | arrow_cache | sources | "
    "tables",
    "networks": "network tokenizers | scratch pretrained | registry",
    "compute": "keys flops throughput optimizer processes hlo topology | compiled compilation_cache | memory",
    "tasks": "encoding | metrics spans base conversations labels pictures | chat | classify language | images",
    "tasks ": "registry | stand_in",
    "compute ": "step | layouts",
    "rundir": "arrays codec | directory | lock records changes | bases claim | finished",
    "loop": "state stop | evaluate checkpoints extend feed",
    "report": "console examples writers reading | tables | curves | page",
    " ": "job",
    "loop ": "run_files steps | loop",
    "  ": "ahead pretrain | summary | experiment",
    "sweep": "members halving state stacked turns | results program files | picture rounds loop | ahead run",
    "commands": "options inputs results contact_sheet advice one_base | export | fit show plan predict generate eval "
    "extract merge report inspect",
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
    code = "import jlora, jax; jlora.lora; jax.config.update('jax_num_cpu_devices', 3); assert jax.device_count() == 3"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, env={"PATH": "", "JAX_PLATFORMS": "cpu"})


def test_importing_loads_little_more_than_jax_optax_and_flax() -> None:
    """Slow imports (orbax, huggingface_hub) happen where they are used. Modules are counted, as times vary."""
    code = """if True:
        import sys, jax, optax, flax
        before = set(sys.modules)
        import jlora
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before} - set(sys.stdlib_module_names)))
    """
    ran = subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, capture_output=True, text=True)
    assert set(ran.stdout.split()) <= {"jax", "jlora", "safetensors"}


def test_a_configuration_is_parsed_without_jax() -> None:
    """So `--help` and the errors of a configuration do not wait for it. Modules are compared, as times vary."""
    code = """if True:
        import sys
        from train.__main__ import ROOT, load_config, parse
        parse(["--lora.rank", "2"])
        for file in ROOT.glob("configs/*.py"):
            load_config(file)
        slow = {"jax", "jaxlib", "flax", "optax", "orbax", "datasets", "pyarrow", "transformers", "scipy"}
        assert not slow & set(sys.modules), slow & set(sys.modules)
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("before", ["", "import jax"])
def test_every_public_name_is_imported_when_it_is_used(before: str) -> None:
    """Whether jax is there before jlora or not: by attribute, by star, in `dir`; and an unknown name is an error."""
    code = f"""if True:
        {before}
        import jlora
        assert not hasattr(jlora, "nothing")
        assert set(jlora.__all__) <= set(dir(jlora)) and jlora.lora.__module__.startswith("jlora._src")
        from jlora import *
        assert lora is jlora.lora and LoraConfig is jlora.LoraConfig
    """
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


ROOMS = ["jlora._src.api", "jlora.fields", "jlora.messages", "jlora.models", "jlora.optim", "jlora.peft"]


def test_all_is_what_is_public() -> None:
    """`__all__` has what `jlora/_src/api.py` imports, in the same order; modules of jlora are rooms of their own."""
    tree = ast.parse((ROOT / "jlora/_src/api.py").read_text())
    imported = [a.name for node in tree.body if isinstance(node, ast.ImportFrom) for a in node.names if not a.asname]
    assert jlora.__all__ == imported
    modules = {name for name, value in vars(jlora).items() if isinstance(value, types.ModuleType)}
    assert {name for name in vars(jlora) if not name.startswith("_")} - modules == set(imported)
    own = {name for name in modules if vars(jlora)[name].__name__ == f"jlora.{name}" and not name.startswith("_")}
    assert own <= {"fields", "files", "messages", "models", "optim", "peft"}


def test_no_function_hides_a_module() -> None:
    """``jlora.trace`` is a function, and there is no module of that name in `jlora`; likewise in every package."""
    for init in (ROOT / "jlora").rglob("__init__.py"):
        inside = [*init.parent.glob("*.py"), *(file.parent for file in init.parent.glob("*/__init__.py"))]
        modules = {path.stem for path in inside}
        body = ast.parse(init.read_text()).body
        names = {a.asname or a.name for node in body if isinstance(node, ast.ImportFrom) for a in node.names}
        names |= {node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        assert not modules & names, init


@pytest.mark.parametrize("module", ROOMS)
def test_every_public_name_is_documented(module: str) -> None:
    """A function or class has a docstring, a constant or type alias one below it."""
    undocumented = [name for name in importlib.import_module(module).__all__ if not documentation(module, name)]
    assert not undocumented, undocumented


def documentation(module: str, name: str) -> str | None:
    """The docstring of a name, where it is defined."""
    file = importlib.import_module(module).__file__
    body = ast.parse(Path(file or "").read_text()).body
    for node, after in zip(body, [*body[1:], None], strict=True):
        match node:
            case ast.FunctionDef(name=found) | ast.ClassDef(name=found) if found == name:
                return ast.get_docstring(node)
            case ast.AnnAssign(target=ast.Name(id=found)) | ast.Assign(targets=[ast.Name(id=found)]) if found == name:
                text = after.value if isinstance(after, ast.Expr) else None
                return str(text.value) if isinstance(text, ast.Constant) else None
            case ast.ImportFrom(module=str(source)) if name in {alias.name for alias in node.names}:
                return documentation(source, name)
    return None


@pytest.mark.parametrize("package", ["train", "benchmarks", "configs"])
def test_users_of_the_library_import_public_names_only(package: str) -> None:
    """Nothing of `jlora._src`, nor of any other module with an underscore."""
    private = re.compile(r"jlora(\.\w+)*\._")
    files = (ROOT / package).rglob("*.py")
    found = [f"{file.relative_to(ROOT)}: {name}" for file in files for name in imports(file) if private.match(name)]
    assert not found, found

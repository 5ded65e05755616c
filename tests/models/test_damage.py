"""Damaged files give an error of the documented type that names file and place, or exactly what was written; no prints.

A sample runs with the suite. ``JLORA_DAMAGES=500 pytest tests/models/test_damage.py`` makes 500 damages of each kind,
and prints the outcomes.

PEFT's and Hugging Face's files have no room for checksums: a changed byte of tensor data, or another valid value in a
configuration, cannot be detected. For these the test requires that the file's content is loaded. For files that jlora
writes for itself it never requires less than detection.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import json
import os
import random
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jlora
from jlora import models, peft
from jlora.files.checksums import SUMS
from tests import peft_cases, tiny
from tests.damage import STRANGE, WAYS, Damage, damage
from tests.runs import program
from tests.small_checkpoints import BERT, VIT
from tests.tree.test_adapters_on_disk import made
from train.__main__ import load_config, parse
from train.compute.keys import random_key
from train.compute.optimizer import make_optimizer
from train.compute.step import init_state
from train.config import ConfigError, TrainConfig
from train.job import make_job, start_adapters
from train.loop.checkpoints import CheckpointError
from train.loop.run_files import RunFiles
from train.rundir.claim import claim
from train.rundir.codec import flat, to_json
from train.rundir.directory import RunDirectory
from train.rundir.finished import open_run

ASKED = os.environ.get("JLORA_DAMAGES")
COUNT = int(ASKED or 30)


class Outcome(NamedTuple):
    """The outcome of reading a damaged folder: the text of an ``error``, or a value; and what was printed."""

    value: Any
    error: str | None
    printed: str


class Reader:
    """Reads damaged copies of intact folders, and counts the outcomes."""

    def __init__(self, errors: tuple[type[Exception], ...], tmp_path: Path, capfd: Any):
        self.errors, self.copy, self.capfd = errors, tmp_path / "copy", capfd
        self.counts: Counter[str] = Counter()

    def read(self, folder: Path, harm: Callable[[Path], Any], read: Callable[[Path], Any]) -> tuple[Any, Outcome]:
        shutil.rmtree(self.copy, ignore_errors=True)
        shutil.copytree(folder, self.copy)
        done = harm(self.copy)
        self.capfd.readouterr()
        value = error = None
        try:
            value = read(self.copy)
        except self.errors as caught:
            error = str(caught)
        except BaseException as caught:
            raise AssertionError(f"{done}: {type(caught).__name__}: {caught}") from caught
        return done, Outcome(value, error, "".join(self.capfd.readouterr()))

    def each(
        self, folders: list[tuple[Path, Path, Callable[[Path], Any]]], judge: Callable[[Path, Damage, Outcome], str]
    ) -> None:
        """`COUNT` damages, each of the next of ``folders`` (a whole one, another, how to read it)."""
        for seed in range(COUNT):
            folder, other, read = folders[seed % len(folders)]
            rng = random.Random(seed)
            done, outcome = self.read(folder, lambda copy, o=other, r=rng: damage(copy, o, r), read)
            try:
                verdict = judge(folder, done, outcome)
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, {folder.name}, {done}: {str(outcome)[:900]} {error}") from error
            self.counts[verdict] += 1
        self.tell()

    def tell(self) -> None:
        """Print the number of each verdict, if ``JLORA_DAMAGES`` is set."""
        if ASKED:
            with self.capfd.disabled():
                print(f"\n{sum(self.counts.values())} damages: {dict(self.counts)}")


@pytest.fixture
def reader(tmp_path: Path, capfd: Any) -> Callable[..., Reader]:
    return lambda *errors: Reader(errors, tmp_path, capfd)


def same(one: Any, other: Any) -> bool:
    """Whether two trees are equal bit for bit, dtypes and static fields too."""
    if jax.tree.structure(one) != jax.tree.structure(other):
        return False

    def equal(x: Any, y: Any) -> bool:
        x, y = np.asarray(x), np.asarray(y)
        return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()

    return jax.tree.all(jax.tree.map(equal, one, other))


def named(text: str, done: Damage) -> None:
    """The error names the file, or the folder and what of it does not fit; and the key, where one was changed."""
    assert Path(done.file).name in text or "/copy" in text
    if done.key and "twice" not in text and SUMS not in text and Path(done.file).name in text:
        # A list or a rule is named as a whole; and one value may contradict another, or the tensors.
        assert any(str(key) in text for key in done.key) or "tensor" in text or "expected" in text


# jlora.save


@pytest.mark.parametrize("sharded", [False, True])
def test_adapters_of_jlora_save(sharded: bool, reader: Any, tmp_path: Path) -> None:
    """The file is named, or the adapters are those that were saved, static fields and all."""
    adapters, wanted = made(), None
    if sharded:
        mesh = Mesh(np.array(jax.devices()), ("x",))
        wanted = NamedSharding(mesh, PartitionSpec("x"))
        adapters = {"w": jlora.LoraFactors(*jax.device_put((jnp.ones((16, 2)), jnp.ones((8, 8))), wanted), scale=0.5)}
    jlora.save(tmp_path / "whole", adapters)
    jlora.save(tmp_path / "other", jax.tree.map(lambda x: x + 1, adapters))

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        assert not outcome.printed
        if outcome.error is None:
            assert same(outcome.value, adapters)
            return "as it was"
        assert done.file in outcome.error or SUMS in outcome.error
        return "refused"

    read = lambda folder: jlora.load(folder, shardings=wanted)  # noqa: E731
    reader(models.TensorError).each([(tmp_path / "whole", tmp_path / "other", read)], judge)


# Hugging Face

DECODER: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 32, "max_position_embeddings": 8,
}  # fmt: skip
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "bert": {
        **BERT, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "id2label": {"0": "a", "1": "b"}, "pad_token_id": 0,
    },
    "roberta": {
        **BERT, "model_type": "roberta", "architectures": ["RobertaModel"],
        "pad_token_id": 1, "max_position_embeddings": 12,
    },
    "llama": {
        **DECODER, "model_type": "llama", "architectures": ["LlamaForCausalLM"], "tie_word_embeddings": False,
        "rope_theta": 1e4, "attention_bias": False, "rms_norm_eps": 1e-6, "hidden_act": "silu", "rope_scaling": {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8,
        },
    },
    "gpt2": {
        "model_type": "gpt2", "architectures": ["GPT2LMHeadModel"], "vocab_size": 24, "n_positions": 8, "n_embd": 16,
        "n_layer": 2, "n_head": 2, "n_inner": 32, "activation_function": "gelu_new", "resid_pdrop": 0.1,
    },
    "gemma2": {
        **DECODER, "model_type": "gemma2", "architectures": ["Gemma2ForSequenceClassification"], "head_dim": 8,
        "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"], "query_pre_attn_scalar": 8,
        "attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0, "pad_token_id": 0,
    },
    "qwen2": {
        **DECODER, "model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "use_sliding_window": True,
        "max_window_layers": 1, "sliding_window": 4, "rope_scaling": {
            "type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4, "beta_fast": 32,
        },
    },
    "vit": {**VIT, "architectures": ["ViTForImageClassification"], "num_channels": 3, "qkv_bias": True},
}  # fmt: skip


@pytest.mark.slow
def test_checkpoints_of_hugging_face(reader: Any, tmp_path: Path) -> None:
    """Refused by name; or what is loaded is what the file says, and the tensors those that were saved."""
    folders = []
    for name, hf in CHECKPOINTS.items():
        model = models.build(hf)
        for i, kind in enumerate(("whole", "other")):
            params = jax.tree.map(
                lambda x, i=i: jnp.asarray(np.random.default_rng(x.size + i).normal(size=x.shape), x.dtype),
                models.abstract(model),
            )
            models.save(tmp_path / kind / name, model, params, max_shard_bytes=3000 if name == "llama" else 10**9)
        folders.append((tmp_path / "whole" / name, tmp_path / "other" / name, models.load))
    whole = {folder: models.load(folder) for folder, *_ in folders}

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        assert not outcome.printed
        if outcome.error is not None:
            named(outcome.error, done)
            return "refused"
        (model, params), (expected, original) = outcome.value, whole[folder]
        now = json.loads((tmp_path / "copy" / "config.json").read_text())
        config = dataclasses.replace(model.config, hf="")
        if same(params, original) and config == dataclasses.replace(expected.config, hf=""):
            return "as it was"
        if done.file.endswith(".safetensors"):
            assert config == dataclasses.replace(expected.config, hf="")
            return "other tensor data"
        assert done.file == "config.json"
        # A weight may have no effect any more (a head, biases); what is there is what was saved.
        assert same(params, original) or jax.tree.structure(params) != jax.tree.structure(original)
        for name, value in dataclasses.asdict(config).items():
            if now.get(name) is not None and name != "hf":
                assert type(value) is type(now[name]) and value == now[name]
        return "another valid configuration"

    reader(models.ModelError, models.TensorError).each(folders, judge)


# PEFT


def test_adapters_of_peft(reader: Any) -> None:
    """Refused by name; or the tensors are those that were saved, with what the config says of them."""
    folders = []
    for case, about in peft_cases.CASES.items():
        base = peft_cases.base(about.base)
        other = next(name for name in peft_cases.CASES if name != case)

        def read(folder: Path, base: Any = base) -> Any:
            return peft.load(folder, base.names, base.params)

        folders.append((peft_cases.FOLDER / case, peft_cases.FOLDER / other, read))

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        assert not outcome.printed
        if outcome.error is not None:
            named(outcome.error, done)
            return "refused"
        (adapters, config), (expected, original) = outcome.value, peft_cases.loaded(folder.name)
        if same(adapters, expected) and config == original:
            return "as it was"
        if done.file.endswith(".safetensors"):
            assert jax.tree.structure(adapters) == jax.tree.structure(expected) and config == original
            return "other tensor data"
        assert done.file == "adapter_config.json"
        assert adapters.keys() == expected.keys()
        for one, other in zip(adapters.values(), expected.values(), strict=True):
            if isinstance(one, jlora.LoraFactors):
                assert np.isfinite(one.scale) and 0 <= one.dropout < 1
                one = dataclasses.replace(one, scale=other.scale, dropout=other.dropout)
                if one.a.ndim == 3:  # of stacked layers, whose scales are folded into B
                    one = dataclasses.replace(one, b=other.b)
            assert same(one, other)
        return "another valid configuration"

    reader(models.TensorError, peft.PeftError).each(folders, judge)


# Runs


@pytest.fixture(scope="module")
def runs(tmp_path_factory: Any) -> Path:
    """Two finished runs of two seeds, ``whole`` and ``other``."""
    work = tiny.write_sentiment(tmp_path_factory.mktemp("damage"))
    for seed, name in enumerate(("whole", "other")):
        code, printed = program(*flags(work, work / name), "--seed", str(seed))
        assert code == 0, printed
    return work


def flags(work: Path, run_dir: Path) -> list[str]:
    return [
        "configs/sst2_minilm.py", "--model.path", str(work / "encoder"), "--data.train", str(work / "train.jsonl"),
        "--cache-dir", str(work / "cache"), "--run-dir", str(run_dir), *(
            "--data.limit None --task.max-length 16 --lora.rank 2 --learning-rate.lora 0.01 --fit.batch-size 8 "
            "--eval-batch-size 8 --fit.epochs 2 --save.every-steps 4 --log-every 2 --seed 0"
        ).split(),
    ]  # fmt: skip


@pytest.mark.slow
def test_finished_runs(runs: Path, reader: Any, tmp_path: Path) -> None:
    """The file is named, or configuration and adapters are those of the run."""
    for name in ("whole", "other"):
        shutil.copytree(runs / name, tmp_path / name, ignore=shutil.ignore_patterns("checkpoints", "curves.png"))
    whole = open_run(tmp_path / "whole")

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        assert not outcome.printed
        if outcome.error is None:
            assert outcome.value.config == whole.config
            assert same(outcome.value.adapters, whole.adapters) and same(outcome.value.params, whole.params)
            return "as it was"
        assert Path(done.file).name in outcome.error or SUMS in outcome.error
        return "refused"

    reader(ConfigError).each([(tmp_path / "whole", tmp_path / "other", open_run)], judge)


@pytest.mark.slow
def test_runs_that_go_on(runs: Path, reader: Any, tmp_path: Path) -> None:
    """The file is named, or the training goes on from where it was; records that are lost are told."""
    config = parse(flags(runs, runs / "new"))
    job = make_job(config, lambda: None)
    assert job.network.load is not None
    load = functools.partial(job.network.load, random_key(0, "head"))
    base = job.layout.place_base(job.shapes, load)
    like = job.layout.make_state(
        lambda base: init_state(make_optimizer(config.fit), start_adapters(job.config, job.network, base, job.plan)),
        base,
    )
    for name in ("whole", "other"):
        ignored = shutil.ignore_patterns("summary.json", "adapters.json", "curves.png")
        shutil.copytree(runs / name, tmp_path / name, ignore=ignored)
        shutil.rmtree(tmp_path / name / "adapters")
        (tmp_path / name / SUMS).unlink()

    def go_on(folder: Path) -> Any:
        with (
            claim(dataclasses.replace(job.config, run_dir=folder), job.provenance) as directory,
            RunFiles(job.config, directory, str(job.plan), job.intervals(job.config.fit, job.examples)) as kept,
        ):
            state, key = kept.resume(job.layout, like, random_key(0, "x"))
            print(kept.note)
            return dataclasses.asdict(kept.state), state, jax.random.key_data(key), directory.metrics.read_bytes()

    whole: list[Any] = []

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        if outcome.error is not None:
            assert "\n" not in outcome.printed.strip()
            named(outcome.error, done)
            return "refused"
        *trained, metrics = outcome.value
        assert same(trained[1:], whole[1:-1]) and trained[0] == whole[0]
        told = [line for line in outcome.printed.splitlines() if line]
        assert told[-1].startswith("resuming ")
        if metrics == whole[-1]:
            assert len(told) == 1
            return "as it was"
        assert done.file == "metrics.jsonl" and len(told) == 2 and "has changed since the checkpoint" in told[0]
        assert all(isinstance(json.loads(line), dict) for line in metrics.splitlines())
        return "records lost, and told"

    one = reader(ConfigError, CheckpointError, OSError)  # the program ends with the message of any of them
    whole += one.read(tmp_path / "whole", lambda copy: None, go_on)[1].value
    one.each([(tmp_path / "whole", tmp_path / "other", go_on)], judge)


@pytest.mark.slow
def test_the_program_tells_it(runs: Path, tmp_path: Path, capfd: Any) -> None:
    """One line, and exit code 2."""
    shutil.copytree(runs / "whole", tmp_path / "run")
    for file in sorted((tmp_path / "run" / "adapters" / "arrays").rglob("manifest.ocdbt")):
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    code, printed = program("predict", str(tmp_path / "run"), "--text", "a fine film")
    assert code == 2 and printed.startswith("error: ") and "manifest.ocdbt differs" in printed
    (tmp_path / "run" / "summary.json").unlink()
    newest = max((tmp_path / "run" / "checkpoints").glob("[0-9]*"), key=lambda step: int(step.name))
    for file in newest.glob("adapters/**/manifest.ocdbt"):
        file.write_bytes(b"")
    code, printed = program(*flags(runs, tmp_path / "run"))
    assert code == 2 and "manifest.ocdbt differs" in printed and "pass --resume 12" in printed, printed
    assert "Traceback" not in printed + "".join(capfd.readouterr())
    code, printed = program(*flags(runs, tmp_path / "run"), "--resume", "12")
    assert code == 0, printed
    code, printed = program("predict", str(tmp_path / "run"), "--text", "a fine film")
    assert code == 0, printed


# Configurations


@pytest.mark.slow
def test_configurations_as_json(runs: Path, reader: Any, tmp_path: Path) -> None:
    """Without checksums beside it a file may be another configuration; then its content is read."""
    for name in ("whole", "other"):
        (tmp_path / name).mkdir()
        shutil.copy(runs / name / "config.json", tmp_path / name)

    def read(folder: Path) -> TrainConfig:
        return RunDirectory(folder).read_config()

    def judge(folder: Path, done: Damage, outcome: Outcome) -> str:
        assert not outcome.printed
        if outcome.error is not None:
            named(outcome.error, done)
            return "refused"
        told = flat(json.loads((tmp_path / "copy" / "config.json").read_text()))
        found = flat(json.loads(json.dumps(to_json(outcome.value))))
        assert told.items() <= found.items()
        return "as it was" if outcome.value == read(folder) else "another valid configuration"

    reader(ConfigError, models.TensorError).each([(tmp_path / "whole", tmp_path / "other", read)], judge)


def test_configurations_as_python(reader: Any, tmp_path: Path) -> None:
    """Python files are the user's own: a file that runs and is valid is accepted."""
    for name, config in (("whole", "sst2_minilm"), ("other", "digits")):
        (tmp_path / name).mkdir()
        shutil.copy(Path("configs") / f"{config}.py", tmp_path / name / "config.py")

    def harm(folder: Path, rng: random.Random) -> Damage:
        file = folder / "config.py"
        if rng.random() < 0.4:
            return Damage(file.name, rng.choice(WAYS)(file, tmp_path / "other" / file.name, rng))
        lines = file.read_text().splitlines(keepends=True)
        values = [n for n in ast.walk(ast.parse("".join(lines))) if isinstance(n, ast.Constant) and n.lineno > 20]
        one, value = rng.choice([n for n in values if n.lineno == n.end_lineno]), rng.choice(STRANGE)
        line = lines[one.lineno - 1]
        shown = repr(value) if value == value and value not in (float("inf"),) else f"float('{value}')"
        lines[one.lineno - 1] = line[: one.col_offset] + shown + line[one.end_col_offset :]
        file.write_text("".join(lines))
        return Damage(file.name, f"{one.value!r} is {value!r:.40}")

    def read(folder: Path) -> TrainConfig:
        config = load_config(folder / "config.py")
        config.check()
        return config

    one = reader(ConfigError)
    for seed in range(COUNT):
        rng = random.Random(seed)
        _, outcome = one.read(tmp_path / "whole", lambda copy, r=rng: harm(copy, r), read)
        assert not outcome.printed
        assert outcome.error is None or "config.py" in outcome.error or "problem" in outcome.error
        one.counts["refused" if outcome.error else "sound"] += 1
    one.tell()

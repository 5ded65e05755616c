"""Laws of the training program, on a toy network that trains for two epochs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jlora
from tests.runs import content, records, stopping
from train.__main__ import DEFAULT_CONFIG, ROOT, load_config, main, parse
from train.compute.keys import random_key
from train.compute.layouts import one_device
from train.compute.optimizer import make_optimizer, make_schedule
from train.compute.step import init_state, make_step
from train.config import (
    EVERYTHING,
    NEW_HEAD,
    ComputeConfig,
    ConfigError,
    DataConfig,
    Domain,
    FitConfig,
    ImageClassification,
    PatchTransformer,
    TrainConfig,
)
from train.data import batches
from train.data import tables as data
from train.data.ragged import Examples
from train.experiment import run
from train.job import encoded_tables
from train.loop.evaluate import make_measure
from train.loop.stop import EXIT_CODE
from train.networks.registry import make_network
from train.networks.scratch import patches
from train.pretrain import identity
from train.rundir.arrays import load_tree
from train.rundir.bases import load_base, save_base
from train.rundir.claim import claim
from train.rundir.codec import from_json, to_json
from train.rundir.directory import RunDirectory
from train.tasks.registry import make_task, resolved

MODES = ("lora", "full", "head")
TINY = (
    "--model.width 16 --model.depth 1 --model.heads 2 --model.hidden 24 --lora.rank 2 --base.epochs 2 --fit.epochs 2 "
    "--base.batch-size 32 --fit.batch-size 32 --learning-rate.base 0.01 --learning-rate.full 0.01 "
    "--learning-rate.lora 0.03 --learning-rate.head 0.03 --eval-every 2 --eval-batch-size 600"
).split()


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def config(cache_dir):
    return parse([*TINY, "--cache-dir", str(cache_dir)])


@pytest.fixture(scope="session")
def summaries(cache_dir, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """The program, run once in each mode; the first run trains the base and the others find it."""
    found = {}
    for mode in MODES:
        run_dir = tmp_path_factory.mktemp(mode)
        assert main([*TINY, "--cache-dir", str(cache_dir), "--run-dir", str(run_dir), "--mode", mode]) == 0
        found[mode] = json.loads((run_dir / "summary.json").read_text())
    return found


@pytest.fixture(scope="session")
def tables(config):
    return data.load(config.data, config.cache_dir)


@pytest.fixture(scope="session")
def task(config, tables):
    config = resolved(config, tables)
    return make_task(config, make_network(config))


@pytest.fixture(scope="session")
def images(config, task, tables) -> dict[str, dict[str, Examples]]:
    """Training and test images, in both domains."""
    train, test = encoded_tables(task, tables, config.cache_dir)
    return {"train": train, "test": test}


@pytest.fixture(scope="session")
def network(config, tables):
    """(forward, params) of the toy network, untrained."""
    made = make_network(resolved(config, tables))
    return made.forward, made.init(jax.random.key(0))


def accuracy(summary: dict[str, Any], model: str, domain: str) -> float:
    return summary["metrics"][model][domain]["accuracy"]


def in_domains(config: TrainConfig, **domains: Domain):
    return dataclasses.replace(config.task, domains=domains)


# The run


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mode", MODES)
def test_the_run_directory_holds_all_that_the_run_made(summaries, mode):
    summary = summaries[mode]
    run_dir = Path(summary["run_dir"])
    expected = {
        "config.json", "data.json", "plan.txt", "metrics.jsonl", "checkpoints", "adapters", "base", "summary.json",
        "run.lock", "SHA256SUMS",
    }  # fmt: skip
    found = {path.name for path in run_dir.iterdir()}
    assert found - {"curves.png"} == expected

    config = json.loads((run_dir / "config.json").read_text())
    assert (config["mode"], config["lora"]["rank"], config["fit"]["epochs"]) == (mode, 2, 2)
    assert to_json(from_json(TrainConfig, config)) == config

    written = records(run_dir)
    ends = [(record["phase"], record["epoch"], record["step"]) for record in written if "epoch" in record]
    assert ends == [
        ("base", 1, 37),
        ("base", 2, 74),
        ("fit", 1, 37),
        ("fit", 2, 74),
    ]
    assert all(np.isfinite(record["loss"]) for record in written)
    assert written[-1]["shifted_accuracy"] == accuracy(summary, "adapted", "shifted")


def test_a_run_that_was_killed_before_its_summary_writes_it_again(summaries, cache_dir, tmp_path):
    folder = shutil.copytree(summaries["lora"]["run_dir"], tmp_path / "run")
    (folder / "summary.json").unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    assert main([*TINY, "--cache-dir", str(cache_dir), "--run-dir", str(folder)]) == 0
    again = json.loads((folder / "summary.json").read_text())
    assert again["metrics"] == summaries["lora"]["metrics"]
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_plot_is_drawn(summaries):
    assert (Path(summaries["lora"]["run_dir"]) / "curves.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("mode", MODES)
def test_merging_changes_no_prediction_and_detaching_restores_the_base(summaries, mode):
    summary = summaries[mode]
    assert summary["differing_predictions"] == {"merged_vs_adapted": 0, "detached_vs_base": 0}
    for one, other in (("merged", "adapted"), ("detached", "base")):
        for domain in ("upright", "shifted"):
            assert accuracy(summary, one, domain) == accuracy(summary, other, domain)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("mode", MODES)
def test_the_files_are_enough_to_predict_again(summaries, mode, task, images, network, tmp_path):
    """base + adapters, as read back from disk, predict what the exported merged parameters predict."""
    forward, like = network
    summary = summaries[mode]
    run_dir = Path(summary["run_dir"])
    base = load_base(run_dir / "base", like)
    assert main(["export", str(run_dir), "--to", "orbax", "--out", str(tmp_path / "merged")]) == 0
    merged = load_tree(tmp_path / "merged", like)

    config = {"lora": jlora.LoraConfig(rank=2, alpha=8), "full": EVERYTHING, "head": NEW_HEAD}[mode]
    uses = jlora.trace(forward, like, {"images": np.zeros((1, 8, 8, 1), np.float32)})
    adapters = jlora.load(run_dir / "adapters", like=jlora.init(jax.random.key(0), base, config, uses))

    test = images["test"]["shifted"]
    measure = make_measure(one_device(), forward, task, 600)
    found = task.predictions(measure(base, adapters, test))
    np.testing.assert_array_equal(found, task.predictions(measure(merged, None, test)))
    assert np.mean(found == test["label"]) == accuracy(summary, "adapted", "shifted")


def test_training_helps(summaries):
    """Two epochs are enough to beat guessing: the base upright, whoever trains all layers on the shifted domain."""
    assert accuracy(summaries["lora"], "base", "upright") > 0.3
    for mode in ("lora", "full"):
        assert accuracy(summaries[mode], "adapted", "shifted") > accuracy(summaries[mode], "base", "shifted") + 0.1


def test_modes_train_their_parameters(summaries):
    total = summaries["full"]["total"]
    assert summaries["full"]["trainable"] == total
    assert summaries["head"]["trainable"] == 16 * 10 + 10
    assert 0 < summaries["lora"]["trainable"] < total


def test_the_base_is_trained_once(summaries):
    assert [summaries[mode]["base"]["cached"] for mode in MODES] == [False, True, True]
    assert len({summaries[mode]["base"]["path"] for mode in MODES}) == 1
    assert len({json.dumps(summaries[mode]["metrics"]["base"]) for mode in MODES}) == 1


def test_a_base_is_known_by_what_determines_it(config):
    """The base is trained again only if it would differ, not for changes of what comes after it."""
    same = [
        {"mode": "full"},
        {"lora": jlora.LoraConfig(rank=1)},
        {"fit": FitConfig(epochs=9)},
        {"compute": ComputeConfig(layout="pmap")},
        {"task": in_domains(config, upright=Domain(), shifted=Domain(2))},
        {"eval_every_steps": 5},  # its records are what they are
        {"log_every": 5},
    ]
    other = [
        {"seed": 1},
        {"model": PatchTransformer()},
        {"base": FitConfig(epochs=9)},
        {"task": in_domains(config, upright=Domain(2), shifted=Domain())},
        {"data": DataConfig(train=config.data.train, limit=99)},
    ]
    for change in same:
        assert identity(dataclasses.replace(config, **change)) == identity(config), change
    for change in other:
        assert identity(dataclasses.replace(config, **change)) != identity(config), change


def test_two_runs_may_save_the_same_base(tmp_path):
    for _ in range(2):
        save_base(tmp_path / "bases" / "entry", {"w": jnp.ones(3)}, [], {})
    assert [path.name for path in (tmp_path / "bases").iterdir()] == ["entry"]
    assert load_base(tmp_path / "bases" / "entry", {"w": jnp.zeros(3)})["w"].tolist() == [1, 1, 1]


@pytest.mark.slow
def test_a_run_keeps_its_base(summaries, tmp_path, monkeypatch, capsys):
    """Without the cache, and after the code has changed: it is resumed, evaluated, exported, reported, extended."""
    argv = [*TINY, "--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run"), "--log-every", "10"]
    with stopping(74 + 10):  # in the fit, after the base
        assert main(argv) == EXIT_CODE
    assert "base: trained and cached at" in capsys.readouterr().out
    shutil.rmtree(tmp_path / "cache")
    monkeypatch.setattr("train.pretrain.identity", lambda config: {"sources": "others"})

    assert main(argv) == 0
    printed = capsys.readouterr().out
    assert f"base: loaded from {tmp_path}/run/base\n" in printed and "\nbase  step" not in printed
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["metrics"] == summaries["lora"]["metrics"]
    assert main(["eval", str(tmp_path / "run")]) == 0
    found = f"accuracy {accuracy(summary, 'adapted', 'shifted'):.4f}"
    assert found in capsys.readouterr().out.split("shifted: ")[1]
    assert main(["export", str(tmp_path / "run"), "--to", "orbax"]) == 0
    assert main(["report", str(tmp_path / "run"), "--out", str(tmp_path / "report.html")]) == 0
    assert main([*argv, "--fit.epochs", "3"]) == 0
    assert "\nbase  step" not in capsys.readouterr().out

    for file in (tmp_path / "run" / "base").rglob("manifest.ocdbt"):
        file.write_bytes(b"")
    assert main(["eval", str(tmp_path / "run")]) == 2
    assert "manifest.ocdbt differs" in capsys.readouterr().err


def test_claiming_a_directory_changes_no_file(config, tmp_path):
    """`begin` does."""
    directory = RunDirectory(tmp_path)
    directory.write_config(config)
    directory.write_data({})
    before = content(tmp_path)
    later = dataclasses.replace(config, run_dir=tmp_path, log_every=3)
    with claim(later, {}) as claimed:
        assert content(tmp_path) == before | {"run.lock": b""}
        with pytest.raises(ConfigError, match="is in use by another"):
            claim(later, {})
        claimed.begin(later, {})
    assert directory.read_config() == later
    with pytest.raises(ConfigError, match=r"seed: the run has 0, got 1"):
        claim(dataclasses.replace(later, seed=1), {})
    claim(later, {}).__exit__()


def test_a_cached_base_serves_runs_that_log_and_evaluate_at_other_steps(summaries, cache_dir, tmp_path, capsys):
    argv = [*TINY, "--cache-dir", str(cache_dir), "--run-dir", str(tmp_path / "run")]
    assert main([*argv, "--log-every", "9", "--eval-every", "1"]) == 0
    assert f"base: loaded from {summaries['lora']['base']['path']}\n" in capsys.readouterr().out
    assert records(tmp_path / "run", "base") == records(Path(summaries["lora"]["run_dir"]), "base")


@pytest.mark.slow
def test_a_run_is_a_pure_function_of_its_configuration(summaries, cache_dir, tmp_path):
    """The same configuration with the base trained again gives the same records, but for times."""
    run(parse([*TINY, "--cache-dir", str(tmp_path / "cache"), "--run-dir", str(tmp_path / "run")]))
    first, second = (records(directory) for directory in (Path(summaries["lora"]["run_dir"]), tmp_path / "run"))
    assert first == second
    for phase in ("base", "fit"):
        assert [record["step"] for record in first if record["phase"] == phase and "epoch" not in record] == [
            *range(1, 75)
        ]


# Data


def test_the_order_of_the_data_is_a_pure_function_of_seed_and_epoch():
    order = batches.epoch_order(1198, seed=3, epoch=5)
    np.testing.assert_array_equal(order, batches.epoch_order(1198, seed=3, epoch=5))
    np.testing.assert_array_equal(np.sort(order), np.arange(1198))
    assert not np.array_equal(order, batches.epoch_order(1198, seed=3, epoch=6))
    assert not np.array_equal(order, batches.epoch_order(1198, seed=4, epoch=5))


def test_an_epoch_shows_no_example_twice_and_padding_keeps_the_order():
    examples = {"image": np.arange(10), "label": np.arange(10)}
    found = [batches.training_rows(10, 3, seed=0, step=step) for step in range(3)]
    assert [len(rows) for rows in found] == [3, 3, 3]
    assert len(set(np.concatenate(found))) == 9
    assert batches.training_rows(10, 3, seed=0, step=3).tolist() == batches.epoch_order(10, 0, 2)[:3].tolist()
    ordered = [(rows.tolist(), own) for rows, own in batches.ordered_rows(examples, 4)]
    assert ordered == [([0, 1, 2, 3], 4), ([4, 5, 6, 7], 4), ([8, 9, 9, 9], 2)]


def test_the_split_is_fixed_and_holds_every_digit(images):
    assert {name: batches.size(sets["upright"]) for name, sets in images.items()} == {"train": 1198, "test": 599}
    for sets in images.values():
        for examples in sets.values():
            assert (examples["image"].dtype, examples["image"].shape[1:]) == (np.float32, (8, 8, 1))
            assert (examples["image"].min(), examples["image"].max()) == (-1, 1)
            assert set(examples["label"]) == set(range(10))


def test_domains_turn_and_invert(images):
    plain, shown = images["test"]["upright"], images["test"]["shifted"]
    np.testing.assert_allclose(-np.rot90(shown["image"], -1, axes=(1, 2)), plain["image"], atol=1e-6)
    np.testing.assert_array_equal(shown["label"], plain["label"])


def test_patches_are_squares_of_the_image():
    image = jnp.arange(16.0).reshape(1, 4, 4, 1)
    assert patches(image, 2)[0].tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


# The step


@contextlib.contextmanager
def compilations():
    """The list of what JAX traces and compiles inside the block."""
    events = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/"):
            events.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield events
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.fixture(scope="session")
def stepped(network, task, images):
    """For each mode: the states before and after two steps, and what either step compiled."""
    forward, base = network
    schedule = make_schedule(FitConfig(), 1e-2, steps=10)
    tx = make_optimizer(FitConfig(weight_decay=0.1))
    key = random_key(0, "dropout")
    examples = images["train"]["shifted"]
    first, second = (
        batches.batch_of(examples, batches.training_rows(batches.size(examples), 32, 0, step)) for step in (0, 1)
    )
    uses = jlora.trace(forward, base, task.inputs(first))
    configs = {"lora": jlora.LoraConfig(rank=2, dropout=0.1), "full": EVERYTHING, "head": NEW_HEAD}
    found = {}
    for mode, config in configs.items():
        step = jax.jit(make_step(forward, task, tx, schedule))
        before = init_state(tx, jlora.init(random_key(0, "adapters"), base, config, uses))
        with compilations() as once:
            between, _ = step(before, base, first, key)
        with compilations() as again:
            after, _ = step(between, base, second, key)
        found[mode] = before, after, (once, again)
    return found


@pytest.mark.parametrize("mode", MODES)
def test_the_second_step_compiles_nothing(stepped, mode):
    _, _, (once, again) = stepped[mode]
    assert once
    assert again == []


@pytest.mark.parametrize("mode", MODES)
def test_optimizer_state_is_for_trainables_alone(stepped, mode):
    """Adam keeps two moments for each trained number, and nothing for the frozen ones; counters are scalars."""
    before, after, _ = stepped[mode]
    for state in (before, after):
        bytes_of = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (state.opt_state, state.adapters)]
        assert bytes_of[0] == 2 * bytes_of[1] + 4


@pytest.mark.parametrize("mode", MODES)
def test_steps_move_every_adapter(stepped, mode):
    before, after, _ = stepped[mode]
    assert before.adapters.keys() == after.adapters.keys()
    for path in before.adapters:
        moved = jax.tree.map(lambda x, y: bool((x != y).any()), before.adapters[path], after.adapters[path])
        assert any(jax.tree.leaves(moved)), path
    assert int(after.step) == 2


def test_schedules_rise_to_the_peak_and_fall():
    rates = {}
    for name in ("cosine", "linear", "constant"):
        schedule = make_schedule(FitConfig(schedule=name, warmup=0.1), 1.0, steps=100)
        rates[name] = [np.asarray(schedule(step)).item() for step in (0, 10, 100)]
    expected = {"cosine": [0.1, 1, 0], "linear": [0.1, 1, 0], "constant": [0.1, 1, 1]}
    assert rates == {name: pytest.approx(of_name) for name, of_name in expected.items()}
    assert make_schedule(FitConfig(warmup=0.0), 1.0, steps=100)(0) == 1


def test_clipping_can_be_switched_off():
    grads = {"w": np.full(3, 100.0, np.float32)}
    norms = []
    for clip in (1.0, None):
        chain = make_optimizer(FitConfig(clip=clip))
        updates, state = chain.update(grads, chain.init(grads), grads)
        norms.append(np.asarray(optax.tree.norm(optax.tree.get(state, "mu"))).item())
    assert norms[0] == pytest.approx(0.1, rel=1e-3)
    assert norms[1] == pytest.approx(0.1 * 100 * 3**0.5, rel=1e-3)


# The configuration


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda path: path.name)
def test_every_config_loads_and_is_valid(path):
    config = parse([str(path)])
    assert config.name == path.stem
    assert load_config(path).__class__ is type(config)
    assert "python -m train" in path.read_text().split('"""')[1]


def test_no_arguments_mean_the_default_config():
    assert parse([]) == load_config(DEFAULT_CONFIG)


def test_overrides_reach_every_part():
    config = parse(["fit", "--lora.rank", "3", "--fit.clip", "None", "--task.side", "8", "--mode", "head"])
    assert isinstance(config.task, ImageClassification)
    assert (config.lora.rank, config.fit.clip, config.task.side, config.mode) == (3, None, 8, "head")


def test_all_problems_are_reported_at_once(tmp_path, capsys):
    used = tmp_path / "used"
    used.touch()
    argv = "--fit.epochs 0 --model.width 97 --learning-rate.lora -1 --data.limit 0".split()
    assert main([*argv, "--run-dir", str(used)]) == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: 5 problems in the configuration:",
        "  model.width: got 97, expected a multiple of model.heads = 4; pass --model.width 96",
        "  data.limit: got 0, expected a whole number >= 1, or None; pass --data.limit 1000",
        "  fit.epochs: got 0, expected a whole number >= 1; pass --fit.epochs 20",
        "  learning_rate.lora: got -1.0, expected a number > 0; pass --learning-rate.lora 0.001",
        f"  run_dir: got {used}, expected a directory, a new path, or gs://bucket/name, or None; pass "
        "--run-dir runs/mine",
    ]


def test_a_percentage_is_not_a_fraction(capsys):
    """The advice does not switch off what was asked for."""
    assert main(["--data.validation", "None", "--data.holdout", "20"]) == 2
    assert "data.holdout: got 20.0, expected a fraction, 0 <= x < 1; pass --data.holdout 0.1" in capsys.readouterr().err


def test_a_batch_larger_than_the_data_is_refused_before_training(cache_dir, capsys):
    assert main(["--fit.batch-size", "2000", "--cache-dir", str(cache_dir)]) == 2
    assert "fit.batch_size: got 2000, expected at most the 1198 training examples" in capsys.readouterr().err


def test_a_target_that_matches_nothing_is_refused_before_training(cache_dir, tmp_path, capsys):
    argv = [*TINY, "--cache-dir", str(cache_dir), "--run-dir", str(tmp_path / "run"), "--lora.targets", "qeury"]
    assert main(argv) == 2
    assert "qeury" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("argv", "nearest"), [(["--fit.epoch", "3"], "--fit.epochs"), (["--lora.rnk", "3"], "--lora.rank")]
)
def test_the_error_of_a_misspelt_flag_names_the_nearest(argv, nearest, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code == 2
    assert nearest in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("config = TrainConfig(name='x', fit=FitConfig(epoch=3))", "line 3.*did you mean 'epochs'"),
        ("config = TrainConfig(name='x', lora=LoraConfig(rnk=3))", "line 3.*did you mean 'rank'"),
        ("config = FitConfig()", r"expected `config = TrainConfig\(\.\.\.\)`, got a FitConfig"),
        ("other = 1", "got nothing of that name"),
        ("config = (", "SyntaxError"),
        ("config = TrainConfig(name='x', lora=None, **rest)", "lora: got None, expected a LoraConfig"),
        (
            "config = TrainConfig(name='x', lora=LoraConfig(), seed='1', **rest)",
            "seed: got '1', expected a whole number >= 0",
        ),
    ],
)
def test_a_config_file_that_fails_says_where_and_why(tmp_path, text, message):
    file = tmp_path / "mine.py"
    rest = "rest = dict(task=SequenceClassification(), model=Pretrained('x'), data=DataConfig('y'))"
    file.write_text(f"from jlora import LoraConfig\nfrom train.config import *; {rest}\n{text}\n")
    with pytest.raises(ConfigError, match=message):
        parse([str(file)])


def test_the_error_of_a_missing_config_file_names_those_that_exist(capsys, monkeypatch, tmp_path):
    """As they are given from the working directory."""
    monkeypatch.chdir(ROOT)
    assert main(["configs/digit.py"]) == 2
    names = ", ".join(sorted(f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")))
    error = capsys.readouterr().err
    assert "configs/digit.py" in error and names in error
    monkeypatch.chdir(tmp_path)
    assert main(["configs/digits.py"]) == 2
    assert f"{ROOT}/configs/digits.py, " in capsys.readouterr().err


def test_transformers_does_not_warn_that_torch_is_missing():
    """It is imported by every command that reads a run."""
    code = (
        "import importlib.util as u, sys; find = u.find_spec\n"
        "u.find_spec = lambda name, *more: None if name == 'torch' else find(name, *more)\n"
        "import train.tasks.chat; assert 'torch' not in sys.modules"
    )
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "PyTorch" not in found.stdout + found.stderr


def test_help_shows_how_to_call_and_every_field(capsys):
    with pytest.raises(SystemExit) as done:
        main(["--help"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "usage: python -m train [fit] [CONFIG.py]" in shown
    assert all(flag in shown for flag in ("--mode {lora,full,head}", "--lora.rank", "--fit.epochs", "--run-dir"))


@pytest.mark.parametrize("config", ["digits", "mnist_mlp", "sst2_minilm", "instruct_llama"])
def test_help_says_what_every_field_is(config, capsys):
    """Whatever its type: a sentence, and the default."""
    with pytest.raises(SystemExit):
        main([f"configs/{config}.py", "--help"])
    fields = re.split(r"\n\W{1,3}(?=--[a-z])", capsys.readouterr().out)[1:]
    assert len(fields) > 50
    for field in fields:
        assert re.search(r"[A-Za-z]+ [a-z]+", field.split("\n", 1)[1].split("(default:")[0]), field


def test_a_field_is_checked_by_what_it_declares():
    """Wherever it stands in the configuration, and whatever the file says; a value of another type is a problem too."""
    config = parse([])
    domain = {"a": Domain(-1)}
    wrong = dataclasses.replace(
        config,
        task=dataclasses.replace(config.task, domains=domain, class_weights={"a": 0.0, "b": 1.0}, labels=("a", "a")),
        fit=FitConfig(epochs=True, warmup=1.0, clip=float("nan")),
        log=("stdout",),  # pyright: ignore[reportArgumentType]
        data="digits.csv",  # pyright: ignore[reportArgumentType]
        mode="LoRA",  # pyright: ignore[reportArgumentType]
    )
    with pytest.raises(ConfigError) as error:
        wrong.check()
    found = [line.split(":")[0].strip() for line in str(error.value).splitlines()[1:]]
    assert found == [
        "task.labels", "task.class_weights", "task.domains.a.quarter_turns", "data", "mode", "fit.epochs",
        "fit.warmup", "fit.clip", "log",
    ]  # fmt: skip
    assert "data: got 'digits.csv', expected a DataConfig; write data = DataConfig(...)" in str(error.value)
    assert "mode: got 'LoRA', expected one of lora, full, head; pass --mode lora" in str(error.value)

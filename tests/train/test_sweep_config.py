"""The configuration of a sweep, and its members."""

from __future__ import annotations

import math
import random
import re
from pathlib import Path
from typing import Any

import pytest

from tests.messages import expect, message
from tests.runs import program
from train.__main__ import parse
from train.config import ConfigError, SweepConfig, TrainConfig
from train.config.sweep import MOST
from train.rundir.changes import config_changes
from train.rundir.codec import from_json, to_json
from train.sweep.members import data_sets, members, short_names

FLAGS = {
    "data": "--data.train",
    "rank": "--lora.rank",
    "alpha": "--lora.alpha",
    "dropout": "--lora.dropout",
    "lr": "--learning-rate",
    "lora_plus": "--fit.lora-plus",
    "weight_decay": "--fit.weight-decay",
    "seed": "--seed",
}
"""The flag of a single run for each swept field, in the order of the fields."""

VALUES: dict[str, list[Any]] = {
    "data": ["a/train.jsonl", "b/train.csv", "owner/name:train", "b/more.csv:train"],
    "rank": [1, 3, 8, 64],
    "alpha": [0.5, 16, 1e-7],
    "dropout": [0, 0.1, 0.25],
    "lr": [1e-5, 3e-4, 0.001, 1],
    "lora_plus": [1, 16, 2.5],
    "weight_decay": [0, 1e-4, 0.3],
    "seed": [0, 1, 12345],
}


def single(flags: list[str]) -> TrainConfig:
    return parse([*flags, "--run-dir", "runs/one"])


def swept(text: str) -> SweepConfig:
    return parse(text.split()).sweep


# The configuration


def test_values_are_separated_by_commas_or_spaces():
    expected = SweepConfig(rank=(4, 8), lr=(1e-4, 3e-4, 1e-3), lora_plus=(1.0, 16.0), halving=2, at_once=3)
    for text in (
        "--sweep.rank 4,8 --sweep.lr 1e-4,3e-4,1e-3 --sweep.lora-plus 1,16 --sweep.halving 2 --sweep.at-once 3",
        "--sweep.rank 4 8 --sweep.lr 1e-4, 3e-4, 1e-3 --sweep.lora_plus 1 16 --sweep.halving 2 --sweep.at_once 3",
        "--sweep.rank=4,8 --sweep.lr=1e-4,3e-4 1e-3 --sweep.lora_plus=1,16 --sweep.halving=2 --sweep.at-once=3",
    ):
        assert swept(text) == expected
        assert swept(f"{text} --lora.targets query,key --mode lora") == expected  # other flags keep their commas
    assert parse(["--sweep.seed", "0,1", "--lora.targets", "a,b"]).lora.targets == ("a,b",)


def test_data_sets_are_given_either_way(tmp_path, monkeypatch):
    """As sources of data.train, unless a file has that very name, or as those of the sweep."""
    monkeypatch.chdir(tmp_path)
    one, other = parse(["--data.train", "a.jsonl,b.jsonl"]), parse(["--sweep.data", "a.jsonl", "b.jsonl"])
    assert one == other and one.sweep.data == ("a.jsonl", "b.jsonl") and one.data.train == "a.jsonl"
    Path("a.jsonl,b.jsonl").touch()
    for text in ("a.jsonl,b.jsonl", "a.jsonl,b.jsonl:train"):
        alone = parse(["--data.train", text])
        assert not alone.sweep and alone.data.train == text
        assert parse(["--sweep.data", text]).sweep.data == (text,)
    said = message(ConfigError, lambda: parse(["--data.train", "c,d", "--sweep.data", "a,b"]))
    expect(said, "sweep.data", "2 sources in data.train", "pass one of them")


def test_a_run_without_a_sweep_is_as_before():
    """Also one whose stored configuration is older than sweeps."""
    config = parse([])
    assert not config.sweep and config.sweep.given == {}
    written = to_json(config)
    del written["sweep"]
    assert from_json(TrainConfig, written) == config and config_changes(written, config) == {}
    other = parse(["--sweep.rank", "4,8"])
    assert [*config_changes(written, other)] == ["sweep.rank"]
    assert from_json(TrainConfig, to_json(other)) == other


def test_a_flag_without_a_value_undoes_the_values_of_the_file(tmp_path):
    file = tmp_path / "mine.py"
    whole = (Path(__file__).parents[2] / "configs/digits.py").read_text()
    file.write_text(f"{whole}\nimport dataclasses\nfrom train.config import SweepConfig\n"
                    "config = dataclasses.replace(config, sweep=SweepConfig(rank=(4, 8), seed=(0, 1)))")  # fmt: skip
    assert parse([str(file)]).sweep.given == {"rank": (4, 8), "seed": (0, 1)}
    assert parse([str(file), "--sweep.rank", "--sweep.seed", "2"]).sweep.given == {"seed": (2,)}


def numbers(count: int) -> str:
    return ",".join(map(str, range(1, count + 1)))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("--sweep.rank 4,8 --sweep.rank=16", ["--sweep.rank twice", "--sweep.rank VALUE,VALUE"]),
        ("--sweep.lora-plus 4 --sweep.lora_plus 8", ["--sweep.lora-plus twice"]),
        ("--sweep.rank 4,8,4", ["sweep.rank: got (4, 8, 4)", "each once", "--sweep.rank 4,8,16"]),
        ("--sweep.rank 4,0", ["sweep.rank: got (4, 0)", "whole numbers >= 1"]),
        ("--sweep.lr 0,1", ["sweep.lr: got (0.0, 1.0)", "numbers > 0"]),
        ("--sweep.dropout 0,1", ["sweep.dropout", "0 <= x < 1"]),
        ("--sweep.weight-decay nan", ["sweep.weight_decay", "numbers >= 0"]),
        ("--sweep.seed=-1", ["sweep.seed", "whole numbers >= 0"]),
        ("--sweep.data a.csv,,b.csv", ["sweep.data: got ('a.csv', '', 'b.csv')"]),
        ("--sweep.lr 1 --sweep.halving 1", ["sweep.halving: got 1", "a whole number >= 2"]),
        ("--sweep.lr 1 --sweep.at-once 0", ["sweep.at_once: got 0", "a whole number >= 1"]),
        ("--sweep.at-once 4", ["sweep.at_once: got 4", "nothing is swept"]),
        ("--sweep.halving 2", ["sweep.halving: got 2 with one training", "at least two"]),
        ("--sweep.halving 2 --sweep.lr 1", ["sweep.halving: got 2 with one training"]),
        ("--sweep.halving 2 --sweep.data a,b", ["sweep.halving: got 2 with 2 data sets", "--sweep.halving None"]),
        ("--mode full --sweep.rank 4 --sweep.lr 1", ["sweep.rank: got (4,) with mode 'full'", "--mode lora"]),
        ("--mode head --sweep.lora-plus 1,4", ["sweep.lora_plus: got (1.0, 4.0) with mode 'head'"]),
        ("--sweep.lr 1 --resume 3", ["resume: got step 3 with a sweep", "--resume auto"]),
        ("--sweep.lr 1 --log wandb", ["log: got wandb with a sweep", "--log tensorboard"]),
        ("--sweep.lr 1 --compute.layout pmap", ["compute.layout: got 'pmap' with a sweep", "--compute.layout mesh"]),
        (
            "--sweep.lr 1 --processes.count 2 --processes.index 0 --processes.coordinator a:1",
            ["processes.count: got 2 with a sweep", "or --sweep.lr"],
        ),
        (
            f"--sweep.rank {numbers(65)} --sweep.alpha {numbers(64)}",
            ["sweep.rank: got 4,160 trainings (65 of rank x 64 of alpha), expected at most 4,096"],
        ),
    ],
)
def test_what_cannot_be_swept_is_an_error(text, parts):
    expect(message(ConfigError, lambda: parse(text.split())), *parts)


def test_the_largest_sweep_is_taken():
    assert math.prod(map(len, swept(f"--sweep.rank {numbers(64)} --sweep.alpha {numbers(64)}").given.values())) == MOST


@pytest.mark.parametrize("flag", ["--sweep.lr", "--data.train"])
def test_a_command_on_one_run_refuses_a_sweep_before_it_reads(flag):
    code, said = program("show", "--data.validation", "missing.csv", flag, "1,2")
    assert code == 2 and "missing" not in said
    expect(said, "sweep: got --sweep.", "show takes a single run", "leave them out")


# Members


@pytest.mark.parametrize("seed", range(12))
def test_a_member_has_the_configuration_of_the_single_command(seed):
    """Of its values by their own flags; and members are the product, the last field varying fastest."""
    rng = random.Random(seed)
    fields = [name for name in FLAGS if rng.random() < 0.4] or ["seed"]
    chosen = {name: rng.sample(VALUES[name], rng.randint(1, 2)) for name in fields}
    others = ["--mode", "lora", "--fit.epochs", "3", "--lora.alpha", "4", *(["--lora.use-dora"] if seed % 2 else [])]
    argv = [word for name, values in chosen.items() for word in (f"--sweep.{name}", ",".join(map(str, values)))]
    found = members(single([*others, *argv]))
    expected: list[dict[str, Any]] = [{}]
    for name, values in chosen.items():
        expected = [{**one, name: value} for one in expected for value in values]
    assert [member.values for member in found] == expected
    for member in found:
        flags = [word for name, value in member.values.items() for word in (FLAGS[name], str(value))]
        assert member.config == single([*others, *flags])
        assert re.fullmatch(r"[\w.]+(-[\w.]+)*(e-\d+)?", member.name)
    assert len({member.name.casefold() for member in found}) == len(found)


@pytest.mark.parametrize("mode", ["full", "head"])
def test_the_learning_rate_is_that_of_the_mode(mode):
    found = members(single(["--mode", mode, "--sweep.lr", "0.5"]))
    assert found[0].config == single(["--mode", mode, f"--learning-rate.{mode}", "0.5"])


def test_names_tell_the_values():
    text = "--sweep.seed 0,1 --sweep.rank 4 --sweep.lr 1e-4 --sweep.data x/acme.jsonl.gz,b.csv"
    found = members(parse([*text.split()]))
    assert [member.name for member in found][:2] == ["acme-rank4-lr0.0001-seed0", "acme-rank4-lr0.0001-seed1"]
    assert found[2].values == {"data": "b.csv", "rank": 4, "lr": 1e-4, "seed": 0}
    assert [member.name for member in members(parse(["--sweep.alpha", "16,0.5"]))] == ["alpha16", "alpha0.5"]


@pytest.mark.parametrize(
    ("sources", "names"),
    [
        (["x/a.jsonl", "y/b.c.jsonl.gz"], ["a", "b.c"]),
        (["acme/train.csv", "bolt/train.csv"], ["acme-train", "bolt-train"]),
        (["a.csv:x", "a.csv:y"], ["a-x", "a-y"]),
        (["a.csv", "a.jsonl"], ["a.csv", "a.jsonl"]),
        (["nyu/glue/sst2:train", "nyu/glue/cola:train"], ["sst2", "cola"]),
        (["gs://bucket/rows one.csv", "Ärger/"], ["rows-one", "Ärger"]),
        (["A.csv", "a.csv"], ["data1", "data2"]),  # one name on some file systems
        (["x/" + 300 * "n" + "1.csv", "!.csv"], [59 * "n" + "1", "data"]),
    ],
)
def test_data_sets_have_short_distinct_names(sources, names):
    assert short_names(sources) == names


def test_a_problem_of_a_member_names_it():
    """Once, however many members have it."""
    argv = ["--lora.init", "orthogonal", "--lora.rank", "2", "--sweep.rank", "2,3", "--sweep.seed", "0,1,2"]
    said = message(ConfigError, lambda: members(parse(argv)))
    expect(said, "1 problem", "sweep: member rank3-seed0 and 2 more: rank = 3; expected an even one")


def test_a_folder_is_the_data_sets_in_it(tmp_path):
    for name in ("b.jsonl", "a.CSV.gz", "validation.jsonl", "README.md", ".hidden.csv", "c/rows.csv", "test/rows.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("text\n")
    expected = ["a.CSV.gz", "b.jsonl", "c", "test"]
    assert data_sets([str(tmp_path)]) == tuple(str(tmp_path / name) for name in expected)
    found = members(parse(["--sweep.data", str(tmp_path), "--sweep.seed", "0,1"]))
    assert [member.name for member in found[::2]] == ["a-seed0", "b-seed0", "c-seed0", "test-seed0"]
    assert found[2].config == parse(["--data.train", str(tmp_path / "b.jsonl")])
    both = (str(tmp_path), "other.csv")  # a folder among other sources is one of them
    assert data_sets(both) == both
    halved = parse(["--sweep.data", str(tmp_path), "--sweep.seed", "0,1", "--sweep.halving", "2"])
    expect(message(ConfigError, lambda: members(halved)), "sweep.halving: got 2 with 4 data sets")


def test_an_empty_data_set_in_a_folder_is_named(tmp_path):
    said = message(ConfigError, lambda: data_sets([str(tmp_path)]))
    expect(said, f"sweep.data: got {tmp_path}, which has no data sets", ".jsonl")
    (tmp_path / "full.csv").write_text("text\n")
    (tmp_path / "bare.csv").touch()
    (tmp_path / "hollow").mkdir()
    said = message(ConfigError, lambda: data_sets([str(tmp_path)]))
    expect(said, "2 problems", f"{tmp_path / 'bare.csv'} is empty", f"{tmp_path / 'hollow'} is empty")

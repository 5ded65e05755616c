"""Labels: a column gives the classes as written, or an error names the rows; and class weights."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
from pathlib import Path
from typing import Any

import chex
import datasets
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from sklearn.utils.class_weight import compute_class_weight

import jlora
from tests import tiny
from tests.runs import program, records
from train.__main__ import parse
from train.compute.optimizer import make_optimizer
from train.compute.step import init_state, make_step
from train.config import ConfigError, FitConfig, SequenceClassification
from train.data import tables as data
from train.data.tables import Table
from train.tasks.classify import Classification
from train.tasks.labels import class_names, class_numbers, class_weights, counts_table, label_texts, regression_targets
from train.tasks.registry import resolved

NAN = float("nan")


def rows(labels: Any, declared: tuple[str, ...] = ()) -> Any:
    """A table with a column of labels: of several types, or of declared classes."""
    if declared:
        features = datasets.Features({"label": datasets.ClassLabel(names=list(declared))})
        return Table.from_dict({"label": labels}, features=features)
    mixed = len(set(map(type, labels))) > 1
    return Table.from_dict({"label": labels}, on_mixed_types="use_json" if mixed else None)


def advised(message: str) -> tuple[str, ...]:
    """The names that an error advises to pass with --task.labels, as a shell reads them."""
    found = re.search(
        r"(?:--task\.labels|None to take the classes from the data, or --task\.labels) ((?!None).*)$", message
    )
    assert found, message
    return tuple(shlex.split(found[1]))


def refusal(call: Any, *args: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        call(*args)
    return str(caught.value)


# Which classes there are


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["b", "a", "b"], ("a", "b")),
        (["10", "9", "1", "9"], ("1", "9", "10")),
        (["007", "7", "1e2", "7"], ("007", "7", "1e2")),
        (["1.0", "0.0"], ("0.0", "1.0")),
        (["NA", "None", "null", "nan", "inf"], ("NA", "None", "inf", "nan", "null")),
        (["2024-05-01", "2023-01-02"], ("2023-01-02", "2024-05-01")),
        (["yes ", "yes", "Ä"], ("yes", "yes ", "Ä")),
        ([3, 10, 9, 3], ("3", "9", "10")),
        ([1.0, 0.0, 1.0], ("0", "1")),
        ([True, False], ("false", "true")),
        ([1, -2], ("-2", "1")),
    ],
)
def test_classes_are_what_the_column_says(labels, names):
    """Numbers by their value, then names; and each label is its own class."""
    table = rows(labels)
    assert class_names(table, "label") == names
    assert [names[i] for i in class_numbers(table, "label", names)] == list(label_texts(table, "label"))


def test_labels_of_several_types_are_classes_or_an_error():
    table = rows(["b", 10, 9, "a", True, 2.0])
    try:
        assert class_names(table, "label") == ("2", "9", "10", "a", "b", "true")
    except ConfigError as error:
        assert "row 1" in str(error) and "row 2" in str(error)


def test_declared_classes_keep_their_names_and_their_order():
    table = rows([1, 0, 1], ("pos", "neg", "none"))
    assert class_names(table, "label") == ("pos", "neg", "none")
    assert list(label_texts(table, "label")) == ["neg", "pos", "neg"]
    assert class_numbers(table, "label", ("pos", "neg", "none")).tolist() == [1, 0, 1]
    # The same classes in another order, as a folder that lacks one of them numbers them.
    assert class_numbers(table, "label", ("neg", "none", "pos")).tolist() == [0, 2, 0]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([0.37, 1.0, 2.5, 0.37], ["0.37' (rows 1, 4)", "2.5' (row 3)", "--task.regression"]),
        (["0.5", "1", "1.5"], ["0.5' (row 1)", "1.5' (row 3)", "--task.regression"]),
        ([0, -1, 1, -1], ["-1 in rows 2, 4", "missing label"]),
        (["-1", "0", "1"], ["-1 in row 1"]),
    ],
)
def test_scores_and_missing_labels_are_not_classes_unless_they_are_named(labels, expected):
    message = refusal(class_names, rows(labels), "label")
    assert all(part in message for part in expected), message
    names = advised(message)
    assert [names[i] for i in class_numbers(rows(labels), "label", names)] == list(label_texts(rows(labels), "label"))


def test_a_split_without_labels_is_an_error():
    for table in (rows([-1, -1, -1]), rows([-1] * 3, ("neg", "pos"))):
        for call in (class_names, lambda table, label: class_numbers(table, label, ("neg", "pos"))):
            message = refusal(call, table, "label")
            assert "-1 in all 3 rows" in message and "another split" in message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([["a"], ["a", "b"], ["a"]], ["['a']", "1"]),
        ([{"x": 1}, {"x": 2}], ["{'x': 1}", "1"]),
        (["a", "b", "  "], ["'  ' (row 3)"]),
        (["a", ""], ["column 'label'"]),
        ([1.0, NAN, 0.0, NAN], ["rows 2, 4"]),
        ([1.0, float("inf"), 0.0], ["inf (row 2)"]),
        (["a", None], ["1 of 2 values of the column 'label' are missing"]),
        (["a", [1]], ["[1]", "row 2"]),
    ],
)
def test_a_value_that_is_not_a_label_is_an_error_with_its_row(labels, expected):
    message = refusal(class_names, rows(labels), "label")
    assert message.startswith("task.label: ") and all(part in message for part in expected), message


def test_one_class_and_a_column_of_ids_are_errors():
    message = refusal(class_names, rows(["x"] * 4), "label")
    assert "'x' alone" in message and advised(message) == ("x", "OTHER")
    many = {"id": [f"u{i}" for i in range(30)], "stars": [i % 5 for i in range(30)]}
    message = refusal(class_names, Table.from_dict(many), "id")
    assert "30 different labels in 30 rows" in message and "one of stars" in message
    assert class_names(Table.from_dict(many), "stars") == ("0", "1", "2", "3", "4")  # pyright: ignore[reportArgumentType]
    few_shot = [f"c{i % 15}" for i in range(30)]
    assert len(class_names(rows(few_shot), "label")) == 15


# Which class a label is


@pytest.mark.parametrize(
    ("names", "labels", "expected"),
    [
        (("bad", "good"), ["good", "bad"], [1, 0]),
        (("bad", "good"), [1, 0], [1, 0]),
        (("bad", "good"), [1.0, 0.0], [1, 0]),
        (("bad", "good"), ["1", "0"], [1, 0]),
        (("bad", "good"), [1, 1], [1, 1]),
        (("3", "7"), [7, 3], [1, 0]),
        (("1", "0"), ["0", "1"], [1, 0]),
        (("1.0", "0.0"), ["0.0"], [1]),
        (("-1", "0", "1"), [1, -1, 0], [2, 0, 1]),
        (("false", "true"), [True, False], [1, 0]),
        (("other", "10"), ["10", "other"], [1, 0]),
    ],
)
def test_a_label_is_a_class_by_its_name_or_where_there_are_none_by_its_number(names, labels, expected):
    found = class_numbers(rows(labels), "label", names)
    assert found.tolist() == expected and found.dtype == np.int32


@pytest.mark.parametrize(
    ("names", "labels", "unknown"),
    [
        (("1", "2", "3"), [1, 2, 0], {"0": "row 3"}),
        (("1", "2", "3"), [1, 2, 3, 4], {"4": "row 4"}),
        (("1", "2", "3"), [0, 0], {"0": "rows 1, 2"}),  # never the class of that number
        (("3", "7"), [0, 1], {"0": "row 1", "1": "row 2"}),
        (("bad", "good"), [0, 1, 2, 2], {"2": "rows 3, 4"}),
        (("bad", "good"), ["goood", "bad"], {"goood": "row 1"}),
        (("bad", "good"), ["good", "0"], {"0": "row 2"}),
        (("bad", "good"), ["0.0", "1.0"], {"0.0": "row 1", "1.0": "row 2"}),
        (("bad", "good"), ["²"], {"²": "row 1"}),
        (("bad", "good"), [True], {"true": "row 1"}),
        (("1.0", "2.0"), ["1"], {"1": "row 1"}),
        (("007", "7"), ["07"], {"07": "row 1"}),
    ],
)
def test_only_unknown_labels_are_named(names, labels, unknown):
    """With their rows, the classes, and a way out that works."""
    message = refusal(class_numbers, rows(labels), "label", names)
    parts = re.search(r"holds (.*), which is not a class.*; expected one of (.*)\. Remove these rows, or", message)
    assert parts and parts[1] == ", ".join(f"{label!r} ({where})" for label, where in unknown.items())
    assert parts[2].startswith(", ".join(names))
    by_number = not any(name.replace(".", "").isdigit() for name in names) and not set(map(str, labels)) & set(names)
    assert by_number == (f"or its number from 0 to {len(names) - 1}" in parts[2])
    if "a name for each number" in message:
        wider = (*names, *(f"class {i}" for i in range(len(names), int(max(unknown)) + 1)))
    else:
        wider = advised(message)
        assert wider == (*names, *unknown)
    assert class_numbers(rows(labels), "label", wider).shape == (len(labels),)


@pytest.mark.parametrize(("labels", "own"), [(["tech", "bills"], True), (["good", "bills"], False)])
def test_labels_of_another_task_are_to_be_taken_from_the_data(labels, own):
    """Where the column holds none of the configured names, as with the config file of another task."""
    message = refusal(class_numbers, rows(labels), "label", ("bad", "good"))
    assert ("pass --task.labels None to take the classes from the data, or" in message) == own


def test_labels_that_differ_only_in_case_or_spaces_are_named():
    counts = {"train": {"Billing": 3, "billing ": 1, "Tech": 4}}
    assert counts_table(counts).endswith("\n\nthese labels differ only in case or spaces: 'Billing', 'billing '")
    assert "differ" not in counts_table({"train": {"Billing": 3, "Tech": 4}})


def test_a_declared_class_is_known_by_its_name_alone():
    """Its number is from its own data, and may be another class here."""
    with pytest.raises(ConfigError, match=r"'World' \(row 1\), 'Sports' \(row 2\), which is not a class"):
        class_numbers(rows([0, 1], ("World", "Sports")), "label", ("sports", "world"))
    # Names that are numbers are class numbers, as of other data.
    assert class_numbers(rows([0, 1], ("0", "1")), "label", ("bad", "good")).tolist() == [0, 1]


def test_rows_are_those_of_the_source(tmp_path):
    """Also where some of them were chosen."""
    file = tiny.write_jsonl(tmp_path / "rows.jsonl", [{"label": label} for label in "abcac"])
    table = data.read(str(file), tmp_path / "cache", "data.train").select([4, 0, 2])
    assert "'c' (rows 3, 5" in refusal(class_numbers, table, "label", ("a", "b"))
    assert "'c' (row 5" in refusal(class_numbers, table.select([0]), "label", ("a", "b"))
    message = refusal(class_numbers, rows(["x"] * 12), "label", ("a", "b"))
    assert "'x' (rows 1, 2, 3, 4, 5" in message and "and 7 more)" in message


@pytest.mark.parametrize(
    ("labels", "expected"),
    [([1, 2.5, -1], [1, 2.5, -1]), (["1", "-2.5e1", " 3 "], [1, -25, 3]), ([0.1, 0.2], [0.1, 0.2])],
)
def test_a_regression_reads_the_numbers_that_are_there(labels, expected):
    found = regression_targets(rows(labels), "label")
    np.testing.assert_array_equal(found, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        (["1", "two", "two"], "'two' (rows 2, 3)"),
        (["1", "1,5"], "'1,5' (row 2)"),
        (["1", "1_000"], "'1_000' (row 2)"),
        (["1", "nan"], "'nan' (row 2)"),
        ([1.0, float("inf")], "inf (row 2)"),
        ([1.0, 1e39], "1e+39 (row 2)"),
        ([True, False], "True (row 1)"),
    ],
)
def test_a_regression_needs_finite_numbers(labels, expected):
    message = refusal(regression_targets, rows(labels), "label")
    assert expected in message and "finite numbers" in message
    assert "[1.0]" in refusal(regression_targets, rows([[1.0], [2.0]]), "label")


# Class weights


def test_balanced_weights_are_those_of_scikit_learn():
    labels = ["spam"] * 3 + ["ham"] * 12 + ["eggs"]
    names = class_names(rows(labels), "label")
    count = {name: labels.count(name) for name in names}
    expected = compute_class_weight("balanced", classes=np.array(names), y=np.array(labels))
    found = class_weights("balanced", count)
    assert found is not None and list(found) == list(names)
    np.testing.assert_allclose(list(found.values()), expected)
    assert sum(found[label] for label in labels) == pytest.approx(len(labels))
    assert class_weights(None, count) is None
    assert class_weights({"spam": 2, "ham": 0.5, "eggs": 1}, count) == {"eggs": 1.0, "ham": 0.5, "spam": 2.0}


def test_weights_that_do_not_fit_the_classes_are_errors():
    message = refusal(class_weights, {"spam": 3.0, "hma": 1.0}, {"ham": 4, "spam": 2})
    assert "'hma' is not a class (closest: 'ham'" in message and "'ham' has no weight" in message
    assert message.endswith("--task.class-weights ham 1 spam 3")
    message = refusal(class_weights, "balanced", {"ham": 4, "spam": 0})
    assert "no train example has the label 'spam'" in message
    assert message.endswith("--task.class-weights ham 1 spam 1")


class Linear(Classification):
    """Rows of a batch through one matrix."""

    def __init__(self, weights: Any):
        self.weights = None if weights is None else np.asarray(weights, np.float32)

    def inputs(self, batch: Any, smoothing: float = 0.0) -> Any:
        return batch["x"]


WEIGHTS = (0.02, 0.3, 0.001)


def weighted_batch() -> dict[str, np.ndarray]:
    """Rows whose weights sum to less than 1, some of them almost 0."""
    x = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    return {"x": x, "label": np.array([0, 2, 2, 2, 1, 0, 1, 2], np.int32)}


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
@pytest.mark.parametrize("weights", [None, WEIGHTS, (1.0, 4.0, 2.5)])
def test_the_weighted_loss_and_its_gradient_are_those_of_torch(smoothing, weights):
    torch = pytest.importorskip("torch")
    batch = weighted_batch()
    logits = batch["x"][:, :3]

    def mean(logits: jax.Array) -> jax.Array:
        total, count = Linear(weights).loss(logits, batch, smoothing)
        return total / count

    theirs = torch.tensor(logits, requires_grad=True)
    weight = None if weights is None else torch.tensor(weights)
    loss = torch.nn.CrossEntropyLoss(weight=weight, label_smoothing=smoothing)(
        theirs, torch.tensor(batch["label"], dtype=torch.long)
    )
    loss.backward()
    value, grad = jax.value_and_grad(mean)(jnp.asarray(logits))
    np.testing.assert_allclose(value, loss.item(), rtol=1e-6)
    np.testing.assert_allclose(grad, theirs.grad.numpy(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_weighted_loss_is_its_definition_however_a_batch_is_divided(smoothing):
    """In parts, over devices by pmap, and on a mesh: sum of the weighted losses by the sum of the weights."""
    base = {"w": jax.random.normal(jax.random.key(0), (4, 3))}
    adapters = jlora.init(jax.random.key(1), base, jlora.LoraConfig(rank=2, targets=("w",)))
    tx, batch, task = make_optimizer(FitConfig(clip=None)), weighted_batch(), Linear(WEIGHTS)
    state, key = init_state(tx, adapters), jax.random.key(2)

    def step(**options: Any) -> Any:
        forward = lambda params, inputs, key=None: inputs @ params["w"]  # noqa: E731
        return make_step(forward, task, tx, optax.constant_schedule(1e-2), smoothing=smoothing, **options)  # pyright: ignore[reportArgumentType]

    whole = jax.jit(step())(state, base, batch, key)
    w, log_p = np.array(WEIGHTS), np.asarray(jax.nn.log_softmax(batch["x"] @ base["w"]))
    each = -(1 - smoothing) * w[batch["label"]] * log_p[np.arange(8), batch["label"]] - smoothing / 3 * log_p @ w
    np.testing.assert_allclose(whole[1]["loss"], each.sum() / w[batch["label"]].sum(), rtol=1e-5)

    found = [jax.jit(step(accumulate=parts))(state, base, batch, key) for parts in (2, 4, 8)]
    mapped = jax.pmap(step(axis="rows", accumulate=2), "rows", in_axes=(None, None, 0, None), devices=jax.devices()[:4])
    split = jax.tree.map(lambda x: x.reshape(4, 2, *x.shape[1:]), batch)
    found.append(jax.tree.map(lambda x: x[0], mapped(state, base, split, key)))
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows_apart = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    found.append(jax.jit(step())(state, base, jax.device_put(batch, rows_apart), key))
    for one in found:
        chex.assert_trees_all_close(one, whole, rtol=1e-5, atol=1e-6)


def test_metrics_are_not_weighted():
    batch = weighted_batch()
    logits = jnp.asarray(batch["x"][:, :3])
    found = [(task := Linear(w)).metrics(jax.device_get(task.measure(logits, batch))) for w in (None, WEIGHTS)]
    assert found[0] == found[1]


# What a run reports


def test_counts_are_a_line_for_each_label_and_few_of_many():
    shown = counts_table(
        {"train": {"ham": 1200, "spam": 3}, "validation": {"ham": 7, "spam": 0}}, {"ham": 0.5, "spam": 2}
    )
    assert [line.split() for line in shown.splitlines()[2:]] == [["ham", "1,200", "7", "0.5"], ["spam", "3", "0", "2"]]
    many = {f"c{i}": i for i in range(1000)}
    shown = counts_table({"train": many, "validation": many}).splitlines()
    assert len(shown) == 2 + 21 and shown[2].split() == ["c999", "999", "999"] and shown[-1].split() == ["c0", "0", "0"]
    assert shown[12].strip() == "(980 more)"


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return tiny.write_sentiment(tmp_path_factory.mktemp("labels"))


def flags(work: Path, *more: str) -> list[str]:
    return tiny.sentiment_flags(work, None, "--fit.epochs 1", *more)


@pytest.mark.slow
def test_a_run_reports_its_labels_and_keeps_their_weights(work, tmp_path):
    """The balanced weights are in its config.json, and metrics are computed without them."""
    unbalanced = [row for i, row in enumerate(tiny.sentences(64)) if row["name"] == "bad" or i % 8 == 1]
    file = tiny.write_jsonl(tmp_path / "train.jsonl", unbalanced)
    run_dir, label = tmp_path / "run", ("--task.label", "name", "--task.labels", "None")
    found = flags(work, "--data.train", str(file), "--data.validation", str(work / "validation.jsonl"), *label)
    code, printed = program(*found, "--run-dir", str(run_dir), "--task.class-weights", "balanced")
    assert code == 0, printed
    expected = {
        "bad": {"train": 32, "validation": 10, "weight": 0.625},
        "good": {"train": 8, "validation": 10, "weight": 2.5},
    }
    for name, row in expected.items():
        assert re.search(rf"^{name} +{row['train']} +{row['validation']} +{row['weight']}$", printed, re.MULTILINE), (
            printed
        )
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["labels"] == {
        part: {name: row[part] for name, row in expected.items()} for part in ("train", "validation")
    }
    task = json.loads((run_dir / "config.json").read_text())["task"]
    assert task["labels"] == ["bad", "good"] and task["class_weights"] == {"bad": 0.625, "good": 2.5}
    adapted = summary["metrics"]["adapted"]["validation"]
    code, printed = program("eval", str(run_dir))
    assert code == 0 and f"loss {adapted['loss']:.4f}  accuracy {adapted['accuracy']:.4f}" in printed, printed
    # Other weights are another run, and the same are the same.
    code, printed = program(*found, "--run-dir", str(run_dir), "--task.class-weights", "bad", "1", "good", "4")
    assert code == 2 and "task.class_weights.good: the run has 2.5, got 4.0" in printed, printed
    code, printed = program(*found, "--run-dir", str(run_dir), "--task.class-weights", "bad", "0.625", "good", "2.5")
    assert code == 0 and "is finished" in printed, printed
    assert [one["step"] for one in records(run_dir) if "epoch" in one] == [5]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("--task.class-weights bad -1 good 2", "task.class_weights: got .*expected balanced, or a number > 0"),
        ("--task.class-weights bad 0 good 1", "task.class_weights: got .*expected balanced, or a number > 0"),
        ("--task.labels good good", "task.labels: got .*each once"),
        ("--task.regression --task.labels None --task.class-weights balanced", "task.class_weights: .* regression"),
    ],
)
def test_impossible_weights_and_names_are_errors_before_anything_is_read(work, given, message):
    with pytest.raises(ConfigError, match=message):
        parse(flags(work, *given.split()))


def test_a_label_that_training_lacks_is_an_error_with_all_labels(work):
    """As is one without a weight; and the flags that the error names work."""
    train, other = tiny.sentences(8), [{"sentence": "a film", "name": "odd"}]
    tables = {"train": Table.from_list([{k: row[k] for k in ("sentence", "name")} for row in train])}
    config = resolved(parse(flags(work, "--task.label", "name", "--task.labels", "None")), tables)  # pyright: ignore[reportArgumentType]
    assert isinstance(config.task, SequenceClassification) and config.task.labels == ("bad", "good")
    message = refusal(class_numbers, Table.from_list(other), "name", config.task.labels)
    config = parse(flags(work, "--task.label", "name", "--task.labels", *advised(message)))
    assert resolved(config, tables).task == config.task  # pyright: ignore[reportArgumentType]
    balanced = dataclasses.replace(config, task=dataclasses.replace(config.task, class_weights="balanced"))
    message = refusal(resolved, balanced, tables)
    assert "no train example has the label 'odd'" in message
    weights = re.search(r"--task\.class-weights .*$", message)
    assert weights
    config = parse(flags(work, "--task.label", "name", "--task.labels", "bad", "good", "odd", *weights[0].split()))
    assert resolved(config, tables).task.class_weights == {"bad": 1.0, "good": 1.0, "odd": 1.0}  # pyright: ignore

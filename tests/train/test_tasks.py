"""Laws of the program on texts: tiny checkpoints, trained, predicted with, measured again and exported."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import chex
import jax
import jax.monitoring
import numpy as np
import pytest

import jlora
from jlora import models, peft
from tests import tiny
from tests.runs import program
from train.__main__ import parse
from train.config import CausalLM, ComputeConfig, ConfigError, DataConfig, SequenceClassification, TrainConfig
from train.data import batches
from train.data import tables as data
from train.data.ragged import Ragged
from train.job import bucket_lengths
from train.networks.registry import make_network
from train.networks.tokenizers import load_tokenizer, set_up
from train.rundir.arrays import load_tree
from train.rundir.finished import open_run
from train.tasks import metrics
from train.tasks.classify import TextClassification, TextRegression
from train.tasks.language import LanguageModel

OPTIONS = "--fit.epochs 2 --lora.alpha 4 --learning-rate.lora 0.02"

GENERATION = {"eos_token_id": 3, "temperature": 0.6, "top_p": 0.9}


@pytest.fixture(scope="session")
def work(tmp_path_factory) -> Path:
    """Checkpoints and data: an encoder, a decoder with a chat template, sentences and sums."""
    folder = tiny.write_sentiment(tmp_path_factory.mktemp("tasks"))
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm", chat=True)
    (folder / "decoder" / "generation_config.json").write_text(json.dumps(GENERATION))
    sums = [{"question": f"{i} + {j} =", "answer": str(i + j)} for i in range(5) for j in range(4)]
    talks = [
        {
            "messages": [
                {"role": "user", "content": row["question"]},
                {"role": "assistant", "content": row["answer"]},
                {"role": "user", "content": "the film"},
                {"role": "assistant", "content": "a lovely film"},
            ]
        }
        for row in sums
    ]
    tiny.write_jsonl(folder / "sums" / "train.jsonl", [row | talk for row, talk in zip(sums, talks, strict=True)])
    tiny.write_jsonl(
        folder / "sums" / "test.jsonl", [row | talk for row, talk in zip(sums[:7], talks[:7], strict=True)]
    )
    return folder


def text_flags(work: Path) -> list[str]:
    return tiny.sentiment_flags(work, None, OPTIONS)


def language_flags(work: Path) -> list[str]:
    return [
        "configs/instruct_llama.py", "--model.path", str(work / "decoder"), "--data.train",
        str(work / "sums/train.jsonl"), "--data.validation", "None", "--cache-dir", str(work / "cache"),
        "--model.dtype", "float32", "--model.param-dtype", "float32", "--task.max-length", "48",
        "--fit.batch-size", "8", "--eval-batch-size", "8", "--lora.rank", "2", *OPTIONS.split(),
    ]  # fmt: skip


@pytest.fixture(scope="session")
def text_run(work) -> tuple[Path, str]:
    folder = work / "text-run"
    code, printed = program(*text_flags(work), "--run-dir", str(folder), "--fit.epochs", "8", "--keep", "best")
    assert code == 0, printed
    return folder, printed


@pytest.fixture(scope="session")
def language_run(work) -> tuple[Path, str]:
    folder = work / "language-run"
    unpacked = "--task.no-pack --task.messages None --task.prompt question --task.completion answer --task.chat".split()
    code, printed = program(
        *language_flags(work), "--run-dir", str(folder), *unpacked, "--fit.epochs", "12", "--fit.batch-size", "4"
    )
    assert code == 0, printed
    return folder, printed


# A run on texts


def test_a_text_classifier_learns_and_its_run_directory_is_complete(text_run):
    folder, printed = text_run
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["metrics"]["adapted"]["validation"]["accuracy"] > 0.8
    assert set(summary["metrics"]["adapted"]["validation"]) == {"loss", "accuracy", "f1", "matthews"}
    assert {path.name for path in folder.iterdir()} - {"curves.png"} == {
        "config.json", "data.json", "plan.txt", "metrics.jsonl", "checkpoints", "adapters", "summary.json", "run.lock",
        "SHA256SUMS",
    }  # fmt: skip
    assert f"trainable: {summary['trainable']:,} of {summary['total']:,}" in printed
    for name, count in (("train", 64), ("validation", 20)):
        cut = summary["cut"][name]
        assert (cut["examples"], cut["cut"], cut["lost"]) == (count, 0, 0)
        assert f"{name}: {count} examples of at most {cut['longest']} tokens, none is cut" in printed
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    kept = next(record for record in records if "epoch" in record and record["step"] == summary["kept_step"])
    assert kept["validation_accuracy"] == summary["metrics"]["adapted"]["validation"]["accuracy"]


def test_predict_labels_texts_as_the_run_measured_them(text_run, tmp_path):
    """From flags or from a file, in any order: the accuracy of the labels is the run's."""
    folder, _ = text_run
    rows = tiny.sentences(20, start=100)
    code, printed = program("predict", str(folder), *(flag for row in rows for flag in ("--text", row["sentence"])))
    assert code == 0, printed
    found = [line.split("\t") for line in printed.splitlines()]
    assert [text for text, *_ in found] == [row["sentence"] for row in rows]
    assert all(0.5 <= float(probability) <= 1 for *_, probability in found)
    names = ("negative", "positive")
    right = np.mean([label == names[row["label"]] for (_, label, _), row in zip(found, rows, strict=True)])
    summary = json.loads((folder / "summary.json").read_text())
    assert right == summary["metrics"]["adapted"]["validation"]["accuracy"]

    (tmp_path / "texts.txt").write_text("\n".join(row["sentence"] for row in reversed(rows)) + "\n")
    _, again = program("predict", str(folder), "--file", str(tmp_path / "texts.txt"))
    for one, other in zip(found, reversed([line.split("\t") for line in again.splitlines()]), strict=True):
        assert one[:2] == other[:2]
        assert float(one[2]) == pytest.approx(float(other[2]), abs=2e-4)


def test_eval_measures_what_the_run_measured(text_run, work):
    """After a line with the provenance of the examples."""
    folder, _ = text_run
    summary = json.loads((folder / "summary.json").read_text())
    adapted_metrics = summary["metrics"]["adapted"]["validation"]
    found = "validation: " + "  ".join(f"{name} {value:.4f}" for name, value in adapted_metrics.items())
    file, digest = work / "validation.jsonl", summary["data"]["validation"]["digest"][:12]
    rows = f"20 rows read, all used; sha256 {digest}"
    code, printed = program("eval", str(folder))
    assert (code, printed) == (0, f"{file}, found next to train.jsonl: {rows}\n{found}\n")
    code, printed = program("eval", str(folder), "--source", str(file), "--limit", "20")
    assert (code, printed) == (0, f"{file}: {rows}\n{found}\n")


def test_truncation_is_reported_by_eval_and_predict(text_run, tmp_path):
    """`max_length` is the run's, 16 tokens with those at both ends."""
    folder, _ = text_run
    long = " ".join(["warm"] * 20)
    (tmp_path / "long.jsonl").write_text(
        "".join(json.dumps({"sentence": text, "label": label}) + "\n" for text, label in ((long, 1), ("dull", 0)))
    )
    cut = "1 of 2 examples are cut at 16 tokens: 6 of 25 tokens are lost\n"
    code, printed = program("eval", str(folder), "--source", str(tmp_path / "long.jsonl"))
    assert code == 0 and f"validation: {cut}" in printed
    code, printed = program("predict", str(folder), "--text", long, "--text", "dull")
    assert code == 0 and printed.startswith(f"predict: {cut}")
    code, printed = program("predict", str(folder), "--text", "dull")
    assert code == 0 and "cut" not in printed


def test_exports_are_the_adapted_model(text_run, tmp_path):
    """Adapters for peft, a merged checkpoint and merged parameters: each gives the adapted model's logits."""
    folder = shutil.copytree(text_run[0], tmp_path / "run")
    run = open_run(folder)
    inputs = {"input_ids": np.array([[2, 5, 13, 3], [2, 8, 3, 0]]), "attention_mask": np.array([[1] * 4, [1, 1, 1, 0]])}
    expected = jlora.lora(run.network.forward)(run.tree, inputs)
    for to in ("peft", "hf", "orbax"):
        code, printed = program("export", str(folder), "--to", to)
        assert code == 0, printed
        assert f"written to {folder / to}" in printed

    assert run.network.model is not None
    adapters, _ = peft.load(folder / "peft", models.tensor_names(run.network.model), run.params)
    tree = jlora.attach(run.params, adapters)
    np.testing.assert_allclose(jlora.lora(run.network.forward)(tree, inputs), expected, atol=1e-5)

    model: Any
    model, params = models.load(folder / "hf")
    np.testing.assert_allclose(model.apply(params, **inputs), expected, atol=1e-5)
    assert (
        load_tokenizer(str(folder / "hf"))("a great film")["input_ids"]
        == run.network.tokenizer("a great film")["input_ids"]
    )
    assert json.loads((folder / "hf/config.json").read_text())["id2label"] == {"0": "negative", "1": "positive"}
    assert "jlora" in (folder / "hf/README.md").read_text()

    merged = load_tree(folder / "orbax", run.params)
    np.testing.assert_allclose(run.network.forward(merged, inputs), expected, atol=1e-5)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_after_warm_up_nothing_is_compiled(work, tmp_path, accumulate):
    """Sentences of many lengths make few shapes: the second epoch meets none that the first did not."""
    config = dataclasses.replace(
        parse([*text_flags(work), "--run-dir", str(tmp_path)]),
        data=DataConfig(str(work / "train.jsonl")),
        compute=ComputeConfig(accumulate=accumulate),
    )
    tokenizer = load_tokenizer(str(work / "encoder"))
    assert isinstance(config.task, SequenceClassification)
    task = TextClassification(config.task, ("negative", "positive"), tokenizer)
    examples = task.encode(data.load(config.data, config.cache_dir)["train"])[""]
    buckets = bucket_lengths(config, {"": examples})
    assert buckets == (8, 16)
    shapes = {
        batches.batch_of(examples, batches.training_rows(64, 8, 0, step), buckets)["input_ids"].shape
        for step in range(40)
    }
    assert shapes == {(8, 8), (8, 16)} or shapes == {(8, 16)}

    events: list[str] = []

    def listen(event: str, duration_secs: float, **_: str | int) -> None:
        if event.startswith("/jax/core/compile/backend"):
            events.append(event)

    from train.experiment import run

    counts = {}
    for epochs in (2, 4):
        jax.monitoring.register_event_duration_secs_listener(listen)
        jax.clear_caches()
        fit = dataclasses.replace(config.fit, epochs=epochs)
        run(dataclasses.replace(config, fit=fit, run_dir=tmp_path / str(epochs)))
        jax.monitoring.unregister_event_duration_listener(listen)
        counts[epochs], events = len(events), []
    assert counts[2] == counts[4]


# Text classification


def rows_of(**columns: Any) -> Any:
    return data.Table.from_dict(columns)


def test_pairs_and_truncation_reach_the_tokenizer(work):
    tokenizer = load_tokenizer(str(work / "encoder"))
    task = TextClassification(SequenceClassification(text="one", pair="two", max_length=8), ("0", "1"), tokenizer)
    examples = task.encode(rows_of(one=["a film"], two=["the plot"], label=[1]))[""]
    words = [tiny.VOCABULARY[i] for i in examples["input_ids"][0]]
    assert words == ["[CLS]", "a", "film", "[SEP]", "the", "plot", "[SEP]"]
    assert examples["token_type_ids"][0].tolist() == [0, 0, 0, 0, 1, 1, 1]

    left = SequenceClassification(text="one", max_length=4, truncation="left")
    examples = TextClassification(left, ("0", "1"), set_up(tokenizer, left)).encode(
        rows_of(one=["a b c film plot"], label=[0])
    )[""]
    assert [tiny.VOCABULARY[i] for i in examples["input_ids"][0]] == ["[CLS]", "film", "plot", "[SEP]"]


@pytest.mark.slow
def test_a_regression_learns_a_number(work, tmp_path):
    flags = [*text_flags(work), "--task.regression", "--task.label", "score", "--task.labels", "None"]
    code, printed = program(*flags, "--run-dir", str(tmp_path), "--fit.epochs", "10")
    assert code == 0, printed
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["primary"] == "pearson"
    assert summary["metrics"]["adapted"]["validation"]["pearson"] > 0.6
    rows = tiny.sentences(20, start=100)
    code, printed = program("predict", str(tmp_path), *(flag for row in rows for flag in ("--text", row["sentence"])))
    values = [float(line.split("\t")[1]) for line in printed.splitlines()]
    pearson = np.corrcoef(values, [row["score"] for row in rows])[0, 1]
    assert pearson == pytest.approx(summary["metrics"]["adapted"]["validation"]["pearson"], abs=1e-3)
    assert isinstance(open_run(tmp_path).task, TextRegression)


def test_metrics_agree_with_their_definitions():
    logits = np.log(np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.3, 0.7]], np.float32))
    labels = np.array([0, 1, 1, 0])  # right, right, wrong, wrong
    found = metrics.classification(logits, labels)
    assert found["accuracy"] == 0.5 and found["f1"] == 0.5 and found["matthews"] == pytest.approx(0)
    assert found["loss"] == pytest.approx(-np.log([0.9, 0.8, 0.4, 0.3]).mean(), rel=1e-5)
    line = np.arange(5.0, dtype=np.float32)
    assert metrics.regression(2 * line + 1, line)["pearson"] == pytest.approx(1)
    assert metrics.regression(line**3, line)["spearman"] == pytest.approx(1)
    assert metrics.regression(np.zeros(5, np.float32), line)["pearson"] == 0
    found = metrics.language_model(np.array([2.0, 4.0]), np.array([1, 2]), np.array([1, 1]))
    assert found == {"loss": 2.0, "perplexity": pytest.approx(np.exp(2)), "token_accuracy": pytest.approx(2 / 3)}


# Batches


def test_batches_pad_to_the_shortest_bucket_that_holds_them():
    examples = {"x": Ragged.of([[1], [2, 2], [3, 3, 3], [4] * 4], fill=9), "y": np.arange(4)}
    batch = batches.batch_of(examples, np.array([0, 1]), (2, 4))
    assert batch["x"].tolist() == [[1, 9], [2, 2]] and batch["y"].tolist() == [0, 1]
    assert batches.batch_of(examples, np.array([2]), (2, 4))["x"].tolist() == [[3, 3, 3, 9]]
    left = {"x": Ragged.of([[1], [2, 2, 2]], fill=0, left=True)}
    assert batches.batch_of(left, np.array([0, 1]))["x"].tolist() == [[0, 0, 1], [2, 2, 2]]
    assert batches.default_buckets(64) == (16, 32, 48, 64) and batches.default_buckets(10) == (8, 10)


def test_ordered_batches_hold_every_example_once_in_few_shapes():
    rng = np.random.default_rng(0)
    examples = {"x": Ragged.of([[i] * n for i, n in enumerate(rng.integers(1, 17, 21))], fill=-1), "i": np.arange(21)}
    seen, shapes = [], set()
    for rows, own in batches.ordered_rows(examples, 4):
        bucket = batches.bucket_of(examples, rows, (4, 8, 16))
        batch = batches.batch_of(examples, rows, bucket)
        assert batch["i"].tolist() == batch["x"][:, 0].tolist() == rows.tolist()
        # A part of the rows, as one process builds it, is as long as the whole.
        assert batches.batch_of(examples, rows[:1], bucket)["x"].tolist() == batch["x"][:1].tolist()
        seen += rows[:own].tolist()
        shapes.add(batch["x"].shape)
    assert sorted(seen) == list(range(21))
    assert shapes <= {(4, 4), (4, 8), (4, 16)}


# Language models


def language_model(work: Path, **config: Any) -> LanguageModel:
    task = CausalLM(**config)
    return LanguageModel(task, set_up(load_tokenizer(str(work / "decoder")), task))


def words_with_loss(examples: batches.Examples, row: int = 0) -> list[str]:
    pairs = zip(examples["input_ids"][row], examples["loss_mask"][row], strict=True)
    return [tiny.VOCABULARY[token] for token, carries_loss in pairs if carries_loss]


def test_only_the_completion_carries_loss(work):
    task = language_model(work, prompt="q", completion="a")
    examples = task.encode(rows_of(q=["1 + 1 ="], a=[" 2"]))[""]
    assert [tiny.VOCABULARY[i] for i in examples["input_ids"][0]] == ["[CLS]", "1", "+", "1", "=", "2", "[SEP]"]
    assert words_with_loss(examples) == ["2", "[SEP]"]
    whole = language_model(work, prompt="q", completion="a", learn_prompt=True)
    assert len(words_with_loss(whole.encode(rows_of(q=["1 + 1 ="], a=[" 2"]))[""])) == 7


def test_only_the_assistants_turns_carry_loss(work):
    talk = [
        {"role": "user", "content": "1 + 1 ="}, {"role": "assistant", "content": "2"},
        {"role": "user", "content": "the film"}, {"role": "assistant", "content": "lovely"},
    ]  # fmt: skip
    task = language_model(work, messages="m", system="a story")
    examples = task.encode(rows_of(m=[talk]))[""]
    assert words_with_loss(examples) == ["2", "<end>", "lovely", "<end>"]
    assert tiny.VOCABULARY[examples["input_ids"][0][0]] == "[UNK]"  # <system>, which the tokenizer does not know
    bare = load_tokenizer(str(work / "encoder"))
    with pytest.raises(ConfigError, match="has no chat template"):
        LanguageModel(CausalLM(messages="m"), bare)


def test_packed_examples_have_the_loss_that_they_have_alone(work):
    """One row of several segments, or a row for each: the same summed loss over as many tokens."""
    model: Any
    model, params = models.load(work / "decoder")
    table = rows_of(q=["1 + 1 =", "the film", "2 + 3 ="], a=[" 2", " a lovely film", " 5"])
    found = {}
    for pack in (False, True):
        task = language_model(work, prompt="q", completion="a", pack=pack, max_length=32)
        examples = task.encode(table)[""]
        batch = batches.batch_of(examples, np.arange(batches.size(examples)))
        total, count = task.loss(model.apply(params, **task.inputs(batch)), batch)
        found[pack] = len(batch["input_ids"]), float(total), int(count)
    assert (found[False][0], found[True][0]) == (3, 1)
    assert found[False][2] == found[True][2] == 8
    assert found[False][1] == pytest.approx(found[True][1], rel=1e-5)


def test_examples_without_a_token_of_loss_are_dropped_and_counted(work):
    task = language_model(work, prompt="q", completion="a", max_length=4)
    examples = task.encode(rows_of(q=["1 + 1 =", "1"], a=[" 2", " 3"]))[""]
    assert batches.size(examples) == 1
    cut = batches.truncation_of(examples)
    assert cut is not None and (cut.examples, cut.cut, cut.dropped, cut.lost, cut.tokens) == (2, 1, 1, 2, 4)
    with pytest.raises(ConfigError, match="none of the 1 examples has a token that carries loss"):
        task.encode(rows_of(q=["1 + 1 ="], a=["2"]))


def test_a_language_model_learns_and_continues(language_run):
    folder, printed = language_run
    adapted_metrics = json.loads((folder / "summary.json").read_text())["metrics"]
    assert adapted_metrics["adapted"]["validation"]["loss"] < 0.7 * adapted_metrics["base"]["validation"]["loss"]
    assert "perplexity" in printed
    cut = json.loads((folder / "summary.json").read_text())["cut"]["train"]
    assert cut["lost"] == cut["ends"] == cut["dropped"] == 0 and cut["tokens"] > 20
    assert (
        "\nfirst example, 11 tokens, 2 with loss (in ⟦ ⟧):\n  <user> : 0 + 0 = <end> <assistant> :⟦ 0 <end>⟧\n"
        in printed
    )
    code, printed = program("generate", str(folder), "--prompt", "1 + 1 =", "--prompt", "2 +", "--max-new-tokens", "3")
    assert code == 0, printed
    assert [line for line in printed.splitlines() if line.startswith("> ")] == ["> 1 + 1 =", "> 2 +"]
    code, printed = program("predict", str(folder), "--text", "x")
    assert code == 2 and "was not trained to label texts; see `generate`" in printed


def test_conversations_are_packed_and_trained_on(work, tmp_path):
    targets = "--lora.targets embed_tokens q_proj".split()
    code, printed = program(*language_flags(work), "--run-dir", str(tmp_path), "--fit.batch-size", "2", *targets)
    assert code == 0, printed
    assert "token_accuracy" in printed

    # Its table is the output projection too, and the adapter is written for both.
    code, printed = program("export", str(tmp_path))
    assert code == 0, printed
    run = open_run(tmp_path)
    assert run.network.model is not None
    found, _ = peft.load(tmp_path / "peft", models.tensor_names(run.network.model), run.params)
    assert set(found) == set(run.adapters) >= {"params/model/embed_tokens/embedding"}
    for path, factors in found.items():
        chex.assert_trees_all_equal(factors, run.adapters[path])


def test_the_card_of_a_classifier_for_peft_loads_it_with_its_labels(text_run, tmp_path, monkeypatch):
    """PEFT's format has no labels. A card of another author stays."""
    theirs, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    run, out = open_run(text_run[0]), tmp_path / "out"
    task = SequenceClassification("sentence", labels=("a 'b'", "ü", "c"), max_length=16)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, task=task))
    network = make_network(run.config)
    assert network.load is not None and network.model is not None
    params = network.load(jax.random.key(1), None)
    adapters = {
        p: jax.numpy.full(x.shape, 0.5, x.dtype) for p, x in jlora.named_leaves(params)[0].items() if "classifier" in p
    }
    adapters |= {p: x for p, x in run.adapters.items() if "classifier" not in p}
    monkeypatch.setattr(
        "train.commands.export.open_run",
        lambda _: dataclasses.replace(run, network=network, params=params, adapters=adapters),
    )
    code, printed = program("export", str(text_run[0]), "--out", str(out))
    assert code == 0 and f"{out / 'README.md'} shows how to load it" in printed, printed
    written = re.search(r"```python\n(.*?)```", (out / "README.md").read_text(), re.DOTALL)
    assert written
    names: dict[str, Any] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(written[1], names)
    model = names["model"].eval()
    assert isinstance(model, theirs.PeftModel) and model.config.id2label == dict(enumerate(task.labels or ()))
    with torch.no_grad():
        found = model(input_ids=torch.tensor([[2, 5, 13, 3]])).logits
    inputs = {"input_ids": np.array([[2, 5, 13, 3]]), "attention_mask": np.ones((1, 4), np.int32)}
    expected = jlora.lora(network.forward)(jlora.attach(params, adapters), inputs)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-5)

    (out / "README.md").write_text("mine")
    assert program("export", str(text_run[0]), "--out", str(out))[0] == 0
    assert (out / "README.md").read_text() == "mine"


def test_eval_says_that_it_reads_the_columns_of_the_run(text_run, tmp_path):
    """The flags that a training is advised to pass are no flags of `eval`."""
    file = tiny.write_jsonl(tmp_path / "other.jsonl", [{"sentence": "a film", "stars": 1}])
    code, printed = program("eval", str(text_run[0]), "--source", str(file))
    assert code == 2 and f"Rename them in {file}" in printed, printed


@pytest.mark.slow
def test_an_untied_language_model_is_trained_and_exported(work, tmp_path):
    """`--model.untie`: the projection is a leaf of its own, as are its adapter and its tensor in the merged file."""
    flags = "--model.untie --lora.train-also lm_head --fit.epochs 1".split()
    code, printed = program(*language_flags(work), "--run-dir", str(tmp_path), *flags)
    assert code == 0, printed
    for to in ("hf", "peft"):
        code, printed = program("export", str(tmp_path), "--to", to)
        assert code == 0, printed
    # The tokenizer is an object here, and comes with no generation_config.json of its own: the model's stays.
    assert json.loads((tmp_path / "hf" / "generation_config.json").read_text()) == GENERATION
    run = open_run(tmp_path)
    model: Any
    model, params = models.load(tmp_path / "hf")
    assert isinstance(run.network.model, type(model)) and not model.config.tie_word_embeddings
    np.testing.assert_allclose(params["params"]["lm_head"]["kernel"], run.adapters["params/lm_head/kernel"], atol=1e-6)


# Images


@pytest.mark.slow
def test_a_vision_transformer_of_a_checkpoint_is_adapted(work, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    vit = models.build({"model_type": "vit", "image_size": 8, "patch_size": 4, **sizes}, task="features")
    params = {"params": vit.init(jax.random.key(0), models.example_inputs(vit))["params"]}
    models.save(tmp_path / "vit", vit, params)
    (tmp_path / "mine.py").write_text(
        "from jlora import LoraConfig\nfrom train.config import *\n"
        f"config = TrainConfig('mine', ImageClassification(brightest=16), Pretrained({str(tmp_path / 'vit')!r}),"
        " DataConfig(f'{ASSETS}/digits.parquet:train', f'{ASSETS}/digits.parquet:test', limit=64, validation_limit=32),"
        " LoraConfig(2, train_also=('classifier',)), fit=FitConfig(1, 32))\n"
    )
    run_dir = tmp_path / "run"
    code, printed = program(str(tmp_path / "mine.py"), "--run-dir", str(run_dir), "--cache-dir", str(work / "cache"))
    assert code == 0, printed
    summary = json.loads((run_dir / "summary.json").read_text())
    found = program("eval", str(run_dir))[1]
    assert f"accuracy {summary['metrics']['adapted']['validation']['accuracy']:.4f}" in found
    for to in ("hf", "peft"):
        code, printed = program("export", str(run_dir), "--to", to)
        assert code == 0, printed


# Sources


def test_every_format_gives_the_same_rows(tmp_path):
    rows = [{"text": "a, film", "label": 1}, {"text": "the plot", "label": 0}]
    tiny.write_jsonl(tmp_path / "rows.jsonl", rows)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    data.Table.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    for suffix, delimiter in ((".csv", ","), (".tsv", "\t")):
        with (tmp_path / f"rows{suffix}").open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "label"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(rows)
    for suffix in (".jsonl", ".json", ".parquet", ".csv", ".tsv"):
        table = data.read(str(tmp_path / f"rows{suffix}"), tmp_path / "cache", "data.train")
        cells = [row | {"label": str(row["label"])} for row in rows]  # a cell is text
        assert table.to_list() == (cells if suffix in (".csv", ".tsv") else rows), suffix


def test_a_folder_has_splits_and_a_file_has_siblings(tmp_path):
    for name, count in (("train", 6), ("validation", 4)):
        tiny.write_jsonl(tmp_path / "set" / f"{name}.jsonl", tiny.sentences(count))
    for source in (tmp_path / "set", tmp_path / "set" / "train.jsonl"):
        tables = data.load(DataConfig(str(source), limit=5), tmp_path / "cache")
        assert {name: len(table) for name, table in tables.items()} == {"train": 5, "validation": 4}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{0}/no/rows.jsonl", "no file at .*rows.jsonl: there is no folder .*/no$"),
        ("{0}/nothing.jsonl", "no file at .*nothing.jsonl.*closest: .*rows.jsonl"),
        ("{0}/rows.exe", "ends in '.exe'; expected one of .jsonl"),
        ("{0}/broken.jsonl", "broken.jsonl, line 1, character 10: expected JSON"),
        ("{0}/empty.jsonl", "empty.jsonl is empty"),
        ("{0}/rows.jsonl:test", "has no column `split`"),
        ("nobody/nothing:train", "nobody/nothing:train cannot be read"),
        ("{0}/rows.jsonl", "data.validation: got None, and no file next to .*rows.jsonl is named"),
    ],
)
def test_a_source_that_cannot_be_used_says_why(tmp_path, source, message):
    tiny.write_jsonl(tmp_path / "rows.jsonl", [{"text": "a", "label": 1}])
    (tmp_path / "rows.exe").write_text("x")
    (tmp_path / "broken.jsonl").write_text('{"text": ')
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=message):
        data.load(DataConfig(source.format(tmp_path)), tmp_path / "cache")


def test_the_error_on_a_missing_column_names_the_nearest(work, tmp_path):
    code, printed = program(*text_flags(work), "--task.text", "sentense", "--run-dir", str(tmp_path))
    assert code == 2
    assert "task.text: the data has no column 'sentense' (closest: 'sentence'" in printed
    assert "pass --task.text" in printed


# Errors


@pytest.mark.parametrize(
    ("flags", "rows", "message"),
    [
        ("--task.max-length 99", {}, "task.max_length: got 99, expected at most 64.*pass --task.max-length 64"),
        ("--task.label lable", {}, "the data has no column 'lable' .closest: 'label'.*pass --task.label"),
        ("", {"sentence": None}, "task.text: 12 of 12 values of the column 'sentence' are missing"),
        ("", {"label": None}, "task.label: 12 of 12 values of the column 'label' are missing"),
        (
            "",
            {"label": "2"},
            r"holds '2' \(rows .*which is not a class; expected one of negative, positive, or its number",
        ),
        ("--data.holdout 0.001", {}, "0.001 of 20 training examples are 0; expected at least one"),
        (
            "--learning-rate.lora 1e30",
            {},
            "fit: .*diverged: loss (nan|inf) and .* in step . \\(epoch .\\), on the training examples ",
        ),
        ("--lora.train-also", {}, "pass key=.*A new head must be trained: --lora.train-also classifier"),
    ],
)
def test_what_would_train_on_nonsense_is_an_error(work, tmp_path, flags, rows, message):
    file = tiny.write_jsonl(tmp_path / "train.jsonl", [row | rows for row in tiny.sentences(20)])
    argv = [*text_flags(work), "--data.train", str(file), "--data.holdout", "0.4", *flags.split()]
    code, printed = program(*argv, "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert re.search(message, printed, re.DOTALL), printed


def test_a_tokenizer_of_other_weights_is_an_error(work, tmp_path):
    tiny.write_checkpoint(tmp_path, {**tiny.ENCODER, "vocab_size": 6}, task="features")
    code, printed = program(*text_flags(work), "--model.path", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert code == 2
    assert re.search(r"has the token \d+ \('\w+'\), but the network of .* has 6 tokens", printed)
    (tmp_path / "tokenizer.json").unlink()
    (tmp_path / "tokenizer_config.json").unlink()
    code, printed = program(*text_flags(work), "--model.path", str(tmp_path), "--run-dir", str(tmp_path / "run"))
    assert code == 2 and "has no tokenizer that transformers can read" in printed


def test_a_template_that_fails_is_an_error(work):
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    for template in ("{% for", "{{ raise_exception('no system here') }}"):
        with pytest.raises(ConfigError, match="the chat template cannot render"):
            language_model(work, messages="m", template=template).encode(rows_of(m=[talk]))


# Commands and configurations


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["predict", "{0}/nowhere", "--text", "a"], "is not a run directory.*text-run"),
        (["predict", "{0}/text-run"], "no text; pass --text"),
        (["generate", "{0}/text-run", "--prompt", "a"], "was not trained as a language model; see `predict`"),
        (["predict", "{0}/text-run", "--text", "a", "--file", "b.txt"], "got --text and --file"),
        (["predict", "{0}/encoder", "--text", "a"], "its config.json is of something else, such as a checkpoint"),
        (["predcit", "{0}/text-run"], "unknown command 'predcit'; did you mean 'predict'?"),
        (["eval", "{0}/text-run", "--limit", "0"], "got --limit 0"),
        (["export", "{0}/text-run", "--out", "{0}/train.jsonl"], "File exists|is a file"),
        (["export", "{0}/text-run", "--uniform-rank"], "vLLM.*is trained whole.*jlora.merge"),
        (["inspect", "{0}/sums"], "has no config.json"),
        (["inspect", "{0}/encoder", "--lora.targets", "qeury"], "qeury.*closest"),
    ],
)
def test_commands_refuse_what_they_cannot_do(text_run, work, argv, message):
    code, printed = program(*(part.format(work) for part in argv))
    assert code == 2
    assert re.search(message, printed, re.DOTALL), printed


def test_inspect_shows_the_plan_without_reading_a_weight(work, tmp_path):
    (tmp_path / "config.json").write_text((work / "decoder" / "config.json").read_text())
    code, printed = program("inspect", str(tmp_path), "--lora.rank", "2")
    assert code == 0, printed
    assert "q_proj/kernel" in printed and "trainable:" in printed


@pytest.mark.parametrize(
    ("name", "config", "trainable"),
    [
        (
            "sst2_roberta",
            {
                "model_type": "roberta", "vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1,
                "pad_token_id": 1, "layer_norm_eps": 1e-5,
            },
            665_858,
        ),
        ("spam_gpt2", {"model_type": "gpt2", "vocab_size": 50257, "n_ctx": 1024}, 2_371_616),
    ],
)  # fmt: skip
def test_configs_train_exactly_what_they_say(name, config, trainable):
    """From shapes alone: the published configurations of roberta-base and of GPT-2."""
    wanted: TrainConfig = parse([f"configs/{name}.py"])
    model = models.build(config, task="sequence-classification", labels=2)
    params = models.abstract(model)
    uses = jlora.trace(model.apply, params, models.example_inputs(model))
    with warnings.catch_warnings():
        # GPT-2's new head has two outputs and gets factors of rank 16 all the same, as in the tutorial.
        warnings.filterwarnings("ignore", message="plan: the rank exceeds that of 1 weight")
        plan = jlora.plan(params, wanted.lora, uses)
    assert plan.trainable == trainable
    assert f"of {plan.total:,}" in Path(f"configs/{name}.py").read_text()
    assert f"{trainable:,} trainable" in Path(f"configs/{name}.py").read_text().replace("\n", " ")

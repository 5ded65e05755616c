"""What `predict` and `generate` read and write: every kind of file, in its order, with nothing lost or changed."""

from __future__ import annotations

import csv
import dataclasses
import io
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

import jlora
from tests import tiny
from tests.made import made_run
from tests.runs import program
from train.__main__ import load_config
from train.commands.generate import completions, end_of_answers
from train.commands.inputs import read_inputs
from train.config import CausalLM, SequenceClassification
from train.data import tables
from train.networks.tokenizers import load_tokenizer
from train.tasks.language import LanguageModel

WORDS = ("a great film", "the dull plot", "a story with\u2028a scene", 'fine, and "lovely"', "cold")
LABELS = ("negative", "positive")
GPT2 = {
    "model_type": "gpt2", "vocab_size": len(tiny.VOCABULARY), "n_positions": 128, "n_embd": 16, "n_layer": 1,
    "n_head": 2, "initializer_range": 0.5, "eos_token_id": 3,
}  # fmt: skip
TALK = [
    {"role": "user", "content": "1 + 1 ="},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "the film"},
    {"role": "assistant", "content": "a lovely film"},
]


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("prompts")
    tiny.write_checkpoint(folder / "encoder", tiny.ENCODER, task="features")
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm", chat=True)
    tiny.write_checkpoint(folder / "gpt2", GPT2, task="causal-lm")
    return folder


@pytest.fixture
def classifier(work, monkeypatch) -> None:
    run = made_run(work / "encoder", work / "cache", SequenceClassification("sentence", labels=LABELS, max_length=64))
    monkeypatch.setattr("train.commands.predict.open_run", lambda _: run)


@pytest.fixture
def chat(work, monkeypatch) -> Any:
    run = made_run(work / "decoder", work / "cache", CausalLM(messages="messages"))
    monkeypatch.setattr("train.commands.one_base.open_run", lambda *_: run)
    return run


@pytest.fixture
def continuer(work, monkeypatch) -> Any:
    run = made_run(work / "gpt2", work / "cache", CausalLM(prompt="question", completion="answer", max_length=64))
    monkeypatch.setattr("train.commands.one_base.open_run", lambda *_: run)
    return run


def written(file: Path, texts: tuple[str, ...], name: str) -> Path:
    """A file of the texts, of the kind that its name says, in a column of that name."""
    rows = [{"other": i, name: text} for i, text in enumerate(texts)]
    if file.suffix == ".txt":
        file.write_bytes(b"\xef\xbb\xbf" + "\r\n".join(texts).encode() + b"\r\n")
    elif file.suffix == ".jsonl":
        tiny.write_jsonl(file, rows)
    elif file.suffix == ".json":
        file.write_text(json.dumps(rows))
    elif file.suffix == ".parquet":
        tables.Table.from_list(rows).to_parquet(file)
    else:
        how: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE, "quotechar": None}
        with file.open("w", newline="") as out:
            writer = csv.DictWriter(out, ["other", name], **(how if file.suffix == ".tsv" else {}))
            writer.writeheader()
            writer.writerows(rows)
    return file


def results(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def ok(*argv: str | Path) -> str:
    code, printed = program(*map(str, argv))
    assert code == 0, printed
    return printed


def refused(*argv: str | Path) -> str:
    code, printed = program(*map(str, argv))
    assert code == 2, printed
    return printed


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json", ".csv", ".tsv", ".parquet"])
def test_every_kind_of_file_gives_the_same_texts(tmp_path, suffix):
    """A BOM, CRLF, U+2028, quotes and commas included."""
    config = dataclasses.replace(load_config(Path("configs/sst2_minilm.py")), cache_dir=tmp_path / "cache")
    file = written(tmp_path / f"texts{suffix}", WORDS, "Sätze")
    found = read_inputs((), file, ["Sätze"], config, flag="--text", by_column=False)
    assert found.rows == [(text,) for text in WORDS] and found.not_blank == [0, 1, 2, 3, 4]
    assert found.where(2) == f"{file}, {'line' if suffix == '.txt' else 'row'} 3"


@pytest.mark.slow
def test_predict_says_of_a_file_what_it_says_of_flags(classifier, tmp_path):
    """By the run's column, or another one."""
    expected = ok("predict", "run", *(flag for text in WORDS for flag in ("--text", text)))
    assert [line.split("\t")[0] for line in expected.split("\n")[:-1]] == list(WORDS)
    assert ok("predict", "run", "--file", written(tmp_path / "own.txt", WORDS, "")) == expected
    assert ok("predict", "run", "--file", written(tmp_path / "own.csv", WORDS, "sentence")) == expected
    named = written(tmp_path / "named.csv", WORDS, "Satz")
    assert ok("predict", "run", "--file", named, "--column", "Satz") == expected
    assert f"{named} has no column 'sentence'" in refused("predict", "run", "--file", named)
    text = refused("predict", "run", "--file", tmp_path / "own.csv", "--column", "sentense")
    assert "own.csv" in text and "closest: 'sentence'" in text and "pass --column" in text


@pytest.mark.sampled(1)
@pytest.mark.parametrize("command", ["predict", "generate"])
def test_blank_lines_keep_their_place(command, classifier, continuer, tmp_path, monkeypatch):
    """Line i of the output is about line i of the input, from a file as from standard input, also in a table."""
    lines = ["", "a film", "  ", "", "the plot", ""]
    (tmp_path / "lines.txt").write_text("\n".join(lines) + "\n")
    tiny.write_jsonl(tmp_path / "rows.jsonl", [{"sentence": line, "question": line} for line in lines])
    more = ("--max-new-tokens", "3") if command == "generate" else ()
    printed = ok(command, "run", "--file", tmp_path / "lines.txt", *more)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO((tmp_path / "lines.txt").read_bytes())))
    assert ok(command, "run", "--file", "-", *more) == printed
    assert ok(command, "run", "--file", tmp_path / "rows.jsonl", *more) == printed
    ok(command, "run", "--file", tmp_path / "lines.txt", "--out", tmp_path / "out.jsonl", *more)
    found = results(tmp_path / "out.jsonl")
    assert [one["row"] for one in found] == list(range(1, 7))
    if command == "predict":
        assert [line.split("\t")[0] for line in printed.split("\n")[:-1]] == ["", "a film", "", "", "the plot", ""]
        assert [one["label"] in LABELS for one in found] == [False, True, False, False, True, False]
        assert found[0] == {"text": "", "label": None, "probability": None, "probabilities": None, "row": 1}
    else:
        asked = [line for line in printed.split("\n") if line.startswith(">")]
        assert asked == ["> ", "> a film", "> ", "> ", "> the plot", "> "]
        assert [one["prompt"] for one in found] == ["", "a film", "", "", "the plot", ""]
        assert found[2] == {"prompt": "", "completion": "", "row": 3} and found[1]["completion"]
    (tmp_path / "blank.txt").write_text("\n \n")
    assert "blank.txt: no texts" in refused(command, "run", "--file", tmp_path / "blank.txt")


def test_results_go_to_a_new_file_whole(classifier, tmp_path, monkeypatch):
    """A line for each text, whatever is in it, as on the screen; nothing is replaced, and nothing left half."""
    texts = ("a\nfilm", *WORDS, "a\x85film")
    flags = [flag for text in texts for flag in ("--text", text)]
    out = tmp_path / "out.jsonl"
    assert ok("predict", "run", *flags, "--out", out) == f"written to {out}: 7 lines\n"
    found = results(out)
    assert [one["text"] for one in found] == list(texts) and [one["row"] for one in found] == list(range(1, 8))
    shown = [line.split("\t") for line in ok("predict", "run", *flags).split("\n")[:-1]]
    assert [[one["label"], f"{one['probability']:.4f}"] for one in found] == [line[1:] for line in shown]
    for one in found:
        assert tuple(one["probabilities"]) == LABELS and abs(sum(one["probabilities"].values()) - 1) < 1e-6
        assert one["probability"] == max(one["probabilities"].values()) == one["probabilities"][one["label"]]

    before = out.read_bytes()
    assert "already exists" in refused("predict", "run", *flags, "--out", out) and out.read_bytes() == before
    assert "ends in .jsonl" in refused("predict", "run", *flags, "--out", tmp_path / "out.csv")
    assert "there is no folder" in refused("predict", "run", *flags, "--out", tmp_path / "no" / "out.jsonl")
    assert [file.name for file in tmp_path.iterdir()] == ["out.jsonl"]


def test_pairs_are_two_columns_or_two_sides_of_a_tab(work, tmp_path, monkeypatch):
    task = SequenceClassification("one", "two", labels=LABELS, max_length=64)
    run = made_run(work / "encoder", work / "cache", task)
    monkeypatch.setattr("train.commands.predict.open_run", lambda _: run)
    tiny.write_jsonl(tmp_path / "pairs.jsonl", [{"one": "a film", "two": "the plot"}, {"one": "cold", "two": "warm"}])
    (tmp_path / "pairs.txt").write_text("a film\tthe plot\ncold\twarm\n")
    expected = ok("predict", "run", "--text", "a film\tthe plot", "--text", "cold\twarm")
    for name in ("pairs.jsonl", "pairs.txt"):
        assert ok("predict", "run", "--file", tmp_path / name) == expected
    (tmp_path / "pairs.txt").write_text("a film\tthe plot\ncold\n\na\tb\tc\n")
    text = refused("predict", "run", "--file", tmp_path / "pairs.txt")
    assert "pairs.txt, line 2, " in text and "pairs.txt, line 4" in text and "line 3" not in text


def test_a_regression_gives_numbers(work, tmp_path, monkeypatch):
    run = made_run(work / "encoder", work / "cache", SequenceClassification("t", regression=True, max_length=64))
    monkeypatch.setattr("train.commands.predict.open_run", lambda _: run)
    ok("predict", "run", "--text", "a film", "--out", tmp_path / "out.jsonl")
    (found,) = results(tmp_path / "out.jsonl")
    assert list(found) == ["text", "label", "row"] and isinstance(found["label"], float)
    assert ok("predict", "run", "--text", "a film") == f"a film\t{found['label']:.4f}\n"


def test_generate_says_of_a_file_what_it_says_of_flags(continuer, tmp_path):
    more = ("--max-new-tokens", "3")
    expected = ok("generate", "run", *(flag for text in WORDS for flag in ("--prompt", text)), *more)
    assert ok("generate", "run", "--file", written(tmp_path / "prompts.csv", WORDS, "question"), *more) == expected
    assert ok("generate", "run", "--file", written(tmp_path / "prompts.txt", WORDS, ""), *more) == expected


def test_several_runs_answer_in_one_batch_as_alone(continuer, tmp_path, monkeypatch):
    """Each prompt by the run that its row names, by the name or the path of its directory, or by the base."""
    other = dataclasses.replace(continuer, adapters=jlora.rescale(continuer.adapters, -2.0))
    bare = dataclasses.replace(continuer, adapters=jlora.rescale(continuer.adapters, 0.0))
    runs = {"one": continuer, "far/two": other, "bare": bare}
    monkeypatch.setattr("train.commands.one_base.open_run", lambda folder, *_: runs[str(folder)])
    names = ["one", "two", "base", "far/two", "one"]
    rows = [{"question": text, "adapter": name, "who": name} for text, name in zip(WORDS, names, strict=True)]
    rows.insert(2, {"question": " ", "adapter": "", "who": ""})
    tiny.write_jsonl(tmp_path / "prompts.jsonl", rows)
    tiny.write_jsonl(tmp_path / "none.jsonl", [{"question": text} for text in WORDS])

    def answers(*given: str, file: str = "prompts.jsonl") -> list[str]:
        out = tmp_path / f"{len(list(tmp_path.iterdir()))}.jsonl"
        ok("generate", *given, "--file", tmp_path / file, "--max-new-tokens", "4", "--out", out)
        return [one["completion"] for one in results(out)]

    found = answers("one", "far/two")
    alone = {name: answers(folder) for name, folder in (("one", "one"), ("two", "far/two"), ("base", "bare"))}
    assert len({tuple(one) for one in alone.values()}) == 3
    assert found == [
        "" if not row["adapter"] else alone[row["adapter"].split("/")[-1]][i] for i, row in enumerate(rows)
    ]
    assert answers("one", "far/two", "--adapter", "who") == found
    more = ("generate", "one", "far/two", "--file")
    text = refused(*more, tmp_path / "none.jsonl")
    assert "without a column 'adapter'" in text and "--adapter" in text
    tiny.write_jsonl(
        tmp_path / "wrong.jsonl", [{"question": "a film", "adapter": name} for name in ("one", "three", 4)]
    )
    text = refused(*more, tmp_path / "wrong.jsonl")
    assert "wrong.jsonl, row 2: 'three'" in text and "row 3: '4'" in text and "one, far/two, base, two" in text


def test_a_conversation_is_answered_where_the_assistant_s_last_turn_was(chat, tmp_path):
    """All but the last turn of the assistant, in the template, as the examples have it."""
    more = ("--max-new-tokens", "3", "--out")
    talks = [TALK, TALK[:3], TALK[:1]]
    tiny.write_jsonl(tmp_path / "talks.jsonl", [{"messages": talk, "q": talk[0]["content"]} for talk in talks])
    ok("generate", "run", "--file", tmp_path / "talks.jsonl", *more, tmp_path / "out.jsonl")
    found = results(tmp_path / "out.jsonl")
    assert [one["messages"] for one in found] == [TALK[:3], TALK[:3], TALK[:1]]
    assert found[0]["completion"] == found[1]["completion"]
    ok("generate", "run", "--file", tmp_path / "talks.jsonl", "--column", "q", *more, tmp_path / "q.jsonl")
    asked = results(tmp_path / "q.jsonl")
    assert [one["prompt"] for one in asked] == ["1 + 1 ="] * 3
    assert {one["completion"] for one in asked} == {found[2]["completion"]}
    whole = chat.task.tokenizer("<user> : 1 + 1 = <end> <assistant> : 2 <end> <user> : the film <end> <assistant> : ")
    expected = completions(
        chat, chat.task, [whole["input_ids"][1:]], jax.random.key(0), lambda _: chat.tree, max_new_tokens=3
    )
    assert [found[0]["completion"]] == expected
    assert "> assistant: 2\n> user: the film\n" in ok("generate", "run", "--file", tmp_path / "talks.jsonl", *more[:2])


def test_tools_are_shown_to_the_template_as_in_training(work, tmp_path, monkeypatch):
    """By the run's column of tools, for conversations as for texts; rows, files and flags without it have none."""
    template = tiny.CHAT.replace("{% for", "{% for t in tools or [] %}{{ t['name'] }} {% endfor %}{% for", 1)
    config = CausalLM(messages="messages", tools="tools", template=template)
    run = made_run(work / "decoder", work / "cache", config)
    monkeypatch.setattr("train.commands.one_base.open_run", lambda *_: run)
    asked: list[list[str]] = []

    def answered(run: Any, task: Any, tokens: Any, key: Any, tree: Any, **_: Any) -> list[str]:
        asked.append([task.tokenizer.decode(one) for one in tokens])
        return [""] * len(tokens)

    monkeypatch.setattr("train.commands.generate.completions", answered)
    tools = [[{"name": "film", "type": "function"}], None, '[{"name": "plot"}]']
    tiny.write_jsonl(tmp_path / "t.jsonl", [{"messages": TALK[:1], "q": "1 + 1 =", "tools": one} for one in tools])
    tiny.write_jsonl(tmp_path / "none.jsonl", [{"messages": TALK[:1]}] * 3)
    ok("generate", "run", "--file", tmp_path / "t.jsonl")
    ok("generate", "run", "--file", tmp_path / "t.jsonl", "--column", "q")
    ok("generate", "run", "--file", tmp_path / "none.jsonl")
    bare = "<user> : 1 + 1 = <end> <assistant> :"
    assert asked == [[f"film {bare}", bare, f"plot {bare}"], [f"film {bare}", bare, f"plot {bare}"], [bare] * 3]
    assert isinstance(run.task, LanguageModel)
    rows: Any = tables.Table.from_list([{"messages": TALK[:2], "tools": tools[0]}])
    (example,) = run.task.encode(rows)[""]["input_ids"]
    assert run.task.tokenizer.decode(example).startswith(asked[0][0])
    tiny.write_jsonl(tmp_path / "bad.jsonl", [{"messages": TALK[:1], "tools": "no JSON"}])
    assert "bad.jsonl, row 1: got 'no JSON'" in refused("generate", "run", "--file", tmp_path / "bad.jsonl")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], r"got \[\].* expected "),
        (TALK[1:2], "got .* expected a message that can be answered"),
        ([{"role": None, "content": "a"}], ".*expected .*role"),
    ],
)
def test_a_conversation_that_is_none_is_named(chat, tmp_path, value, message):
    file = tmp_path / "talks.parquet"
    tables.Table.from_list([{"messages": TALK}, {"messages": value}]).to_parquet(file)
    assert re.search(f"error: .*talks.parquet, row 2: {message}", refused("generate", "run", "--file", file))


def test_the_positions_of_the_network_are_for_tokens_not_for_padding(continuer, tmp_path):
    """100 tokens and 8 new ones in 128 positions are padded to 128; what does not fit is named with its true length."""

    def prompt(tokens: int) -> str:
        return " ".join(["film"] * (tokens - 1))  # and [CLS]

    out = tmp_path / "out.jsonl"
    file = written(tmp_path / "prompts.jsonl", (prompt(100), prompt(120), "a film"), "question")
    ok("generate", "run", "--file", file, "--max-new-tokens", "8", "--out", out)
    assert len(results(out)) == 3
    alone = ok("generate", "run", "--prompt", prompt(100), "--max-new-tokens", "8")
    assert alone == f"> {prompt(100)}\n{results(out)[0]['completion']}\n\n"
    file = written(tmp_path / "long.jsonl", ("a film", prompt(121), prompt(126)), "question")
    text = refused("generate", "run", "--file", file, "--max-new-tokens", "8")
    assert "long.jsonl, row 2: 121 prompt and 8 new tokens; the network has 128 positions" in text
    assert "long.jsonl, row 3: 126 prompt and 8 new tokens" in text and "--max-new-tokens" in text


def exported(run: Any, to: str, out: Path, monkeypatch: Any) -> dict[str, bytes]:
    """The files that `export` writes of a run."""
    monkeypatch.setattr("train.commands.export.open_run", lambda _: run)
    ok("export", "run", "--to", to, "--out", out)
    return {file.name: file.read_bytes() for file in out.iterdir()}


@pytest.mark.parametrize("to", ["peft", "hf"])
def test_an_export_has_the_tokenizer_files_of_the_checkpoint(work, tmp_path, monkeypatch, to):
    """Byte for byte, whatever the task set on the tokenizer: padding, the side of truncation, a chat template."""
    checkpoint = tmp_path / "gpt2"
    shutil.copytree(work / "gpt2", checkpoint)
    about = json.loads((checkpoint / "tokenizer_config.json").read_text())
    del about["pad_token"]
    (checkpoint / "tokenizer_config.json").write_text(json.dumps(about))
    (checkpoint / "special_tokens_map.json").write_text("{}")
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
    left = SequenceClassification("t", labels=LABELS, max_length=64, truncation="left")
    template = "{% for m in messages %}{{ m['content'] }} <end> {% endfor %}"
    tasks = {"left": left, "chat": CausalLM(messages="m", template=template, max_length=64)}
    for name, task in tasks.items():
        run = made_run(checkpoint, work / "cache", task)
        found = exported(run, to, tmp_path / name, monkeypatch)
        assert {one: found[one] for one in names} == {one: (checkpoint / one).read_bytes() for one in names}
        assert found.get("chat_template.jinja") == (template.encode() if name == "chat" else None)
        assert not found.keys() & {"added_tokens.json", "vocab.json"}
    if to == "hf":  # classifiers of transformers pad with the token that the run padded with
        assert json.loads((tmp_path / "left" / "config.json").read_text())["pad_token_id"] == GPT2["eos_token_id"]
    assert load_tokenizer(str(tmp_path / "chat")).chat_template == template


def test_an_answer_ends_where_the_template_closes_it(work, tmp_path):
    """By the model's and the tokenizer's end tokens, and the token or the text that closes the assistant's message."""
    (tmp_path / "decoder").mkdir()
    for file in (work / "decoder").iterdir():
        (tmp_path / "decoder" / file.name).write_bytes(file.read_bytes())
    (tmp_path / "decoder" / "generation_config.json").write_text('{"eos_token_id": [3, 5]}')
    cases: dict[str, tuple[Any, set[int], str]] = {"plain": ({"text": "t"}, set(), "")}
    cases["chat"] = ({"messages": "m"}, set(), "<end>")
    shown = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }}"
    cases["special"] = ({"messages": "m", "template": shown + "[PAD]\n{% endfor %}"}, {0}, "")
    cases["unknown"] = ({"messages": "m", "template": shown + " nobody {% endfor %}"}, set(), "nobody")
    cases["hidden"] = ({"messages": "m", "template": "{{ messages[0]['content'] }} film"}, set(), "")
    cases["refusing"] = ({"messages": "m", "template": "{{ raise_exception('no') }}"}, set(), "")
    for name, (config, more, closing) in cases.items():
        run = made_run(tmp_path / "decoder", work / "cache", CausalLM(**config))
        assert isinstance(run.task, LanguageModel)
        assert end_of_answers(run.network.model, run.task) == ({3, 5} | more, closing), name


def test_a_file_that_cannot_be_read_is_named_with_its_place(classifier, tmp_path):
    tables.Table.from_dict({"sentence": ["a", "b"], "tags": [["x"], ["y"]]}).to_parquet(tmp_path / "nested.parquet")
    text = refused("predict", "run", "--file", tmp_path / "nested.parquet", "--column", "tags")
    assert "nested.parquet, row 1: got ['x']; expected text" in text
    tiny.write_jsonl(tmp_path / "rows.jsonl", [{"sentence": 7, "score": 0.5}])
    assert ok("predict", "run", "--file", tmp_path / "rows.jsonl").startswith("7\t")
    text = refused("predict", "run", "--file", tmp_path / "rows.jsonl", "--column", "score")
    assert "rows.jsonl, row 1: got 0.5; expected text" in text
    (tmp_path / "latin.txt").write_bytes("a film\nschön\n".encode("latin-1"))
    assert "latin.txt, line 2: expected UTF-8" in refused("predict", "run", "--file", tmp_path / "latin.txt")
    assert "no file at" in refused("predict", "run", "--file", tmp_path / "latin.jsonl")
    (tmp_path / "lines.ndjson").write_text('{"sentence": "a"}\n')
    assert "'.ndjson'" in refused("predict", "run", "--file", tmp_path / "lines.ndjson")
    text = refused("predict", "run", "--file", tmp_path / "latin.txt", "--column", "a")
    assert "--column" in text and "has no columns" in text
    assert "got --text and --file" in refused("predict", "run", "--file", "x.txt", "--text", "a")

"""What a person is shown of the data: `show`, and the first example at the start of a run."""

from __future__ import annotations

import contextlib
import io
import random
import re
import shutil
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from jlora.models import TokenLosses
from tests import tiny
from tests.runs import program
from train.__main__ import main
from train.commands.contact_sheet import write_contact_sheet
from train.config import CausalLM, SequenceClassification
from train.data import tables as data
from train.data.ragged import Ragged
from train.networks.tokenizers import load_tokenizer
from train.report import examples as look
from train.tasks.classify import TextClassification, TextRegression
from train.tasks.language import LanguageModel


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Checkpoints without weights, and data."""
    folder = tmp_path_factory.mktemp("show")
    tiny.write_checkpoint(folder / "encoder", tiny.ENCODER, task="features")
    tiny.write_checkpoint(folder / "decoder", tiny.DECODER, task="causal-lm", chat=True)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
    tiny.write_jsonl(folder / "train.jsonl", tiny.sentences(40))
    tiny.write_jsonl(folder / "validation.jsonl", tiny.sentences(8, start=100))
    sums = [{"q": f"{i} + {j} =", "a": " ".join("2" * (1 + i))} for i in range(4) for j in range(3)]
    tiny.write_jsonl(folder / "sums" / "train.jsonl", sums)
    tiny.write_jsonl(folder / "sums" / "test.jsonl", sums[:5])
    return folder


def texts(work: Path, *flags: str) -> tuple[int, str]:
    argv = ["configs/sst2_minilm.py", "--model.path", work / "encoder", "--data.train", work / "train.jsonl"]
    own = ["--cache-dir", work / "cache", "--data.limit", "None", "--task.max-length", "16"]
    return program("show", *map(str, [*argv, *own]), *flags)


def language(work: Path, *flags: str) -> tuple[int, str]:
    argv = ["configs/instruct_llama.py", "--model.path", work / "decoder", "--data.train", work / "sums/train.jsonl"]
    own = "--data.validation None --task.messages None --task.prompt q --task.completion a --task.chat".split()
    return program("show", *map(str, [*argv, "--cache-dir", work / "cache"]), *own, *flags)


def tables(**columns: Any) -> data.Table:
    return data.Table.from_dict(columns)


# The command


def test_examples_are_shown_with_the_tokens_that_carry_loss(work):
    """Decoded, with tokens of loss in brackets and counted; packed examples one by one; without any weights."""
    code, printed = language(work, "--task.max-length", "40", "--examples", "1")
    assert code == 0, printed
    first = "<user> : 0 + 0 = <end> <assistant> :⟦ 2 <end>⟧"
    second = "<user> : 0 + 1 = <end> <assistant> :⟦ 2 <end>⟧"
    third = "<user> : 0 + 2 = <end> <assistant> :⟦ 2 <end>⟧"
    rows = "\n-- packed behind it --\n".join((first, second, third))
    assert printed.endswith(f"\nexample 1 of 5: 33 tokens, 6 with loss (in ⟦ ⟧), 3 examples packed\n{rows}\n")
    assert "train: 12 examples, packed into 5 rows of at most 40 tokens\n" in printed
    assert "\n  tokens  11 to 14, median 12\n" in printed
    assert "\n  tokens with loss  2 to 5, median 4; 42 of 150 tokens (28.0%)\n" in printed
    assert "validation: 5 examples" in printed

    code, printed = language(work, "--task.no-pack", "--examples", "2", "--tokens")
    assert code == 0, printed
    assert "example 2 of 12: 11 tokens, 2 with loss (in ⟦ ⟧)\n" in printed and "example 3" not in printed
    assert printed.endswith("\n<user>│ :│ 0│ +│ 1│ =│ <end>│ <assistant>│ :│⟦ 2⟧│⟦ <end>⟧\n")


@pytest.mark.parametrize("pack", ["--task.pack", "--task.no-pack"])
@pytest.mark.parametrize(("limit", "cut", "lost"), [(14, 0, 0), (12, 6, 9), (10, 12, 30)])
def test_what_is_cut_is_counted_exactly(work, pack, limit, cut, lost):
    """An example as long as the limit is whole; longer ones lose their last tokens."""
    code, printed = language(work, "--task.max-length", str(limit), pack)
    assert code == 0, printed
    train = printed.partition("validation: ")[0]
    if cut:
        assert re.search(rf"\b{cut} of 12\b.* cut.*\b14\b|\b{cut} of 12\b.*\b14\b.* cut", train), printed
        assert re.search(rf" cut.*: {lost} .*lost", train), printed
    else:
        assert "are cut" not in train and "lost" not in train, printed


def test_labels_are_counted_and_named(work):
    code, printed = texts(work, "--task.max-length", "8")
    assert code == 0, printed
    assert "train: 40 examples\n" in printed and "validation: 8 examples\n" in printed
    assert re.search(r"label +train +validation\n.*\nnegative +20 +4\npositive +20 +4\n", printed)
    assert re.search(r"\b15 of 40\b.* cut", printed)
    assert "\nexample 2 of 40: 5 tokens, label 'positive' (class 1)\n[CLS] the fine a [SEP]\n" in printed
    code, printed = texts(work, "--task.regression", "--task.labels", "None", "--task.label", "score")
    assert code == 0, printed
    assert "  labels  0 to 1, median 0.5\n" in printed and "5 tokens, label 1\n" in printed


def test_of_many_labels_the_frequent_and_the_rarest_are_named(work, tmp_path):
    rows = [{"sentence": "a", "label": f"l{i:02}"} for i in range(30) for _ in range(40 - i)]
    tiny.write_jsonl(tmp_path / "train.jsonl", rows)
    file = str(tmp_path / "train.jsonl")
    flags = ("--data.train", file, "--data.validation", file, "--task.labels", "None")
    code, printed = texts(work, *flags)
    assert code == 0, printed
    assert re.search(r"validation\n[- ]+\nl00 +40 +40\n(.+\n)*\(10 more\)\n(.+\n)*l29 +11 +11\n\nexample 1", printed)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--examples", "0"), "got --examples 0, expected a whole number >= 1"),
        (("--out", "x.png"), "got --out, which is for images"),
        (("--fit.epochs", "0"), "fit.epochs: got 0"),
        (("--task.text", "sentense"), "no column 'sentense' .closest: 'sentence'"),
    ],
)
def test_what_cannot_be_shown_is_refused(work, flags, message):
    code, printed = texts(work, *flags)
    assert code == 2 and re.search(message, printed), printed


def test_a_config_that_is_not_there_is_refused():
    code, printed = program("show", "configs/nothing.py")
    assert code == 2 and "no config file at configs/nothing.py" in printed


# Images


def test_images_are_shown_as_the_network_sees_them(tmp_path):
    """A row for each label, a block for each domain, pixel for pixel."""
    out = tmp_path / "digits.png"
    code, printed = program("show", "--cache-dir", str(tmp_path / "cache"), "--examples", "2", "--out", str(out))
    assert code == 0, printed
    assert "train: 1,198 images of 8 x 8 x 1, shown as upright and shifted\n" in printed
    assert re.search(r"\n0 +119 +\d+\n1 +126 ", printed)
    assert f"written to {out}" in printed
    code, printed = program("show", "--tokens", "--out", str(out))
    assert code == 2 and "got --tokens, which is for texts" in printed
    code, printed = program("show", "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "digits.jpg"))
    assert code == 2 and "ends in .png" in printed

    rng = np.random.default_rng(0)
    images = {"one": rng.random((7, 8, 8, 3)), "two": rng.random((7, 8, 8, 3))}
    labels = np.array([1, 0, 1, 1, 0, 1, 1])
    write_contact_sheet(out, images, labels, ("none", "some", "absent"), 3)
    with Image.open(out) as file:
        sheet = np.asarray(file)
    for domain in images.values():
        for image in (1, 4, 0, 2, 3):  # the first three of each label
            assert place_of(domain[image], sheet) is not None
        assert place_of(domain[5], sheet) is None
    places = {name: place_of(images[name][4], sheet) for name in images}
    assert places["one"][0] == places["two"][0] and places["one"][1] < places["two"][1]
    assert place_of(images["one"][0], sheet)[0] > places["one"][0]


def place_of(image: np.ndarray, sheet: np.ndarray) -> Any:
    """Where an image is on a sheet, each of its pixels drawn as 8 x 8."""
    large = np.round(image * 255).astype(np.uint8).repeat(8, axis=0).repeat(8, axis=1)
    starts = np.argwhere((sheet == large[0, 0]).all(axis=-1))
    return next(((y, x) for y, x in starts if np.array_equal(sheet[y : y + 64, x : x + 64], large)), None)


def test_a_sheet_of_many_labels_stays_small(tmp_path):
    names = [f"class {i} of a very long name indeed" for i in range(300)]
    write_contact_sheet(tmp_path / "x.png", {"": np.zeros((300, 224, 224, 1))}, np.arange(300), names, 3)
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size[0] < 1000 and sheet.size[1] < 3000
    odd = ["漢字 \ue000é", "none"]
    write_contact_sheet(tmp_path / "x.png", {"": np.zeros((2, 4, 4, 1))}, np.zeros(2, int), odd, 1)
    with Image.open(tmp_path / "x.png") as sheet:
        assert sheet.size[1] < 200


# An example as text


def byte_level() -> Any:
    """A tokenizer of single bytes, so that most characters beyond ASCII are several tokens."""
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    own = Tokenizer(models.BPE({one: i for i, one in enumerate(alphabet)}, []))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    own.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(tokenizer_object=own)


def test_the_parts_of_a_text_are_the_whole_text():
    """Wherever it is cut, also inside of a character, which then belongs to one part."""
    tokenizer, rng = byte_level(), random.Random(0)
    for _ in range(30):
        text = "".join(rng.choice("ab é漢🙂\n\u2028") for _ in range(rng.randrange(1, 12)))
        ids = tokenizer(text)["input_ids"]
        for borders in (range(1, len(ids)), sorted(rng.sample(range(1, len(ids) + 1), min(3, len(ids))))):
            parts = look.split_text(tokenizer, ids, list(borders))
            assert "".join(parts) == text and len(parts) == len(borders) + 1 and "\ufffd" not in "".join(parts)


def test_the_first_token_of_a_text_is_not_marked(work):
    """It has no loss: nothing is before it. So of every packed text."""
    task = LanguageModel(CausalLM(text="t", pack=True), load_tokenizer(str(work / "decoder")))
    (examples,) = task.encode(tables(t=["a film", "the plot"])).values()
    shown = [look.marked(one) for one in look.pieces(task, examples, 0)]
    assert shown == ["[CLS]⟦ a film [SEP]⟧", "[CLS]⟦ the plot [SEP]⟧"]
    assert look.about(task, examples, 0) == "8 tokens, 6 with loss (in ⟦ ⟧), 2 examples packed"
    outputs = TokenLosses(jnp.zeros((1, 8)), jnp.zeros((1, 8), jnp.int32))
    _, count = task.loss(outputs, {n: c[0][None] for n, c in examples.items()})
    assert int(count) == look.loss_mask_of(examples, 0).sum()


def test_the_first_example_of_a_run_is_short_and_on_one_line(work):
    tokenizer = load_tokenizer(str(work / "decoder"))
    task = LanguageModel(CausalLM(prompt="q", completion="a"), tokenizer)
    (examples,) = task.encode(tables(q=["film " * 200], a=["plot " * 200])).values()
    text = look.first(task, examples)
    assert text is not None and text.startswith("first example, 402 tokens, 201 with loss (in ⟦ ⟧):\n  [CLS] film")
    assert len(text) < 400 and text.count("\n") == 1 and "⟦ plot" in text and text.endswith("[SEP]⟧")
    assert text.count(" ... ") == 2

    talk = [{"role": r, "content": f"{r} {i}"} for i in range(40) for r in ("user", "assistant")]
    task = LanguageModel(CausalLM(messages="m", max_length=2048), tokenizer)
    text = look.first(task, task.encode(tables(m=[talk]))[""])
    assert text is not None and len(text) < 500 and text.endswith(" ...")

    several = byte_level()
    several.pad_token = "Ġ"
    task = TextClassification(SequenceClassification(), ("bad", "good"), several)
    text = look.first(task, task.encode(tables(text=["a\nb\x1b[2J"], label=["good"]))[""])
    assert text == "first example, 7 tokens, label 'good' (class 1):\n  a\\nb\\x1b[2J"
    named = TextClassification(SequenceClassification(), ("0", "1"), several)
    assert look.label(named, 1) == "label '1'"
    assert look.label(TextRegression(SequenceClassification(), (), several), 0.25) == "label 0.25"


def test_what_cannot_be_seen_is_escaped():
    assert look.visible("a\u200bb\xa0c\u2028\x07\té漢🙂\n") == "a\\u200bb\\xa0c\\u2028\\x07\té漢🙂\n"


class Terminal(io.TextIOWrapper):
    """A screen that shows what its encoding has."""

    def __init__(self, encoding: str, colours: bool):
        super().__init__(io.BytesIO(), encoding)
        self.colours = colours

    def isatty(self) -> bool:
        return self.colours

    def shown(self) -> str:
        self.flush()
        return self.buffer.getvalue().decode(self.encoding)  # pyright: ignore[reportAttributeAccessIssue]


def test_marks_are_those_that_the_terminal_has(work, monkeypatch):
    """Colours on a terminal without NO_COLOR; brackets of its encoding; no text breaks a run."""
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    parts = [look.Piece("a", False), look.Piece("é", True), look.Piece("b", False)]

    def shown(encoding: str, colours: bool) -> str:
        terminal = Terminal(encoding, colours)
        with contextlib.redirect_stdout(terminal):
            return look.marked(parts)

    assert shown("utf-8", True) == "a\x1b[1;32mé\x1b[0mb"
    assert shown("utf-8", False) == "a⟦é⟧b" and shown("latin-1", False) == "a[[é]]b"
    monkeypatch.setenv("NO_COLOR", "1")
    assert shown("utf-8", True) == "a⟦é⟧b"

    terminal = Terminal("ascii", colours=False)
    config = str(work / "mine.py")
    shutil.copy("configs/sst2_minilm.py", config)
    tiny.write_jsonl(work / "odd.jsonl", [{"sentence": "a film", "label": one} for one in ("schön", "schlecht")] * 2)
    file = str(work / "odd.jsonl")
    flags = ["--model.path", str(work / "encoder"), "--cache-dir", str(work / "cache"), "--task.max-length", "16"]
    with contextlib.redirect_stdout(terminal):
        code = main(["show", config, *flags, "--data.train", file, "--data.validation", file, "--task.labels", "None"])
    assert code == 0 and re.search(r"sch\\xf6n +2 +2\n", terminal.shown())


def test_ragged_examples_without_texts_have_no_first():
    """Only texts can be shown on a line."""
    assert look.first(object(), {"x": Ragged.of([[1]], 0)}) is None  # pyright: ignore[reportArgumentType]

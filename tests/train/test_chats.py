"""Laws of the loss mask: which tokens carry loss, in every chat template, and what `max_length` cuts. No model is run.

Expected texts are written out as a person would mark them, with ⟦ and ⟧ around what carries loss.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from tests import tiny
from tests.chat_templates import CHATML, SPECIAL, TEMPLATES
from train.config import CausalLM, ConfigError, DataConfig, Pretrained, SequenceClassification, TrainConfig
from train.data import tables as data
from train.data.batches import size, truncation_of
from train.data.ragged import Examples
from train.data.tables import Table
from train.data.truncation import Truncation
from train.networks.tokenizers import set_up
from train.tasks.chat import Chat
from train.tasks.classify import TextClassification
from train.tasks.conversations import messages_of, tools_of
from train.tasks.encoding import Draft
from train.tasks.language import LanguageModel
from train.tasks.registry import resolved
from train.tasks.spans import Example, SpannedText, pack, tokenize, tokenize_plain, truncate

CORPUS = ["What is 2+2? The answer is 4, as the assistant says.\n\nuser system tool think name a\n"] * 3
GPT2 = Path("../shared/models/gpt2-tokenizer")


# Tokenizers, trained here on a few words


@functools.cache
def byte_level(kind: str = "plain") -> Tokenizer:
    """Bytes with merges, as GPT-2, Llama 3, Qwen and SmolLM have them; `trimmed` hides spaces from offsets."""
    tokenizer: Any = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=360, special_tokens=list(SPECIAL), initial_alphabet=alphabet)
    tokenizer.train_from_iterator(CORPUS, trainer)
    if kind == "trimmed":
        tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


@functools.cache
def leading_space(kind: str = "always") -> Tokenizer:
    """Pieces with a space in front of the first one, as SentencePiece makes them for Llama 2, Mistral and Gemma."""
    tokenizer: Any = Tokenizer(models.Unigram())
    if kind == "normalized":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.pre_tokenizer = pre_tokenizers.Split("\n", "isolated")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="never")
    alphabet = sorted({*map(chr, range(33, 127)), "▁", "\n"})
    trainer = trainers.UnigramTrainer(
        vocab_size=180, special_tokens=list(SPECIAL), unk_token="<unk>", initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


KINDS = {
    "byte-level": lambda: byte_level(),
    "trimmed": lambda: byte_level("trimmed"),
    "leading space": lambda: leading_space(),
    "leading space of the first": lambda: leading_space("first"),
    "leading space by normalizer": lambda: leading_space("normalized"),
}


def wrapped(
    kind: str, *, bos: str | None = None, eos: str | None = None, adds: str = "$A", template: str | None = None
) -> Any:
    """A tokenizer of transformers; ``adds`` is what it puts around a text."""
    backend = Tokenizer.from_str(KINDS[kind]().to_str())
    if adds != "$A":
        tokens = [(token, backend.token_to_id(token)) for token in SPECIAL if token in adds]
        backend.post_processor = processors.TemplateProcessing(single=adds, special_tokens=tokens)  # pyright: ignore
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>", chat_template=template
    )


def chat_tokenizer(name: str, kind: str = "byte-level", **changed: Any) -> Any:
    template = TEMPLATES[name]
    return wrapped(kind, **{"bos": template.bos, "eos": template.eos, "template": template.source} | changed)


def slow(tokenizer: Any) -> Any:
    """The same tokenizer without offsets, as those of transformers that are written in Python have none."""

    class Slow:
        is_fast = False

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            if options.pop("return_offsets_mapping", False):
                raise NotImplementedError
            return tokenizer(text, **options)

    return Slow()


# Shown with brackets


def shown(spanned: SpannedText) -> str:
    text = spanned.text
    for start, end in reversed(spanned.spans):
        text = f"{text[:start]}⟦{text[start:end]}⟧{text[end:]}"
    return text


def shown_tokens(example: Example | tuple[Any, Any], tokenizer: Any) -> str:
    """Decoded runs of tokens, those that carry loss in brackets; a token of part of a character stays with its run."""
    text = ""
    tokens, mask = list(example[0]), list(example[1])
    for carries_loss, run in itertools.groupby(zip(tokens, mask, strict=True), key=lambda one: one[1]):
        part = tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False)
        text += f"⟦{part}⟧" if carries_loss else part
    return text


def turns(tokenizer: Any, messages: Any, tools: Any = None, system: str | None = None) -> list[SpannedText]:
    return Chat(tokenizer, system).turns(messages_of(messages), tools_of(tools))


def table(**columns: Any) -> Table:
    return Table.from_dict(columns)


def encoded(tokenizer: Any, rows: Table, **config: Any) -> Examples:
    task = CausalLM(**config)
    return LanguageModel(task, set_up(tokenizer, task)).encode(rows)[""]


def as_shown(examples: Examples, tokenizer: Any) -> list[str]:
    pairs = zip(examples["input_ids"], examples["loss_mask"], strict=True)
    return [shown_tokens(pair, tokenizer) for pair in pairs]


def user(content: Any, **more: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **more}


def assistant(content: Any = None, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **more}


SYSTEM = {"role": "system", "content": "Be brief"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TOOL_TEXT = '{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}'
CALL = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
ADDED = {"role": "tool", "name": "add", "tool_call_id": "c1", "content": "4"}

TALKS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    "single": ([user("2+2?"), assistant("4")], None),
    "multi": ([user("2+2?"), assistant("4"), user("3+2?"), assistant("It is 5")], None),
    "system": ([SYSTEM, user("2+2?"), assistant("4")], None),
    "tools": ([user("2+2?"), assistant(tool_calls=[CALL]), ADDED, assistant("It is 4")], [TOOL]),
    "thinking": (
        [user("2+2?"), assistant("4", reasoning_content="two"), user("3+2?"), assistant("<think>\nsum\n</think>\n\n5")],
        None,
    ),
    "inline thinking": ([user("2+2?"), assistant("<think>\ntwo\n</think>\n\n4")], None),
    "assistant first": ([assistant("Hi"), user("2+2?"), assistant("4")], None),
}

_LLAMA3 = "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nCutting Knowledge Date: December 2023\n\n"
_LLAMA3_ASKED = "<|start_header_id|>user<|end_header_id|>\n\n2+2?<|eot_id|>"
_LLAMA3_SAYS = "<|start_header_id|>assistant<|end_header_id|>\n\n"
_QWEN2 = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
_SMOL = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
_ASKED = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n"
_AGAIN = "<|im_start|>user\n3+2?<|im_end|>\n<|im_start|>assistant\n"
_BRIEF = "<|im_start|>system\nBe brief<|im_end|>\n"
_QWEN_TOOLS = f"<|im_start|>system\n# Tools\n<tools>\n{TOOL_TEXT}\n</tools><|im_end|>\n"
_QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call><|im_end|>'
_QWEN_ADDED = "<|im_start|>user\n<tool_response>\n4\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
_NO_THOUGHT = "<think>\n\n</think>\n\n"


def _chatml(start: str) -> dict[str, str | list[str]]:
    return {
        "single": f"{start}{_ASKED}⟦4<|im_end|>⟧\n",
        "multi": f"{start}{_ASKED}⟦4<|im_end|>⟧\n{_AGAIN}⟦It is 5<|im_end|>⟧\n",
        "system": f"{_BRIEF}{_ASKED}⟦4<|im_end|>⟧\n",
        "tools": "leaves out the 'tool_calls' of message 1, 'assistant'",
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": f"{start}{_ASKED}⟦<think>\ntwo\n</think>\n\n4<|im_end|>⟧\n",
        "assistant first": f"{start}<|im_start|>assistant\n⟦Hi<|im_end|>⟧\n{_ASKED}⟦4<|im_end|>⟧\n",
    }


MARKED: dict[str, dict[str, str | list[str]]] = {
    "llama2": {
        "single": "<s>[INST] 2+2? [/INST]⟦ 4 </s>⟧",
        "multi": "<s>[INST] 2+2? [/INST]⟦ 4 </s>⟧<s>[INST] 3+2? [/INST]⟦ It is 5 </s>⟧",
        "system": "<s>[INST] <<SYS>>\nBe brief\n<</SYS>>\n\n2+2? [/INST]⟦ 4 </s>⟧",
        "tools": "leaves out the 'tool_calls' of message 1, 'assistant'",
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": "<s>[INST] 2+2? [/INST]⟦ <think>\ntwo\n</think>\n\n4 </s>⟧",
        "assistant first": "cannot render messages of assistant: .*roles must alternate",
    },
    "llama3": {
        "single": f"{_LLAMA3}<|eot_id|>{_LLAMA3_ASKED}{_LLAMA3_SAYS}⟦4<|eot_id|>⟧",
        "multi": f"{_LLAMA3}<|eot_id|>{_LLAMA3_ASKED}{_LLAMA3_SAYS}⟦4<|eot_id|>⟧"
        f"{_LLAMA3_ASKED.replace('2+2', '3+2')}{_LLAMA3_SAYS}⟦It is 5<|eot_id|>⟧",
        "system": f"{_LLAMA3}Be brief<|eot_id|>{_LLAMA3_ASKED}{_LLAMA3_SAYS}⟦4<|eot_id|>⟧",
        "tools": f"{_LLAMA3}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nUse these functions:\n\n{TOOL_TEXT}"
        f'\n\n2+2?<|eot_id|>{_LLAMA3_SAYS}⟦{{"name": "add", "parameters": {{"a": 2}}}}<|eot_id|>⟧'
        f'<|start_header_id|>ipython<|end_header_id|>\n\n"4"<|eot_id|>{_LLAMA3_SAYS}⟦It is 4<|eot_id|>⟧',
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": f"{_LLAMA3}<|eot_id|>{_LLAMA3_ASKED}{_LLAMA3_SAYS}⟦<think>\ntwo\n</think>\n\n4<|eot_id|>⟧",
        "assistant first": f"{_LLAMA3}<|eot_id|>{_LLAMA3_SAYS}⟦Hi<|eot_id|>⟧{_LLAMA3_ASKED}{_LLAMA3_SAYS}⟦4<|eot_id|>⟧",
    },
    "mistral": {
        "single": "<s>[INST] 2+2?[/INST]⟦ 4</s>⟧",
        "multi": "<s>[INST] 2+2?[/INST]⟦ 4</s>⟧[INST] 3+2?[/INST]⟦ It is 5</s>⟧",
        # The template shows it while the question is the last message, and no longer when it is answered.
        "system": "<s>[INST] Be brief\n\n2+2?[/INST]⟦ 4</s>⟧",
        "tools": f"<s>[AVAILABLE_TOOLS] [{TOOL_TEXT}][/AVAILABLE_TOOLS][INST] 2+2?[/INST]"
        '⟦[TOOL_CALLS] [{"name": "add", "arguments": {"a": 2}, "id": "c1"}]</s>⟧'
        '[TOOL_RESULTS] {"content": 4, "call_id": "c1"}[/TOOL_RESULTS]⟦ It is 4</s>⟧',
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": "<s>[INST] 2+2?[/INST]⟦ <think>\ntwo\n</think>\n\n4</s>⟧",
        "assistant first": "<s>⟦ Hi</s>⟧[INST] 2+2?[/INST]⟦ 4</s>⟧",
    },
    "qwen2": _chatml(_QWEN2)
    | {
        "tools": f"{_QWEN_TOOLS}{_ASKED}⟦{_QWEN_CALL}⟧\n{_QWEN_ADDED}⟦It is 4<|im_end|>⟧\n",
    },
    # Each turn is generated after its (perhaps empty) thinking, and shown without it once it has been followed.
    "qwen3": {
        "single": f"{_ASKED}⟦{_NO_THOUGHT}4<|im_end|>⟧\n",
        "multi": [
            f"{_ASKED}⟦{_NO_THOUGHT}4<|im_end|>⟧\n",
            f"{_ASKED}4<|im_end|>\n{_AGAIN}⟦{_NO_THOUGHT}It is 5<|im_end|>⟧\n",
        ],
        "system": f"{_BRIEF}{_ASKED}⟦{_NO_THOUGHT}4<|im_end|>⟧\n",
        "tools": [
            f"{_QWEN_TOOLS}{_ASKED}⟦{_NO_THOUGHT}{_QWEN_CALL}⟧\n",
            f"{_QWEN_TOOLS}{_ASKED}{_QWEN_CALL}\n{_QWEN_ADDED}⟦{_NO_THOUGHT}It is 4<|im_end|>⟧\n",
        ],
        "thinking": [
            f"{_ASKED}⟦<think>\ntwo\n</think>\n\n4<|im_end|>⟧\n",
            f"{_ASKED}4<|im_end|>\n{_AGAIN}⟦<think>\nsum\n</think>\n\n5<|im_end|>⟧\n",
        ],
        "inline thinking": f"{_ASKED}⟦<think>\ntwo\n</think>\n\n4<|im_end|>⟧\n",
        "assistant first": [
            f"<|im_start|>assistant\n⟦{_NO_THOUGHT}Hi<|im_end|>⟧\n",
            f"<|im_start|>assistant\nHi<|im_end|>\n{_ASKED}⟦{_NO_THOUGHT}4<|im_end|>⟧\n",
        ],
    },
    "gemma": {
        "single": "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦4<end_of_turn>⟧\n",
        "multi": "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n⟦4<end_of_turn>⟧\n"
        "<start_of_turn>user\n3+2?<end_of_turn>\n<start_of_turn>model\n⟦It is 5<end_of_turn>⟧\n",
        "system": "cannot render messages of system, user, assistant: .*System role not supported",
        "tools": "leaves out the 'tool_calls' of message 1, 'assistant'",
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": "<bos><start_of_turn>user\n2+2?<end_of_turn>\n<start_of_turn>model\n"
        "⟦<think>\ntwo\n</think>\n\n4<end_of_turn>⟧\n",
        "assistant first": "cannot render messages of assistant: .*roles must alternate",
    },
    "smollm2": _chatml(_SMOL),
    "chatml": _chatml(""),
    "zephyr": {
        "single": "<|user|>\n2+2?</s>\n<|assistant|>\n⟦4</s>⟧\n",
        "multi": "<|user|>\n2+2?</s>\n<|assistant|>\n⟦4</s>⟧\n<|user|>\n3+2?</s>\n<|assistant|>\n⟦It is 5</s>⟧\n",
        "system": "<|system|>\nBe brief</s>\n<|user|>\n2+2?</s>\n<|assistant|>\n⟦4</s>⟧\n",
        "tools": "leaves out the 'tool_calls' of message 1, 'assistant'",
        "thinking": "leaves out the 'reasoning_content' of message 1, 'assistant'",
        "inline thinking": "<|user|>\n2+2?</s>\n<|assistant|>\n⟦<think>\ntwo\n</think>\n\n4</s>⟧\n",
        "assistant first": "<|assistant|>\n⟦Hi</s>⟧\n<|user|>\n2+2?</s>\n<|assistant|>\n⟦4</s>⟧\n",
    },
}
"""Of each template and conversation: the text as marked by hand, or several, or what the error says."""


@pytest.mark.parametrize(("name", "talk"), [(name, talk) for name in TEMPLATES for talk in TALKS])
def test_the_assistants_turns_carry_loss_in_every_template(name, talk):
    """Decoded, the tokens that carry loss are what a person marks: for bytes, and for pieces with a leading space."""
    messages, tools = TALKS[talk]
    expected = MARKED[name][talk]
    rows = table(messages=[json.dumps(messages)], tools=[json.dumps(tools)])
    config = {"messages": "messages", "tools": "tools", "max_length": 4096}
    if isinstance(expected, str) and "⟦" not in expected:
        with pytest.raises(ConfigError, match=f"task.messages: row 1: the chat template.*{expected}"):
            encoded(chat_tokenizer(name), rows, **config)
        return
    expected = [expected] if isinstance(expected, str) else expected
    for kind in KINDS:
        tokenizer = chat_tokenizer(name, kind)
        found = as_shown(encoded(tokenizer, rows, **config), tokenizer)
        if kind in ("byte-level", "trimmed"):
            assert found == expected
        else:  # pieces add spaces of their own
            assert ["".join(one.split()) for one in found] == ["".join(one.split()) for one in expected]


def test_the_table_has_every_case():
    assert {name: set(cases) for name, cases in MARKED.items()} == {name: set(TALKS) for name in TEMPLATES}


def test_conversations_in_gpt2s_own_tokens():
    """The tokenizer of a real model, which has no template and no special token but its end."""
    if not GPT2.is_dir():
        pytest.skip(f"{GPT2} is not here")
    tokenizer = AutoTokenizer.from_pretrained(str(GPT2))
    tokenizer.chat_template = TEMPLATES["zephyr"].source
    examples = encoded(tokenizer, table(m=[TALKS["multi"][0]]), messages="m")
    end = "<|endoftext|>"
    assert as_shown(examples, tokenizer) == [str(MARKED["zephyr"]["multi"]).replace("</s>", end)]


# What messages hold


def test_tables_fill_every_row_with_every_key():
    """What `datasets` adds to rows that lack a key is dropped: rows are encoded as they were written."""
    talks = [TALKS["single"][0], TALKS["tools"][0], TALKS["multi"][0]]
    tokenizer = chat_tokenizer("qwen2")
    together = table(m=talks)
    assert "tool_calls" in together[0]["m"][0]
    apart = [as_shown(encoded(tokenizer, table(m=[json.dumps(talk)]), messages="m"), tokenizer)[0] for talk in talks]
    assert as_shown(encoded(tokenizer, together, messages="m"), tokenizer) == apart


def test_arguments_of_calls_may_be_json():
    """As OpenAI writes them; templates want objects, and would show a text of a text."""
    stored = {"id": "c1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    flat = {"name": "add", "arguments": {"a": 2}}
    for name in ("qwen2", "llama3"):
        wanted = [shown(one) for one in turns(chat_tokenizer(name), TALKS["tools"][0], [TOOL])]
        talk = [user("2+2?"), assistant("", tool_calls=[stored]), ADDED, assistant("It is 4")]
        assert [shown(one) for one in turns(chat_tokenizer(name), talk, json.dumps([TOOL]))] == wanted
    talk = [user("2+2?"), assistant(tool_calls=[flat]), ADDED, assistant("It is 4")]
    assert shown(turns(chat_tokenizer("qwen2"), talk, [TOOL])[0]) == MARKED["qwen2"]["tools"]


def test_an_empty_list_of_calls_is_dropped():
    """Mistral's template asks only whether there is a list."""
    found = turns(chat_tokenizer("mistral"), [user("2+2?"), assistant("4", tool_calls=[])])
    assert shown(found[0]) == MARKED["mistral"]["single"]


PARTS_TEMPLATE = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}{{ part.text }}{% endfor %}{% endif %}
{{- '<|im_end|>' }}
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def test_contents_may_be_lists_of_texts():
    """One text is that text. Several are joined by a newline, but where the template itself joins them."""
    part = {"type": "text", "text": "2+2?"}
    tokenizer = chat_tokenizer("chatml")
    assert shown(turns(tokenizer, [user([part]), assistant(["4"])])[0]) == MARKED["chatml"]["single"]
    many = [user([{"type": "text", "text": "Add"}, part]), assistant([{"type": "text", "text": "4"}, "!"])]
    assert "Add\n2+2?" in shown(turns(tokenizer, many)[0]) and "⟦4\n!<|im_end|>⟧" in shown(turns(tokenizer, many)[0])
    tokenizer.chat_template = PARTS_TEMPLATE
    assert "Add2+2?" in shown(turns(tokenizer, many)[0]) and "⟦4!<|im_end|>⟧" in shown(turns(tokenizer, many)[0])


NAMED = CHATML.replace("m['role'] + '", "m['role'] + ((' name=' + m['name']) if m['name'] else '') + '")


def test_other_keys_reach_the_template_or_are_reported(capsys):
    talk = [user("2+2?", name="Ann"), assistant("4")]
    tokenizer = wrapped("byte-level", eos="<|im_end|>", template=NAMED)
    assert "user name=Ann\n2+2?" in as_shown(encoded(tokenizer, table(m=[talk, talk]), messages="m"), tokenizer)[0]
    assert "does not read" not in capsys.readouterr().out
    encoded(chat_tokenizer("chatml"), table(m=[talk, talk]), messages="m")
    assert "does not read these keys of messages: name (in 2 rows)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "expected a list of one or more"),
        ("hello", "expected a list of one or more"),
        (["hello"], "expected a list of one or more"),
        ([{"from": "human", "value": "2+2?"}], "message 0 has the keys from, value; expected a role and a content"),
        ([user("2+2?"), {"role": "assistant"}], "message 1, 'assistant', has the content None"),
        ([user("2+2?"), assistant(4)], "message 1, 'assistant', has the content 4; expected a string"),
        ([user([{"type": "image", "url": "x"}]), assistant("4")], "message 0 has a part of type 'image'"),
        ([user("2+2?"), assistant(tool_calls=[{"id": "c1"}])], "message 1 has the tool_calls .*expected a list"),
        (
            [user("2+2?"), assistant(tool_calls=[{"function": {"name": "add", "arguments": "2, 2"}}])],
            "message 1 calls 'add' with '2, 2'; expected a JSON object",
        ),
    ],
)
def test_a_malformed_conversation_is_an_error_with_its_row(messages, message):
    good = json.dumps(TALKS["single"][0])
    with pytest.raises(ConfigError, match=f"task.messages: row 2: .*{message}"):
        encoded(chat_tokenizer("chatml"), table(m=[good, json.dumps(messages)]), messages="m")


def test_a_message_that_the_template_leaves_out_is_an_error():
    """Zephyr's has no tools: a result that vanishes would leave an answer to nothing."""
    talk = [user("2+2?"), assistant("wait"), ADDED, assistant("4")]
    with pytest.raises(ConfigError, match="leaves out the 'content' of message 2, 'tool'.*--task.template"):
        turns(chat_tokenizer("zephyr"), talk)
    # By role, so that a short text which stands elsewhere by chance does not hide it.
    assert "4" in TALKS["multi"][0][1]["content"]
    with pytest.raises(ConfigError, match="leaves out the tool 'add'"):
        turns(chat_tokenizer("zephyr"), TALKS["single"][0], [TOOL])
    # The way out: a template that shows it.
    assert "tool\n4<|im_end|>" in shown(turns(chat_tokenizer("chatml"), talk)[0])


def test_a_template_that_drops_thinking_where_it_is_generated_is_an_error():
    dropping = CHATML.replace("m['content']", "m['content'].split('</think>')[-1]")
    tokenizer = wrapped("byte-level", eos="<|im_end|>", template=dropping)
    with pytest.raises(ConfigError, match="leaves out the 'content' of message 1, 'assistant', or a part of it"):
        turns(tokenizer, TALKS["inline thinking"][0])


FORCED = CHATML.replace("{{ '<|im_start|>assistant\\n' }}", "{{ '<|im_start|>assistant\\n<think>\\n' }}")


def test_a_generation_prompt_that_turns_lack_is_an_error_with_ways_out_that_work():
    """A prompt that opens a thought, where answers have none: what is generated is not what was trained on."""
    talk = TALKS["single"][0]
    tokenizer = wrapped("byte-level", eos="<|im_end|>", template=FORCED)
    assert FORCED != CHATML
    with pytest.raises(
        ConfigError, match=r"generation prompt ends in '<think>\\n' where .* continues with '4<\|im_end"
    ):
        turns(tokenizer, talk)
    assert shown(turns(tokenizer, [user("2+2?"), assistant("<think>\ntwo\n</think>\n\n4")])[0]).endswith(
        "<think>\n⟦two\n</think>\n\n4<|im_end|>⟧\n"
    )
    # The ways out that the message names: marks in the template, a template that fits, and loss on the whole text.
    marks = FORCED.replace("m['content']", "'' }}{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}"
                           "{% endgeneration %}{% else %}{{ m['content'] }}{% endif %}{{ ''")  # fmt: skip
    assert shown(turns(wrapped("byte-level", eos="<|im_end|>", template=marks), talk)[0]) == (
        f"{_ASKED}⟦4⟧<|im_end|>\n"
    )
    fitting = encoded(tokenizer, table(m=[talk]), messages="m", template=CHATML)
    assert as_shown(fitting, tokenizer) == [MARKED["chatml"]["single"]]
    tokenizer = wrapped("byte-level", eos="<|im_end|>", template=FORCED)
    whole = encoded(tokenizer, table(m=[talk]), messages="m", learn_prompt=True)
    assert as_shown(whole, tokenizer) == [f"⟦{_ASKED}4<|im_end|>\n⟧"]


def test_with_learn_prompt_the_whole_text_carries_loss():
    """Once, as the template renders it, even if it drops thinking from earlier turns."""
    tokenizer = chat_tokenizer("qwen3")
    talk = TALKS["thinking"][0]
    found = as_shown(encoded(tokenizer, table(m=[talk]), messages="m", learn_prompt=True), tokenizer)
    assert found == [f"⟦{_ASKED}4<|im_end|>\n{_AGAIN}<think>\nsum\n</think>\n\n5<|im_end|>\n⟧"]
    with pytest.raises(ConfigError, match="leaves out the 'tool_calls'"):
        encoded(chat_tokenizer("zephyr"), table(m=[TALKS["tools"][0]]), messages="m", learn_prompt=True)


def test_conversations_that_are_several_examples_are_reported(capsys):
    examples = encoded(chat_tokenizer("qwen3"), table(m=[TALKS["thinking"][0]] * 3), messages="m")
    assert size(examples) == 6
    assert "3 conversations become 6 examples" in capsys.readouterr().out


def test_a_tool_that_moves_to_the_last_question_is_in_the_prompt_of_each_turn():
    """Mistral's template puts tools before the last question: each turn carries loss with the tools before its own."""
    talk = [*TALKS["tools"][0], user("3+2?"), assistant("5")]
    found = [shown(one) for one in turns(chat_tokenizer("mistral"), talk, [TOOL])]
    assert found[0] == MARKED["mistral"]["tools"]
    assert len(found) == 2 and found[1].endswith("[INST] 3+2?[/INST]⟦ 5</s>⟧") and found[1].count("⟦") == 1
    assert found[1].count("[AVAILABLE_TOOLS]") == 1


def test_a_system_message_that_moves_to_the_last_question_is_in_the_prompt_of_each_turn():
    """Mistral's template: each answer follows the prompt that generates it, even if it repeats its question."""
    talk = [SYSTEM, user("2+2?"), assistant("2+2?[/INST] is 4"), user("2+2?"), assistant("4")]
    tokenizer = chat_tokenizer("mistral")
    assert [shown(one) for one in turns(tokenizer, talk)] == [
        "<s>[INST] Be brief\n\n2+2?[/INST]⟦ 2+2?[/INST] is 4</s>⟧",
        "<s>[INST] 2+2?[/INST] 2+2?[/INST] is 4</s>[INST] Be brief\n\n2+2?[/INST]⟦ 4</s>⟧",
    ]
    for end in (2, 4):
        (found,) = turns(tokenizer, talk[: end + 1])[-1:]
        assert found.text[: found.spans[0][0]] == Chat(tokenizer).prompt(messages_of(talk[:end]))


def test_what_comes_after_the_last_answer_is_not_needed():
    talk = [*TALKS["thinking"][0], user("and now?")]
    found = [shown(one) for one in turns(chat_tokenizer("qwen3"), talk)]
    assert found == MARKED["qwen3"]["thinking"]


def test_the_system_message_is_for_conversations_without_one():
    talk, with_one = TALKS["single"][0], TALKS["system"][0]
    for name in ("llama2", "llama3", "qwen2", "zephyr"):
        tokenizer = chat_tokenizer(name)
        assert [shown(one) for one in turns(tokenizer, talk, system="Be brief")] == [MARKED[name]["system"]]
        assert [shown(one) for one in turns(tokenizer, with_one, system="Be long")] == [MARKED[name]["system"]]


# {% generation %} in the template

MARKING = {
    "plain": "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}",
    "lines": """\
{%- for m in messages %}
    {{- '<|im_start|>' + m.role + '\\n' }}
    {%- if m.role == 'assistant' %}
        {%- generation %}
            {{- m.content }}
            {{- '<|im_end|>' -}}
        {%- endgeneration -%}
    {%- else %}
        {{- m.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}
""",
    "trimmed blocks": """\
{% for m in messages %}
{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}
  {% generation %}
{{ m.content }}{{ '<|im_end|>' }}{% endgeneration %}
{% else %}
{{ m.content + '<|im_end|>' }}{% endif %}

{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
""",
}


@pytest.mark.parametrize("name", MARKING)
def test_generation_tags_give_the_assistant_mask_of_transformers(name):
    """`{% generation %}`: the same tokens as ``return_assistant_tokens_mask`` gives, whatever the tokenizer."""
    for kind, talk in itertools.product(KINDS, ("single", "multi", "system")):
        tokenizer = wrapped(kind, eos="<|im_end|>", template=MARKING[name])
        messages = TALKS[talk][0]
        peer = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        (found,) = tokenize(turns(tokenizer, messages), tokenizer)
        assert (found.tokens, found.loss_mask) == (peer["input_ids"], peer["assistant_masks"])
        assert sum(found.loss_mask) > 0
        (other,) = tokenize(turns(slow(tokenizer), messages), slow(tokenizer))
        assert other == found
        # A template with a macro, whose marks are found by characters in the text.
        tokenizer.chat_template = "{% macro unused() %}{% endmacro %}" + MARKING[name]
        assert list(tokenize(turns(tokenizer, messages), tokenizer)) == [found]


def test_generation_tags_are_found_wherever_the_template_puts_the_text():
    """Also in a macro, a block or a filter, where transformers misplaces them; changed text is an error."""
    macro = (
        "{% macro turn(m) %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}"
        "{{ '\\n' }}{% endmacro %}{% for m in messages %}{{ turn(m) }}{% endfor %}"
    )
    tokenizer = wrapped("byte-level", eos="<|im_end|>", template=macro)
    assert shown(turns(tokenizer, TALKS["multi"][0])[0]) == MARKED["chatml"]["multi"]
    captured = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\\n' }}{% if m.role == 'assistant' %}BEGIN"
        "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}END{% else %}"
        "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\\n' }}{% endfor %}"
    )
    for begin, end in (
        ("{% set turn %}  ", "{% endset %}{{ turn | trim }}"),
        ("{%- filter trim %}  ", "{% endfilter %}"),
        ("{% macro say() %}{{ caller() }}{% endmacro %}{% call say() %}", "{% endcall %}"),
    ):
        tokenizer.chat_template = captured.replace("BEGIN", begin).replace("END", end)
        assert shown(turns(tokenizer, TALKS["multi"][0])[0]) == MARKED["chatml"]["multi"], begin
    trimmed = macro.replace("{{ turn(m) }}", "{% set t = turn(m) %}{{ t[:40] }}")
    tokenizer.chat_template = trimmed
    with pytest.raises(ConfigError, match="changes the text between"):
        turns(tokenizer, [user("2+2?"), assistant("a long answer that is cut by its template, in the midst of it")])


# Prompts and completions, and plain texts

FRAMES = {
    "nothing": ("$A", "<s>", "</s>"),
    "begin": ("<s> $A", "<s>", "</s>"),
    "begin and end": ("<s> $A </s>", "<s>", "</s>"),
    "end": ("$A </s>", None, "</s>"),
    "no end token": ("<s> $A", "<s>", None),
}


@pytest.mark.parametrize("frame", FRAMES)
@pytest.mark.parametrize("kind", KINDS)
def test_texts_begin_once_and_end_once(kind, frame):
    """Whatever the tokenizer adds by itself, and whatever is written in the text already."""
    adds, bos, eos = FRAMES[frame]
    tokenizer = wrapped(kind, bos=bos, eos=eos, adds=adds)
    begin, end = ("<s>" in adds) * "<s>", (eos is not None) * "</s>"
    pieces = lambda tokens: tokenizer.convert_ids_to_tokens(list(tokens))  # noqa: E731
    inner = pieces(tokenizer("2+2=4", add_special_tokens=False)["input_ids"])
    wanted = [*([begin] if begin else []), *inner, *([end] if end else [])]
    for text in ("2+2=4", begin + "2+2=4", "2+2=4" + end, begin + "2+2=4" + end):
        found = encoded(tokenizer, table(t=[text]), text="t")
        assert pieces(found["input_ids"][0]) == wanted, text
        assert found["loss_mask"][0].all()
    for prompt, completion in (("2+2=", "4"), (begin + "2+2=", "4" + end)):
        found = encoded(tokenizer, table(p=[prompt], c=[completion]), prompt="p", completion="c")
        assert pieces(found["input_ids"][0]) == wanted, (prompt, completion)
        answer = pieces(found["input_ids"][0][found["loss_mask"][0] == 1])
        assert answer == ["4", *([end] if end else [])]
        task = LanguageModel(CausalLM(prompt="p", completion="c"), tokenizer)
        assert pieces(task.prompt_tokens(prompt)) == wanted[: len(wanted) - len(answer)]


def test_a_completion_follows_its_prompt_without_a_space():
    """A tokenizer that puts a space in front of every text puts none between the two."""
    tokenizer = wrapped("leading space", bos="<s>", eos="</s>", adds="<s> $A")
    alone = tokenizer.convert_ids_to_tokens(tokenizer("4", add_special_tokens=False)["input_ids"])
    assert alone[0].startswith("▁")  # an earlier version trained on `2+2= 4`
    found = encoded(tokenizer, table(p=["2+2="], c=["4"]), prompt="p", completion="c")
    assert as_shown(found, tokenizer)[0].endswith("=⟦4</s>⟧")
    whole = encoded(tokenizer, table(p=["2+2="], c=["4"]), prompt="p", completion="c", learn_prompt=True)
    assert as_shown(whole, tokenizer)[0].startswith("⟦<s>")


def test_a_token_of_prompt_and_answer_carries_loss_and_is_reported(capsys):
    """A generation prompt that ends in a space: the space goes into the answer's first token."""
    tokenizer = wrapped("byte-level", eos="<|im_end|>")
    spaced = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    examples = encoded(tokenizer, table(p=["2+2?"], c=["the"]), prompt="p", completion="c", chat=True, template=spaced)
    assert as_shown(examples, tokenizer) == ["user: 2+2?<|im_end|>assistant:⟦ the<|im_end|>⟧"]
    assert (
        "in 1 of 1 examples one token spans the end of a prompt and the start of its answer" in capsys.readouterr().out
    )


# Laws

WORDS = ("2+2", "the", " answer", "  ", "\n", "é", "😀", "日本", "<", "a", "4", ".", " ", "\t", "’s", "The")


def texts(rng: np.random.Generator, count: int) -> list[str]:
    return ["".join(rng.choice(WORDS, rng.integers(1, 7))) for _ in range(count)]


def ascii_texts(rng: np.random.Generator, count: int) -> list[str]:
    return [text.encode("ascii", "ignore").decode().replace("\t", "") for text in texts(rng, count)]


def agree(prompt: list[int], example: Example) -> bool:
    """Whether the tokens of a prompt are those before the loss, up to a token that joins both."""
    first = example.loss_mask.index(1)
    if not example.joined:
        return prompt == example.tokens[:first]
    return prompt[: first - 1] == example.tokens[: first - 1] and len(prompt) > first - 1


@pytest.mark.parametrize("kind", KINDS)
def test_answers_are_generated_from_the_prompts_of_training(kind):
    """The law of `prompt_tokens`, for chats in every template and for prompts and completions."""
    rng = np.random.default_rng(0)
    for name in (*TEMPLATES, None):
        for prompt, answer in zip(texts(rng, 20), texts(rng, 20), strict=True):
            prompt, answer = f"a{prompt}a", f"b{answer}"
            if name is None:
                tokenizer = wrapped(kind, bos="<s>", eos="</s>", adds="<s> $A </s>")
                task = LanguageModel(CausalLM(prompt="p", completion="c"), tokenizer)
                spanned = [one for _, one in task._spanned_texts(table(p=[prompt], c=[answer]), Draft())]
                (example,) = tokenize_plain(spanned, tokenizer)
            else:
                tokenizer = chat_tokenizer(name, kind)
                task = LanguageModel(CausalLM(prompt="p", completion="c", chat=True), tokenizer)
                spanned = [one for _, one in task._spanned_texts(table(p=[prompt], c=[answer]), Draft())]
                (example,) = tokenize(spanned, tokenizer)
            assert agree(task.prompt_tokens(prompt), example), (name, prompt, answer)


@pytest.mark.parametrize("kind", KINDS)
def test_tokenizers_without_offsets_give_the_same_mask(kind):
    """By prefixes of the text: spans that begin anywhere, within a character too, and end with the end token.

    Where a token joins both, pieces of the word may be divided differently in the prefix; then these carry loss too.
    """
    rng = np.random.default_rng(1)
    tokenizer = wrapped(kind, eos="</s>")
    known = texts if kind in ("byte-level", "trimmed") else ascii_texts  # an unknown token has no characters
    parts = [known(rng, 60) for _ in range(3)]
    spanned = [
        SpannedText(f"{one}{two}</s>{three}", [(len(one), len(one + two) + 4)])
        for one, two, three in zip(*parts, strict=True)
    ]
    found = zip(tokenize(spanned, tokenizer), tokenize(spanned, slow(tokenizer)), spanned, strict=True)
    for fast, by_prefix, one in found:
        assert fast.tokens == by_prefix.tokens
        if fast.joined:
            assert all(a <= b for a, b in zip(fast.loss_mask, by_prefix.loss_mask, strict=True)), one
        else:
            assert fast.loss_mask == by_prefix.loss_mask, (one, tokenizer.convert_ids_to_tokens(fast.tokens))


def test_a_token_that_reaches_into_a_span_carries_loss():
    """At its start and at its end, with offsets or without; so is a space that offsets leave out."""
    tokenizer = wrapped("byte-level", eos="</s>")
    assert tokenizer.tokenize("The answer")[0] == "The"
    for fast in (tokenizer, slow(tokenizer)):
        (found,) = tokenize([SpannedText("The answer", [(0, 2)])], fast)
        assert found.loss_mask[:1] == [1] and not any(found.loss_mask[1:])
        (found,) = tokenize([SpannedText("The answer", [(2, 10)])], fast)
        assert all(found.loss_mask) and found.joined
    trimmed = wrapped("trimmed", eos="</s>")
    (found,) = tokenize([SpannedText(" \nThe", [(0, 5)])], trimmed)
    assert trimmed.convert_ids_to_tokens(found.tokens)[0] == "Ġ" and all(found.loss_mask)


def test_offsets_that_miss_characters_are_not_trusted():
    """Some tokenizers report every token as empty; then prefixes of the text decide."""
    tokenizer = wrapped("byte-level", eos="</s>")

    class Wrong:
        is_fast = True

        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def __call__(self, text: Any, **options: Any) -> Any:
            found = tokenizer(text, **options)
            if "offset_mapping" in found:
                found["offset_mapping"] = [[(start, start) for start, _ in one] for one in found["offset_mapping"]]
            return found

    spanned = [SpannedText("What is the answer?", [(8, 19)])]
    assert list(tokenize(spanned, Wrong())) == list(tokenize(spanned, tokenizer))


def test_every_answer_carries_loss_whole_in_every_template():
    """Random conversations: together, the spans hold each answer and each closing token once."""
    rng = np.random.default_rng(2)
    for name, kind in itertools.product(TEMPLATES, ("byte-level", "leading space")):
        tokenizer = chat_tokenizer(name, kind)
        for rounds in (1, 2, 3):
            answers = [f"x{i}{one.strip()}y{i}" for i, one in enumerate(texts(rng, rounds))]
            talk = [one for i, answer in enumerate(answers) for one in (user(f"q{i}?"), assistant(answer))]
            found = turns(tokenizer, talk)
            spans = [one.text[start:end] for one in found for start, end in one.spans]
            assert len(spans) == rounds
            for answer, text in zip(answers, spans, strict=True):
                assert answer in text and Chat(tokenizer).end and text.endswith(Chat(tokenizer).end or "")


def test_an_answer_ends_with_the_templates_token_and_the_tokenizers():
    """A base model's tokenizer ends texts differently than the chat template ends a turn: generation stops at both."""
    tokenizer = wrapped("byte-level", eos="<|endoftext|>", template=CHATML)
    task = LanguageModel(CausalLM(messages="m"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(task.ends) == ["<|im_end|>", "<|endoftext|>"]
    task = LanguageModel(CausalLM(text="t"), tokenizer)
    assert tokenizer.convert_ids_to_tokens(task.ends) == ["<|endoftext|>"]


# Truncation


def test_what_max_length_cuts_is_counted():
    """By hand: of four examples one fits, one loses its end, one half of its answer, one all of it."""
    examples = [
        Example([1, 2, 3, 4], [0, 0, 1, 1]),
        Example([1, 2, 3, 4, 5], [0, 0, 1, 1, 1]),
        Example([1, 2, 3, 4, 5, 6], [0, 0, 0, 1, 1, 1]),
        Example([1, 2, 3, 4, 5, 6, 7], [0, 0, 0, 0, 0, 1, 0]),
    ]
    kept, cut = truncate(examples, 4)
    assert kept == [Example(one.tokens[:4], one.loss_mask[:4]) for one in examples[:3]]
    assert cut == Truncation(limit=4, examples=4, longest=7, cut=3, dropped=1, tokens=9, lost=4, ends=2)
    line = cut.describe("train")
    assert line.startswith("train: 3 of 4 examples are cut at 4 tokens: 4 of 9 tokens of loss are lost")
    assert (
        "2 examples lose their end" in line and "1 of 4 examples are left out" in line and "--task.max-length 7" in line
    )
    _, none = truncate(examples, 7)
    assert (none.cut, none.lost, none.ends, none.dropped) == (0, 0, 0, 0)
    assert none.describe("train") == "train: 4 examples of at most 7 tokens, none is cut"


@pytest.mark.parametrize("limit", [4, 20, 24, 200])
@pytest.mark.parametrize("pack", [False, True])
def test_every_lost_token_is_counted(pack, limit):
    """Kept and lost tokens of loss add up to all of them, packed or not."""
    tokenizer = chat_tokenizer("chatml")
    rng = np.random.default_rng(3)
    rows = table(p=texts(rng, 30), c=texts(rng, 30))
    config = {"prompt": "p", "completion": "c", "chat": True}
    whole = encoded(tokenizer, rows, **config, max_length=10_000)
    total = sum(int(one[1:].sum()) for one in whole["loss_mask"])
    assert truncation_of(whole) is not None and truncation_of(whole).lost == 0  # pyright: ignore[reportOptionalMemberAccess]
    if limit < 8:
        with pytest.raises(ConfigError, match="none of the 30 examples has a token that carries loss"):
            encoded(tokenizer, rows, **config, max_length=limit, pack=pack)
        return
    examples = encoded(tokenizer, rows, **config, max_length=limit, pack=pack)
    cut = truncation_of(examples)
    assert cut is not None and cut.tokens == total and cut.examples == 30
    assert sum(int(one.sum()) for one in examples["loss_mask"]) == total - cut.lost
    if not pack:
        assert size(examples) == 30 - cut.dropped
    assert all(len(one) <= limit for one in examples["input_ids"])


def test_packing_keeps_every_token_of_every_example():
    rng = np.random.default_rng(4)
    examples = [Example(list(rng.integers(1, 99, n)), [1] * n) for n in rng.integers(1, 9, 40)]
    rows = list(pack(examples, 12))
    assert [token for row, _ in rows for token in row.tokens] == [token for one in examples for token in one.tokens]
    assert sum(sum(row.loss_mask) for row, _ in rows) == sum(len(one.tokens) - 1 for one in examples)
    assert sum(len(set(segments)) for _, segments in rows) == len(examples)


def test_classified_texts_that_are_cut_are_counted():
    tokenizer = wrapped("byte-level", bos="<s>", eos="</s>", adds="<s> $A </s>")
    tokenizer.pad_token = "<unk>"
    task = TextClassification(SequenceClassification(text="t", max_length=8), ("a", "b"), tokenizer)
    words = ["the the the", "4 " * 20]
    lengths = [len(one) for one in tokenizer(words)["input_ids"]]
    assert lengths[0] <= 8 < lengths[1]
    examples = task.encode(table(t=words, label=["a", "b"]))[""]
    assert [len(one) for one in examples["input_ids"]] == [lengths[0], 8]
    assert truncation_of(examples) == Truncation(8, 2, lengths[1], 1, 0, sum(lengths), lengths[1] - 8, None)
    assert f"{lengths[1] - 8} of {sum(lengths)} tokens are lost" in Truncation.of(8, lengths).describe("train")


# The configuration


def config_of(**task: Any) -> TrainConfig:
    from jlora import LoraConfig

    return TrainConfig("mine", CausalLM(**task), Pretrained("x"), DataConfig("train.jsonl"), LoraConfig())


@pytest.mark.parametrize(
    ("task", "message"),
    [
        ({"text": "t", "chat": True}, "task.chat: got True with task.text"),
        ({"text": "t", "system": "Be brief"}, "task.system: got 'Be brief' without a chat"),
        ({"prompt": "p", "completion": "c", "tools": "tools"}, "task.tools: got 'tools' without a chat"),
        ({"prompt": "p", "completion": "c", "template": "{{ x }}"}, "task.template: got '{{ x }}' without a chat"),
    ],
)
def test_options_of_chats_are_an_error_without_one(task, message):
    """They would have no effect."""
    with pytest.raises(ConfigError, match=re.escape(message)):
        config_of(**task).check()


def test_a_template_may_be_a_file(tmp_path):
    """In UTF-8; a name that is neither a file nor Jinja is an error."""
    (tmp_path / "chat.jinja").write_bytes("\ufeff{{ 'é' }}".encode())
    tables = {"train": table(m=["x"])}
    found = resolved(config_of(messages="m", template=str(tmp_path / "chat.jinja")), tables).task
    assert isinstance(found, CausalLM) and found.template == "{{ 'é' }}"
    with pytest.raises(ConfigError, match="task.template: no file at chat.jinj"):
        resolved(config_of(messages="m", template="chat.jinj"), tables)


def test_rows_are_dropped_when_none_of_their_examples_is_left(tmp_path):
    """Each conversation is several examples; in most, only the first one is short enough."""
    long = [*TALKS["thinking"][0][:-1], assistant("5" * 80)]
    far = [user("x" * 500), *TALKS["thinking"][0][1:]]
    file = tiny.write_jsonl(tmp_path / "talks.jsonl", [{"m": json.dumps(one)} for one in (long, far, long)])
    rows = data.read(str(file), tmp_path / "cache", "data.train")
    examples = encoded(chat_tokenizer("qwen3"), rows, messages="m", max_length=200)
    cut = truncation_of(examples)
    assert cut and cut.examples == 6 and size(examples) + cut.dropped == 6 and cut.dropped >= 2
    assert rows.provenance and rows.provenance.dropped == {"without a token that carries loss within 200 tokens": 1}

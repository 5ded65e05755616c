"""Tasks: what to train, and on which columns of the data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Literal

from train.config.fields import Column, Constraint, Count, Part, Positive, at_least

Labels = Annotated[
    tuple[Annotated[str, Constraint("a name", bool)], ...],
    Constraint("two or more names, each once", lambda x: len(x) > 1 and len({*x}) == len(x), "negative positive"),
]
ClassWeights = Annotated[
    Literal["balanced"] | dict[str, Positive],
    Constraint("balanced, or a number > 0 for each label", bool, "negative 1 positive 3"),
]
MaxLength = Annotated[int, at_least(4)]


@dataclass(frozen=True)
class SequenceClassification(Part):
    """Classify a text or a pair of texts, or predict a number (regression)."""

    #: Column of the text.
    text: Column = "text"
    #: Column of the second text of a pair.
    pair: Column | None = None
    #: Column of the label: a class by name or number, or with --task.regression the number to predict.
    label: Column = "label"
    #: Names of the classes. Default: the dataset's own, or else the distinct labels of the training
    #: examples.
    labels: Labels | None = None
    #: Weight of each class in the training loss, a weighted mean as in PyTorch: a number for each label, or "balanced"
    #: for n / (classes * examples of the class), as in scikit-learn. Validation metrics are not weighted.
    class_weights: ClassWeights | None = None
    #: Predict a number, with mean squared error as the loss.
    regression: bool = False
    #: Maximum number of tokens of an example. Longer ones are truncated, and the log reports how many.
    max_length: MaxLength = 128
    #: The side on which long texts are truncated.
    truncation: Literal["right", "left"] = "right"

    def conflicts(self) -> Iterator[str]:
        if self.regression and self.labels is not None:
            yield "labels: got names, expected None: a regression has no classes; pass --task.labels None"
        if self.regression and self.class_weights is not None:
            yield "class_weights: got weights, expected None: a regression has none; pass --task.class-weights None"


@dataclass(frozen=True)
class CausalLM(Part):
    """Supervised fine-tuning of a language model. The loss covers what the model is to generate.

    An example is a conversation (--task.messages), a prompt and its completion, or plain text. Conversations carry loss
    on the assistant's turns, each with the token that ends it; completions follow their prompts without a space and
    carry loss; plain text carries loss throughout. A token carries loss if any of its characters does. Prompts and
    plain texts get one begin and one end token, if the tokenizer has them; chat templates write their own.

    Messages are {"role", "content"} and any other keys that the chat template reads (tool_calls, name,
    reasoning_content). A content is a string or a list of {"type": "text", "text"}, joined by newlines for templates
    that take strings only. Keys without a value are dropped. If the template marks the assistant's text with
    {% generation %}, that text carries loss; otherwise the text from the generation prompt to the end token does. A
    template that renders earlier turns differently from how they were generated (without their thinking) turns a
    conversation into several examples. A template that leaves out part of a message is an error.
    """

    #: Column of the conversations. Pass this, or prompt and completion, or text.
    messages: Column | None = None
    #: Column of the prompts.
    prompt: Column | None = None
    #: Column of the completions.
    completion: Column | None = None
    #: Column of plain texts.
    text: Column | None = None
    #: Column of the tools for the chat template: lists of JSON schemas, or the same as JSON text.
    tools: Column | None = None
    #: System message for conversations without one.
    system: str | None = None
    #: Format prompts and completions with the chat template, as a question and its answer.
    chat: bool = False
    #: Chat template (Jinja), or a file with one. Default: the tokenizer's.
    template: str | None = None
    #: Include prompts, or the other roles' messages, in the loss.
    learn_prompt: bool = False
    #: Pack several examples into one sequence of max_length tokens. They do not attend to each other.
    pack: bool = False
    #: Maximum number of tokens of a sequence. Longer ones are truncated on the right, and the log reports how many.
    max_length: MaxLength = 512

    def conflicts(self) -> Iterator[str]:
        pair = self.prompt is not None and self.completion is not None
        ways = [self.messages is not None, pair, self.text is not None]
        if sum(ways) != 1 or (self.prompt is None) != (self.completion is None):
            yield (
                f"messages: got messages={self.messages!r}, prompt={self.prompt!r}, completion={self.completion!r}, "
                f"text={self.text!r}; expected exactly one of messages, prompt and completion, or text"
            )
        if self.chat and self.text is not None:
            yield (
                "chat: got True with task.text, expected False: plain text uses no chat template; pass --task.no-chat, "
                "or messages, or prompt and completion"
            )
        if self.messages is None and not self.chat:
            for name in ("system", "template", "tools"):
                if (value := getattr(self, name)) is not None:
                    yield (
                        f"{name}: got {value!r:.80} without a chat, expected None; pass --task.chat with prompt and "
                        f"completion, or --task.{name} None"
                    )


@dataclass(frozen=True)
class Domain(Part):
    """A fixed transformation applied to all images."""

    #: Counter-clockwise rotations by 90 degrees.
    quarter_turns: Annotated[int, at_least(0)] = 0
    #: Swap black and white.
    invert: bool = False


@dataclass(frozen=True)
class ImageClassification(Part):
    """Classify an image."""

    #: Column of the image: a path, the content of an image file, an image of the datasets library, or pixels as
    #: numbers, flat or row by row.
    image: Column = "image"
    #: Column of the label: a class by name or number.
    label: Column = "label"
    #: Names of the classes. Default: the dataset's own, or else the distinct labels of the training
    #: examples.
    labels: Labels | None = None
    #: Weight of each class in the training loss, a weighted mean as in PyTorch: a number for each label, or "balanced"
    #: for n / (classes * examples of the class), as in scikit-learn. Validation metrics are not weighted.
    class_weights: ClassWeights | None = None
    #: Height and width of the square images in pixels; other images are resized, without keeping their aspect ratio.
    #: Default: the checkpoint's, or that of the first image.
    side: Count | None = None
    #: The value of white, for pixels given as numbers and for formats that do not define it (32 bits, floats).
    brightest: Positive = 255.0
    #: Named transformations of the images. Validation covers each; training uses the last one, and
    #: training a base from scratch uses the first.
    domains: dict[str, Domain] = field(default_factory=dict)


TaskConfig = SequenceClassification | CausalLM | ImageClassification

"""Networks: the checkpoint to adapt, or a small network to train from scratch first."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, Literal

from train.config.fields import Constraint, Count, Part

Dtype = Literal["float32", "bfloat16", "float16"]
Attention = Literal["auto", "plain", "flash"]


@dataclass(frozen=True)
class Pretrained(Part):
    """A Hugging Face checkpoint of a family in jlora.models."""

    #: Folder, also in a bucket as gs://bucket/folder, or id of a model on the hub.
    path: Annotated[str, Constraint("a folder or the id of a model on the hub", bool, "gpt2")]
    #: Branch, tag or commit of a model on the hub.
    revision: str | None = None
    #: The dtype of activations.
    dtype: Dtype = "float32"
    #: The dtype of the frozen weights. Default: as stored.
    param_dtype: Dtype | None = None
    #: Apply the network's own dropout in training, besides the adapters'.
    dropout: bool = False
    #: Attention: all scores of a layer at once (plain); never all, by the kernels of TPUs and GPUs, elsewhere in chunks
    #: (flash); or plain below 1024 tokens (on a TPU 512), and flash from there on (auto).
    attention: Attention = "auto"
    #: Give a language model with tied embeddings a separate output projection.
    untie: bool = False


@dataclass(frozen=True)
class PatchTransformer(Part):
    """A small vision transformer, trained from scratch."""

    #: Side of the square patches in pixels.
    patch: Count = 2
    #: Width of the residual stream.
    width: Count = 96
    #: Number of transformer blocks.
    depth: Count = 2
    #: Attention heads of a block.
    heads: Count = 4
    #: Hidden width of a block's MLP.
    hidden: Count = 192

    def conflicts(self) -> Iterator[str]:
        if self.heads > 0 and self.width % self.heads:
            nearest = max(1, round(self.width / self.heads)) * self.heads
            yield (
                f"width: got {self.width}, expected a multiple of model.heads = {self.heads}; "
                f"pass --model.width {nearest}"
            )


@dataclass(frozen=True)
class Mlp(Part):
    """Linear layers with ReLU between them, on the pixels of an image, trained from scratch."""

    #: Widths of the hidden layers.
    hidden: Annotated[tuple[Count, ...], Constraint("one or more widths >= 1", bool, "128")] = (128,)


NetworkConfig = Pretrained | PatchTransformer | Mlp

"""Digits: a base is trained on upright digits, then adapted with LoRA to rotated and inverted ones.

    python -m train                                   # this file is the default
    python -m train configs/digits.py --lora.rank 2   # any field can be overridden
    python -m train --mode full                       # full fine-tuning, to compare
    python -m train --mode head                       # the frozen base with a new head

Expected on 599 test images, mean and range over the seeds 0 to 2 (`python -m benchmarks.digits_modes`, CPU):

                           upright                 shifted                 trained
    base                   0.946 (0.933 to 0.955)  0.119 (0.104 to 0.134)  100 %
    lora                                           0.951 (0.950 to 0.952)  7.3 %
    full                                           0.958 (0.952 to 0.965)  100 %
    head                                           0.791 (0.776 to 0.810)  0.6 %

LoRA reaches 0.991 (0.982 to 1.000) of full fine-tuning's gain over the base. The merged and the adapted model agree on
every image. About 30 seconds on 2 busy cores, half of it compiling; less the next time.
"""

from jlora import LoraConfig
from train.config import (
    ASSETS,
    DataConfig,
    Domain,
    FitConfig,
    ImageClassification,
    LearningRates,
    PatchTransformer,
    TrainConfig,
)

config = TrainConfig(
    name="digits",
    task=ImageClassification(
        brightest=16, domains={"upright": Domain(), "shifted": Domain(quarter_turns=1, invert=True)}
    ),
    model=PatchTransformer(patch=2, width=96, depth=2, heads=4, hidden=192),
    data=DataConfig(train=f"{ASSETS}/digits.parquet:train", validation=f"{ASSETS}/digits.parquet:test"),
    lora=LoraConfig(rank=4, alpha=8),
    base=FitConfig(epochs=12, batch_size=64),
    fit=FitConfig(epochs=20, batch_size=64),
    learning_rate=LearningRates(base=2e-3, lora=1e-2, full=2e-3, head=1e-2),
    eval_every=4,
    eval_batch_size=200,
)

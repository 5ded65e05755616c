"""SST-2 with RoBERTa: the sentiment of sentences from film reviews, with the settings of a well-known LoRA tutorial.

    python -m train configs/sst2_roberta.py
    python -m train configs/sst2_roberta.py --model.dtype bfloat16      # on a GPU or TPU
    python -m train predict RUN --text "a gripping story"

Rank 4 on the query of every layer (12 x 4 x (768 + 768) = 73,728), and a new head trained whole (592,130): 665,858
trainable parameters, 0.53% of 124,647,170. Evaluates after every epoch, and keeps the best adapters.

Expected on the 872 validation sentences: the tutorial it follows reached an accuracy of 0.9358 with PyTorch.
Not run here: it needs an accelerator, and downloads roberta-base (500 MB) and GLUE's SST-2 (67,349 sentences).
"""

from jlora import LoraConfig
from train.config import DataConfig, FitConfig, LearningRates, Pretrained, SequenceClassification, TrainConfig

config = TrainConfig(
    name="sst2_roberta",
    task=SequenceClassification(text="sentence", labels=("negative", "positive"), max_length=512, truncation="left"),
    model=Pretrained("FacebookAI/roberta-base", dropout=True),
    data=DataConfig(
        train="nyu-mll/glue/sst2:train", validation="nyu-mll/glue/sst2:validation", buckets=(32, 64, 128, 512)
    ),
    lora=LoraConfig(rank=4, alpha=32, dropout=0.01, targets=("query",), train_also=("classifier",)),
    fit=FitConfig(epochs=5, batch_size=16, schedule="linear", warmup=0.0, weight_decay=0.01, clip=1.0),
    learning_rate=LearningRates(lora=1e-3),
    eval_every=1,
    keep="best",
)

"""SMS spam with GPT-2: a language model turned into a classifier, every linear layer and the head adapted.

    python -m train configs/spam_gpt2.py
    python -m train predict RUN --text "You have won a prize! Call now"

Rank 16 on every linear layer and on the new head: 2,371,616 trainable parameters, 1.9% of 124,441,344. The tutorial
it follows counts 2,666,528, because it splits the fused query-key-value weight into three, each with its own
factors; here, as in Hugging Face's GPT-2, it is one weight with one pair of factors.

Expected: the tutorial reports a test accuracy of about 0.97 after training on 1,045 balanced messages. Not run here: it
downloads GPT-2 (550 MB) and the 5,574 messages, a fifth of which is held out.
"""

from jlora import LoraConfig
from train.config import DataConfig, FitConfig, LearningRates, Pretrained, SequenceClassification, TrainConfig

config = TrainConfig(
    name="spam_gpt2",
    task=SequenceClassification(text="sms", labels=("ham", "spam"), max_length=128),
    model=Pretrained("openai-community/gpt2"),
    data=DataConfig(train="ucirvine/sms_spam/plain_text:train", holdout=0.2),
    lora=LoraConfig(rank=16, alpha=16, exclude=()),
    fit=FitConfig(epochs=6, batch_size=8, schedule="constant", warmup=0.0, weight_decay=0.1, clip=None),
    learning_rate=LearningRates(lora=8e-4),
)

"""Instruction tuning of a Llama-type model: every linear layer, in its own chat template, on conversations.

    python -m train configs/instruct_llama.py --model.path CHECKPOINT --data.train conversations.jsonl \
        --data.validation None --data.holdout 0.05
    python -m train configs/instruct_llama.py --task.messages None --task.prompt question --task.completion answer \
        --task.chat --data.train gsm8k.jsonl --data.validation None --data.holdout 0.05
    python -m train generate RUN --prompt "What is a low-rank update?"
    python -m train export RUN --to peft

The data have a column `messages`: lists of `{"role": ..., "content": ...}`, with tool calls and any other keys of the
chat template. The loss covers the assistant's turns. Examples are packed into sequences without padding, and do not
attend to each other. Works for every decoder of `jlora.models`: Llama, Mistral, Qwen, Gemma.

Expected: perplexity on held-out answers falls in the first few hundred steps and then levels off. A 1B model trains
11,272,192 x 2 parameters, on one accelerator with 16 GB in bfloat16. Not run here.
"""

from jlora import LoraConfig
from train.config import CausalLM, DataConfig, FitConfig, LearningRates, Pretrained, TrainConfig

config = TrainConfig(
    name="instruct_llama",
    task=CausalLM(messages="messages", pack=True, max_length=1024),
    model=Pretrained("meta-llama/Llama-3.2-1B-Instruct", dtype="bfloat16", param_dtype="bfloat16"),
    data=DataConfig(train="HuggingFaceH4/no_robots:train", validation="HuggingFaceH4/no_robots:test"),
    lora=LoraConfig(rank=32, alpha=64, dropout=0.05),
    fit=FitConfig(epochs=2, batch_size=8, schedule="cosine", warmup=0.03, weight_decay=0.0, clip=1.0),
    learning_rate=LearningRates(lora=2e-4),
    eval_batch_size=8,
)

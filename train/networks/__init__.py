"""The networks, as functions of their parameters. They know nothing of LoRA."""

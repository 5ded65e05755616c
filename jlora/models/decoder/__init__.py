"""One decoder: Llama 2 and 3 (Touvron et al. 2023, Grattafiori et al. 2024), Mistral, Qwen 2 and 3, Gemma 1 and 2."""

"""GGUF files as checkpoints: names, configuration, tokenizer, blocks of types that UQFF does not have."""

"""Small models of random weights: checkpoints, directories of many architectures, GGUF files."""

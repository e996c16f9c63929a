"""Where a model comes from: checkpoints, GGUF files and configs, read as data; and the model's graph."""

"""Reads models: checkpoints, GGUF files and configs, only as data, and captures the model's graph."""

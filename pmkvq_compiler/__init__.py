"""A compiler for key/value-cache quantization."""

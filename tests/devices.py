"""Which GPUs a test needs."""

import pytest
import torch

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
EACH_GPU = ["cuda:0", pytest.param("cuda:1", marks=two_gpus)]
"""Torch's current device in tests, and another one."""

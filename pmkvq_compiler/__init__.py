"""A compiler for key/value-cache quantization."""

import os
import sys

_installed = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
if sys.argv[:1] == ["-m"] and sys.path[:1] == [os.getcwd()] != [_installed]:
    del sys.path[0]  # `python -m pmkvq_compiler.cli` must not import a `torch.py` from the current folder

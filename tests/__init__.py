"""Tests run as in a user's shell: variables that change what Python or a library does are not inherited.

`PYTHONDONTWRITEBYTECODE` is one: with it no test sees the bytecode that Python puts into folders it imports from.
"""

import os
import sys

for _name in [name for name in os.environ if name.startswith(("PYTHON", "HF_", "TRANSFORMERS_", "TRITON_", "TQDM_"))]:
    if _name != "TRITON_INTERPRET":  # with which checks of the kernels are started
        del os.environ[_name]
sys.dont_write_bytecode = False

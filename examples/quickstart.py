"""Compile a model, let the artifact write, and look at its cache.

    python examples/quickstart.py                                        # SmolLM2-135M-Instruct, a few minutes on a CPU
    python examples/quickstart.py Qwen/Qwen2.5-1.5B-Instruct out/qwen    # any causal language model

Only the first run compiles; the next ones load what it wrote.
"""

import argparse
from pathlib import Path

from transformers import AutoTokenizer

from pmkvq_compiler import runtime
from pmkvq_compiler.compile import compile_model
from pmkvq_compiler.options import CompileOptions

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("model", nargs="?", default="demo", help="hub id, folder, .gguf file or `demo` (%(default)s)")
parser.add_argument("artifact", nargs="?", type=Path, default="out/quickstart", help="folder to write (%(default)s)")
chosen = parser.parse_args()

if not chosen.artifact.exists():
    options = CompileOptions(chosen.model, chosen.artifact, budget="25%", max_len=4096)
    compile_model(options, lambda stage, done, total: print(f"\r{stage} {done}/{total}", end="\n" * (done == total)))

model, tokenizer = runtime.load(chosen.artifact), AutoTokenizer.from_pretrained(chosen.artifact)
cache = model.new_cache()
prompt = tokenizer("The whale rose out of the fog, and ", return_tensors="pt").input_ids
tokens = model.generate(prompt, max_new_tokens=200, do_sample=True, top_p=0.9, seed=0, cache=cache)

print(tokenizer.decode(tokens[0]))
print(f"{cache.bytes_used:,} of {cache.bytes_reserved:,} bytes hold {cache.length[0]} tokens")
print("bits of K and V in each layer:", cache.bits)

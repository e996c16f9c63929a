"""Continue a text with an artifact's `model.onnx`: prefill, then token by token, greedily.

    python examples/onnx/onnx_generate.py out/demo "The whale rose" --max-new-tokens 64

It needs onnxruntime and tokenizers, but neither torch nor the compiler.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxDecoder:
    """An onnxruntime session and the cache of its sequences, which start empty and all have the same length."""

    def __init__(self, path: Path, batch_size: int = 1, threads: int = 0) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.outputs = [output.name for output in self.session.get_outputs()]
        self.length = 0
        self.state: dict[str, onnxruntime.OrtValue] = {}
        for tensor in self.session.get_inputs()[2:]:  # after input_ids and position_ids
            fixed = [size if isinstance(size, int) else 0 for size in tensor.shape]
            self.state[tensor.name] = _value(np.zeros([batch_size, *fixed[1:]], DTYPES[tensor.type]))

    def __call__(self, input_ids: np.ndarray) -> np.ndarray:
        """Logits [B, S, vocab_size] of tokens [B, S] that follow those of earlier calls."""
        batch, count = input_ids.shape
        positions = np.arange(self.length, self.length + count, dtype=np.int64)
        inputs = {
            "input_ids": _value(input_ids.astype(np.int64)),
            "position_ids": _value(np.ascontiguousarray(np.broadcast_to(positions, (batch, count)))),
        }
        logits, *present = self.session.run_with_ort_values(self.outputs, {**inputs, **self.state})
        self.state = dict(zip(self.state, present, strict=True))  # outputs come in the order of the inputs
        self.length += count
        return logits.numpy()

    @property
    def cache_bytes(self) -> int:
        return sum(value.tensor_size_in_bytes() for value in self.state.values())


def _value(array: np.ndarray) -> onnxruntime.OrtValue:
    return onnxruntime.OrtValue.ortvalue_from_numpy(array)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("artifact", type=Path, help="folder that pmkvq-compile --onnx wrote")
    parser.add_argument("prompt")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    arguments = parser.parse_args()

    tokenizer = Tokenizer.from_file(str(arguments.artifact / "tokenizer.json"))
    decoder = OnnxDecoder(arguments.artifact / "model.onnx")
    tokens = tokenizer.encode(arguments.prompt).ids
    logits = decoder(np.array([tokens]))
    for _ in range(arguments.max_new_tokens):
        tokens.append(int(logits[0, -1].argmax()))
        logits = decoder(np.array([tokens[-1:]]))
    print(tokenizer.decode(tokens))
    print(f"[{decoder.length} tokens in {decoder.cache_bytes:,} bytes of cache]")


if __name__ == "__main__":
    main()

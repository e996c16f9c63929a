"""The artifact as a transformers model: `AutoModelForCausalLM.from_pretrained(ARTIFACT, trust_remote_code=True)`.

Weights, generated code and runtime are those of the folder that this file lies in; a hub id is downloaded as a whole.
Keys and values are kept in the runtime's progressively quantized cache, which `generate` makes by itself.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from operator import index
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from transformers import AutoConfig, GenerationConfig, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache
from transformers.generation.configuration_utils import GenerationMode
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple

MANIFEST, LARGEST_MANIFEST = "pmkvq.json", 64 << 20
AGAIN = "copy the artifact again or compile it again"
CACHE = next(
    name for name in ("cache", "past_key_values") if name in {one.name for one in fields(CausalLMOutputWithPast)}
)
"""What transformers calls the cache in its calls and outputs: `past_key_values` before 5.24."""
FOREIGN_CACHE = "the cache is a {}; a compiled artifact has its own cache: make one with the model's new_cache()"
CACHE_IMPLEMENTATIONS = (None, "dynamic")
FOREIGN_IMPLEMENTATION = (
    "cache_implementation={!r} is not supported: a compiled artifact has its own cache; leave it out"
)
TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
UNSUPPORTED = {
    "inputs_embeds": "give input_ids",
    "labels": "compute the loss from the logits",
    "output_attentions": "attention weights are not kept",
    "output_hidden_states": "hidden states are not kept",
}


class PmkvqCache(Cache):
    """The runtime's cache as a cache of transformers.

    transformers counts columns, which include padding. `cache`, the runtime's, counts each sequence's tokens.
    """

    def __init__(self, cache: Any) -> None:
        super().__init__(layers=[])
        self.cache = cache
        self._note(0, 0)

    def _note(self, columns: int, unpadded: int) -> None:
        """Note how many columns were fed, how many of the last hold a token in every row, and each row's tokens."""
        self._counted = columns, unpadded, list(self.cache.length)

    @property
    def columns(self) -> int:
        return self._counted[0]

    @property
    def unpadded(self) -> int:
        return self._counted[1]

    def check(self) -> None:
        """Raises `ValueError` where the runtime's cache holds more or fewer tokens than were counted here."""
        if self.cache.length != self._counted[2]:
            raise ValueError(
                "this cache was interrupted in the middle of a call, or its runtime cache was changed directly: it "
                f"holds {self.cache.length} tokens where {self._counted[2]} were counted; reset() it or make a new one"
            )

    def __copy__(self) -> PmkvqCache:
        return copy.deepcopy(self)

    def __repr__(self) -> str:
        try:
            held = f"{self.cache.bytes_used:,} of {self.cache.bytes_reserved:,} bytes"
        except ValueError:  # another thread uses it
            held = f"some of {self.cache.bytes_reserved:,} bytes"
        return f"PmkvqCache({self.batch_size} x {self.columns:,} of {self.cache.max_len:,} columns, {held})"

    def __len__(self) -> int:
        return len(self.cache.layers)

    @property
    def batch_size(self) -> int:
        return self.cache.batch_size

    @property
    def is_initialized(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether a crop restores the cache exactly: it undoes no lowering, what left a sliding window is lost, and a
        recurrent state is of all tokens at once."""
        plans = [layer.plan for layer in self.cache.layers]
        return not self.cache.plan.states and not any(
            plan.quantized or plan.sliding_window is not None for plan in plans
        )

    @property
    def is_sliding(self) -> list[bool]:
        return [layer.plan.sliding_window is not None for layer in self.cache.layers]

    @property
    def is_linear(self) -> list[bool]:
        return [False] * len(self)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.columns

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return self.cache.max_len

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        return self.cache.max_len

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise NotImplementedError("this cache is filled by the artifact's own attention; pass it to no other model")

    def count(self, mask: Tensor) -> None:
        """Count the columns of a call. Its `mask` [B, S] is true for tokens and false for padding."""
        padded = (~mask).any(0).flip(0)
        trailing = int(padded.int().argmax()) if bool(padded.any()) else len(padded) + self.unpadded
        self._note(self.columns + len(padded), trailing)

    def reset(self) -> None:
        self.cache.reset()
        self._note(0, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.check()
        self.cache.reorder(beam_idx)
        self._note(self.columns, self.unpadded)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.check()
        self.cache = self.cache.select(indices)
        self._note(self.columns, self.unpadded)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.check()
        repeats = _whole("repeats", repeats)
        self.cache = self.cache.select([row for row in range(self.batch_size) for _ in range(repeats)])
        self._note(self.columns, self.unpadded)

    def crop(self, tokens_to_remove: int) -> None:
        """Take back the last `-tokens_to_remove` columns, a number of at most 0.

        Raises `ValueError` where they are quantized or padding; nothing is changed then.
        """
        self.check()
        count = -_whole("tokens_to_remove", tokens_to_remove)
        if count < 0:
            raise ValueError(f"crop({tokens_to_remove}) is not supported; to take back n tokens call crop(-n)")
        if count > self.unpadded:
            raise ValueError(
                f"{count:,} columns cannot be taken back: only the last {self.unpadded:,} hold a token in every row; "
                f"feed the tokens that you keep to a new cache"
            )
        self.cache.crop(count)
        self._note(self.columns - count, self.unpadded - count)


class PmkvqForCausalLM(PreTrainedModel, GenerationMixin):
    """A compiled model, for inference only: it has no gradients, and its cache is always the artifact's."""

    main_input_name = "input_ids"
    _supports_sdpa = True  # attention is the artifact's; this keeps transformers from refusing its own default

    def __init__(
        self,
        config: PretrainedConfig,
        folder: Path,
        device: torch.device,
        dtype: str | torch.dtype | None,
        backend: str | None,
    ) -> None:
        super().__init__(config)
        package = _import_package(folder)
        self.compiled = package.load(device, dtype, backend)
        artifact = package.runtime.open_artifact(folder)
        self.prefill_chunk = package.runtime.PREFILL_CHUNK
        self.backend_on = partial(package.runtime.choose_backend, artifact.package, self.compiled.plan, backend=backend)
        self.constants = set(artifact.manifest.tensors[artifact.manifest.constants])
        for name in self.compiled.weights.keys() - self.constants:
            _attach(self, name, self.compiled.weights[name])
        self._apply(lambda value: value)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, *args: Any, **kwargs: Any) -> PmkvqForCausalLM:
        """The model in an artifact's folder or hub repository, by default in its own dtype and on the CPU.

        `dtype` is a torch dtype, its name or "auto"; `device_map` one device, {"": device} or "auto"; `backend` is
        "triton" or "reference", as in the runtime's `load`. Raises `ValueError` for what an artifact cannot do.
        """
        for name in ("quantization_config", "gguf_file", "subfolder", "state_dict"):
            if kwargs.get(name):
                raise ValueError(f"{name}={kwargs[name]!r} is not supported by a compiled artifact; leave it out")
        folder = _folder(pretrained_model_name_or_path, kwargs)
        config = copy.deepcopy(kwargs.get("config")) or AutoConfig.from_pretrained(folder)
        model = cls(config, folder, _device(kwargs.get("device_map")), _dtype(kwargs), kwargs.get("backend"))
        model.name_or_path = config.name_or_path = str(pretrained_model_name_or_path)
        model.generation_config = _defaults(folder, model.compiled.vocab_size)
        if getattr(config, "max_position_embeddings", None):
            config.max_position_embeddings = model.compiled.plan.max_len  # as long as the cache's budget allows
        return model.eval()

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"an artifact is saved by copying its folder, {self.name_or_path}")

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError(f"a compiled model is not pickled; copy its folder, {self.name_or_path}")

    def __copy__(self) -> PmkvqForCausalLM:
        twin = type(self).__new__(type(self))
        vars(twin).update(vars(self))
        return twin

    def __deepcopy__(self, memo: dict[int, Any]) -> PmkvqForCausalLM:
        memo[id(self)] = twin = type(self).__new__(type(self))
        vars(twin).update(copy.deepcopy(vars(self), memo))
        return twin

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PmkvqForCausalLM:
        """Move or convert the weights. Constants are moved, never converted. The backend is chosen for the device."""
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.compiled.dtype, device=self.compiled.device))
        weights = self.compiled.weights  # read by the generated code: changed in place
        weights.update(self.named_parameters())
        weights.update({name: weights[name].to(probe.device) for name in self.constants})
        changed = (probe.device, probe.dtype) != (self.compiled.device, self.compiled.dtype)
        attention, ops = self.compiled.attention, self.compiled.ops
        if changed:
            attention, ops = self.backend_on(probe.device, dtype=probe.dtype)
        self.compiled = replace(self.compiled, dtype=probe.dtype, device=probe.device, attention=attention, ops=ops)
        return self

    def new_cache(self, batch_size: int = 1, max_len: int | None = None) -> PmkvqCache:
        """An empty cache for `past_key_values`, for sequences of up to `max_len` tokens (by default as many as the
        budget allows)."""
        return PmkvqCache(self.compiled.new_cache(batch_size, max_len))

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: PmkvqCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: PmkvqCache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits [B, kept, vocab_size] of `input_ids` [B, S]: of the last `logits_to_keep` columns, of those that it
        lists, or of all (0).

        `attention_mask` [B, cached columns + S] marks padding (0), at either end of a row. `position_ids` follow from
        the mask by default. `cache` and `past_key_values` are the newer and the older name of one argument. Long input
        is fed in chunks, and all chunks but the first attend to tokens that may be quantized already.
        """
        for name in UNSUPPORTED.keys() & kwargs.keys():
            if kwargs[name] is not None and kwargs[name] is not False:
                raise ValueError(f"{name} is not supported by a compiled artifact; {UNSUPPORTED[name]}")
        for name, value in kwargs.items():
            if isinstance(value, Cache):  # ignoring it would continue the text without its past
                raise ValueError(f"{name} holds a cache; give it as cache or past_key_values")
        if cache is not None and past_key_values is not None:
            raise ValueError("cache and past_key_values are two names of one argument; give one of them")
        if input_ids is None:
            raise ValueError("input_ids are missing; a compiled artifact reads token ids only")
        ids, mask = self.compiled.check_inputs(input_ids, None)
        ids = ids.cpu()  # every check reads them, which is fast there
        use_cache = getattr(self.config, "use_cache", True) if use_cache is None else use_cache
        past = past_key_values if cache is None else cache
        if past is None:
            past = self.new_cache(ids.shape[0], None if use_cache else ids.shape[1])
        elif not isinstance(past, PmkvqCache):
            raise ValueError(FOREIGN_CACHE.format(type(past).__name__))
        if attention_mask is not None:
            ids, mask = self.compiled.check_inputs(ids, _new_columns(attention_mask, ids.shape, past.columns))
        positions = None if position_ids is None else self.compiled.check_positions(position_ids, mask)
        kept = _kept(logits_to_keep, ids.shape[1])
        self.compiled.check_cache(past.cache, ids.shape[0])
        parts = []
        with past.cache.claims.claim():
            past.check()
            past.cache.check_room(mask.sum(-1).tolist())
            for start in range(0, ids.shape[1], self.prefill_chunk):
                part = slice(start, start + self.prefill_chunk)
                wanted = kept[(kept >= start) & (kept < part.stop)] - start
                parts.append(
                    self.compiled(
                        ids[:, part],
                        past.cache,
                        None if positions is None else positions[:, part],
                        mask[:, part],
                        only=_grid(ids.shape[0], wanted),
                    ).unflatten(0, (ids.shape[0], len(wanted)))
                )
            past.count(mask)
        return CausalLMOutputWithPast(logits=torch.cat(parts, dim=1), **{CACHE: past if use_cache else None})

    def generate(self, *args: Any, custom_generate: Any = None, **kwargs: Any) -> Any:
        """As `GenerationMixin.generate`, except that it refuses strategies that fetch their code, which is written for
        other caches. A cache that is passed is in use until the end."""
        if isinstance(custom_generate, str):
            raise ValueError(
                f"custom_generate={custom_generate!r} is not supported: it is code for other caches; leave it out, or "
                f"give a function that calls the model"
            )
        if kwargs.get("cache_implementation") not in CACHE_IMPLEMENTATIONS:
            raise ValueError(FOREIGN_IMPLEMENTATION.format(kwargs["cache_implementation"]))
        if custom_generate is not None:
            kwargs["custom_generate"] = custom_generate
        given = [kwargs[name] for name in ("cache", "past_key_values") if isinstance(kwargs.get(name), PmkvqCache)]
        if not given:
            return super().generate(*args, **kwargs)
        with given[0].cache.claims.claim():
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self,
        generation_config: GenerationConfig,
        model_kwargs: dict[str, Any],
        generation_mode: Any,
        batch_size: int,
        max_cache_length: int,
    ) -> None:
        """Called by `generate`: makes our cache, and refuses what it cannot hold before any work is done."""
        if generation_config.cache_implementation not in CACHE_IMPLEMENTATIONS:
            raise ValueError(FOREIGN_IMPLEMENTATION.format(generation_config.cache_implementation))
        _check_ids(generation_config, self.compiled.vocab_size)
        past = model_kwargs.get(CACHE)
        if past is not None and not isinstance(past, PmkvqCache):
            raise ValueError(FOREIGN_CACHE.format(type(past).__name__))
        if generation_mode == GenerationMode.ASSISTED_GENERATION:
            self._check_assisted(past)
        if past is None and generation_config.use_cache is False:
            return
        if past is None:
            sequences = batch_size * max(generation_config.num_beams, generation_config.num_return_sequences)
            past = model_kwargs[CACHE] = self.new_cache(sequences)
        else:
            past._is_user_defined = True  # as transformers marks them
        if max_cache_length > past.get_max_length():
            raise ValueError(
                f"{max_cache_length + 1:,} tokens, prompt and new ones together, do not fit a cache of "
                f"{past.get_max_length():,} tokens for each of {past.batch_size} sequence(s); shorten one of them or "
                f"compile with a larger --max-len or --batch-size"
            )

    def _check_assisted(self, past: PmkvqCache | None) -> None:
        """Raises `ValueError` where drafted tokens that turn out wrong could not be taken back without a trace."""
        if not (self.new_cache(1, 1) if past is None else past).is_croppable:
            advice = "" if self.compiled.plan.states else ", or compile with --recipe none"
            raise ValueError(
                "assisted generation (assistant_model, prompt_lookup_num_tokens, assistant_early_exit) requires a "
                "cache that can be cropped, which one that quantizes, or has a sliding window or a recurrent state, "
                f"cannot; generate without it{advice}"
            )


def _defaults(folder: Path, vocab_size: int) -> GenerationConfig:
    """The artifact's generation defaults, without settings of other caches and without ids beyond the vocabulary."""
    config = GenerationConfig.from_pretrained(folder)
    config.cache_implementation = config.cache_config = None
    config.use_cache = True
    for name in TOKEN_IDS:
        value = getattr(config, name, None)
        ids = value if isinstance(value, list) else [value]
        known = [one for one in ids if _is_token(one, vocab_size)]
        setattr(config, name, known if isinstance(value, list) and known else next(iter(known), None))
    return config


def _check_ids(config: GenerationConfig, vocab_size: int) -> None:
    """Raises `ValueError` where tokens that `generate` writes or waits for are not in the vocabulary."""
    for name in TOKEN_IDS:
        value = getattr(config, name, None)
        value = value.tolist() if isinstance(value, Tensor) else value
        for one in value if isinstance(value, list) else [value]:
            if one is not None and not _is_token(one, vocab_size):
                raise ValueError(f"{name}={one!r} is not in the vocabulary of {vocab_size:,} tokens; give another one")


def _is_token(value: Any, vocab_size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < vocab_size


def _folder(name: str | Path, kwargs: dict[str, Any]) -> Path:
    """The artifact's folder; that of a hub id is downloaded or found in the hub's cache."""
    if Path(name).is_dir():
        return Path(name)
    options = ("cache_dir", "force_download", "local_files_only", "revision", "token")
    return Path(snapshot_download(str(name), **{option: kwargs[option] for option in options if kwargs.get(option)}))


def _import_package(folder: Path) -> ModuleType:
    """The package of the artifact in `folder`, under a unique name, since artifacts of one model may differ.

    Its `__init__.py` is run from the text that was compared with its digest, and imports the rest in the same way.
    Raises `ValueError` where the manifest or that file is damaged.
    """
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = file.read(LARGEST_MANIFEST)
        content = json.loads(manifest)
        package, digest = content["package"], content["files"][f"{content['package']}/__init__.py"]
        if not package.isidentifier():
            raise ValueError(f"{package[:60]!r} cannot name a package")
        path = (folder / package if (folder / package).is_dir() else folder.absolute().parent) / "__init__.py"
        text = path.read_bytes()
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(f"{folder / MANIFEST} cannot be used ({type(error).__name__}: {error}); {AGAIN}") from error
    if hashlib.sha256(text).hexdigest() != digest:
        raise ValueError(f"{path} was changed after the compile: its sha256 is not the one in {MANIFEST}; {AGAIN}")
    name = f"{package}_{hashlib.sha256(str(folder.absolute()).encode() + manifest).hexdigest()[:16]}"
    if name not in sys.modules:
        spec = importlib.util.spec_from_file_location(name, path, submodule_search_locations=[str(path.parent)])
        assert spec is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        try:
            exec(compile(text, str(path), "exec", dont_inherit=True), module.__dict__)
        except ImportError as error:
            del sys.modules[name]
            raise ValueError(str(error)) from error
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _attach(model: nn.Module, name: str, value: Tensor) -> None:
    """Register a weight under its name in the checkpoint, as in an ordinary model of transformers."""
    *path, leaf = name.split(".")
    for part in path:
        if part not in model._modules:
            model.add_module(part, nn.Module())
        model = model._modules[part]  # type: ignore[assignment]
    model.register_parameter(leaf, nn.Parameter(value, requires_grad=False))


def _device(device_map: Any) -> torch.device:
    if isinstance(device_map, dict):
        if len(set(map(str, device_map.values()))) != 1:
            raise ValueError(f"device_map={device_map!r} names several devices; an artifact runs on one")
        (device_map, *_) = device_map.values()
    if device_map == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return torch.device("cpu" if device_map is None else device_map)


def _dtype(kwargs: dict[str, Any]) -> str | torch.dtype | None:
    dtype = kwargs.get("dtype") or kwargs.get("torch_dtype")
    return None if dtype == "auto" else dtype


def _new_columns(attention_mask: Any, shape: torch.Size, cached: int) -> Tensor:
    """The part [B, S] of a mask over cached and new columns that is for the new ones, which have `shape`."""
    expected = [shape[0], cached + shape[1]]
    try:
        mask = torch.as_tensor(attention_mask)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ValueError(f"attention_mask cannot be read as numbers ({error}); give a tensor {expected}") from error
    if list(mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {list(mask.shape)}; give {expected}, a value for each cached and each new column"
        )
    return mask[:, cached:]


def _kept(logits_to_keep: Any, count: int) -> Tensor:
    """The columns, of `count`, whose logits are asked for."""
    columns = torch.arange(count)
    if not isinstance(logits_to_keep, Tensor):
        last = _whole("logits_to_keep", logits_to_keep)
        if last < 0:
            raise ValueError(f"logits_to_keep {last} is negative; give how many of the last columns, or 0 for all")
        return columns[-last:]
    try:
        return columns[logits_to_keep.cpu()]
    except IndexError as error:
        raise ValueError(f"logits_to_keep does not list columns among the {count:,} of input_ids ({error})") from error


def _whole(name: str, value: Any) -> int:
    try:
        return index(value)
    except TypeError as error:
        raise ValueError(f"{name} {value!r} is not a whole number; give an int") from error


def _grid(rows: int, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Indices of all `rows` times `columns`, row by row."""
    return torch.arange(rows).repeat_interleave(len(columns)), columns.repeat(rows)

"""Kernels that were compiled with the artifact: what is launched was compiled, and is launched as it was compiled."""

import ctypes
import dataclasses
import json
import re
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from pmkvq_compiler import runtime
from pmkvq_compiler.emit import cubins, launches
from pmkvq_compiler.errors import CompileError, UsageError
from pmkvq_compiler.runtime import warm_up
from pmkvq_compiler.runtime.cubins import Archive, CompiledKernels, Launch, archives, flat, runs_on
from pmkvq_compiler.runtime.fused import PLAIN
from pmkvq_compiler.runtime.fused_kernels import FUSED, FusedKernels
from pmkvq_compiler.runtime.kernels import LayerKernels
from pmkvq_compiler.runtime.load import choose_attention, import_generated
from pmkvq_compiler.runtime.tuning import Tuning

from ..conftest import CompileTiny
from .plans import cache_plan, layer_plan

pytest.importorskip("triton", reason="Triton has no wheel for this machine")

import triton
from triton.backends.compiler import GPUTarget

from ..kernel_checks import CONSERVATIVE, LIBRARY

SMALL = {"head_dim": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
OPTIONS = {"budget": "76KiB", "max_len": 420, "batch_size": 2, "block": 64, "window": 64, "calib_len": 160}
GEMMA = {**SMALL, "sliding_window": 200, "num_hidden_layers": 2}


@pytest.fixture
def compiled(compile_tiny: CompileTiny) -> Path:
    """One layer that ends at 8 bits, with its kernels for sm_90."""
    return compile_tiny("llama", SMALL, bits=(8,), aot=("sm_90",), **{**OPTIONS, "budget": "46KiB"})


def package_of(artifact: Path) -> Path:
    return artifact / json.loads((artifact / "pmkvq.json").read_text())["package"]


@dataclasses.dataclass
class Device:
    """Stands for the functions on a device: counts launches instead of running them."""

    launches: Counter[str] = dataclasses.field(default_factory=Counter)

    def function(self, name: str) -> Any:
        return SimpleNamespace(launch=lambda grid, parameters: self.launches.update([name]))


def run_through_all_stages(artifact: Path, modules: dict[str, Any]) -> set[tuple[int, int]]:
    """Run a model on the CPU whose kernels are launched from `modules`; the widths that its caches went through.

    Prompts of one token and many, ragged batches, caches of few tokens and many. Its numbers mean nothing.
    """
    package = package_of(artifact)
    names = import_generated(package / "kernels" / "layers.py").KERNELS
    attention = [LayerKernels(modules[name], CONSERVATIVE) for name in names]
    model = dataclasses.replace(runtime.load(artifact), attention=attention, ops=FusedKernels(modules[FUSED]))
    model.weights.update({name: tensor.clone() for name, tensor in model.weights.items()})  # aligned in memory
    widths = set()
    for batch, max_len in ((1, None), (2, None), (1, 1), (1, 70), (2, 130), (1, 300)):
        cache = model.new_cache(batch, max_len)
        for count in (1, 60, 1, 3, 1, 1, *[64, 1] * 6):
            if max(cache.length) + count > cache.max_len:
                continue
            ids = torch.full((batch, count), 5)
            mask = torch.ones_like(ids)
            mask[-1, : count // 2] = batch == 1
            model(ids, cache, attention_mask=mask)
            widths |= set(cache.bits)
    return widths


def test_every_launch_of_a_run_was_compiled(compiled: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = Device()
    monkeypatch.setattr(Archive, "function", lambda self, name: device.function(name))
    (path,) = archives(package_of(compiled)).values()
    archive = Archive(path, torch.device("cuda:0"))
    widths = run_through_all_stages(compiled, {name: archive.kernels(name) for name in ("attention_0", FUSED)})
    assert widths == {(16, 16), (16, 8), (8, 8)}, "the run was to go through every stage"
    assert len(device.launches) > 15
    entry = archive.index["modules"]["attention_0"]
    gone = next(key for key in entry["variants"] if json.loads(key)[0] == "lower")
    del entry["variants"][gone]
    with pytest.raises(runtime.InputError, match=r"the kernel lower was not compiled for sm_90 with .* --aot"):
        run_through_all_stages(compiled, {name: archive.kernels(name) for name in ("attention_0", FUSED)})


def test_every_launch_of_a_run_is_foreseen_for_each_kind_of_layer(compile_tiny: CompileTiny) -> None:
    artifact = compile_tiny("gemma2", GEMMA, **OPTIONS)
    checkpoint = [artifact / "model.safetensors"]
    foreseen = launches.launches_of(package_of(artifact), checkpoint)
    launched = {name: launches.Recorder(recorder.module) for name, recorder in foreseen.items()}
    run_through_all_stages(artifact, launched)
    assert len(launched) == 3
    for name, recorder in launched.items():
        assert recorder.launches.keys() <= foreseen[name].launches.keys()
        kernels = {"linear", "gate", "rope"} if name == FUSED else {"append", "lower", "decode", "merge"}
        assert {one.kernel for one in recorder.launches.values()} >= kernels
        for key, one in recorder.launches.items():
            assert one.divisible >= foreseen[name].launches[key].divisible, f"{key} relies on more than holds"


@pytest.mark.parametrize("tuning", [CONSERVATIVE, LIBRARY], ids=["kernels", "library"])
def test_the_first_launches_of_a_model_are_known_when_it_is_loaded(compile_tiny: CompileTiny, tuning: Tuning) -> None:
    """But for small kernels: those that merge the parts of a cache, whose number depends on the cache."""
    artifact = compile_tiny("gemma2", {**GEMMA, "attn_logit_softcapping": None}, dtype="bfloat16", **OPTIONS)
    package, model = package_of(artifact), runtime.load(artifact)
    names = import_generated(package / "kernels" / "layers.py").KERNELS
    modules = {name: import_generated(package / "kernels" / f"{name}.py") for name in names}
    known, launched = ({name: launches.Recorder(module) for name, module in modules.items()} for _ in range(2))
    for name, layer in zip(names, model.plan.layers, strict=True):
        warm_up.launch_first(LayerKernels(known[name], tuning), model.plan, layer, model.dtype)
    attention = [LayerKernels(launched[name], tuning) for name in names]
    for batch, counts in ((1, (3, 1, 70, 1, 1)), (2, (70, 1, 3))):
        cache = dataclasses.replace(model, attention=attention).new_cache(batch, 260)
        for count in counts:
            ids = torch.full((batch, count), 5)
            dataclasses.replace(model, attention=attention)(ids, cache, attention_mask=torch.ones_like(ids))
        assert [store.stage for store in cache.layers] == [0, 0]
    for name, recorder in launched.items():
        found, expected = (
            {key: one for key, one in each.launches.items() if one.kernel not in ("merge", "join")}
            for each in (recorder, known[name])
        )
        assert found.keys() == expected.keys()
        assert all(one.divisible >= expected[key].divisible for key, one in found.items())
    kernels = {one.kernel for recorder in launched.values() for one in recorder.launches.values()}
    assert ("halve" in kernels) == (tuning is LIBRARY)


def test_the_first_launches_of_other_ops_are_known_when_a_model_is_loaded(compile_tiny: CompileTiny) -> None:
    artifact = compile_tiny("gemma2", {**GEMMA, "attn_logit_softcapping": None}, dtype="bfloat16", **OPTIONS)
    package, model = package_of(artifact), runtime.load(artifact)
    code, module = (import_generated(package / name) for name in ("model.py", f"kernels/{FUSED}.py"))
    known, launched = (launches.Recorder(module) for _ in range(2))
    empty = {name: tensor.to("meta") for name, tensor in model.weights.items()}
    warm_up.observed_calls(code, empty, code.JOINED, model.plan, FusedKernels(known), (1,), (1, 2))  # type: ignore[arg-type]
    model = dataclasses.replace(model, ops=FusedKernels(launched))  # type: ignore[arg-type]
    cache = model.new_cache(1, 260)
    for count in (3, 1, 70, 1):
        model(torch.full((1, count), 5), cache)
    assert launched.launches.keys() == known.launches.keys()


def test_a_model_loads_though_its_first_kernels_cannot_be_compiled(
    compile_tiny: CompileTiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact = compile_tiny("gemma2", {**GEMMA, "attn_logit_softcapping": None}, dtype="bfloat16", **OPTIONS)
    package, plan = package_of(artifact), runtime.load(artifact).plan
    layers = import_generated(package / "kernels" / "attention_0.py")
    attention = [LayerKernels(layers, CONSERVATIVE)] * len(plan.layers)

    def fail(*arguments: Any) -> None:
        raise RuntimeError("no driver")

    monkeypatch.setattr(warm_up, "launch_first", fail)
    monkeypatch.setattr(torch.cuda, "device", lambda index: nullcontext())
    read = False
    with (
        pytest.warns(RuntimeWarning, match=r"could not be compiled while the model was loaded \(no driver\)"),
        warm_up.first_kernels(attention, PLAIN, fail, plan, torch.bfloat16, torch.device("cuda:0")),
    ):
        read = True
    assert read


def test_code_takes_the_parameters_that_are_passed(compiled: Path, tmp_path: Path) -> None:
    """As the machine code itself says."""
    (path,) = archives(package_of(compiled)).values()
    archive = Archive(path, torch.device("cuda:0"))
    tool = triton.knobs.nvidia.cuobjdump.path
    variants = archive.index["modules"]["attention_0"]["variants"]
    assert {json.loads(key)[0] for key in variants} >= {"append", "lower", "decode", "merge", "prefill"}
    for key, entry in variants.items():
        about = archive.index["cubins"][entry["cubin"]]
        file = tmp_path / entry["cubin"]
        file.write_bytes(archive.files.read(entry["cubin"]))
        text = subprocess.run([tool, "-elf", file], capture_output=True, text=True, check=True).stdout
        kernel, types, _ = json.loads(key)
        assert text.count("EIATTR_KPARAM_INFO") == len(flat(types)) + about["hidden"], key
        assert about["symbol"] == kernel
        assert re.search(rf"\.text\.{kernel}\b", text)
        assert set(entry["divisible"]) <= set(range(len(flat(types))))


def test_parameters_are_packed_as_the_driver_reads_them() -> None:
    seen: list[bytes] = []

    class Reads:
        def launch(self, grid: tuple[int, ...], parameters: Any) -> None:
            seen.extend(ctypes.string_at(address, 8) for address in parameters)

    words = torch.zeros(8, dtype=torch.int16)
    types = ["*i16", "i32", "i32", "i32", "fp32"]
    launch = Launch("append", Reads(), types, [0, 1], 2)  # type: ignore[arg-type]
    launch((1,), (words, (32, -5, 7), 0.5))
    assert struct.unpack("<Q", seen[0]) == (words.data_ptr(),)
    assert [struct.unpack("<i", one[:4])[0] for one in seen[1:4]] == [32, -5, 7]
    assert struct.unpack("<f", seen[4][:4]) == (0.5,)
    assert seen[5:] == [bytes(8)] * 2
    with pytest.raises(runtime.InputError, match=r"argument 1 of the kernel append is 24, .* not a multiple of 16"):
        launch((1,), (words, (24, 5, 7), 0.5))
    with pytest.raises(runtime.InputError, match="does not fit 32 bits"):
        launch((1,), (words, (32, 1 << 31, 7), 0.5))


@pytest.mark.parametrize(
    ("target", "yes", "no"),
    [
        ("sm_80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0), (10, 0)]),
        ("sm_90", [(9, 0)], [(8, 0), (10, 0)]),
        ("sm_100", [(10, 0)], [(9, 0), (10, 3), (12, 0)]),
    ],
)
def test_code_runs_on_devices_of_its_kind(target: str, yes: list[Any], no: list[Any]) -> None:
    assert all(runs_on(target, capability) for capability in yes)
    assert not any(runs_on(target, capability) for capability in no)


def test_kernels_are_taken_from_the_archive_that_fits_or_a_warning_says_not(
    compiled: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a device")
    package, device = package_of(compiled), torch.device("cuda:0")
    plan = import_generated(package / "plan.py").PLAN
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    with warnings.catch_warnings(), monkeypatch.context() as patch:
        warnings.simplefilter("error")
        patch.setitem(sys.modules, "triton", None)  # it is not needed
        attention = choose_attention(package, plan, device)
    assert isinstance(attention[0], LayerKernels)
    assert isinstance(attention[0].module, CompiledKernels)
    assert dataclasses.replace(runtime.load(compiled), attention=attention).kernels_from == "sm_90"
    with pytest.warns(UserWarning, match="kernels are for float32, not for bfloat16: Triton compiles"):
        attention = choose_attention(package, plan, device, dtype=torch.bfloat16)
    assert dataclasses.replace(runtime.load(compiled), attention=attention).kernels_from == "triton"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (10, 3))
    with pytest.warns(UserWarning, match="kernels are for sm_90, not for sm_103: Triton compiles"):
        attention = choose_attention(package, plan, device)
    assert isinstance(attention[0], LayerKernels)
    assert attention[0].module.__name__.endswith("attention_0")
    assert runtime.load(compiled).kernels_from == "reference"


def test_a_changed_archive_is_found(compiled: Path) -> None:
    manifest = json.loads((compiled / "pmkvq.json").read_text())
    name = f"{manifest['package']}/kernels/aot/sm_90.zip"
    assert name in manifest["files"]
    content = (compiled / name).read_bytes()
    try:
        (compiled / name).write_bytes(content[:-1] + b"x")
        with pytest.raises(runtime.ArtifactError, match=r"sm_90\.zip was changed after the compile"):
            runtime.load(compiled)
    finally:
        (compiled / name).write_bytes(content)


def test_what_cannot_be_compiled_is_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match="target 'sm_75' is not known; choose from sm_80, sm_90, sm_100"):
        cubins.check_targets(["sm_80", "sm_75"])
    short = cache_plan(layer_plan(block=32))
    with pytest.raises(UsageError, match=r"a block of 32 tokens .* leave --aot out"):
        cubins.check_plan(short)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="--aot needs the package triton"):
        cubins.check_targets(["sm_80"])
    cubins.check_targets([])


@pytest.mark.parametrize("widths", [[64, 32], [64, 32, 64, 64]])
def test_hidden_parameters_are_counted(widths: list[int]) -> None:
    entry = ".visible .entry merge(" + ",".join(f".param .u{width} merge_param_{width}" for width in widths) + ")"
    assert cubins.hidden_parameters(entry, ["*fp32", "i32"]) == len(widths) - 2
    with pytest.raises(ValueError, match="parameters have"):
        cubins.hidden_parameters(entry, ["*fp32", "*i32"])


def test_a_kernel_that_cannot_be_compiled_is_named(compiled: Path) -> None:
    file = package_of(compiled) / "kernels" / "attention_0.py"
    wrong = launches.Launched(
        "merge", ["*fp32"] * 4 + ["i32"] * 3, {"SPLITS_PADDED": 4, "CHUNK": 4, "num_warps": 2}, set()
    )
    with pytest.raises(
        CompileError, match=r"the kernel merge cannot be compiled for sm_90 \(.*int32.*\); leave sm_90 out"
    ):
        cubins.compile_all({0: cubins.Work(file, wrong, "sm_90")}, lambda stage, done, total: None)


@pytest.mark.parametrize(("target", "here"), [(80, 90), (90, None)])
def test_kernels_have_the_instructions_of_their_target_whatever_gpu_is_here(
    compiled: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, target: int, here: int | None
) -> None:
    """Those of sm_90 let kernels overlap and fetch blocks ahead; sm_80 has neither."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))  # nothing is found there
    present = None if here is None else cubins.Machine(GPUTarget("cuda", here, 32))
    monkeypatch.setattr(triton.runtime.driver, "_active", present)
    kernels = package_of(compiled) / "kernels"
    index = json.loads(zipfile.ZipFile(kernels / "aot" / "sm_90.zip").read("index.json"))
    for name, kernel in (("attention_0", "decode"), (FUSED, "gate")):
        variants = map(json.loads, index["modules"][name]["variants"])
        types, keywords = next((types, keywords) for one, types, keywords in variants if one == kernel)
        keywords |= {"PREFETCH": 1} if kernel == "decode" else {}
        launched = launches.Launched(kernel, types, keywords, set())
        text = cubins.compiled_by_triton(cubins.Work(kernels / f"{name}.py", launched, f"sm_{target}")).asm["ptx"]
        assert ("griddepcontrol" in text) is (target == 90)
        assert ("cp.async.bulk.prefetch" in text) is (target == 90 and kernel == "decode")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_kernels_say_what_triton_says_and_compile_nothing(
    compile_tiny: CompileTiny, monkeypatch: pytest.MonkeyPatch, dtype: str
) -> None:
    """Calls through every stage, and decoding by captured graphs."""
    target = "sm_{}{}".format(*torch.cuda.get_device_capability())
    options: dict[str, Any] = {**OPTIONS, "dtype": dtype}
    artifact = compile_tiny("gemma2", GEMMA, aot=(target,), **options)
    with_triton = compile_tiny("gemma2", GEMMA, **options)

    def outputs(model: runtime.CompiledModel) -> tuple[list[torch.Tensor], torch.Tensor, list[tuple[int, int]]]:
        generator = torch.Generator().manual_seed(0)
        logits, cache = [], model.new_cache(batch_size=2)
        for count in (100, 1, 1, 150, 1, 130, 1):
            ids = torch.randint(3, 128, (2, count), generator=generator)
            logits.append(model(ids, cache).cpu())
        tokens = model.generate(torch.arange(3, 33).unsqueeze(0), 300, eos_token_id=())
        return logits, tokens.cpu(), cache.bits

    model = runtime.load(with_triton, "cuda")
    assert model.kernels_from == "triton"
    expected = outputs(model)

    def refuse(*arguments: Any, **keywords: Any) -> None:
        raise AssertionError("Triton was asked to compile or to launch")

    monkeypatch.setattr(triton, "compile", refuse)
    monkeypatch.setattr("triton.compiler.compile", refuse)
    monkeypatch.setattr("triton.runtime.jit.JITFunction.run", refuse)
    model = runtime.load(artifact, "cuda")
    assert model.kernels_from == target
    found = outputs(model)
    assert found[2] == expected[2]
    for ours, theirs in zip(found[0], expected[0], strict=True):
        error = ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()
        assert error < (2e-2 if dtype == "bfloat16" else 1e-4), f"the logits differ by {error:.1e}"
    assert (found[1] == expected[1]).float().mean() > 0.5


@pytest.mark.gpu
def test_the_first_tokens_find_their_kernels_compiled(
    compile_tiny: CompileTiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    artifact, compiled = compile_tiny("gemma2", GEMMA, **OPTIONS), list[tuple[str, bool]]()

    def note(*, metadata: dict[str, Any], cache_hit: bool, **others: Any) -> None:
        compiled.append((metadata["name"], cache_hit))

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(triton.knobs.compilation, "listener", note)
    model = runtime.load(artifact, "cuda")
    assert {name for name, _ in compiled} >= {"append", "decode", "prefill", "unpack"}
    compiled.clear()
    for batch in (1, 2):
        model.generate(torch.full((batch, 70), 5), 20, eos_token_id=())
    assert {name for name, _ in compiled} <= {"merge"}
    compiled.clear()
    runtime.load(artifact, "cuda").generate(torch.full((1, 70), 5), 20, eos_token_id=())
    assert all(hit for _, hit in compiled), "the next load finds the kernels on the disk"

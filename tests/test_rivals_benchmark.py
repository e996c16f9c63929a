"""The comparison with rivals measures what it says, on models that take no time."""

from __future__ import annotations

import importlib
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import gguf
import pytest
import torch
import torch.nn.functional as F
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache, PreTrainedModel

from .conftest import CompileTiny
from .gguf_files import gguf_file
from .models import SHAPE, tiny_folder, tiny_model

BENCHMARKS = Path(__file__).parent.parent / "examples" / "benchmarks"
TOKENS = torch.randint(3, 128, (301,), generator=torch.Generator().manual_seed(0)).tolist()
NUMBERS = SHAPE["num_hidden_layers"] * SHAPE["num_key_value_heads"] * 2 * SHAPE["head_dim"]


@pytest.fixture
def rivals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("rivals")


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("rival_engines")


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    return tiny_model("qwen2").requires_grad_(False)


@pytest.mark.parametrize(
    ("lengths", "chunk", "decoded", "sizes"),
    [
        ([300], 128, 2, [128, 128, 42, 1, 1]),
        ([300], 128, 0, [128, 128, 44]),
        ([300, 100], 64, 1, [64, 35, 1, 64, 64, 64, 7, 1]),
        ([300, 299], 299, 3, [296, 1, 1, 1, 1]),
    ],
)
def test_pieces_cover_the_text_and_end_at_every_length(
    engines: ModuleType, lengths: list[int], chunk: int, decoded: int, sizes: list[int]
) -> None:
    pieces = list(engines.Text(TOKENS, lengths, chunk, decoded).pieces())
    assert [piece.stop - piece.start for piece in pieces] == sizes
    assert [place for piece in pieces for place in range(piece.start, piece.stop)] == list(range(300))
    assert set(lengths) <= {piece.stop for piece in pieces}


def test_full_precision_is_no_different_from_itself_and_has_the_models_perplexity(
    engines: ModuleType, model: PreTrainedModel
) -> None:
    text = engines.Text(TOKENS, [200, 300], 64, 2)
    full, same = (engines.Transformers(model, DynamicCache(config=model.config)) for _ in range(2))
    rows = engines.compare(full, {("the", "same"): same}, text, NUMBERS)
    assert [row.tokens for row in rows] == [200, 300]
    for row in rows:
        assert (row.rival, row.cache, row.true_bits, row.agreement) == ("the", "same", 32, 1)
        assert row.divergence < 1e-9
        assert row.tokens_per_second > 0 < row.full_tokens_per_second
        logits = model(torch.tensor([TOKENS[: row.tokens]])).logits[0]
        expected = F.cross_entropy(logits, torch.tensor(TOKENS[1 : row.tokens + 1])).exp().item()
        assert row.perplexity == row.full_perplexity == pytest.approx(expected, rel=1e-4)


def test_divergence_and_agreement_are_those_of_all_logits_at_once(engines: ModuleType, model: PreTrainedModel) -> None:
    other = tiny_model("qwen2", seed=1).requires_grad_(False)
    full, changed = (engines.Transformers(one, DynamicCache(config=one.config)) for one in (model, other))
    (row,) = engines.compare(full, {("a", "b"): changed}, engines.Text(TOKENS, [300], 100, 1), NUMBERS)
    p, q = (one(torch.tensor([TOKENS[:300]])).logits[0].double().log_softmax(-1) for one in (model, other))
    divergences = (p.exp() * (p - q)).sum(-1)
    assert row.divergence == pytest.approx(divergences.mean().item(), rel=1e-4)
    assert row.late_divergence == pytest.approx(divergences[150:].mean().item(), rel=1e-4)
    assert row.agreement == pytest.approx((p.argmax(-1) == q.argmax(-1)).double().mean().item())
    assert row.perplexity != pytest.approx(row.full_perplexity, rel=1e-3)


@pytest.mark.parametrize("name", ["HQQ", "HQQ, K by channel", "quanto", "quanto, K by channel"])
@pytest.mark.parametrize(("nbits", "dtype"), [(4, torch.bfloat16), (2, torch.float32)])
def test_true_bits_of_a_quantized_cache_count_scales_and_recent_tokens(
    rivals: ModuleType, engines: ModuleType, model: PreTrainedModel, name: str, nbits: int, dtype: torch.dtype
) -> None:
    for module in rivals.RIVALS["transformers"].modules:
        pytest.importorskip(module, reason="a rival, which the script says how to install")
    options = {**rivals.TRANSFORMERS_CACHES[name], "nbits": nbits}
    quantized = engines.Transformers(model, engines.Rounded(dtype, config=model.config, **options))
    full = engines.Transformers(model, DynamicCache(config=model.config))
    text = engines.Text(TOKENS, [276], 256, 20)
    (row,) = engines.compare(full, {(name, str(nbits)): quantized}, text, NUMBERS)
    exact = 8 * dtype.itemsize
    parameters = 2 * exact / 64  # a scale and a zero point for 64 numbers
    assert row.true_bits == pytest.approx((256 * (nbits + parameters) + 20 * exact) / 276, rel=1e-3)
    assert row.divergence > 0


def test_bytes_of_tensors_are_found_inside_what_holds_them(engines: ModuleType) -> None:
    packed = TwoTensor(torch.zeros(8, dtype=torch.float16), torch.ones(8, dtype=torch.float16))
    held = {"keys": packed, "values": (torch.zeros(3), {"scale": torch.zeros(2, dtype=torch.uint8)}), "nbits": 4}
    assert engines.tensor_bytes(held) == 2 * 16 + 12 + 2


@pytest.fixture(scope="module")
def artifact(compile_tiny: CompileTiny) -> Path:
    """One layer whose blocks are quantized as soon as they leave the window, in bfloat16."""
    return compile_tiny("llama", {"num_hidden_layers": 1}, recipe="uniform", budget="60%", dtype="bfloat16")


def test_an_artifact_computes_in_float32_and_its_cache_has_the_bytes_of_its_plan(
    engines: ModuleType, artifact: Path
) -> None:
    loaded = engines.open_source(str(artifact.parent / "source"), "bfloat16").load_model("sdpa").float()
    full, numbers = DynamicCache(config=loaded.config), NUMBERS // SHAPE["num_hidden_layers"]
    caches = {("ours", name): engines.Artifact(artifact, 300, exact=name == "exact") for name in ("16 bits", "exact")}
    text = engines.Text(TOKENS, [60, 300], 64, 2)
    rounded, exact, quantized, _ = engines.compare(engines.Transformers(loaded, full), caches, text, numbers)
    assert max(exact.divergence, rounded.divergence) < 1e-4, "so far all tokens are in the window"
    assert rounded.perplexity == pytest.approx(rounded.full_perplexity, rel=1e-2)
    assert quantized.divergence > 1e-3
    arenas, wider = (
        sum(layer.arena.untyped_storage().nbytes() for layer in one.cache.layers) for one in caches.values()
    )
    assert quantized.true_bits == 8 * arenas / (300 * numbers) < 60 / 100 * 16
    assert wider > arenas == engines.load(artifact).new_cache(max_len=300).bytes_reserved


def test_llama_cpps_types_have_the_bits_of_their_blocks(engines: ModuleType, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="a rival, which the script says how to install")
    gguf_file(tmp_path / "tiny.gguf", "llama", tokenizer=True, vocab_size=101, head_dim=64)
    tokens = [token % 101 for token in TOKENS]
    bits = {"f16": 16, "q8_0": 8.5, "q5_1": 6, "q4_0": 4.5}
    text = engines.Text(tokens, [300], 64, 2)
    rows = engines.llama_caches("llama.cpp", str(tmp_path / "tiny.gguf"), list(bits), text, 4 * NUMBERS)
    assert {row.cache: row.true_bits for row in rows} == bits
    assert [row.divergence for row in rows] == sorted(row.divergence for row in rows)
    assert rows[0].divergence < 0.01 * rows[1].divergence
    expected = engines.open_source(str(tmp_path / "tiny.gguf"), "float32").load_model("sdpa")
    logits = expected(torch.tensor([tokens[:300]])).logits[0]
    perplexity = F.cross_entropy(logits, torch.tensor(tokens[1:])).exp().item()
    assert rows[0].full_perplexity == pytest.approx(perplexity, rel=1e-2)


def test_a_file_with_packed_weights_is_the_same_model_in_float32(
    rivals: ModuleType, engines: ModuleType, tmp_path: Path
) -> None:
    whole, small, again = (tmp_path / f"{name}.gguf" for name in ("whole", "small", "again"))
    gguf_file(whole, "qwen2", tokenizer=True, vocab_size=101, header={"general.author": "nobody"})
    packed_copy(whole, small)
    assert small.stat().st_size < 0.6 * whole.stat().st_size
    assert rivals.unpacked(small, again) == again
    changed = again.stat().st_mtime_ns
    assert rivals.unpacked(small, again).stat().st_mtime_ns == changed, "it is not written twice"
    assert list(tmp_path.glob("*.partial")) == []
    before, after = (engines.open_source(str(path), "float32") for path in (small, again))
    assert after.config.to_dict() == before.config.to_dict()
    assert after.tokenizer.get_vocab() == before.tokenizer.get_vocab()
    states = [source.load_model("sdpa").state_dict() for source in (before, after)]
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    fields = [
        {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()} for path in (small, again)
    ]
    assert fields[1]["general.author"] == "nobody"
    ignored = {name for name in fields[0] if name.startswith("GGUF.")} | {"general.file_type"}
    assert {name: value for name, value in fields[0].items() if name not in ignored} == {
        name: value for name, value in fields[1].items() if name not in ignored
    }


def packed_copy(path: Path, copy: Path) -> None:
    """A file with the matrices of another in blocks of 8 bits."""
    reader, kind = gguf.GGUFReader(path), gguf.GGMLQuantizationType.Q8_0
    writer = gguf.GGUFWriter(copy, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        if len(tensor.shape) == 2:
            writer.add_tensor(tensor.name, gguf.quantize(tensor.data, kind), raw_dtype=kind)
        else:
            writer.add_tensor(tensor.name, tensor.data)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()


def test_mikv_with_all_tokens_at_16_bits_is_exact_and_with_fewer_has_the_bits_of_its_share(
    rivals: ModuleType, tmp_path: Path
) -> None:
    mikv = importlib.import_module("mikv")
    model = rivals.open_source(str(tiny_folder(tmp_path, "qwen2")), "float32").load_model(rivals.ATTENTION)
    ids, positions = torch.tensor([TOKENS[:300]]), torch.arange(300)[None]
    outputs = []
    for share, high in ((1.0, 16), (0.25, 8)):
        with torch.no_grad(), rivals.observed(method := mikv.MiKV(share, high)):
            outputs.append(rivals.logits_of(model, ids, positions)[:])
    beside = (2 * 32 + 16) / (2 * SHAPE["head_dim"])  # two fp16 numbers for K and for V, and the token's attention
    assert method.true_bits == pytest.approx(0.25 * 8 + 0.75 * 2 + beside)
    exact = model(ids).logits[0]
    assert (outputs[0] - exact).abs().max() < 1e-2 < (outputs[1] - exact).abs().max()
    whole, quarter = rivals.mikv_rows(model, TOKENS[:300], [1.0, 0.25])
    assert (quarter.rival, quarter.cache, quarter.tokens) == ("mikv", "25% at 8 bits", 300)
    assert quarter.true_bits == method.true_bits < whole.true_bits
    assert 0 < whole.divergence < quarter.divergence
    assert quarter.full_perplexity == pytest.approx(
        F.cross_entropy(exact[:-1], torch.tensor(TOKENS[1:300])).exp().item(), rel=1e-4
    )


def test_tokens_with_the_most_attention_and_the_last_keep_their_place_and_none_comes_back(rivals: ModuleType) -> None:
    mikv = importlib.import_module("mikv")
    attention = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3, 2], [1, 2, 3, 4, 5, 6, 7, 8]])
    wide = torch.ones(2, 8, dtype=torch.bool)
    assert mikv.kept(attention, wide, 4).int().tolist() == [[1, 1, 0, 0, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1]]
    wide[0, 0] = False
    assert mikv.kept(attention, wide, 4)[0].int().tolist() == [0, 1, 1, 0, 0, 0, 1, 1]
    assert not mikv.kept(attention, wide, 0).any()


def test_a_rival_that_is_missing_is_named_with_the_way_to_get_it(
    rivals: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("llama.cpp", "transformers"):
        monkeypatch.setitem(rivals.RIVALS, name, replace(rivals.RIVALS[name], modules=("json", "not_there")))
        arguments = ["--model", __file__, "--rivals", f"pmkvq-compile,{name}", "--output", str(tmp_path / "out")]
        with pytest.raises(SystemExit, match=f"^{name} needs the module not_there, .* -m pip install .*--rivals$"):
            rivals.main(arguments)
    assert not (tmp_path / "out").exists()
    rivals.check_installed("pmkvq-compile", sys.executable)
    monkeypatch.setattr(rivals, "PROJECT", "not_here")
    with pytest.raises(SystemExit, match=r"needs the module not_here, .* -m pip install \.`"):
        rivals.check_installed("llama.cpp", sys.executable)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--rivals", "gpt4all"], "'gpt4all' is not known; choose among pmkvq-compile, llama.cpp"),
        (["--types", "q3_0"], "'q3_0' is not known; choose among f32, f16"),
        (["--caches", "HQQ;fp4"], "'fp4' is not known; choose among HQQ"),
        (["--python", f"vllm={sys.executable}"], "'vllm' is not known"),
        (["--python", "llama.cpp=/nowhere/python"], "'/nowhere/python' of llama.cpp is no program"),
        (["--model", "nowhere.gguf"], "'nowhere.gguf' is not a file"),
        (["--lengths", "0"], "'0' is not a list of numbers above 0"),
        (["--lengths", "2048,4000"], "--lengths is not a multiple of 64, and 'quanto, K by channel' only takes whole"),
        (["--decode", "16"], "--decode is not a multiple of 64"),
        (["--chunk", "100"], "--chunk is not a multiple of 64"),
    ],
)
def test_unusable_arguments_are_refused_at_once(
    rivals: ModuleType, arguments: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        rivals.main(["--model", __file__, *arguments])
    assert reason in capsys.readouterr().err


def test_rows_are_kept_and_shown_as_a_table_and_a_picture(rivals: ModuleType, tmp_path: Path) -> None:
    tmp_path = tmp_path / "tiny"
    tmp_path.mkdir()
    ours = [
        rivals.Row("pmkvq-compile", "4bits", n, 4.0, 28.65, 28.59, 1.7e-3, 0.971, 3e-3, 9.5, 10.25)
        for n in (4096, 2048)
    ]
    simulated = rivals.Row("kivi", "6bits", 4096, 5.25, 29.0, 28.6, 2e-2, 0.9)
    older = [replace(row, divergence=1.0) for row in (*ours, simulated)]
    for rows in (older, ours, [simulated]):
        rivals.add_rows(rows, tmp_path / "rivals.csv")
    read = rivals.read_rows(tmp_path / "rivals.csv")
    assert read[:2] == ours
    assert math.isnan(read[2].tokens_per_second)
    known = {"tokens_per_second": 0, "full_tokens_per_second": 0, "late_divergence": 0}
    assert replace(read[2], **known) == replace(simulated, **known)
    rivals.main(["--model", "tiny.gguf", "--plot", "--output", str(tmp_path.parent)])
    table = (tmp_path / "rivals.md").read_text()
    assert "| pmkvq-compile, 4bits | 4.00 | 28.650 | 28.590 | 1.7e-03 | 3.0e-03 | 97.1% | 9.5 | 10.2 |" in table
    assert "| kivi, 6bits | 5.25 | 29.000 | 28.600 | 2.0e-02 |  | 90.0% |  |  |" in table
    assert table.index("2,048 tokens") < table.index("4,096 tokens")
    assert "<svg" in (tmp_path / "rivals.svg").read_text()


def test_a_process_of_its_own_does_a_task_and_writes_its_rows(
    engines: ModuleType, artifact: Path, tmp_path: Path
) -> None:
    task = {
        "engine": "pmkvq-compile",
        "options": {"full": str(artifact), "caches": {"exact": str(artifact)}},
        "text": {"tokens": TOKENS[:101], "lengths": [100], "chunk": 50, "decoded": 0},
        "numbers": NUMBERS,
        "threads": torch.get_num_threads(),
    }
    (tmp_path / "task.json").write_text(json.dumps(task))
    engines.main(tmp_path / "task.json")
    (row,) = json.loads((tmp_path / "task.rows.json").read_text())
    assert (row["rival"], row["tokens"]) == ("pmkvq-compile", 100)
    assert 0 < row["divergence"] < 1e-4, "K and V are rounded to 16 bits, and nothing else differs"

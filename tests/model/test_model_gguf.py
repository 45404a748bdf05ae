"""GGUF files: every type gguf decodes, any interval of any tensor, and whole models."""

import gguf
import numpy as np
import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import Deployment, Piece, relative_error, stages
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Kind
from gguf_files import permute, write
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, LlamaConfig
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

from evener.errors import InvalidInput, UnsupportedModel
from evener.model import gguf_file
from evener.model.gguf_file import GgufFile, check_decodable
from evener.model.source import default_model, open_model

TOKENS = [5, 17, 3, 88, 41, 2, 96, 0, 13, 13, 54, 9, 71, 30, 22, 6, 64, 7, 33]


def decodable(kind):
    try:
        check_decodable(kind, "test")
    except UnsupportedModel:
        return False
    return True


DECODABLE = [k for k in Kind if decodable(k)]
ROWS = 6


@pytest.fixture(scope="module")
def every_type(tmp_path_factory):
    """One tensor of random blocks per type, six rows of two to eight blocks; and all of them decoded whole."""
    path = tmp_path_factory.mktemp("gguf") / "types.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    rng = np.random.default_rng(0)
    whole = {}
    for kind in DECODABLE:
        block, width = GGML_QUANT_SIZES[kind]
        blocks = 256 // block * 2 if block < 256 else 2
        if kind in (Kind.F32, Kind.F16):
            raw = rng.standard_normal((ROWS, blocks)).astype(np.float32 if kind == Kind.F32 else np.float16)
            whole[kind] = raw.astype(np.float32)
        else:
            raw = rng.integers(0, 256, (ROWS, blocks * width), dtype=np.uint8)
            with np.errstate(all="ignore"):
                whole[kind] = gguf.quants.dequantize(raw, kind)
        writer.add_tensor(f"t.{kind.name}", raw, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return GgufFile(path), whole


def test_the_types_of_real_files_are_decodable():
    names = {k.name for k in DECODABLE}
    assert {"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K",
            "IQ4_NL", "IQ4_XS", "IQ2_XXS", "IQ3_S", "TQ1_0", "MXFP4"} <= names  # fmt: skip
    assert len(DECODABLE) >= 26


@pytest.mark.parametrize("kind", DECODABLE, ids=lambda k: k.name)
@given(data=st.data())
@settings(max_examples=6, deadline=None)
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_any_interval_equals_the_slice_of_the_whole(every_type, kind, data):
    file, whole = every_type
    want = whole[kind]
    a, b = sorted(data.draw(st.lists(st.integers(0, ROWS), min_size=2, max_size=2)))
    c, d = sorted(data.draw(st.lists(st.integers(0, want.shape[1]), min_size=2, max_size=2)))
    order = np.array(data.draw(st.permutations(range(a, b))), np.int64)
    np.testing.assert_array_equal(file.rows(f"t.{kind.name}", slice(a, b), (c, d)), want[a:b, c:d])
    np.testing.assert_array_equal(file.rows(f"t.{kind.name}", order, (c, d)), want[order, c:d])


def test_only_the_covering_blocks_are_decoded(every_type, monkeypatch):
    file, whole = every_type
    decoded = []

    def spy(raw, kind):
        decoded.append(raw.shape)
        return gguf.quants.dequantize(raw, kind)

    monkeypatch.setattr(gguf_file, "dequantize", spy)
    got = file.rows("t.Q8_0", slice(2, 4), (40, 70))
    np.testing.assert_array_equal(got, whole[Kind.Q8_0][2:4, 40:70])
    assert decoded == [(1, 2 * 2 * 34)]  # columns 40..70 of two rows lie in blocks 1 and 2, of 34 bytes each


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_large_tensors_are_decoded_in_chunks(every_type, monkeypatch):
    file, whole = every_type
    monkeypatch.setattr(gguf_file, "CHUNK_ELEMENTS", 2 * 512)
    np.testing.assert_array_equal(file.rows("t.Q4_1", slice(1, 6), (3, 500)), whole[Kind.Q4_1][1:6, 3:500])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_model_in_a_file_equals_transformers(checkpoint, tmp_path, name):
    directory, model = checkpoint(name)
    source = open_model(write(tmp_path / f"{name}-F32.gguf", model))
    assert source.name == name
    in_directory = open_model(directory).spec
    for field in ("vocab", "hidden", "layers", "heads", "kv_heads", "head_dim", "ffn", "max_position", "tied",
                  "qkv_bias", "o_bias", "mlp_bias", "qk_norm"):  # fmt: skip
        assert getattr(source.spec, field) == getattr(in_directory, field), field
    n = source.spec.heads
    deployment = Deployment(source, stages(source.spec, heads=[(0, 1), (1, n)]))
    with torch.no_grad():
        want = model(torch.tensor([TOKENS])).logits[0]
    assert relative_error(deployment.run([Piece(0, 0, TOKENS)]), want) < 1e-4


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q8_0, Kind.BF16, Kind.F16], ids=lambda k: k.name)
def test_q_rows_come_back_in_rotation_halves(tmp_path, kind):
    """Any interval of q and k rows, also one that cuts heads, is in Hugging Face order."""
    config = LlamaConfig(vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    source = open_model(write(tmp_path / "m.gguf", model, kind))
    for part, heads in (("q", 4), ("k", 2)):
        value = getattr(model.model.layers[0].self_attn, f"{part}_proj").weight.detach().numpy()
        kept = gguf.quants.dequantize(gguf.quants.quantize(permute(value, heads), kind), kind)
        want = np.empty_like(kept)
        for head in range(heads):
            block = kept[head * 16 : head * 16 + 16]
            want[head * 16 : head * 16 + 8], want[head * 16 + 8 : head * 16 + 16] = block[0::2], block[1::2]
        got = source.read(f"model.layers.0.self_attn.{part}_proj.weight", (5, 29), (3, 50))
        np.testing.assert_array_equal(got.numpy(), want[5:29, 3:50])
        assert np.abs(got.numpy() - value[5:29, 3:50]).max() < 0.02


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"expert_count": 8}, "expert_count=8 is not implemented"),
        ({"rope__scaling__type": "yarn"}, "rope.scaling.type='yarn' is not implemented"),
        ({"attention__sliding_window": 128}, "attention.sliding_window=128 is not implemented"),
        ({"rope__dimension_count": 4}, "rope.dimension_count=4 is not implemented"),
    ],
)
def test_what_the_decoder_lacks_is_refused(checkpoint, tmp_path, overrides, message):
    _, model = checkpoint("smol")
    with pytest.raises(UnsupportedModel, match=message):
        open_model(write(tmp_path / "m.gguf", model, **overrides))


def test_damaged_files_are_refused_with_the_remedy(checkpoint, tmp_path):
    _, model = checkpoint("smol")
    data = write(tmp_path / "whole.gguf", model).read_bytes()
    path = tmp_path / "m.gguf"
    for damaged in (b"", b"GGML" + data[4:], data[:100], data[: len(data) // 2], b"GGUF\x00\x00\x00\x03" + data[8:]):
        path.write_bytes(damaged)
        with pytest.raises(InvalidInput, match="download it again"):
            open_model(path)


def test_an_unknown_architecture_lists_the_supported_ones(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "mamba")
    writer.add_tensor("token_embd.weight", np.zeros((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedModel, match=r"'mamba' is not supported; supported: llama .*qwen2 .*qwen3"):
        open_model(tmp_path / "m.gguf")


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_default_model_equals_transformers_loading_of_the_same_file():
    path = default_model()
    source = open_model()
    # The published config, and what from_pretrained(gguf_file=...) does without the accelerate package it asks for.
    config = LlamaConfig(vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
                         num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=8192,
                         rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
                         tie_word_embeddings=True)  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    loaded = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert model.load_state_dict(loaded, strict=False).missing_keys == ["lm_head.weight"]  # tied
    model.tie_weights()
    tokens = source.tokenizer().encode("The capital of France is Paris, and 12 x 12 = 144.\n\nOnce upon a time")
    with torch.no_grad():
        want = model(torch.tensor([tokens])).logits[0]
    spec = source.spec
    split = stages(spec, layers=[(0, 19), (19, 30)], heads=[(0, 5), (5, 9)], ffn=[(0, 1000), (1000, 1536)])
    for plan in (stages(spec), split):
        deployment = Deployment(source, plan)
        assert relative_error(deployment.run([Piece(0, 0, tokens[:7])]), want[:7]) < 1e-4
        got = [deployment.run([Piece(1, a, tokens[a:b])]) for a, b in ((0, 5), (5, 6), (6, len(tokens)))]
        assert relative_error(torch.cat(got), want) < 1e-4
        assert torch.equal(torch.cat(got).argmax(1), want.argmax(1))

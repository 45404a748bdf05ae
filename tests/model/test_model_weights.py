"""A rank reads what it computes with, and nothing more."""

import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import stages
from gguf_files import write

from evener.errors import UnsupportedModel
from evener.kernels import PackedWeight
from evener.model.decoder import StageModel
from evener.model.source import open_model
from evener.model.weights import Table
from evener.spec.memory import weight_bytes


def load(source, stage, rank, first=True, last=True):
    return StageModel(source, source.spec, stage, stage.shards[rank], first_stage=first, last_stage=last, rank=rank)


def held(model):
    """Bytes that the weights of a StageModel keep, without the padding of the last panels; what overlaps is one."""
    ends = [t.weight if isinstance(t, Table) else t for t in model.ends]
    weights = [w for w in [w for layer in model.layers for w in layer] + ends if w is not None]
    packed = [isinstance(w, PackedWeight) for w in weights]
    data = [w.data if p else w for w, p in zip(weights, packed, strict=True)]
    counts = [w.n * w.k if p else w.numel() for w, p in zip(weights, packed, strict=True)]
    kept, end = [], 0
    for at, size, count in sorted((d.data_ptr(), d.nbytes, c) for d, c in zip(data, counts, strict=True)):
        if at < end:
            kept[-1] = max(kept[-1], count)
        else:
            kept.append(count)
        end = max(end, at + size)
    return 4 * sum(kept)


def lopsided(spec):
    n, v = spec.heads, spec.vocab
    return stages(
        spec,
        layers=[(0, 1), (1, spec.layers)],
        heads=[(0, n - 1), (n - 1, n - 1), (n - 1, n)],
        ffn=[(0, 5), (5, spec.ffn), (spec.ffn, spec.ffn)],
        embed=[(0, v), (v, v), (v, v)],
        head=[(0, 0), (0, 60), (60, v)],
    )


@pytest.mark.parametrize("gguf", [False, True], ids=["safetensors", "gguf"])
@pytest.mark.parametrize("name", ["smol", "qwen2", "qwen3"])
def test_bytes_held_are_those_that_the_planner_counts(checkpoint, tmp_path, name, gguf):
    """But for the final norm, which the planner leaves out."""
    directory, model = checkpoint(name)
    source = open_model(write(tmp_path / "m.gguf", model) if gguf else directory)
    spec = source.spec
    for plan in (lopsided(spec), stages(spec), stages(spec, embed=[(0, 60), (60, 97)], head=[(0, 20), (20, 97)])):
        for s, stage in enumerate(plan):
            for rank, shard in enumerate(stage.shards):
                last = s == len(plan) - 1
                got = held(load(source, stage, rank, s == 0, last))
                assert got == weight_bytes(shard, stage, spec, "fp32") + 4 * spec.hidden * last


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_reads_add_up_to_one_model(checkpoint, monkeypatch, name):
    """Over all ranks of a plan, matrices that are split are read once, not once per rank."""
    directory, model = checkpoint(name)
    source = open_model(directory)
    read = {}
    original = source.read

    def spy(tensor, rows=None, cols=None, dtype=None):
        part = original(tensor, rows, cols, dtype)
        read[tensor] = read.get(tensor, 0) + part.numel()
        return part

    monkeypatch.setattr(source, "read", spy)
    for s, stage in enumerate(
        stages(source.spec, layers=[(0, 1), (1, 3)], heads=[(0, 1), (1, 1), (1, source.spec.heads)])
    ):
        for rank in range(3):
            load(source, stage, rank, s == 0, s == 1)
    for tensor, value in model.state_dict().items():
        if tensor == "lm_head.weight" and source.spec.tied:
            continue
        split = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head")
        if any(part in tensor for part in split):
            times = 2 if "embed_tokens" in tensor and source.spec.tied else 1  # both ends of the pipeline
            assert read[tensor] == times * value.numel(), tensor
        else:  # norms by all three; k and v by those that need them
            assert value.numel() <= read[tensor] <= 3 * value.numel(), tensor


def test_row_biases_are_added_once(checkpoint):
    """Biases of the summed outputs belong to the first rank, also when it owns no head and no column."""
    directory, _ = checkpoint("llama3")
    source = open_model(directory)
    spec = source.spec
    (stage,) = stages(spec, heads=[(0, 0), (0, spec.heads)], ffn=[(0, 0), (0, spec.ffn)])
    models = [load(source, stage, rank) for rank in range(2)]
    for layer in range(spec.layers):
        assert models[0].layers[layer].o_bias_H is not None and models[0].layers[layer].down_bias_H is not None
        assert models[1].layers[layer].o_bias_H is None and models[1].layers[layer].down_bias_H is None


def test_a_cache_for_a_shard_without_heads_is_empty(checkpoint):
    directory, _ = checkpoint("smol")
    source = open_model(directory)
    (stage,) = stages(source.spec, heads=[(0, 0), (0, 9)])
    assert load(source, stage, 0).allocate_kv(7).nbytes == 0
    slabs = load(source, stage, 1).allocate_kv(7)
    assert slabs.k.shape == (3, 3, 7, 16, 16) and slabs.nbytes == 2 * slabs.k.nbytes and slabs.k.dtype == torch.float32


def test_shared_kv_heads_are_held_by_both(checkpoint):
    """5:4 of 9 query heads cuts the second of three KV heads: both ranks hold it."""
    directory, model = checkpoint("smol")
    source = open_model(directory)
    (stage,) = stages(source.spec, heads=[(0, 5), (5, 9)])
    first, second = load(source, stage, 0), load(source, stage, 1)
    assert (first.n_kv, second.n_kv) == (2, 2)
    k = model.model.layers[0].self_attn.k_proj.weight
    assert torch.equal(first.layers[0].qkv_CH.rows(torch.arange(5 * 16, 7 * 16)), k[:32])
    assert torch.equal(second.layers[0].qkv_CH.rows(torch.arange(4 * 16, 6 * 16)), k[16:])


def test_reading_a_tensor_that_is_not_there(checkpoint, tmp_path):
    directory, model = checkpoint("smol")
    for source in (open_model(directory), open_model(write(tmp_path / "m.gguf", model))):
        with pytest.raises(UnsupportedModel, match=r"there is no tensor model.layers.9.mlp.up_proj.weight"):
            source.read("model.layers.9.mlp.up_proj.weight")

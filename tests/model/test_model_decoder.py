"""Law 6 (plan equivalence) for the maths: any split of any family gives transformers' logits."""

from itertools import pairwise

import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import Deployment, Piece, relative_error, stages
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec import structs

from evener import kernels
from evener.errors import InvalidInput
from evener.model.decoder import StageModel
from evener.model.source import open_model

BOUND = 1e-4
PROMPTS = [[5, 17, 3, 88, 41, 2, 96, 0, 13, 13, 54, 9, 71, 30, 22, 6, 64, 7, 33], [11, 90, 4]]


@torch.no_grad()
def reference(model, tokens):
    return model(torch.tensor([tokens])).logits[0]


def check(deployment, model, padding=0):
    batch = [Piece(i, 0, tokens) for i, tokens in enumerate(PROMPTS)]
    got = deployment.run(batch, padding)
    want = torch.cat([reference(model, tokens) for tokens in PROMPTS])
    assert relative_error(got, want) < BOUND


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_whole_model_equals_transformers(checkpoint, name):
    directory, model = checkpoint(name)
    source = open_model(directory)
    check(Deployment(source, stages(source.spec)), model)


@pytest.mark.parametrize("name", CHECKPOINTS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_tensor_parallel_equals_transformers(checkpoint, name, ranks):
    directory, model = checkpoint(name)
    source = open_model(directory)
    shares = [source.spec.heads * r // ranks for r in range(ranks + 1)]
    heads = list(pairwise(shares))
    check(Deployment(source, stages(source.spec, heads=heads)), model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_pipeline_of_tensor_parallel_stages_equals_transformers(checkpoint, name):
    directory, model = checkpoint(name)
    source = open_model(directory)
    spec = source.spec
    split = stages(spec, layers=[(0, 2), (2, 3)], heads=[(0, 1), (1, spec.heads)])
    check(Deployment(source, split), model)


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shards_without_heads_columns_or_vocabulary(checkpoint, name):
    directory, model = checkpoint(name)
    source = open_model(directory)
    n, f, v = source.spec.heads, source.spec.ffn, source.spec.vocab
    split = stages(
        source.spec,
        heads=[(0, 0), (0, n - 1), (n - 1, n)],
        ffn=[(0, 7), (7, 7), (7, f)],
        embed=[(0, v), (v, v), (v, v)],
        head=[(0, 3), (3, v - 1), (v - 1, v)],
    )
    check(Deployment(source, split), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_shards_without_parts_are_the_same_model_in_every_dtype(checkpoint, name, dtype):
    directory, _ = checkpoint(name)
    source = open_model(directory)
    spec = structs.replace(source.spec, quant_group=64)
    n, f, v = spec.heads, spec.ffn, spec.vocab
    none = {"heads": [(0, 0), (0, n)], "ffn": [(0, f), (f, f)], "embed": [(0, v), (v, v)], "head": [(0, 0), (0, v)]}
    batch = [Piece(i, 0, tokens) for i, tokens in enumerate(PROMPTS)]
    split, whole = (Deployment(source, stages(spec, **cuts), dtype=dtype, spec=spec).run(batch) for cuts in (none, {}))
    assert relative_error(split, whole) < 1e-5


def test_padding_rows_change_nothing_and_write_no_kv(checkpoint):
    directory, model = checkpoint("qwen3")
    source = open_model(directory)
    deployment = Deployment(source, stages(source.spec, heads=[(0, 3), (3, 4)]))
    check(deployment, model, padding=5)
    used = set(deployment.tables[: len(PROMPTS)].flatten().tolist())
    for rank in deployment.models[0]:
        slabs = rank._kv
        others = [b for b in range(slabs.k.shape[2]) if b not in used]
        assert slabs.k[:, :, others].abs().max() == 0 and slabs.v[:, :, others].abs().max() == 0


@given(data=st.data())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_chunked_prefill_and_decode_equal_one_pass(checkpoint, data):
    directory, model = checkpoint(data.draw(st.sampled_from(sorted(CHECKPOINTS))))
    source = open_model(directory)
    spec = source.spec
    cut = data.draw(st.integers(0, spec.heads))
    deployment = Deployment(source, stages(spec, heads=[(0, cut), (cut, spec.heads)]))
    lengths = data.draw(st.lists(st.integers(1, 40), min_size=1, max_size=3))
    texts = [[(7 * i * i + 3 * n + i) % spec.vocab for i in range(n)] for n in lengths]
    done = [0] * len(texts)
    logits = [[] for _ in texts]
    while any(d < len(t) for d, t in zip(done, texts, strict=True)):
        batch = []
        for s, text in enumerate(texts):
            if left := len(text) - done[s]:
                count = data.draw(st.integers(1, left))
                batch.append(Piece(s, done[s], text[done[s] : done[s] + count]))
        parts = deployment.run(batch).split([len(p.tokens) for p in batch])
        for piece, part in zip(batch, parts, strict=True):
            logits[piece.sequence].append(part)
            done[piece.sequence] += len(piece.tokens)
    for text, parts in zip(texts, logits, strict=True):
        assert relative_error(torch.cat(parts), reference(model, text)) < BOUND


def test_positions_near_the_end_of_the_context(checkpoint):
    """llama3 scaling changes long wavelengths: only far positions tell."""
    directory, model = checkpoint("llama3")
    source = open_model(directory)
    tokens = [(i * i + i // 3) % source.spec.vocab for i in range(256)]
    deployment = Deployment(source, stages(source.spec), max_len=256, sequences=1)
    assert relative_error(deployment.run([Piece(0, 0, tokens)]), reference(model, tokens)) < BOUND


def test_logits_of_chosen_rows_only(checkpoint):
    directory, _ = checkpoint("smol")
    source = open_model(directory)
    (stage,) = stages(source.spec)
    model = StageModel(source, source.spec, stage, stage.shards[0], first_stage=True, last_stage=True, rank=0)
    x_TH = torch.randn(5, source.spec.hidden)
    chosen = torch.tensor([4, 1])
    assert torch.allclose(model.logits(x_TH, chosen), model.logits(x_TH, torch.arange(5))[chosen], atol=1e-6)
    assert model.logits(x_TH, torch.arange(0)).shape == (0, source.spec.vocab)


def test_rotary_tables_may_stop_at_the_longest_position(checkpoint):
    directory, model = checkpoint("llama3")
    source = open_model(directory)
    (stage,) = stages(source.spec)
    short = StageModel(source, source.spec, stage, stage.shards[0], first_stage=True, last_stage=True, rank=0,
                       max_position=len(PROMPTS[0]))  # fmt: skip
    short.allocate_kv(17)
    deployment = Deployment(source, [stage])
    deployment.models[0][0] = short
    assert short._cos_PD.shape == (19, source.spec.head_dim // 2)
    check(deployment, model)


def test_tied_rows_are_stored_once(checkpoint):
    directory, _ = checkpoint("smol")
    source = open_model(directory)
    v = source.spec.vocab
    (stage,) = stages(source.spec, embed=[(0, 60), (60, v)], head=[(0, 20), (20, v)])
    model = StageModel(source, source.spec, stage, stage.shards[1], first_stage=True, last_stage=True, rank=1)
    embed, head = model.ends.embed, model.ends.head
    assert embed is not None and embed.size == v - 60 and head is not None and head.size == v - 20
    held = sorted((t.weight.data.data_ptr(), t.weight.data.nbytes) for t in (embed, head))
    assert sum(held[0]) >= sum(held[1]), "one of them lies within the other"


def test_other_dtypes_are_refused(checkpoint):
    directory, _ = checkpoint("smol")
    source = open_model(directory)
    (stage,) = stages(source.spec)
    with pytest.raises(InvalidInput, match=r"torch.float16 is not supported on cpu; supported: torch.float32, .*int8"):
        StageModel(source, source.spec, stage, stage.shards[0], first_stage=True, last_stage=True, rank=0,
                   dtype=torch.float16)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("threads", [2, 3])
def test_logits_do_not_depend_on_threads(checkpoint, dtype, threads):
    """Few rows share the columns among the threads, many are divided by rows: the same bits."""
    source = open_model(checkpoint("qwen3")[0])
    deployment = Deployment(source, stages(source.spec), max_len=256, dtype=dtype)
    ids = [(7 * i + 3) % source.spec.vocab for i in range(230)]
    for cuts in ([1], [31], [32, 40], [100, 50], [230], [210, 3, 1]):
        batch = [Piece(i, 0, ids[:n]) for i, n in enumerate(cuts)]
        for padding in (0, 140):
            alone = deployment.run(batch, padding)
            kernels.set_threads(threads)
            try:
                together = deployment.run(batch, padding)
            finally:
                kernels.set_threads(1)
            assert torch.equal(together, alone)


def test_a_bad_position_in_a_large_batch_is_an_error_on_every_number_of_threads(checkpoint):
    """Not the end of the process: what helpers run must not throw."""
    source = open_model(checkpoint("smol")[0])
    deployment = Deployment(source, stages(source.spec), max_len=256)
    model = deployment.models[0][0]
    for threads in (1, 3):
        rows, tokens_T = deployment.rows([Piece(0, 0, list(range(90)) * 2)], 0)
        rows.positions_T[170] = 10_000
        kernels.set_threads(threads)
        try:
            with pytest.raises(ValueError, match="positions holds 10000, outside"):
                model.run_layers(model.embed(tokens_T, None), rows, None)
        finally:
            kernels.set_threads(1)

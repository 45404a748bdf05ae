"""The layers as one native object: the same bits as the decoder written out in Python, which defines them."""

import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import Deployment, Piece, stages

from evener import kernels
from evener.model.source import open_model

NATIVE = [name for name, config in CHECKPOINTS.items() if config.get("head_dim", 1) % 16 == 0]
LONG = [(7 * i) % 89 for i in range(150)]
"""More rows than pass through a layer together."""
FIRST = [Piece(0, 0, LONG), Piece(1, 0, [5, 17, 3, 88, 41])]
SECOND = [Piece(1, 5, [2, 96, 11]), Piece(0, 150, [9]), Piece(2, 0, [4, 8])]


@pytest.fixture
def threads(request: pytest.FixtureRequest):
    kernels.set_threads(request.param)
    yield request.param
    kernels.set_threads(1)


def native_layers(deployment: Deployment) -> list[kernels.Layers | None]:
    return [model._native for stage in deployment.models for model in stage]


def written_out(deployment: Deployment) -> Deployment:
    for model in (m for stage in deployment.models for m in stage):
        model._native = None
    return deployment


def check(make) -> None:
    native, plain = make(), written_out(make())
    assert all(native_layers(native)) and not any(native_layers(plain))
    for batch, padding in ((FIRST, 0), (SECOND, 3)):
        assert torch.equal(native.run(batch, padding), plain.run(batch, padding))


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize(
    ("dtype", "kv_dtype"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("int8", "int8"), ("int8", "float32"), ("float32", "bfloat16")],
)
def test_whole_models(checkpoint, name, dtype, kv_dtype):
    source = open_model(checkpoint(name)[0])
    types = {"dtype": getattr(torch, dtype), "kv_dtype": getattr(torch, kv_dtype)}
    check(lambda: Deployment(source, stages(source.spec), max_len=192, **types))


@pytest.mark.parametrize("threads", [2, 3], indirect=True)
@pytest.mark.parametrize(("name", "dtype"), [("smol", torch.float32), ("llama3-wide", torch.int8)])
def test_on_several_threads(checkpoint, threads, name, dtype):
    source = open_model(checkpoint(name)[0])
    check(lambda: Deployment(source, stages(source.spec), max_len=192, dtype=dtype))


@pytest.mark.parametrize("name", NATIVE)
def test_unequal_shards_and_stages(checkpoint, name):
    """Also a rank without heads, and one without columns: they still join the sums, with the bias of the first."""
    source = open_model(checkpoint(name)[0])
    spec = source.spec
    split = stages(
        spec, layers=[(0, 1), (1, spec.layers)], heads=[(0, 0), (0, 1), (1, spec.heads)],
        ffn=[(0, 3), (3, 3), (3, spec.ffn)],
    )  # fmt: skip
    check(lambda: Deployment(source, split, max_len=192))


def test_what_is_not_native_is_written_out(checkpoint, monkeypatch):
    """Heads that are no multiple of 16 wide run in Python."""
    source = open_model(checkpoint(NATIVE[0])[0])
    shape = kernels.LayerShape(source.spec.hidden, 1, 1, 8, 16, 1e-6, 1.0)
    model = Deployment(source, stages(source.spec)).models[0][0]
    assert not kernels.native_layers(shape, model.layers, model._kv.k)
    with pytest.raises(ValueError, match="not native"):
        kernels.Layers(shape, model.layers, model._kv.k, model._kv.v, model._cos_PD, model._sin_PD, model._kv_of_head)


def test_wrong_rows_are_refused(checkpoint):
    source = open_model(checkpoint(NATIVE[0])[0])
    deployment = Deployment(source, stages(source.spec))
    layers = native_layers(deployment)[0]
    rows, _ = deployment.rows([Piece(0, 0, [1, 2, 3])], 0)
    with pytest.raises(ValueError, match="positions_T"):
        layers.batch(rows._replace(positions_T=rows.positions_T.long()))
    batch = layers.batch(rows)
    with pytest.raises(ValueError, match="x_TH"):
        layers.run(batch, torch.zeros(2, source.spec.hidden))
    with pytest.raises(ValueError, match="outside"):
        layers.run(layers.batch(rows._replace(tables_RM=rows.tables_RM + 10_000)), torch.zeros(3, source.spec.hidden))
    if kernels.isa() != "generic":
        before = kernels.isa()
        kernels.set_isa("generic")
        with pytest.raises(ValueError, match="make them again"):
            layers.batch(rows)
        kernels.set_isa(before)
    with pytest.raises(IndexError):
        layers.mlp(99, batch, *(torch.zeros(3, source.spec.hidden) for _ in range(3)))

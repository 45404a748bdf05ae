"""Packed weights that are kept are those that would be packed, bit for bit, whatever lies in the cache."""

import os
import subprocess
import sys
import threading

import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import stages
from gguf_files import write

from evener import kernels
from evener.errors import InvalidInput
from evener.kernels import PackedWeight
from evener.model import packed_file
from evener.model.decoder import StageModel
from evener.model.source import open_model
from evener.model.weights import Table


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("EVENER_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("EVENER_WEIGHTS_GIB", raising=False)
    monkeypatch.setattr(packed_file, "LEAST_BYTES", 0)  # the models of tests are small
    return tmp_path / "cache" / "weights"


def load(source, stage, rank=0, dtype=torch.float32, first=True, last=True, keep=True):
    return StageModel(
        source, source.spec, stage, stage.shards[rank],
        first_stage=first, last_stage=last, rank=rank, dtype=dtype, keep_packed=keep,
    )  # fmt: skip


def tensors(model):
    """Every tensor that a StageModel holds, and how it is packed."""
    ends = [t.weight if isinstance(t, Table) else t for t in model.ends]
    for weight in [w for layer in model.layers for w in layer] + ends:
        if isinstance(weight, PackedWeight):
            yield weight.data, (weight.n, weight.k, weight.columns, weight.isa, weight.group)
        elif weight is not None:
            yield weight, ()


def assert_same(a, b):
    got, wanted = list(tensors(a)), list(tensors(b))
    assert len(got) == len(wanted)
    for (x, how), (y, so) in zip(got, wanted, strict=True):
        assert how == so and x.dtype == y.dtype and x.shape == y.shape
        assert x.data_ptr() % 64 == 0
        assert torch.equal(x.view(torch.uint8), y.view(torch.uint8))
    for x, y in ((a.ends.embed, b.ends.embed), (a.ends.head, b.ends.head)):
        assert (x is None) == (y is None)
        assert x is None or (x.start, x.size) == (y.start, y.size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=["fp32", "bf16", "int8"])
@pytest.mark.parametrize("name", sorted(CHECKPOINTS))
def test_what_is_kept_is_what_is_packed(checkpoint, own_cache, name, dtype):
    source = open_model(checkpoint(name)[0])
    (stage,) = stages(source.spec)
    packed = load(source, stage, dtype=dtype, keep=False)
    assert packed.weights_from == "packed" and not own_cache.exists()
    for _ in range(2):
        kept = load(source, stage, dtype=dtype)
        assert kept.weights_from in ("mapped", "copied from the cache")
        assert_same(kept, packed)
    assert len(list(own_cache.glob("*.bin"))) == 1
    tokens_T = torch.arange(5) % source.spec.vocab
    assert torch.equal(kept.embed(tokens_T, None), packed.embed(tokens_T, None))


def test_every_shard_has_its_own_file(checkpoint, own_cache, monkeypatch):
    """Also those that differ in nothing but their place: only the first rank holds biases of split inputs."""
    source = open_model(checkpoint("qwen2")[0])
    spec = source.spec
    plan = stages(spec, layers=[(0, 1), (1, spec.layers)], heads=[(0, 2), (2, spec.heads)], ffn=[(0, 5), (5, spec.ffn)])
    for s, stage in enumerate(plan):
        for rank in range(2):
            first, last = s == 0, s == len(plan) - 1
            kept = load(source, stage, rank, first=first, last=last)
            assert_same(kept, load(source, stage, rank, first=first, last=last, keep=False))
    assert len(list(own_cache.glob("*.bin"))) == 4
    before = kernels.isa()
    kernels.set_isa("generic")
    try:
        load(source, plan[0], 0, last=False)
        assert len(list(own_cache.glob("*.bin"))) == 5
    finally:
        kernels.set_isa(before)


def test_a_changed_model_is_packed_anew(checkpoint, own_cache, tmp_path):
    file = write(tmp_path / "m.gguf", checkpoint("smol")[1])
    (stage,) = stages(open_model(file).spec)
    old = load(open_model(file), stage)
    with torch.no_grad():
        other = checkpoint("smol")[1]
        weight = other.model.layers[0].mlp.up_proj.weight
        before = weight.clone()
        weight += 1
        write(file, other)
        weight.copy_(before)  # the checkpoint is shared
    new = load(open_model(file), stage)
    assert_same(new, load(open_model(file), stage, keep=False))
    assert not torch.equal(new.layers[0].gate_up_FH.data, old.layers[0].gate_up_FH.data)
    assert len(list(own_cache.glob("*.bin"))) == 2


@pytest.mark.parametrize("damage", ["empty", "short", "long", "magic", "header"])
def test_a_damaged_file_is_written_anew(checkpoint, own_cache, damage):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    load(source, stage)
    (file,) = own_cache.glob("*.bin")
    whole = file.read_bytes()
    damaged = {
        "empty": b"",
        "short": whole[: len(whole) // 2],
        "long": whole + b"x",
        "magic": b"?" + whole[1:],
        "header": whole[:20] + b"\xff" * 8 + whole[28:],
    }[damage]
    file.unlink()  # another inode: the first model still maps this one
    file.write_bytes(damaged)
    assert_same(load(source, stage), load(source, stage, keep=False))
    assert file.read_bytes() == whole


def test_what_was_not_used_for_longest_goes_first(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    load(source, stage)
    (first,) = own_cache.glob("*.bin")
    size = first.stat().st_size
    old = own_cache / "old.bin"
    old.write_bytes(bytes(size))
    os.utime(old, (1, 1))
    monkeypatch.setenv("EVENER_WEIGHTS_GIB", str(2.2 * size / 2**30))
    load(source, stage, dtype=torch.bfloat16)
    assert not old.exists() and first.exists()
    monkeypatch.setenv("EVENER_WEIGHTS_GIB", str(0.1 * size / 2**30))
    assert "packed anew each time: the cache holds" in load(source, stage).weights_from
    monkeypatch.setenv("EVENER_WEIGHTS_GIB", "0")
    assert load(source, stage).weights_from == "packed anew each time: the cache is off"
    for wrong in ("-1", "much", "inf", "nan"):
        monkeypatch.setenv("EVENER_WEIGHTS_GIB", wrong)
        with pytest.raises(InvalidInput, match=r"EVENER_WEIGHTS_GIB='.*' is no number of GiB"):
            load(source, stage)


def test_a_disk_that_refuses_is_told_and_no_obstacle(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    packed = load(source, stage, keep=False)
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    own_cache.write_text("a file where the folder should be")
    kept = load(source, stage)
    assert kept.weights_from.startswith("packed anew each time: ") and "exists" in kept.weights_from
    assert_same(kept, packed)
    own_cache.unlink()
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda _: type("Usage", (), {"free": 100})())
    kept = load(source, stage)
    assert kept.weights_from == f"packed anew each time: 100 B are free in {own_cache}"
    assert_same(kept, packed)
    assert not list(own_cache.glob("*.bin"))


def test_of_those_that_start_together_one_packs(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    made, lock = [], threading.Lock()
    inner = packed_file._write

    def counted(path, weights):
        with lock:
            made.append(path)
        inner(path, weights)

    monkeypatch.setattr(packed_file, "_write", counted)
    models = []
    starting = [threading.Thread(target=lambda: models.append(load(source, stage))) for _ in range(4)]
    for thread in starting:
        thread.start()
    for thread in starting:
        thread.join()
    assert len(made) == 1 and len(models) == 4
    for model in models:
        assert_same(model, models[0])


def test_one_that_is_killed_while_it_writes_leaves_no_file_and_no_lock(checkpoint, own_cache):
    directory = checkpoint("smol")[0]
    script = f"""
import os, signal, sys
sys.path[:0] = {[p for p in sys.path if "tests" in p]!r}
import torch
from deployment import stages
from evener.model import packed_file
from evener.model.decoder import StageModel
from evener.model.source import open_model
packed_file.LEAST_BYTES = 0
inner = packed_file._write_all
def dies(fd, data):
    os.write(fd, data[:10])
    os.kill(os.getpid(), signal.SIGKILL)
packed_file._write_all = dies
source = open_model({str(directory)!r})
(stage,) = stages(source.spec)
StageModel(source, source.spec, stage, stage.shards[0], first_stage=True, last_stage=True, rank=0, keep_packed=True)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == -9, done.stderr
    assert not list(own_cache.glob("*.bin"))
    source = open_model(directory)
    (stage,) = stages(source.spec)
    assert_same(load(source, stage), load(source, stage, keep=False))

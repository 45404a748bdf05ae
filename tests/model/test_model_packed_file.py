"""Packed weights that are kept are those that would be packed, bit for bit, whatever lies in the cache."""

import os
import subprocess
import sys
import threading

import msgspec
import pytest
import torch
from checkpoints import CHECKPOINTS
from deployment import stages
from gguf_files import write
from msgspec.structs import replace

from evener import kernels
from evener.errors import InvalidInput
from evener.kernels import PackedWeight
from evener.model import decoder, packed_file
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
    for where in (f"packed, kept in {own_cache} and mapped", "mapped"):
        kept = load(source, stage, dtype=dtype)
        assert kept.weights_from == where
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
    kernels.set_isa("generic")
    try:
        load(source, plan[0], 0, last=False)
        assert len(list(own_cache.glob("*.bin"))) == 5
    finally:
        kernels.set_isa("")


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


def altered(whole, change):
    """The file with another header."""
    start = len(packed_file.MAGIC) + 8
    end = start + int.from_bytes(whole[len(packed_file.MAGIC) : start], "little")
    body = msgspec.msgpack.encode(change(msgspec.msgpack.decode(whole[start:end], type=packed_file.Header)))
    head = packed_file.MAGIC + len(body).to_bytes(8, "little") + body
    return head + bytes(-len(head) % 64) + whole[end + -end % 64 :]


def with_head(header, **changes):
    piece, start, size = header.head
    return replace(header, head=(replace(piece, **changes), start, size))


@pytest.mark.parametrize(
    "damage", ["empty", "short", "long", "magic", "header", "text", "offset", "dtype", "isa", "rows"]
)
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
        "text": whole[:20] + b"\xd9\x02\xff\xfe" + whole[24:],
        "header": whole[:20] + b"\xff" * 8 + whole[28:],
        "offset": altered(whole, lambda h: with_head(h, offset=h.size)),
        "dtype": altered(whole, lambda h: with_head(h, dtype="complex")),
        "isa": altered(whole, lambda h: with_head(h, packed=(*h.head[0].packed[:3], "other", 0))),
        "rows": altered(whole, lambda h: with_head(h, packed=(h.head[0].packed[0] + 64, *h.head[0].packed[1:]))),
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
    for wrong in ("-1", "much", "inf", "nan", "1e300"):
        monkeypatch.setenv("EVENER_WEIGHTS_GIB", wrong)
        with pytest.raises(InvalidInput, match=r"EVENER_WEIGHTS_GIB='.*' is no number of GiB"):
            load(source, stage)


def test_what_was_used_a_moment_ago_stays(checkpoint, own_cache, monkeypatch):
    """Else shards that do not fit together would drive each other out at every start."""
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    load(source, stage)
    (first,) = own_cache.glob("*.bin")
    monkeypatch.setenv("EVENER_WEIGHTS_GIB", str(1.3 * first.stat().st_size / 2**30))
    assert "were all used a moment ago" in load(source, stage, dtype=torch.bfloat16).weights_from
    assert first.exists()
    os.utime(first, (1, 1))
    assert load(source, stage, dtype=torch.bfloat16).weights_from == f"packed, kept in {own_cache} and mapped"
    assert not first.exists()


def test_a_full_disk_makes_room_first(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    own_cache.mkdir(parents=True)
    old = own_cache / "old.bin"
    old.write_bytes(b"x")
    os.utime(old, (1, 1))
    usage = packed_file.shutil.disk_usage
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda f: full if old.exists() else usage(f))
    full = type("Usage", (), {"free": 100})()
    assert load(source, stage).weights_from == f"packed, kept in {own_cache} and mapped"
    assert not old.exists()
    monkeypatch.setattr(packed_file.shutil, "disk_usage", lambda _: full)
    kept = load(source, stage, dtype=torch.bfloat16)
    assert kept.weights_from == f"packed anew each time: 100 B are free in {own_cache}"


def test_a_disk_that_refuses_is_told_and_no_obstacle(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    packed = load(source, stage, keep=False)
    own_cache.parent.mkdir(parents=True, exist_ok=True)
    own_cache.write_text("a file where the folder should be")
    kept = load(source, stage)
    assert kept.weights_from.startswith(f"packed anew each time: EVENER_CACHE={own_cache.parent} cannot be used (")
    assert_same(kept, packed)
    own_cache.unlink()

    made = []

    def fails(fd, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(packed_file, "_write_all", fails)
    inner = decoder.load_shard
    monkeypatch.setattr(decoder, "load_shard", lambda *args: made.append(args) or inner(*args))
    kept = load(source, stage)
    assert kept.weights_from == "packed anew each time: [Errno 28] No space left on device"
    assert len(made) == 1  # not a second copy beside the first
    assert_same(kept, packed)
    assert {file.suffix for file in own_cache.iterdir()} == {".lock"}


def test_a_model_that_cannot_be_read_is_not_blamed_on_the_cache(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)

    def fails(*args):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(decoder, "load_shard", fails)
    with pytest.raises(OSError, match="Input/output error"):
        load(source, stage)
    monkeypatch.undo()


def test_files_that_change_while_they_are_read_are_not_kept(checkpoint, own_cache, tmp_path, monkeypatch):
    file = write(tmp_path / "m.gguf", checkpoint("smol")[1])
    source = open_model(file)
    (stage,) = stages(source.spec)
    file.touch()
    kept = load(source, stage)
    assert kept.weights_from == "packed anew each time: the model's files have changed meanwhile"
    assert not list(own_cache.glob("*.bin"))


def test_what_the_kernel_gives_no_huge_pages_is_copied(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    packed = load(source, stage, dtype=torch.int8, keep=False)
    monkeypatch.setattr(packed_file, "in_huge_pages", lambda _: False)
    for where in (f"packed, kept in {own_cache} and copied from the cache", "copied from the cache"):
        kept = load(source, stage, dtype=torch.int8)
        assert kept.weights_from == where
        assert_same(kept, packed)


def test_a_cache_that_can_only_be_read_is_read(checkpoint, own_cache, monkeypatch):
    source = open_model(checkpoint("smol")[0])
    (stage,) = stages(source.spec)
    load(source, stage)

    def fails(path):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(packed_file, "_lock", fails)
    assert load(source, stage).weights_from == "mapped"
    assert "Permission denied" in load(source, stage, dtype=torch.bfloat16).weights_from


@pytest.mark.parametrize("isa", ["generic", ""])
def test_a_head_that_begins_within_the_embedding(checkpoint, own_cache, isa):
    """Its rows are a view of the embedding's, and off a cache line where panels are narrow."""
    source = open_model(checkpoint("smol")[0])
    spec = source.spec
    n, f, v = spec.heads, spec.ffn, spec.vocab
    (stage,) = stages(
        spec, heads=[(0, n), (n, n)], ffn=[(0, f), (f, f)], embed=[(0, v), (v, v)], head=[(40, v), (0, 40)]
    )
    kernels.set_isa(isa)
    try:
        for dtype in (torch.float32, torch.bfloat16, torch.int8):
            if dtype is torch.int8 and spec.quant_group % kernels.QUANT_GROUP:
                continue
            kept = load(source, stage, dtype=dtype)
            assert kept.weights_from == f"packed, kept in {own_cache} and mapped"
            assert_same(kept, load(source, stage, dtype=dtype, keep=False))
    finally:
        kernels.set_isa("")


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


def test_one_that_is_killed_while_it_writes_is_cleared_away(checkpoint, own_cache):
    directory = checkpoint("smol")[0]
    script = f"""
import os, signal, sys
sys.path[:0] = {[p for p in sys.path if "tests" in p]!r}
import torch
from deployment import stages
from evener.model import decoder, packed_file
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
    assert {file.suffix for file in own_cache.iterdir()} != {".bin", ".lock"}
    source = open_model(directory)
    (stage,) = stages(source.spec)
    assert_same(load(source, stage), load(source, stage, keep=False))
    assert {file.suffix for file in own_cache.iterdir()} == {".bin", ".lock"}  # what it left has gone

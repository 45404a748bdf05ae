"""Keeps packed weights in `~/.cache/evener/weights`, one file per shard, and maps them instead of packing them again.

Replicas that hold the same shard map the same file, so that it is in memory once. The kernel must give huge pages to
the mapping (files on ext4 or xfs since Linux 6.16 and 6.1): weights in small ones are read up to a quarter slower
(`evener.kernels.gemm`), and are copied instead.

A file's name is the hash of all that its contents follow from: the model's files (path, inode, size, times), the shard,
the dtype, the instruction set, and the code that reads and packs. It is written under another name first, so that a
file is whole or not there; what was not used for longest goes when `EVENER_WEIGHTS_GIB` (20; 0 keeps nothing) is
exceeded.

Layout: `MAGIC`, the header's length (8 bytes, little endian), the header (msgpack of `Header`), then the tensors, each
on a cache line.
"""

import ctypes
import errno
import fcntl
import hashlib
import math
import mmap
import os
import platform
import shutil
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import IO, NamedTuple

import msgspec
import torch
from msgspec import Struct

from evener import kernels
from evener.cache import cache_dir, cache_name, weights_limit
from evener.kernels import PackedWeight, _native
from evener.model.weights import EndWeights, LayerWeights, ShardWeights, Table
from evener.units import human_bytes

MAGIC = b"EVENERW1"
LEAST_BYTES = 8 << 20
"""Smaller shards are packed faster than a file is opened."""
RECENT_S = 600.0
"""What was used so recently is not deleted for something else."""
_LINE, _CHUNK = 64, 32 << 20
_POPULATE_READ = 22
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.int8}


class Piece(Struct, frozen=True):
    """One tensor in the file."""

    offset: int
    """From the first tensor's place."""
    shape: tuple[int, ...]
    dtype: str
    packed: tuple[int, int, int, str, int] | None = None
    """n, k, columns, isa, group of a PackedWeight."""


class Header(Struct, frozen=True):
    """Where everything is."""

    size: int
    """Bytes of all tensors."""
    layers: tuple[tuple[Piece | None, ...], ...]
    """In the order of LayerWeights' fields."""
    embed: tuple[Piece, int, int] | None
    final_norm: Piece | None
    head: tuple[Piece, int, int] | None


class Kept(NamedTuple):
    """A shard's weights and where they are."""

    weights: ShardWeights
    where: str
    """`mapped`, `copied from the cache`, `packed` and kept, or `packed` with the reason why they are not."""


def packed_weights(make: Callable[[], ShardWeights], size: int, unchanged: Callable[[], bool], *of: object) -> Kept:
    """The weights that `make` packs, from the cache where they are there, and kept there otherwise.

    `size`: roughly their bytes; `unchanged`: whether what `make` read is still what it was; `of`: all that they follow
    from but the code and the instruction set, printable. Whatever the disk refuses, the weights are there. Raises what
    `make` raises, and InvalidInput for a limit that is none.
    """
    limit = weights_limit()
    if size < LEAST_BYTES:
        return Kept(make(), "packed")
    if size > limit:
        why = f"the cache holds {human_bytes(limit)}" if limit else "the cache is off"
        return Kept(make(), f"packed anew each time: {why}")
    try:
        path = cache_dir() / "weights" / f"{key(*of)}.bin"
        if (found := _open(path)) is not None:
            return found
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home
        return Kept(make(), f"packed anew each time: {cache_name()} cannot be used ({error})")
    with lock:
        if (found := _open(path)) is not None:
            return found  # another process has packed them meanwhile
        weights = make()
        why = _keep(path, weights, size, limit) if unchanged() else "the model's files have changed meanwhile"
        if why:
            return Kept(weights, f"packed anew each time: {why}")
        del weights  # before it is there a second time
        if (found := _open(path)) is None:
            return Kept(make(), f"packed anew each time: {path} cannot be read back")
        return Kept(found.weights, f"packed, kept in {path.parent} and {found.where}")


def _keep(path: Path, weights: ShardWeights, size: int, limit: int) -> str:
    """Write the file, if there is room. Gives the reason why it is not there otherwise."""
    try:
        if not _make_room(path.parent, limit, size):
            return f"the cache's {human_bytes(limit)} were all used a moment ago"
        if (free := shutil.disk_usage(path.parent).free) < 2 * size:
            return f"{human_bytes(free)} are free in {path.parent}"
        _write(path, weights)
        return ""
    except OSError as error:
        return str(error)


def key(*of: object) -> str:
    """A name for what follows from `of`, this code and this instruction set."""
    text = repr((of, kernels.isa(), _code()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of all code whose change may change what is packed."""
    package = Path(__file__).parent.parent
    total = hashlib.sha256(repr([version(name) for name in ("gguf", "safetensors", "torch")]).encode())
    for folder in ("model", "spec", "kernels"):
        for file in sorted((package / folder).rglob("*.py")):
            total.update(file.read_bytes())
    total.update(Path(_native.__file__).read_bytes())
    return total.hexdigest()


def _lock(path: Path) -> IO[bytes]:
    """Held until it is closed, by one process at a time: of replicas that start together one packs, the others map."""
    lock = path.with_suffix(".lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
    except OSError:
        lock.close()
        raise
    return lock


def _make_room(folder: Path, limit: int, size: int) -> bool:
    """Delete what was not used for longest, unfinished files as well, until `size` more is within the limit and the
    disk has room for it twice. False if what is left was used in the last minutes: others would do the same to us."""
    kept = []
    for file in folder.iterdir():
        with suppress(OSError):
            stat = file.stat()
            if file.suffix != ".lock":
                kept.append((stat.st_mtime, stat.st_size, file))
    total = size + sum(n for _, n, _ in kept)
    for used, n, file in sorted(kept):
        if total <= limit and shutil.disk_usage(folder).free >= 2 * size:
            break
        if used > time.time() - RECENT_S:
            break
        total -= n
        for gone in (file, file.with_suffix(".lock")):
            with suppress(OSError):
                gone.unlink()
    return total <= limit


class _Writer:
    """Lays tensors out and remembers where; views of what is there already are not stored again."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self._places: list[tuple[int, int, int]] = []
        self.size = 0

    def place(self, tensor: torch.Tensor) -> Piece:
        tensor = tensor.contiguous()
        first, end = tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes
        dtype = str(tensor.dtype).removeprefix("torch.")
        for low, high, offset in self._places:
            if tensor.nbytes and low <= first and end <= high:
                return Piece(offset + first - low, tuple(tensor.shape), dtype)
        offset = self.size
        self._places.append((first, end, offset))
        self.tensors.append(tensor)
        self.size += -(-tensor.nbytes // _LINE) * _LINE
        return Piece(offset, tuple(tensor.shape), dtype)

    def any(self, value: torch.Tensor | PackedWeight | None) -> Piece | None:
        if value is None or isinstance(value, torch.Tensor):
            return None if value is None else self.place(value)
        piece = self.place(value.data)
        how = (value.n, value.k, value.columns, value.isa, value.group)
        return msgspec.structs.replace(piece, packed=how)

    def table(self, table: Table | None) -> tuple[Piece, int, int] | None:
        if table is None:
            return None
        piece = self.any(table.weight)
        assert piece is not None
        return piece, table.start, table.size


def _write(path: Path, weights: ShardWeights) -> None:
    """Write the file in whole. Raises OSError."""
    writer = _Writer()
    ends = weights.ends
    # The embedding first: head rows are views of it.
    embed, head = writer.table(ends.embed), writer.table(ends.head)
    norm = writer.any(ends.final_norm_H)
    layers = tuple(tuple(writer.any(part) for part in layer) for layer in weights.layers)
    body = msgspec.msgpack.encode(Header(writer.size, layers, embed, norm, head))
    for left in path.parent.glob(f"{path.stem}.unfinished-*"):  # by one that was killed: the lock is ours
        left.unlink(missing_ok=True)
    unfinished = path.with_suffix(f".unfinished-{platform.node()}-{os.getpid()}")
    try:
        # Large writes make large folios, which huge pages need; unbuffered, since a buffer would cut them.
        with unfinished.open("wb", buffering=0) as file:
            chunk = bytearray(MAGIC + len(body).to_bytes(8, "little") + body)
            chunk.extend(bytes(-len(chunk) % _LINE))
            for tensor in writer.tensors:
                chunk.extend((ctypes.c_char * tensor.nbytes).from_address(tensor.data_ptr()))
                chunk.extend(bytes(-len(chunk) % _LINE))
                while len(chunk) >= _CHUNK:
                    _write_all(file.fileno(), memoryview(chunk)[:_CHUNK])
                    del chunk[:_CHUNK]
            _write_all(file.fileno(), memoryview(chunk))
            os.fsync(file.fileno())  # or a crash could leave a file of the right size and the wrong contents
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def _write_all(fd: int, data: memoryview) -> None:
    with data:
        done = 0
        while done < len(data):
            done += os.write(fd, data[done:])


def _open(path: Path) -> Kept | None:
    """Map the file; None when there is none, or what is there is not whole (it is written anew then)."""
    try:
        with path.open("rb") as file:
            mapped = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)
    except (OSError, ValueError):  # ValueError: an empty file
        return None
    start = len(MAGIC) + 8
    if mapped[: len(MAGIC)] != MAGIC:
        return None
    end = start + int.from_bytes(mapped[len(MAGIC) : start], "little")
    first = end + -end % _LINE
    try:
        header = msgspec.msgpack.decode(mapped[start:end], type=Header)
    except (msgspec.DecodeError, ValueError):
        return None
    if len(mapped) != first + header.size:
        return None
    with suppress(OSError):
        os.utime(path)  # used now: `_make_room` goes by it
    with suppress(OSError, ValueError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
    try:
        mapped.madvise(_POPULATE_READ)
    except OSError as error:
        if error.errno != errno.EINVAL:  # which is what kernels before 5.14 say; else pages cannot be read
            return None
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes weights
        data = torch.frombuffer(mapped, dtype=torch.int8)
    where = "mapped"
    if not in_huge_pages(data):
        data, where = kernels.huge_copy(data), "copied from the cache"
    try:
        return Kept(_unpack(header, data[first:]), where)
    except (KeyError, RuntimeError, TypeError, ValueError):  # what the header says is not in the file
        return None


def in_huge_pages(data: torch.Tensor) -> bool:
    """Whether nearly all of a mapped file is in huge pages, as the kernel tells (/proc/self/smaps)."""
    inside = False
    with suppress(OSError), Path("/proc/self/smaps").open(encoding="ascii", errors="replace") as lines:
        for line in lines:
            name, _, rest = line.partition(" ")
            if not name.endswith(":"):
                low, _, high = name.partition("-")
                inside = int(low, 16) <= data.data_ptr() < int(high, 16)
            elif inside and name == "FilePmdMapped:":
                return int(rest.split()[0]) * 1024 >= 0.9 * data.nbytes - (4 << 20)
    return False


def _unpack(header: Header, data: torch.Tensor) -> ShardWeights:
    def tensor(piece: Piece) -> torch.Tensor:
        dtype = _DTYPES[piece.dtype]
        size = dtype.itemsize * math.prod(piece.shape)
        if piece.offset < 0 or piece.offset % dtype.itemsize or min(piece.shape, default=0) < 0:
            raise ValueError(f"{piece} is nowhere")
        return data[piece.offset : piece.offset + size].view(dtype).view(piece.shape)  # RuntimeError beyond the end

    def value(piece: Piece | None) -> torch.Tensor | PackedWeight | None:
        if piece is None or piece.packed is None:
            return None if piece is None else tensor(piece)
        weight = PackedWeight(tensor(piece), *piece.packed)
        kernels.check_packed(weight)
        return weight

    def table(entry: tuple[Piece, int, int] | None) -> Table | None:
        if entry is None:
            return None
        weight = value(entry[0])
        if not isinstance(weight, PackedWeight):
            raise ValueError(f"{entry} is no table")
        return Table(weight, entry[1], entry[2])

    layers = [LayerWeights(*(value(piece) for piece in layer)) for layer in header.layers]  # type: ignore[arg-type]
    norm = value(header.final_norm)
    if isinstance(norm, PackedWeight):
        raise ValueError("a norm is no matrix")
    return ShardWeights(layers, EndWeights(table(header.embed), norm, table(header.head)))

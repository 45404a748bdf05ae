"""Keeps packed weights in `~/.cache/evener/weights`, one file per shard, and maps them instead of packing them again.

Replicas that hold the same shard map the same file, so that it is in memory once. The kernel must give huge pages to
the mapping (files on ext4 or xfs since Linux 6.16 and 6.1): weights in small ones are read up to a quarter slower
(`evener.kernels.gemm`), and are copied instead.

A file's name is the hash of all that its contents follow from: the model's files (path, size, time), the shard, the
dtype, the instruction set, and the code that packs. It is written under another name first, so that a file is whole or
not there; what was not used for longest goes when `EVENER_WEIGHTS_GIB` (20; 0 keeps nothing) is exceeded.

Layout: `MAGIC`, the header's length (8 bytes, little endian), the header (msgpack of `Header`), then the tensors, each
on a cache line.
"""

import ctypes
import fcntl
import hashlib
import mmap
import os
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import msgspec
import torch
from msgspec import Struct

from evener import kernels
from evener.cache import cache_dir
from evener.errors import InvalidInput
from evener.kernels import PackedWeight, _native
from evener.model.weights import EndWeights, LayerWeights, ShardWeights, Table
from evener.units import human_bytes

MAGIC = b"EVENERW1"
LEAST_BYTES = 8 << 20
"""Smaller shards are packed faster than a file is opened."""
DEFAULT_GIB = 20.0
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
    """`mapped`, `copied from the cache`, or `packed` with the reason why they are not kept."""


def limit_bytes() -> int:
    """What all files together may take. Raises InvalidInput."""
    said = os.environ.get("EVENER_WEIGHTS_GIB", str(DEFAULT_GIB))
    try:
        gib = float(said)
    except ValueError:
        gib = -1.0
    if not 0 <= gib < float("inf"):
        raise InvalidInput(f"EVENER_WEIGHTS_GIB={said!r} is no number of GiB from 0 (keep no packed weights) on")
    return int(gib * 2**30)


def packed_weights(make: Callable[[], ShardWeights], size: int, *of: object) -> Kept:
    """The weights that `make` packs, from the cache where they are there, and kept there otherwise.

    `size`: roughly their bytes; `of`: all that they follow from but the code and the instruction set, printable.
    Whatever the disk refuses, the weights are there. Raises what `make` raises, and InvalidInput for a limit that is
    none.
    """
    limit = limit_bytes()
    if size < LEAST_BYTES or size > limit:
        why = "the cache is off" if not limit else f"the cache holds {human_bytes(limit)}"
        return Kept(make(), "packed" if size < LEAST_BYTES else f"packed anew each time: {why}")
    folder = cache_dir() / "weights"
    path = folder / f"{key(*of)}.bin"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            if (found := _open(path)) is not None:
                return found
            free = shutil.disk_usage(folder).free
            weights = make()
            if free < 2 * size:
                return Kept(weights, f"packed anew each time: {human_bytes(free)} are free in {folder}")
            _make_room(folder, limit - size)
            _write(path, weights)
            del weights  # before it is there a second time
            if (found := _open(path)) is not None:
                return found
            return Kept(make(), f"packed anew each time: {path} cannot be read back")
    except OSError as error:
        return Kept(make(), f"packed anew each time: {path}: {error.strerror or error}")


def key(*of: object) -> str:
    """A name for what follows from `of`, this code and this instruction set."""
    text = repr((of, kernels.isa(), _code()))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


@lru_cache(maxsize=1)
def _code() -> str:
    """A hash of the code whose change may change what is packed."""
    here = Path(__file__).parent
    files = [Path(_native.__file__), here.parent / "kernels" / "gemm.py", here.parent / "spec" / "model.py"]
    total = hashlib.sha256()
    for file in (*files, *sorted(here.glob("*.py"))):
        total.update(file.read_bytes())
    return total.hexdigest()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One process at a time per file: of replicas that start together one packs, the others wait and map."""
    with path.with_suffix(".lock").open("ab") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _make_room(folder: Path, room: int) -> None:
    """Delete the files that were not used for longest until the rest fits in `room`."""
    kept = []
    for file in folder.glob("*.bin"):
        with suppress(OSError):
            stat = file.stat()
            kept.append((stat.st_mtime, stat.st_size, file))
    total = sum(size for _, size, _ in kept)
    for _, size, file in sorted(kept):
        if total <= room:
            return
        total -= size
        for gone in (file, file.with_suffix(".lock")):
            with suppress(OSError):
                gone.unlink()


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
    unfinished = path.with_suffix(f".{os.getpid()}")
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
    except msgspec.DecodeError:
        return None
    if len(mapped) != first + header.size:
        return None
    with suppress(OSError):
        os.utime(path)  # used now: `_make_room` goes by it
    with suppress(OSError, ValueError):
        mapped.madvise(mmap.MADV_HUGEPAGE)
        mapped.madvise(_POPULATE_READ)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes weights
        data = torch.frombuffer(mapped, dtype=torch.int8)
    where = "mapped"
    if not in_huge_pages(data):
        data, where = kernels.huge_copy(data), "copied from the cache"
    return Kept(_unpack(header, data[first:]), where)


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
        size = dtype.itemsize
        for n in piece.shape:
            size *= n
        return data[piece.offset : piece.offset + size].view(dtype).view(piece.shape)

    def value(piece: Piece | None) -> torch.Tensor | PackedWeight | None:
        if piece is None or piece.packed is None:
            return None if piece is None else tensor(piece)
        return PackedWeight(tensor(piece), *piece.packed)

    def table(entry: tuple[Piece, int, int] | None) -> Table | None:
        if entry is None:
            return None
        weight = value(entry[0])
        assert isinstance(weight, PackedWeight)
        return Table(weight, entry[1], entry[2])

    layers = [LayerWeights(*(value(piece) for piece in layer)) for layer in header.layers]  # type: ignore[arg-type]
    norm = value(header.final_norm)
    assert norm is None or isinstance(norm, torch.Tensor)
    return ShardWeights(layers, EndWeights(table(header.embed), norm, table(header.head)))

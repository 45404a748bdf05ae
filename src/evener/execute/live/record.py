"""Records a live run: every event with its time and the commands it gave, in consumption order (law 4), and the spans.

The file is a sequence of msgpack records, each after its length as four little-endian bytes. The first is a `Header`,
which says all that a fresh brain needs (`evener.execute.served`); `Entry` and `Timing` follow as they came.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from evener.engine.events import Command, Event
from evener.errors import InvalidInput
from evener.execute.served import Header
from evener.ledger.spans import Span
from evener.units import Nanoseconds

FORMAT = 3
"""Of the file; raised with every change that an older reader would misunderstand."""


class Entry(Struct, frozen=True, array_like=True, tag="step"):
    """One call of `Brain.step`."""

    now: Nanoseconds
    event: Event
    commands: list[Command]


class Timing(Struct, frozen=True, array_like=True, tag="spans"):
    """A bundle of spans from one worker, as it arrived."""

    now: Nanoseconds
    device: str
    spans: tuple[Span, ...]


class ReplicaUp(Struct, frozen=True, array_like=True, tag="up"):
    """All workers of a replica have loaded."""

    now: Nanoseconds
    replica: int


Kept = Header | Entry | Timing | ReplicaUp


class Recorder:
    """Appends records to a file. Every method but the constructor lets OSError through (a full disk): stop then."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise InvalidInput(f"cannot record to {path}: {error.strerror}; give a writable path") from error
        self._encode = msgspec.msgpack.Encoder().encode

    def add(self, kept: Kept) -> None:
        """Append one record."""
        data = self._encode(kept)
        self._file.write(len(data).to_bytes(4, "little"))
        self._file.write(data)

    @property
    def closed(self) -> bool:
        """Nothing more can be added."""
        return self._file.closed

    def close(self) -> None:
        """Flush and close; idempotent."""
        self._file.close()


def read_record(path: Path) -> Iterator[Kept]:
    """The records of a file, in order, the header first. A truncated last one (a killed server, a full disk) ends it.

    Raises InvalidInput when the file cannot be read, is no recording, or is of another format.
    """
    try:
        file = path.open("rb")
    except OSError as error:
        raise InvalidInput(f"cannot read the recording {path}: {error.strerror}; give a readable file") from error
    decode = msgspec.msgpack.Decoder(Kept).decode
    with file:
        first = True
        while len(head := file.read(4)) == 4:
            size = int.from_bytes(head, "little")
            data = file.read(size)
            if len(data) < size:
                break
            if first:
                _check_header(path, data)
                first = False
            try:
                yield decode(data)
            except msgspec.DecodeError as error:
                raise InvalidInput(
                    f"{path} is damaged before byte {file.tell()} ({error}); record the run again"
                ) from error
    if first:
        raise InvalidInput(f"{path} is no recording (it has no header); make one with --record FILE")


def _check_header(path: Path, data: bytes) -> None:
    """The format is looked at before the rest, which another format may have changed."""
    try:
        head = msgspec.msgpack.decode(data)
    except msgspec.DecodeError:
        head = None
    if not isinstance(head, list) or len(head) < 2 or head[0] != "header":
        raise InvalidInput(f"{path} is no recording (it has no header); make one with --record FILE")
    if head[1] != FORMAT:
        raise InvalidInput(
            f"{path} has recording format {head[1]}, this Evener reads format {FORMAT}; record the run again"
        )

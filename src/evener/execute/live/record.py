"""Records a live run: every event with its time, and the commands it gave, in consumption order (law 4).

The file is a sequence of msgpack records, each after its length as four little-endian bytes.
"""

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from evener.engine.events import Command, Event
from evener.errors import InvalidInput
from evener.units import Nanoseconds


class Entry(Struct, frozen=True, array_like=True):
    """One call of `Brain.step`."""

    now: Nanoseconds
    event: Event
    commands: list[Command]


class Recorder:
    """Appends entries to a file."""

    def __init__(self, path: Path) -> None:
        try:
            self._file = path.open("wb")
        except OSError as error:
            raise InvalidInput(f"cannot record to {path}: {error.strerror}; give a writable path") from error
        self._encode = msgspec.msgpack.Encoder().encode

    def add(self, now: Nanoseconds, event: Event, commands: list[Command]) -> None:
        """Append one entry."""
        data = self._encode(Entry(now, event, commands))
        self._file.write(len(data).to_bytes(4, "little"))
        self._file.write(data)

    @property
    def closed(self) -> bool:
        """Nothing more can be added."""
        return self._file.closed

    def close(self) -> None:
        """Flush and close; idempotent."""
        self._file.close()


def read_record(path: Path) -> Iterator[Entry]:
    """The entries of a recording, in order. A truncated last entry (a killed server) ends it."""
    decode = msgspec.msgpack.Decoder(Entry).decode
    with path.open("rb") as file:
        while len(head := file.read(4)) == 4:
            size = int.from_bytes(head, "little")
            data = file.read(size)
            if len(data) < size:
                return
            yield decode(data)

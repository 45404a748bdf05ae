"""Files that a command is told to write: refused before minutes are spent on what cannot be kept."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evener.errors import InvalidInput
from evener.pictures import check_drawable


def check_folder(path: Path | None, option: str) -> None:
    """Raise InvalidInput unless a file of this name could be made."""
    if path is None:
        return
    folder = path.absolute().parent
    if not folder.is_dir():
        raise InvalidInput(f"{option} {path}: there is no directory {folder}; make it first")
    if path.is_dir():
        raise InvalidInput(f"{option} {path} is a directory; name a file in it")


def check_picture(path: Path | None, option: str) -> None:
    """Raise InvalidInput unless a picture of this name could be drawn: what it shows may take minutes to find out."""
    if path is None:
        return
    check_folder(path, option)
    check_drawable(path, option)


@contextmanager
def writing(path: Path, option: str) -> Iterator[None]:
    """Raise InvalidInput in the place of an OSError of writing this file."""
    try:
        yield
    except OSError as error:
        raise InvalidInput(
            f"{option} {path} cannot be written: {error.strerror or error}; give a path that can be"
        ) from error

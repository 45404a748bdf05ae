"""What all pictures share: what can be drawn, a figure without a display, and the file it goes to (extra `plot`)."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

from evener.errors import InvalidInput

FORMATS = (".png", ".svg", ".pdf")


def check_drawable(path: Path, what: str) -> None:
    """Raise InvalidInput unless a picture could be drawn under this name; `what` asks for it, such as `--plot`."""
    if path.suffix.lower() not in FORMATS:
        raise InvalidInput(f"{what} {path}: the ending {path.suffix!r} is none of {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise InvalidInput(f"{what} needs matplotlib; install it with pip install 'evener[plot]'")


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib Figure, inches, that needs no display and changes no settings of the process's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), **options)
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Any, path: Path, what: str, **options: Any) -> None:
    """Write it in the format of the path's ending. Raises InvalidInput when the file cannot be written."""
    try:
        figure.savefig(path, **options)
    except OSError as error:
        raise InvalidInput(f"{what} {path} cannot be written: {error.strerror}; give a path that can be") from error

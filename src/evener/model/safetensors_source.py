"""A Hugging Face directory: config.json, safetensors (single or sharded by an index), tokenizer.json.

No torch at module level: reading weights imports it.
"""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from evener.errors import InvalidInput, UnsupportedModel
from evener.model.families import Config, family_of
from evener.model.source import ModelSource, check_tensors, first_line
from evener.spec.plan import Interval

if TYPE_CHECKING:
    import torch

FLOATS = ("F32", "BF16", "F16")


class SafetensorsSource(ModelSource):
    """Weights mapped from safetensors files."""

    def __init__(self, directory: Path, name: str | None = None) -> None:
        self.path = directory
        self.name = name or directory.resolve().name
        self._raw = read_json(directory / "config.json")
        config = Config(self._raw, str(directory / "config.json"))
        self.spec = family_of(config).spec(config)
        self._file_of: dict[str, Path] = {}
        self.shapes = {}
        self._handles: dict[Path, Any] = {}
        for file in self._weight_files():
            self._read_header(file)
        check_tensors(str(directory), self.spec, self.shapes)
        self.opened = self.stamp()  # weights are read later

    def _weight_files(self) -> list[Path]:
        index = self.path / "model.safetensors.index.json"
        if (single := self.path / "model.safetensors").is_file():
            return [single]
        if not index.is_file():
            raise UnsupportedModel(
                f"{self.path} has no model.safetensors and no model.safetensors.index.json; other weight formats are "
                "not read, convert them with transformers' save_pretrained"
            )
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict):
            raise InvalidInput(f"{index} has no mapping `weight_map`; download it again")
        files = sorted({self.path / Path(str(f)).name for f in weight_map.values()})
        if missing := [f.name for f in files if not f.is_file()]:
            raise InvalidInput(f"{self.path} lacks {', '.join(missing)}, named by {index.name}; download them")
        return files

    def _read_header(self, file: Path) -> None:
        """Names, shapes and types; the data stays on disk."""
        try:
            with safe_open(file, framework="numpy") as handle:
                for tensor in handle.keys():  # noqa: SIM118  (not a dict)
                    entry = handle.get_slice(tensor)
                    if entry.get_dtype() not in FLOATS:
                        raise UnsupportedModel(
                            f"{file}: tensor {tensor} is {entry.get_dtype()}; supported: {', '.join(FLOATS)}"
                        )
                    self._file_of[tensor] = file
                    self.shapes[tensor] = tuple(entry.get_shape())
        except (SafetensorError, OSError) as error:
            raise InvalidInput(f"{file} cannot be read as safetensors ({error}); download it again") from error

    def _mapped(self, file: Path) -> Any:
        """The file, mapped at its first use."""
        if file not in self._handles:
            self._handles[file] = safe_open(file, framework="pt")
        return self._handles[file]

    def _read(self, name: str, rows: Interval, cols: Interval | None, dtype: "torch.dtype") -> "torch.Tensor":
        import torch

        part = self._mapped(self._file_of[name]).get_slice(name)
        tensor = part[slice(*rows)] if cols is None else part[slice(*rows), slice(*cols)]
        # A copy always, so that the shard owns its memory and no view keeps the file mapped.
        owned: torch.Tensor = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
        return owned

    def files(self) -> list[Path]:
        return [self.path / "config.json", *sorted(set(self._file_of.values()))]

    def rope_divisors(self) -> list[float] | None:
        return None

    def _load_tokenizer(self) -> Any:
        # transformers imports torch as soon as AutoTokenizer is named; the fast class alone does not.
        from transformers import PreTrainedTokenizerFast

        try:
            if (self.path / "tokenizer.json").is_file():
                return PreTrainedTokenizerFast.from_pretrained(self.path)
            from transformers import AutoTokenizer

            return AutoTokenizer.from_pretrained(self.path, use_fast=True)
        except Exception as error:  # the tokenizer classes raise anything, down to bare Exception
            raise UnsupportedModel(
                f"{self.path}: no tokenizer can be loaded ({first_line(error)}); put the model's tokenizer.json there"
            ) from error

    def _config_eos(self) -> set[int]:
        generation = self.path / "generation_config.json"
        ids: set[int] = set()
        for raw in (self._raw, read_json(generation) if generation.is_file() else {}):
            eos = raw.get("eos_token_id")
            ids.update(eos if isinstance(eos, list) else [] if eos is None else [eos])
        return ids


def read_json(file: Path) -> dict[str, Any]:
    """The file's mapping. Raises InvalidInput when it cannot be read."""
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInput(f"{file} cannot be read as JSON ({error})") from error
    if not isinstance(raw, dict):
        raise InvalidInput(f"{file} must hold a mapping, not {type(raw).__name__}")
    return raw

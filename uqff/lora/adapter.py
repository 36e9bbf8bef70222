"""An adapter as PEFT saves it: a directory with a configuration and the factors of each module.

::

    adapter_config.json
    adapter_model.safetensors    base_model.model.PATH.lora_A.weight    A [r, in]
                                 base_model.model.PATH.lora_B.weight    B [out, r]

PATH is a module of the model, as ``model.layers.0.self_attn.q_proj``.  Of tensors that are listed in
``target_parameters``, stacks of experts among them, PATH is the module that holds them; where it holds several, all but
the last have ``.base_layer`` behind it, and A and B of all experts are one tensor::

    A [experts * r, in]          row e * r + k       of expert e
    B [out, r * experts]         column k * experts + e

Nothing in the directory is executed: an ``adapter_model.bin``, which is a pickle, is refused.

Authority: peft 0.21, ``utils/save_and_load.py``, ``tuners/lora/layer.py`` (``ParamWrapper``).
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from uqff.codes import LOADED_DTYPES, DType
from uqff.container.closing import Closing
from uqff.container.mapped import MappedFile
from uqff.errors import FormatError, HubError, MissingError, ShapeError, UnsupportedError
from uqff.hub.fetch import fetch
from uqff.hub.names import HubName, hub_name
from uqff.lora.config import CONFIG_NAME, LoraConfig, read_lora_config
from uqff.lora.low_rank import LowRank
from uqff.simd.floats import Floats

__all__ = ["WEIGHTS_NAME", "Adapter", "Factors", "open_adapter"]

WEIGHTS_NAME: Final = "adapter_model.safetensors"
PICKLE_NAME: Final = "adapter_model.bin"

PREFIX: Final = "base_model.model."
FACTOR: Final = re.compile(r"(?P<path>.+)\.lora_(?P<factor>[AB])\.weight")
NESTED: Final = ".base_layer"
WEIGHT: Final = "weight"

REFUSED: Final = {
    ".lora_magnitude_vector": "DoRA, whose magnitudes are no sum of a weight and a delta",
    ".lora_embedding_": "factors of an embedding",
    ".lora_A.bias": "biases of the factors",
    ".lora_B.bias": "biases of the factors",
    ".modules_to_save.": "a module that was trained whole",
}
"""What the name of a tensor tells that is not supported."""


@dataclass(frozen=True, eq=False)
class Factors:
    """The two tensors of a module.

    Attributes:
        path: of the module.
        key: what patterns of the configuration call its weight; None if they are not for that.
        a: F32, F16 or BF16, a view of the file.
        b: likewise.
        names: of the tensors.
        parameters: which other tensors of the module they may be for, by ``target_parameters``.
    """

    path: str
    key: str | None
    a: Floats
    b: Floats
    names: tuple[str, str]
    parameters: tuple[str, ...] = ()


class Adapter(Mapping[str, LowRank], Closing):
    """An open adapter: paths of modules to their deltas. Made by :func:`open_adapter`.

    Stacks of experts are not among the paths: their shapes say what is what, see :mod:`uqff.lora.applied`.

    Attributes:
        path: the directory.
        config: its configuration.
        mapped: the file of the factors.
        factors: all that it has, in the order of the file.
    """

    def __init__(self, path: Path, config: LoraConfig, file: MappedFile) -> None:
        self.path = path
        self.config = config
        self.mapped = file
        self.factors = _read(config, file)
        self._by_path = {each.path: each for each in self.factors if each.key is not None}
        for each in self._by_path.values():
            if not each.parameters:
                self.low_rank(each)  # which checks the rank

    def __getitem__(self, path: str) -> LowRank:
        """The delta of a module.

        Raises:
            MissingError: the adapter has none.
        """
        if path not in self._by_path:
            raise MissingError("adapter has no such module", file=str(self.file), layer=path)
        return self.low_rank(self._by_path[path])

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_path)

    def __len__(self) -> int:
        return len(self._by_path)

    def low_rank(self, factors: Factors, weight: float = 1.0) -> LowRank:
        """The delta of the factors of one matrix.

        Args:
            factors: of this adapter.
            weight: of the adapter among others.

        Raises:
            ShapeError: they are of another rank than the configuration says.
        """
        rank, _, scale = self.config.size(factors.key or factors.path, weight)
        if factors.a.shape[0] != rank:
            raise ShapeError(
                "factors of another rank than the configuration says",
                file=str(self.file),
                layer=factors.path,
                field=factors.names[0],
                expected=rank,
                got=factors.a.shape[0],
            )
        return LowRank(factors.b, factors.a, scale, self.origin(factors))

    def origin(self, factors: Factors) -> str:
        """File and tensors, for errors."""
        return f"{self.file}: {', '.join(factors.names)}"

    @property
    def file(self) -> Path:
        """The file of the factors."""
        return self.mapped.path

    def stamps(self) -> list[list[str | int]]:
        """Name, size and time of the last change (nanoseconds) of each file: what tells that it is still the same."""
        status = [(path, os.stat(path)) for path in (self.config.path, self.file)]
        return [[str(path), each.st_size, each.st_mtime_ns] for path, each in status]

    def close(self) -> None:
        """Release the file. Factors already taken out stay valid."""
        self.mapped.close()

    def __repr__(self) -> str:
        return f"<Adapter {self.path}: {len(self.factors)} modules>"


def open_adapter(path: str | os.PathLike[str]) -> Adapter:
    """Open an adapter that PEFT has saved, and check it.

    Args:
        path: the directory, or the name of a repository of the hub, of which it is fetched.

    Raises:
        UnsupportedError: it is no LoRA, or more than factors that are added to weights: DoRA, trained biases, modules
            or tokens, factors of an embedding; the key or tensor is named.
        FormatError: a file breaks a rule; a factor lacks the other, is of another dtype or not finite.
        ShapeError: factors do not fit each other, or the rank that the configuration says.
        HubError: the hub did not give it, or there is no adapter in the repository.
        FileNotFoundError: no such directory, or no adapter in it.
        OSError: a file cannot be read.

    >>> with uqff.lora.open_adapter("adapter") as adapter:
    ...     delta = adapter["model.layers.0.mlp.up_proj"]
    >>> delta.shape, delta.rank, delta.scale
    ((256, 256), 2, 2.0)
    """
    name = hub_name(path)
    path = Path(path) if name is None else _fetched(name)
    if not path.is_dir():
        raise FileNotFoundError(f"no such directory: {path}")
    for part in (CONFIG_NAME, WEIGHTS_NAME):
        if not (path / part).is_file():
            if part == WEIGHTS_NAME and (path / PICKLE_NAME).is_file():
                raise _pickle(path / PICKLE_NAME)
            raise FileNotFoundError(f"no adapter in {path}: it lacks {part}")
    config = read_lora_config(path / CONFIG_NAME)
    file = MappedFile(path / WEIGHTS_NAME)
    try:
        return Adapter(path, config, file)
    except BaseException:
        file.close()
        raise


def _pickle(file: Path | str) -> UnsupportedError:
    return UnsupportedError("adapter is a pickle, which may run code", file=str(file), expected=WEIGHTS_NAME)


def _fetched(name: HubName) -> Path:
    """The directory of an adapter of the hub, in the hub's cache: its weights and the documents, nothing else."""
    if name.kind is not None or name.file is not None:
        expected = "a repository, or a folder in it"
        raise UnsupportedError("not the name of an adapter", field="lora", expected=expected, got=name.text)

    def choose(names: Collection[str]) -> list[str]:
        if WEIGHTS_NAME in names and CONFIG_NAME in names:
            return [WEIGHTS_NAME]
        if PICKLE_NAME in names:
            raise _pickle(f"{name}/{PICKLE_NAME}")
        raise HubError("no adapter in the repository", file=str(name), expected=f"{CONFIG_NAME} and {WEIGHTS_NAME}")

    return fetch(name, choose)


def _read(config: LoraConfig, file: MappedFile) -> tuple[Factors, ...]:
    pairs: dict[str, dict[str, str]] = {}
    for name in file.header.entries:
        match = FACTOR.fullmatch(name)
        if match is None:
            raise _no_factor(file, name)
        pairs.setdefault(match["path"], {})[match["factor"]] = name
    if not pairs:
        raise FormatError("adapter has no tensors", file=str(file.path))
    return tuple(_factors(config, file, place, names) for place, names in pairs.items())


def _no_factor(file: MappedFile, name: str) -> Exception:
    for part, what in REFUSED.items():
        if part in name:
            return UnsupportedError(f"adapter has {what}", file=str(file.path), field=name)
    expected = "names that end in .lora_A.weight or .lora_B.weight"
    if name.endswith((".weight", ".bias")) and ".lora_" not in name:
        problem = "adapter has a tensor that was trained whole"
        return UnsupportedError(problem, file=str(file.path), field=name, expected=expected)
    return FormatError("tensor is no factor", file=str(file.path), field=name, expected=expected)


def _factors(config: LoraConfig, file: MappedFile, place: str, names: Mapping[str, str]) -> Factors:
    """The factors of a module, checked as far as can be without the model."""
    if len(names) < 2:
        (name,) = names.values()
        other = name.replace(".lora_A.", ".lora_B.") if "A" in names else name.replace(".lora_B.", ".lora_A.")
        raise FormatError(
            "factor lacks the other", file=str(file.path), field=name, expected=other, got="no such tensor"
        )
    module = path = place.removeprefix(PREFIX)
    while module.endswith(NESTED):
        module = module.removesuffix(NESTED)
    parameters = [] if config.targets(module) and module == path else config.parameters_of(module)
    key = None
    if module == path and config.targets(module) is not False:
        key = module
    elif WEIGHT in parameters:
        key = f"{module}.{WEIGHT}"
    others = tuple(name for name in parameters if name != WEIGHT)
    if key is None and not others:
        raise FormatError(
            "factors of a module that the configuration leaves out",
            file=str(file.path),
            layer=module,
            field=names["A"],
            expected=f"a module of target_modules, or of target_parameters, in {config.path.name}",
        )
    a, b = (_floats(file, module, names[factor]) for factor in "AB")
    if a.shape[0] != b.shape[1]:
        raise ShapeError(
            "factors of different ranks",
            file=str(file.path),
            layer=module,
            field=names["B"],
            expected=f"[out, {a.shape[0]}], as A is {list(a.shape)}",
            got=list(b.shape),
        )
    return Factors(module, key, a, b, (names["A"], names["B"]), others)


def _floats(file: MappedFile, module: str, name: str) -> Floats:
    entry = file.header.entries[name]
    dtype = LOADED_DTYPES.get(entry.dtype)
    where: dict[str, Any] = {"file": str(file.path), "layer": module, "field": name, "offset": entry.begin}
    if dtype is None:
        expected = ", ".join(LOADED_DTYPES)
        raise UnsupportedError("factor of an unknown dtype", expected=expected, got=entry.dtype, **where)
    if len(entry.shape) != 2 or 0 in entry.shape:
        raise ShapeError("factor is no matrix", expected="two dimensions", got=list(entry.shape), **where)
    floats = Floats.of_bytes(file.slice(entry), dtype, entry.shape)
    if not floats.is_finite:
        first = floats.first_not_finite()
        value = floats.flat[first : first + 1].cast(DType.F32).bits.view(np.float32)[0]
        got = f"{value} at {[*map(int, np.unravel_index(first, entry.shape))]}"
        raise FormatError("factor is not finite", expected="finite numbers", got=got, **where)
    return floats

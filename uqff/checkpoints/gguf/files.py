"""The tensors of a GGUF file under the names that they have in a checkpoint, rows in the model's order.

Which tensor is which weight is declared in :mod:`uqff.checkpoints.gguf.names`; the configuration is made of metadata
(:mod:`uqff.checkpoints.gguf.config`), or is the model's own.  When the file is opened, all is checked: that each tensor
is there, of the shape that the configuration gives it, and that no other is.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from uqff.checkpoints.gguf.beside import check_text_model, open_vision, stated_text, text_entries, text_paths
from uqff.checkpoints.gguf.config import architecture_of_file, check_config, config_of
from uqff.checkpoints.gguf.forms import AS_IS
from uqff.checkpoints.gguf.latent import WHOLE, latent_names, latent_shapes
from uqff.checkpoints.gguf.names import (
    LONG_FACTORS,
    ROPE_FACTORS,
    SHORT_FACTORS,
    columns_of,
    heads_of,
    joined_of,
    order_of,
    plain_tensors,
    shape_of,
    wanted_names,
)
from uqff.checkpoints.gguf.seeing import SEEING
from uqff.checkpoints.gguf.stored import AsIs, Columns, Formed, InFile, JoinedRows, Latent
from uqff.checkpoints.gguf.tokenizer import tokenizer_files
from uqff.checkpoints.safetensors import TensorFiles
from uqff.codes import DType
from uqff.container.document import write_json
from uqff.container.mapped import ListedFile, MappedFile
from uqff.errors import FormatError, ShapeError, UnsupportedError, located
from uqff.families.part import Part
from uqff.gguf.reader import GgufFile, GgufTensor, open_gguf
from uqff.models.architectures import architecture_of
from uqff.models.assets import CONFIG_NAME, companions_of, copy_companions
from uqff.models.config import read_config
from uqff.models.layouts import WeightLayout, half_split_order

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from uqff.checkpoints.method import Cut
    from uqff.container.shards import PathLike
    from uqff.families.base import QuantizedTensor
    from uqff.families.rows import Order

__all__ = ["KEPT_NAME", "GgufTensors", "is_gguf", "open_gguf_tensors"]

KEPT_NAME = "metadata.gguf"
"""Metadata of a GGUF file beside a UQFF model that was made of it: see :mod:`uqff.conversion.kept`."""


TOKENIZER_CONFIG = "tokenizer_config.json"

FACTORS = (ROPE_FACTORS, LONG_FACTORS, SHORT_FACTORS)
"""Tensors that stand in the configuration."""


class GgufTensors(TensorFiles):
    """The tensors of a GGUF file by the names of a checkpoint. Made by :func:`open_gguf_tensors`.

    Attributes:
        file: the GGUF file.
        architecture: of its model.
        vision: the part of the model that sees; None if there is none.
        text: configuration of the text model; the whole one, if there is no other part.
        assets: directory of the model's own configuration and tokenizer; None if they are made of metadata.
        notes: what could not be compared with the model's own configuration, in sentences.
    """

    def __init__(self, file: GgufFile, assets: Path | None = None, mmproj: PathLike | None = None) -> None:
        """Nothing but the list of tensors is read.

        Raises:
            UqffError: see :func:`open_gguf_tensors`.
        """
        self.path = file.paths[0]
        self.file = file
        self.assets = assets
        self.notes: list[str] = []
        self._files = []
        check_text_model(file)
        self.vision = open_vision(file.paths[0], mmproj)
        try:
            seeing = None if self.vision is None else SEEING.get(file.get_value("general.architecture"))
            self.architecture = seeing or architecture_of_file(file)
            self.text, self.config = self._configs()
            plain = plain_tensors(self.architecture, self.text)
            self._forms = {each.name: each.form for each in plain if each.form is not AS_IS}
            self._by_name = {name: self._stored(name, tensors) for name, tensors in self._found().items()}
            if self.vision is not None:
                within = text_paths(self.config)
                self._by_name = {within(name): each for name, each in self._by_name.items()}
                self._by_name |= self.vision.tensors()
        except BaseException:
            self._close_vision()
            raise

    def _configs(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The configuration of the text model, and that of the whole."""
        vision, architecture = self.vision, self.architecture
        name = None if vision is None else vision.class_of(architecture.name)
        if self.assets is None:
            text = config_of(self.file, architecture)
            if vision is None or name is None:
                return text, text
            vision.check_text(text)
            return text, vision.config(name, text, self.file)
        path = self.assets / CONFIG_NAME
        companions_of(self.assets, leave=[KEPT_NAME])
        config = read_config(path)
        with located(file=path):
            known = architecture_of(config)
            allowed = architecture.classes if name is None else (name,)
            fits = architecture.only_if is None or architecture.only_if(config)
            if known.classes[0] not in allowed or (name is None and not fits):
                raise FormatError(
                    "not the file's architecture",
                    field="architectures",
                    expected=" or ".join(allowed),
                    got=known.classes[0],
                )
            WeightLayout.of(config).check()
        text = config
        if vision is not None:
            text = stated_text(config, config_of(self.file, architecture, strict=False), vision.text_sizes)
            vision.check_text(text)
            vision.check_config(config, str(path))
        with located(file=path):
            self.notes += check_config(text, self.file, architecture, str(path))
        if text.get("num_key_value_heads") is None:
            text = {**text, "num_key_value_heads": text["num_attention_heads"]}
        return text, text if vision is None else config

    def _found(self) -> dict[str, tuple[GgufTensor, ...]]:
        """Names in the checkpoint to the tensors that each is made of, in the order of the file."""
        found: dict[str, tuple[str, ...]] = {}
        entries = None if self.vision is None else text_entries(self.config)
        for name, stored, optional in wanted_names(self.architecture, self.text, entries):
            if optional and not any(each in self.file for each in stored):
                continue
            if self.architecture.latent and stored[0].endswith(f".{WHOLE}.weight") and stored[0] not in self.file:
                stored = latent_names(stored[0])
            module = name.rpartition(".")[0]
            for each, expected in zip(stored, self._stored_shapes(name, stored), strict=True):
                tensor = self.file.get(each)
                if tensor is None:
                    raise FormatError("the file lacks a tensor", layer=module, field=each, got="no such tensor")
                if tensor.shape != expected:
                    raise ShapeError(
                        "tensor does not fit the configuration",
                        layer=module,
                        field=each,
                        expected=list(expected),
                        got=list(tensor.shape),
                    )
            found[name] = stored
        taken = {each for stored in found.values() for each in stored}
        left = [name for name in self.file if name not in taken and name not in FACTORS]
        if ahead := [name for name in left if self._is_ahead(name)]:
            self.notes.append(f"the tensors that predict further tokens are left out ({len(ahead)})")
            left = [name for name in left if name not in ahead]
        if left:
            raise UnsupportedError(
                "tensors that the architecture does not have", field=left[0], got=", ".join(left[:20])
            )
        places = {name: at for at, name in enumerate(self.file)}
        ordered = sorted(found.items(), key=lambda each: places[each[1][0]])
        return {name: tuple(self.file[each] for each in stored) for name, stored in ordered}

    def _stored_shapes(self, name: str, stored: Sequence[str]) -> tuple[tuple[int, ...], ...]:
        shape = shape_of(name, self.text)
        if name in self._forms:
            return self._forms[name].shapes(shape, self.text)
        if len(stored) == 1:
            return (shape,)
        if self.architecture.latent:
            return latent_shapes(self.text)
        joined = joined_of(name.removesuffix(".weight"), self.architecture)
        assert joined is not None
        *outer, rows, columns = shape
        return tuple((*outer, each, columns) for each in joined.rows_of(rows, self.text))

    def _is_ahead(self, name: str) -> bool:
        """Whether a tensor is of a layer after those that make the next token, which GLM-4-MoE has."""
        match = re.match(r"blk\.([0-9]{1,9})\.", name)
        said = self.file.get_value(f"{self.architecture.name}.nextn_predict_layers")
        return bool(said) and match is not None and int(match[1]) >= self.text["num_hidden_layers"]

    def _stored(self, name: str, tensors: tuple[GgufTensor, ...]) -> InFile:
        """How a weight stands in the file, of the tensors that it is made of."""
        if name in self._forms:
            return Formed(tensors, self._forms[name], shape_of(name, self.text), self.text)
        runs = columns_of(name.removesuffix(".weight"), self.architecture, self.text)
        if runs is not None:
            return Columns(tensors[0], runs)
        if len(tensors) == 1:
            return AsIs(tensors[0], self._order(name, tensors[0].shape))
        module, shape = name.removesuffix(".weight"), shape_of(name, self.text)
        joined = joined_of(module, self.architecture)
        return Latent(tensors, shape) if joined is None else JoinedRows(tensors, joined, shape, self.text, module)

    def _order(self, name: str, shape: tuple[int, ...]) -> Order | None:
        """The order that makes the rows of a tensor those of the model; None if they are."""
        module = name.rpartition(".")[0]
        heads = heads_of(self.architecture, self.text, module)
        if heads is None:
            return order_of(module, self.architecture, self.text)
        return half_split_order(shape[0], heads, layer=module)

    def gguf(self, name: str) -> GgufTensor:
        """The tensor of a name; of several that it is made of, the first."""
        return self._by_name[name].tensors[0]

    def meta(self, name: str) -> QuantizedTensor:
        """The record of a weight without its bytes; raises what :meth:`record` does."""
        return self._by_name[name].meta()

    def type_names(self, name: str) -> str:
        """The types of the tensors that a weight is made of, in words."""
        return " and ".join(tensor.type_name for tensor in self._by_name[name].tensors)

    @property
    def is_absorbed(self) -> bool:
        """Whether the keys of DeepSeek's attention are transposed: :mod:`uqff.checkpoints.gguf.latent`."""
        return any(isinstance(each, Latent) for each in self._by_name.values())

    def not_coming_back(self) -> list[GgufTensor]:
        """The tensors whose numbers are not made again of the checkpoint's: the last bits of norms and rates."""
        found = (each for each in self._by_name.values() if isinstance(each, Formed) and not each.comes_back)
        return [tensor for each in found for tensor in each.tensors]

    def is_across(self, name: str) -> bool:
        """Whether the blocks of a weight are not those of the model's, so that only its numbers can be had."""
        return self._by_name[name].is_across

    def why_across(self, name: str) -> str:
        """Why they are not, in words."""
        return self._by_name[name].WHY_ACROSS

    def record(self, name: str, cut: Cut | None = None) -> QuantizedTensor:
        """The record of a weight, or of a slice of it, its rows in the model's order.

        Raises:
            UqffError: see :func:`uqff.checkpoints.gguf.blocks.record_of`.
        """
        return self._by_name[name].record(cut)

    def numbers(self, name: str, dtype: DType = DType.F32) -> Part:
        """The numbers of a bias or norm in the model's order."""
        return self._by_name[name].numbers(dtype)

    def __getitem__(self, name: str) -> torch.Tensor:
        return Part(DType.of_safetensors(self.dtype(name)) or DType.U8, self.shape(name), self.raw(name)).tensor()

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __len__(self) -> int:
        return len(self._by_name)

    def raw(self, name: str) -> memoryview:
        """The bytes of a tensor in the model's order; a view of the file where that is the file's."""
        raw: memoryview = self._by_name[name].raw().payload
        return raw

    @property
    def listed(self) -> tuple[MappedFile | ListedFile, ...]:
        """See :attr:`TensorFiles.listed`."""
        return tuple(listed for file in self.ggufs for listed in file.listed())

    @property
    def ggufs(self) -> tuple[GgufFile, ...]:
        """The GGUF file, and that of the part that sees, if there is one."""
        return (self.file,) if self.vision is None else (self.file, self.vision.file)

    def file_of(self, name: str) -> Path:
        """The file that holds a tensor; the first, if none does."""
        return self.gguf(name).file.path if name in self._by_name else self.path

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, of codes that of what they stand for."""
        return self._by_name[name].shape

    def dtype(self, name: str) -> str:
        """Dtype of a tensor as safetensors spells it; U8 of blocks."""
        return self._by_name[name].dtype

    def nbytes(self, name: str) -> int:
        """Bytes of a tensor."""
        return self._by_name[name].nbytes

    def stamps(self) -> list[list[str | int]]:
        """See :meth:`TensorFiles.stamps`."""
        status = [(path, path.stat()) for file in self.ggufs for path in file.paths]
        return [[path.name, each.st_size, each.st_mtime_ns] for path, each in status]

    def _advise(self, name: str, advice: str, start: int = 0, stop: int | None = None) -> None:
        stored = self._by_name[name]
        if isinstance(stored, Formed):
            return
        if len(stored.tensors) > 1:  # rows of all are wanted together
            start, stop = 0, None
        for tensor in stored.tensors:
            end = tensor.begin + (tensor.nbytes if stop is None else stop)
            tensor.file.advise(tensor.begin + start, end, advice)

    @property
    def config_path(self) -> Path:
        """See :attr:`TensorFiles.config_path`."""
        return (self.path if self.assets is None else self.assets) / CONFIG_NAME

    def check_companions(self) -> None:
        """See :meth:`TensorFiles.check_companions`."""
        if self.assets is not None:
            companions_of(self.assets, leave=[KEPT_NAME])

    def write_companions(
        self, directory: Path, config: Mapping[str, Any] | None, dtype: DType
    ) -> tuple[list[str], list[str]]:
        """See :meth:`TensorFiles.write_companions`; without assets, made of the metadata as far as that goes."""
        if self.assets is not None:
            return copy_companions(self.assets, directory, config=config, leave=[KEPT_NAME]), []
        documents, missing = tokenizer_files(self.file, self.text)
        if self.vision is not None:
            name = self.config["architectures"][0]
            documents |= self.vision.documents(name)
            if (settings := documents.get(TOKENIZER_CONFIG)) is not None:
                documents[TOKENIZER_CONFIG] = {**settings, **self.vision.tokenizer_settings(name)}
        documents = {CONFIG_NAME: {**(config or self.config), "torch_dtype": dtype.torch_name}, **documents}
        for name, document in documents.items():
            write_json(directory / name, document)
        return list(documents), missing

    def close(self) -> None:
        """Release the files. Tensors already taken out stay valid."""
        self.file.close()
        self._close_vision()

    def _close_vision(self) -> None:
        if self.vision is not None:
            self.vision.file.close()

    def __repr__(self) -> str:
        return f"<GgufTensors {self.path}: {len(self)} tensors>"


def is_gguf(source: PathLike) -> bool:
    """Whether a path is a file that is named as GGUF, or begins as one."""
    path = Path(source)
    if not path.is_file():
        return False
    if path.suffix == ".gguf":
        return True
    with open(path, "rb") as file:
        return file.read(4) == b"GGUF"


def open_gguf_tensors(path: PathLike, assets: PathLike | None = None, mmproj: PathLike | None = None) -> GgufTensors:
    """Open a GGUF file as a checkpoint's tensors.

    Args:
        path: the file, or one of a split set.
        assets: a directory with the model's own ``config.json`` and tokenizer, which are compared with the file. None:
            they are made of the metadata as far as that goes.
        mmproj: the part of the model that sees, see :func:`uqff.checkpoints.gguf.beside.open_vision`.

    Raises:
        FormatError: the file breaks a rule, lacks a tensor, or is not the model of ``assets``.
        ShardError: there are several ``mmproj`` files, and none was named.
        UnsupportedError: an architecture, a tensor or a rope scaling that is not known.
        OSError: a file cannot be read.
    """
    file = open_gguf(path)
    try:
        with located(file=file.paths[0]):
            return GgufTensors(file, None if assets is None else Path(assets), mmproj)
    except BaseException:
        file.close()
        raise

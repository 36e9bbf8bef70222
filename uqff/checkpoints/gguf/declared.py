"""How GGUF's architectures are declared: the record of what one has otherwise than most of them.

The architectures are in :mod:`uqff.checkpoints.gguf.table`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from uqff.checkpoints.gguf.forms import AS_IS, Form
from uqff.families.rows import Order
from uqff.gguf.names import BLOCK
from uqff.models.text import Rule

__all__ = ["BlockTensor", "GgufArchitecture", "OtherNumbers", "Runs", "SeveralMatrices"]


@dataclass(frozen=True)
class SeveralMatrices:
    """Several matrices of GGUF that are one of a model, by whole rows, which no code is touched for.

    Attributes:
        stored: their modules' names in GGUF.
        turns: whether their rows take turns; if not, the rows of one follow those of the other.
        rows: how many rows each has, of the configuration; as many as the others if None.
        order: where each row of the model is among all of theirs, one after the other; in order if None.
    """

    stored: tuple[str, ...]
    turns: bool = False
    rows: Callable[[Mapping[str, Any]], tuple[int, ...]] | None = None
    order: Callable[[Mapping[str, Any]], Order] | None = None

    def rows_of(self, count: int, config: Mapping[str, Any]) -> tuple[int, ...]:
        """How many rows of ``count`` each matrix has."""
        return (count // len(self.stored),) * len(self.stored) if self.rows is None else self.rows(config)


@dataclass(frozen=True)
class Runs:
    """Columns of a matrix in another order, by runs of as many: where each run of the model is in GGUF.

    Attributes:
        size: columns of a run.
        order: of the runs; each once.
    """

    size: int
    order: Order

    def fits(self, block_size: int) -> bool:
        """Whether whole blocks of a row change places."""
        return self.size % block_size == 0


@dataclass(frozen=True)
class OtherNumbers:
    """Numbers of ``config.json`` that the metadata says otherwise.

    Attributes:
        stored: keys in the metadata, of whole numbers.
        keys: in ``config.json``.
        read: what the configuration says, of what the metadata do by their keys, and of the rest of it.
        write: what the metadata says, of the configuration; numbers that do not make sense are found there.
    """

    stored: tuple[str, ...]
    keys: tuple[str, ...]
    read: Callable[[Mapping[str, int], Mapping[str, Any]], Mapping[str, Any]]
    write: Callable[[Mapping[str, Any]], Mapping[str, int]]


@dataclass(frozen=True)
class BlockTensor:
    """A tensor of a decoder layer that is no layer of UQFF, nor one of the norms that all decoder layers have.

    Attributes:
        name: relative to the decoder layer, whole.
        stored: the same in GGUF; empty if the module's name there and the end of ``name`` make it; of several that it
            is made of, all.
        when: which decoder layers have it; all if None.
        optional: whether a model may be without.
        form: how it stands in GGUF.
    """

    name: str
    stored: str | tuple[str, ...] = ""
    when: Rule | None = None
    optional: bool = False
    form: Form = AS_IS


@dataclass(frozen=True)
class GgufArchitecture:
    """One architecture of GGUF.

    Attributes:
        name: ``general.architecture``.
        classes: values of ``architectures`` in ``config.json`` that it stands for; the first where nothing says more.
        only_if: what must hold of a configuration of these classes; anything if None.
        norms: of each layer, relative to it.
        norm_biases: whether norms have biases.
        final_norm: of the model.
        interleaved: whether the rows of Q and K are interleaved.
        biases: layers that have a bias, relative to the decoder layer or in the model.
        optional_biases: layers that may have one.
        rope_default: ``rope.freq_base`` of a file that has none; None if it must have one.
        plain: other tensors of decoder layers.
        expert_count: the number of experts in ``config.json``, of an architecture that has any.
        expert_size: the inner size of one in ``config.json``.
        listed: lists of one number for each layer in ``config.json``, and where the metadata says that number.
        epsilon: of norms: in ``config.json``, and where the metadata says it.
        fixed: what else ``config.json`` says of every such model.
        written: what else is written into it, and not looked for.
        implied: what llama.cpp takes for granted of a model of some size.
        numbers: more of ``config.json``, and where the metadata says it.
        counts: the same of whole numbers, flags among them.
        stated: what else the metadata says of every such model.
        unless: of numbers and counts, what a file means that does not say them.
        told_by: flags of ``config.json``, and the tensor whose presence tells them.
        rotated: which part of a head is rotated if ``config.json`` does not say, where that may be less than all.
        activation: ``hidden_act``.
        own_head_size: whether heads may have another size than ``hidden_size / num_attention_heads``.
        norm_offset: what norms have more in GGUF than in a checkpoint, whose models add it when they compute.
        renamed: names in GGUF that are others than in :data:`BLOCK`.
        headless: whether there is never a head beside the embedding.
        windowed: whether llama.cpp applies a sliding window.
        needs_window: whether there must be one.
        kinds: what ``layer_types`` calls layers with heads of keys and values, and others: empty if all have them.
        derived: numbers that the metadata says otherwise; None if there are none.
        scalings: kinds of rope scaling that are converted.
        yarn: what else ``config.json`` says of a ``yarn`` scaling of such a model.
        latent: whether attention is DeepSeek's: :mod:`uqff.checkpoints.gguf.latent`.
        joined: layers, relative to the decoder layer, that are several matrices in GGUF.
        orders: layers, likewise, whose rows are in another order there: where each row of the model is.
        columns: layers, likewise, whose columns are.
        mscales: whether ``longrope`` says what it multiplies queries and keys by.
        tempered: whether a ``yarn`` scaling says by how much queries are scaled by their places, and of its two
            ``mscale`` the second alone, as it is.
        axes: of rotary positions that have several, the key of ``config.json`` that says how they are divided; empty if
            none does. None: they have one.
        only_read: whether no file is made of it: the text of a model that sees, which is computed as another
            architecture's is.
    """

    name: str
    classes: tuple[str, ...]
    only_if: Callable[[Mapping[str, Any]], bool] | None = None
    norms: tuple[str, ...] = ("input_layernorm", "post_attention_layernorm")
    norm_biases: bool = False
    final_norm: str = "model.norm"
    interleaved: bool = False
    biases: tuple[str, ...] = ()
    optional_biases: tuple[str, ...] = ()
    rope_default: float | None = None
    plain: tuple[BlockTensor, ...] = ()
    expert_count: str = ""
    expert_size: str = ""
    listed: Mapping[str, str] = field(default_factory=dict)
    epsilon: tuple[str, str] = ("rms_norm_eps", "attention.layer_norm_rms_epsilon")
    fixed: Mapping[str, Any] = field(default_factory=dict)
    written: Mapping[str, Any] = field(default_factory=dict)
    implied: Callable[[Mapping[str, Any]], Mapping[str, Any]] = lambda config: {}
    numbers: Mapping[str, str] = field(default_factory=dict)
    counts: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, Any] = field(default_factory=dict)
    unless: Mapping[str, Any] = field(default_factory=dict)
    told_by: Mapping[str, str] = field(default_factory=dict)
    rotated: float | None = None
    activation: str = "silu"
    own_head_size: bool = True
    norm_offset: float = 0.0
    renamed: Mapping[str, str] = field(default_factory=dict)
    headless: bool = False
    windowed: bool = False
    needs_window: bool = False
    kinds: tuple[str, ...] = ()
    derived: OtherNumbers | None = None
    scalings: tuple[str, ...] = ()
    yarn: Mapping[str, Any] = field(default_factory=dict)
    latent: bool = False
    joined: Mapping[str, SeveralMatrices] = field(default_factory=dict)
    orders: Mapping[str, Callable[[Mapping[str, Any]], Order]] = field(default_factory=dict)
    columns: Mapping[str, Callable[[Mapping[str, Any]], Runs]] = field(default_factory=dict)
    mscales: bool = False
    tempered: bool = False
    axes: str | None = None
    only_read: bool = False

    @property
    def stated_keys(self) -> tuple[str, ...]:
        """What a file of the architecture says of ``config.json`` beside what all say."""
        said = (self.fixed, self.numbers, self.counts, self.listed)
        partly = () if self.rotated is None else ("partial_rotary_factor",)
        derived = () if self.derived is None else self.derived.keys
        return (self.epsilon[0], *(key for each in said for key in each), *partly, *derived)

    def stored_name(self, module: str) -> str | None:
        """Name in GGUF of a module of a layer, None if there is none; of several, the first."""
        if module in self.joined:
            return self.joined[module].stored[0]
        return self.renamed.get(module, BLOCK.get(module))

    def stored_names(self, module: str) -> tuple[str, ...]:
        """Names in GGUF of what a module of a layer is made of: one, but of joined ones."""
        return self.joined[module].stored if module in self.joined else (str(self.stored_name(module)),)

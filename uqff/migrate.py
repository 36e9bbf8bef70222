"""A model of one generation as one of the other: every code, scale and bias as it is, under other names.

::

    SRC/<stem>-N.uqff --> mapped layers --> stacked or taken apart where experts are --> OUT/<stem>-N.uqff
    SRC/residual.safetensors ------------------------------------------------------> OUT/residual.safetensors
    SRC/config.json, tokenizer.json, ... ------------------------------------------> OUT/...

Nothing is dequantised and nothing is requantised, with one exception that is an addition: versions before 1.2 need the
embedding dense.  A 1.2 model whose embedding is quantised gets it dequantised into its residual; the codes become layer
0 if the head is tied to them, or stay in ``<stem>.kept.safetensors``, a file that older loaders do not look at.  On the
way back they are taken from there, and the dense copy goes.

What a model was before is noted where the format has room for it: in the metadata of 1.x files
(``uqff.migrated_from``), or of the residual (``uqff.dequantized``).

Authority: mistral.rs v0.6.0 and v0.9.2, ``mistralrs-core/src/pipeline/isq.rs``, ``mistralrs-core/src/layers.rs``
(``use_legacy_tied_uqff_head``) and ``mistralrs-core/src/moe/experts/backends.rs`` (``from_weight_source``).
"""

from __future__ import annotations

import contextlib
import errno
import json
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from uqff.architectures import (
    EMBEDDING_SINCE,
    LayerName,
    architecture_of,
    embedding_name,
    is_tied,
    layer_names,
    stacked_layer_names,
    stacked_names,
)
from uqff.codes import DType, Family, Version
from uqff.container.file import RESIDUAL_NAME, UqffFile, open_uqff
from uqff.container.mapped import MappedFile
from uqff.container.report import REPORT_NAME, build_report, report_document
from uqff.container.save import SHARD_BYTES
from uqff.container.shards import NUMBERED, SUFFIX, PathLike
from uqff.container.staging import check_target, staged_directory
from uqff.container.streaming import StreamedFile, StreamedLayers, flush_to_disk
from uqff.container.writer import copy_durably
from uqff.errors import FormatError, ShardError, UnsupportedError, UqffError
from uqff.limits import MAX_CONFIG_BYTES
from uqff.moves import Move, Moves, Problem, Row, Source, plan_moves
from uqff.naming import check_residual, known_names
from uqff.schema.entries import FIRST
from uqff.schema.header import HEADER
from uqff.sources.safetensors import CONFIG_NAME, read_json
from uqff.views import bytes_of

if TYPE_CHECKING:
    from types import TracebackType

    import torch
    from typing_extensions import Self

    from uqff.pipeline import Progress

__all__ = ["FORMATS", "MIGRATED_FROM", "Migration", "Written", "migrate_model"]

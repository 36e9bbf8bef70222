"""A checkpoint to UQFF: every layer read once, quantised to every type asked for, and written while the next is made.

::

    mapped source --> round, widen --> quantise (kernels, all threads) --> queue --> queue thread --> .uqff shards
                                                            residual tensors -----> residual.safetensors

All sizes follow from shapes (:mod:`uqff.quantization.plan`), so files are laid out before the first weight is read and
layers are written where they belong, in any order; of a stack of experts, each expert.  The system reads the next
weight from the disk in the background; the pages of one are given back when it is done.  The output directory appears
when everything in it is on the disk.

The residual holds what the checkpoint holds, in the load dtype.  (mistral.rs 0.6 computes the norms of Gemma models as
(w + 1) - 1 and stores them off by an ulp of 1; later versions do not.)

Authority: mistral.rs v0.6.0, ``mistralrs-core/src/pipeline/isq.rs`` (``quantize``, ``write_uqff``); v0.9.2, the same
(``write_uqff_artifacts``).
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Sequence
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from typing import Any, Final, Literal

import numpy as np
import numpy.typing as npt

from uqff._version import __version__
from uqff.checkpoints.checkpoint import open_checkpoint
from uqff.checkpoints.numbers import NumberFiles
from uqff.codec.layer import Layer
from uqff.codes import DType, Version
from uqff.container.document import json_bytes
from uqff.container.file import open_uqff
from uqff.container.job import Job, Staging
from uqff.container.plan import SHARD_BYTES, metadata_of, plan_files
from uqff.container.queue import WriteQueue
from uqff.container.report import REPORT_NAME, Report, build_report, write_report
from uqff.container.shards import PathLike, shard_names
from uqff.container.staging import check_target
from uqff.container.writer import LayerWriter
from uqff.errors import UnsupportedError, located
from uqff.families import PLAIN_KIND
from uqff.families.base import QuantizedTensor
from uqff.families.encoding import EffortName
from uqff.families.loaded import Loaded
from uqff.families.part import Part
from uqff.hub.names import hub_name
from uqff.importance.hessians import Hessians
from uqff.importance.matrix import Importance
from uqff.lora.applied import Adapters, Lora
from uqff.models.architectures import is_table, is_tied_model
from uqff.models.assets import Residual
from uqff.models.engine import limits_of, refuse_limits
from uqff.models.patterns import Pattern
from uqff.progress import Progress, Steps
from uqff.quantization.bias import StoredBias, bias_distance, bias_part, source_bias
from uqff.quantization.effort import Known, LayerEfforts
from uqff.quantization.error import Measure, measured
from uqff.quantization.keep import check_again, kept_record, no_fallback, plan_kept
from uqff.quantization.lora import MergedTensors, model_weights
from uqff.quantization.notes import Notes
from uqff.quantization.plan import (
    Goal,
    PlannedLayer,
    WeightSource,
    engine_notes,
    load_dtype,
    plan_layer,
    plan_model,
    residual_names,
    restated_config,
)
from uqff.quantization.recipe import Recipe, load_recipe
from uqff.quantization.result import AdapterResult, Output, Result, layer_result
from uqff.quantization.types import KEEP, Engine, Fallback, FallbackWarning, encode, kind_name, widened
from uqff.schema.entries import FIRST
from uqff.simd.floats import Floats

__all__ = ["QuantizeJob", "quantize_model"]

SLACK: Final = 16 * 2**20
"""Bytes of finished layers that may wait for the queue even if the largest layer is being made."""


def quantize_model(
    source: PathLike,
    target: PathLike,
    kinds: str | int | Sequence[str | int],
    *,
    fallback: str | int | None = None,
    requantize: bool = False,
    assets: PathLike | None = None,
    mmproj: PathLike | None = None,
    recipe: Recipe | PathLike | None = None,
    layers: Pattern | Literal["auto"] | None = None,
    version: str | tuple[int, int, int] = "1.2",
    engine: Engine = "0.9",
    dtype: str = "auto",
    effort: EffortName = "engine",
    imatrix: Importance | PathLike | None = None,
    hessian: Hessians | PathLike | None = None,
    promote: bool = True,
    engine_biases: bool = False,
    strict: bool = False,
    force: bool = False,
    shard_bytes: int = SHARD_BYTES,
    measure: bool = True,
    resume: bool = False,
    base_model: str | None = None,
    repo_id: str | None = None,
    lora: Lora | tuple[Lora, float] | Sequence[Lora | tuple[Lora, float]] | None = None,
    progress: Progress | None = None,
    on_fallback: Callable[[Fallback], None] | None = None,
) -> Result:
    """Quantise a checkpoint to a model directory of either generation.

    Peak memory is the largest layer's source and its output, plus a constant; for HQQ and FP8, whose scales come from
    the whole weight, its float32 copy too. Of stacked experts, those of one expert, but for types that have groups or
    scales across experts (HQQ, FP8 and F8Q8 in 1.0 and 1.1).

    Args:
        source: a checkpoint or a GGUF file, see :func:`uqff.open_checkpoint`.
        target: the directory to make.
        kinds: the types, or one; each becomes ``<kind>-N.uqff``, the residual is shared. ``keep`` leaves every layer as
            the checkpoint has it, where UQFF has a form for that, see :mod:`uqff.quantization.keep`.
        fallback: what layers become that cannot be kept.
        requantize: quantise blocks of a GGUF file again, where neither fallback nor recipe says so; else refused.
        assets: of a GGUF file, a directory with the model's own configuration and tokenizer.
        mmproj: see :func:`uqff.open_checkpoint`.
        recipe: types of particular layers, or the file of it. The experts of a projection, one layer in 1.x, are called
            by the name of the first, or by that of the tensor which holds all of them.
        layers: which weights are layers, in place of the architecture's list: ``auto`` for those of linear layers, or
            those whose name it is found in, in the architecture's order, others after them in natural order.
        version: of UQFF: one of :data:`uqff.codes.FORMATS`.
        engine: whose rules, see :mod:`uqff.quantization.types`.
        dtype: the load dtype: ``f32``, ``f16``, ``bf16``, or ``auto``, the one that holds all layers exactly. Layers
            that are quantised already are dequantised in float32 and not rounded to it.
        effort: how codes and scales are chosen, see :func:`uqff.quantize`.
        imatrix: importance of the inputs of layers, or its file. Layers that it has nothing of, and those of types that
            take none, are quantised without.
        hessian: XᵀX of the inputs of layers, or the file of it that :func:`uqff.calibrate` writes, for the effort
            ``calibrated``. Layers that it has nothing of are quantised as with ``best``.
        promote: give head and embedding a better type than the others where the engine does: from 1.2 on, see
            :attr:`uqff.families.encoding.Encoding.PROMOTED`; what a recipe says of them counts first.
        engine_biases: store biases in the dtypes in which the engine does: those of FP8 in F8E4M3 without a scale, of
            MXFP4 in BF16, of GGUF and F8Q8 in F32. By default none loses anything that loading leaves, and all layers
            run with activations in the load dtype; see :mod:`uqff.families.biases`.
        strict: refuse what the engine would not load, or not run, whatever it is told: see :mod:`uqff.models.engine`.
        force: replace a model that is in ``target`` already.
        shard_bytes: payload after which a new shard begins.
        measure: find the error of each layer, in a quarter of the time, of large models two fifths; else it is NaN.
        resume: keep what is done if the run is interrupted, and go on from what one with the same arguments has left.
        base_model: what the report of a 1.x directory calls the model that was quantised; if None, a checkpoint's name
            on the hub, and nothing for a directory.
        repo_id: what it says of where the files will be published.
        lora: adapters to merge, in order: directories or :class:`uqff.lora.Adapter`, each alone or as a pair with its
            weight. Weights are added up in float32 and not rounded to the load dtype before they are quantised.
        progress: called after each layer, or expert of one; what is made in several types counts once.
        on_fallback: called for every layer that is stored as another type than asked for, before work begins. If None,
            a :class:`uqff.FallbackWarning` is issued for each.

    Raises:
        UqffError: the checkpoint breaks a rule, or a layer cannot be what is asked for; nothing has been written.
        UnsupportedError: of a strict run: the engine could not load or run the result; nothing has been written.
        FileExistsError: ``target`` is there and may not be replaced.
        OSError: reading or writing failed (a full disk, say); nothing stays behind unless it is to be resumed.

    >>> result = uqff.quantize_model("checkpoint", "made", "q8_0")
    >>> [(output.kind, output.shards) for output in result.outputs]
    [('q8_0', ['q8_0-0.uqff'])]
    """
    check_target(Path(target), force=force)
    if recipe is not None and not isinstance(recipe, Recipe):
        recipe = load_recipe(recipe)
    known = Known.open(effort, imatrix, hessian)
    with known, open_checkpoint(source, assets=assets, mmproj=mmproj) as checkpoint, Adapters.open(lora) as adapters:
        name = hub_name(source)
        if base_model is None and name is not None:
            base_model = name.repo
        job = QuantizeJob(
            NumberFiles(checkpoint),
            [kinds] if isinstance(kinds, (str, int)) else kinds,
            fallback=fallback,
            requantize=requantize,
            recipe=recipe,
            layers=layers,
            version=version,
            engine=engine,
            dtype=dtype,
            known=known,
            promote=promote,
            engine_biases=engine_biases,
            measure=measure,
            shard_bytes=shard_bytes,
            base_model=base_model,
            repo_id=repo_id,
            adapters=adapters,
        )
        if strict:
            refuse_limits(limit for output in job.outputs for limit in output.limits)
        for change in (change for output in job.outputs for change in output.fallbacks):
            if on_fallback is None:
                warnings.warn(FallbackWarning(str(change)), stacklevel=2)
            else:
                on_fallback(change)
        return job.run(target, force=force, resume=resume, progress=progress)


class QuantizeJob(Job[Result]):
    """The quantisation of a checkpoint; see :func:`quantize_model` for the arguments."""

    def __init__(
        self,
        checkpoint: NumberFiles,
        kinds: Sequence[str | int],
        *,
        fallback: str | int | None = None,
        requantize: bool = False,
        recipe: Recipe | None,
        layers: Pattern | Literal["auto"] | None,
        version: str | tuple[int, int, int],
        engine: Engine,
        dtype: str,
        known: Known,
        promote: bool,
        engine_biases: bool,
        measure: bool,
        shard_bytes: int,
        base_model: str | None,
        repo_id: str | None,
        adapters: Adapters,
    ) -> None:
        checkpoint.check_companions()
        json_bytes({"base_model": base_model, "repo_id": repo_id}, Path(REPORT_NAME))
        self.checkpoint = checkpoint
        self.fallback = None if fallback is None else kind_name(fallback)
        self.requantize = requantize
        self.engine_biases = engine_biases
        self.measure = measure
        self.engine = engine
        self.shard_bytes = shard_bytes
        self.base_model = base_model
        self.repo_id = repo_id
        self.version = Version.of(version)
        self.goals = plan_model(checkpoint, self.version, layers, promote=promote)
        self.dtype = load_dtype(checkpoint, self.goals, dtype)
        residual = residual_names(checkpoint, self.goals)
        shapes = {name: checkpoint.shape(name) for name in residual}
        with located(file=checkpoint.path):
            self.lora = adapters.applied(model_weights(checkpoint.config, shapes, self.goals, residual))
        tensors = MergedTensors(checkpoint, self.lora, checkpoint.floats)
        self.residual = Residual(tensors, residual, self.dtype, partial(is_table, checkpoint.config))
        self.unmatched = [] if recipe is None else recipe.unmatched(goal.name for goal in self.goals)
        self.config = restated_config(checkpoint, self.version)
        self.notes = engine_notes(checkpoint, self.goals)
        self.efforts = LayerEfforts(known, self.goals, tied=is_tied_model(checkpoint.config))
        self.notes += self.efforts.notes
        self.outputs: list[Output] = []
        self.plans: list[list[PlannedLayer]] = []
        for kind in dict.fromkeys(KEEP if each == KEEP else kind_name(each) for each in kinds):
            output = Output(kind)
            self.outputs.append(output)
            self.plans.append([self._plan(goal, output, recipe) for goal in self.goals])
            metas = {goal.module: each.meta for goal, each in zip(self.goals, self.plans[-1], strict=True)}
            output.limits = limits_of(metas, self.version)
        if not self.outputs:
            raise UnsupportedError("no type asked for", field="kinds")
        # The pieces of a layer that are made one after the other: its experts, if all outputs have them one by one.
        self.pieces = [
            [(source,) for source in goal.sources]
            if goal.stacked and all(plans[at].by_expert for plans in self.plans)
            else [goal.sources]
            for at, goal in enumerate(self.goals)
        ]

    def _plan(self, goal: Goal, output: Output, recipe: Recipe | None) -> PlannedLayer:
        rules: dict[str, Any] = {"version": self.version, "dtype": self.dtype, "engine_biases": self.engine_biases}
        kind, reason = output.kind, ""
        if kind == KEEP:
            explicit = None if recipe is None else recipe.explicit_kind(goal.name, engine=self.engine)
            kind = PLAIN_KIND if self.fallback is None else self.fallback
            if explicit is None:
                changed = any(path in self.lora for path in goal.paths)
                kept = plan_kept(self.checkpoint, goal, changed=changed, engine=self.engine, **rules)
                if isinstance(kept, PlannedLayer):
                    return kept
                reason = kept
                if self.fallback is None:
                    raise no_fallback(self.checkpoint, goal, reason)
        elif not self.requantize and (recipe is None or recipe.explicit_kind(goal.name, engine=self.engine) is None):
            check_again(self.checkpoint, goal)
        planned = plan_layer(self.checkpoint, goal, kind, recipe, engine=self.engine, **rules)
        if reason:
            planned = replace(planned, requested=KEEP, reason=planned.reason or reason)
        if planned.stored != planned.requested:
            change = Fallback(goal.module, planned.requested, planned.stored, goal.shape, planned.reason)
            output.fallbacks.append(change)
        return planned

    def _is_computed(self, goal: Goal) -> bool:
        return any(source.tensor in self.checkpoint.computed for source in goal.sources)

    @property
    def nbytes(self) -> int:
        """Of all layers and of the residual."""
        return self.residual.nbytes + sum(each.size for plans in self.plans for each in plans)

    def description(self) -> dict[str, Any]:
        """What the files depend on, as JSON values: an interrupted run is resumed only where all of it is the same."""
        layers = {
            output.kind: [
                [goal.key, planned.stored, planned.size] for goal, planned in zip(self.goals, plans, strict=True)
            ]
            for output, plans in zip(self.outputs, self.plans, strict=True)
        }
        return {
            "uqff": __version__,
            "source": str(self.checkpoint.path.resolve()),
            "files": self.checkpoint.stamps(),
            "version": str(self.version),
            "types": [output.kind for output in self.outputs],
            "engine": self.engine,
            "dtype": self.dtype.name,
            "engine_biases": self.engine_biases,
            "shard_bytes": self.shard_bytes,
            "measure": self.measure,
            "layers": layers,
            **self.efforts.description(),
            **({"lora": self.lora.description()} if self.lora.adapters else {}),
        }

    def write(self, stage: Staging, progress: Progress | None) -> Result:
        """Write everything into a directory."""
        directory, journal, begun = stage.directory, stage.journal, stage.begun
        with WriteQueue() as queue:
            files = []
            for output, plans in zip(self.outputs, self.plans, strict=True):
                metas = {goal.key: planned.meta for goal, planned in zip(self.goals, plans, strict=True)}
                plan = plan_files(metas, self.version, self.shard_bytes)
                paths = shard_names(directory, output.kind, len(plan.shards))
                files.append(queue.own(LayerWriter(plan, paths, begun=begun)))
            texts = metadata_of(self.version) if self.version >= FIRST else None
            rest = self.residual.write(queue, directory, texts, begun=begun)
            notes = (
                None if journal is None else Notes(journal, queue, [*(f for each in files for f in each.files), rest])
            )
            self._run_layers(queue, files, progress, notes)
            queue.join()
            rest.finish()
            for output, each in zip(self.outputs, files, strict=True):
                each.finish()
                output.shards = [file.path.name for file in each.files]
                output.nbytes = each.nbytes
        self.notes += self.checkpoint.write_companions(directory, self.config, self.dtype)[1]
        if self.version >= FIRST:
            write_report(self._report(directory), directory)
        rest_of = len(self.residual.names), rest.nbytes
        dtype = self.dtype.safetensors
        lora = [AdapterResult(a.adapter.path, a.weight, a.matrices, a.missing) for a in self.lora.adapters]
        return Result(stage.target, dtype, self.version, self.outputs, *rest_of, self.unmatched, self.notes, lora)

    def _report(self, directory: Path) -> Report:
        """What the engine writes beside the same files of 1.x; they are there and read again."""
        targets, reasons = {}, {}
        for output, plans in zip(self.outputs, self.plans, strict=True):
            planned = {goal.key: each for goal, each in zip(self.goals, plans, strict=True)}
            # Engines know no type that keeps what there is.
            targets[output.kind] = {
                key: each.stored if each.requested == KEEP else each.requested for key, each in planned.items()
            }
            reasons[output.kind] = {
                key: each.meta.weight.SKIPPED[each.stored]
                for key, each in planned.items()
                if each.stored in each.meta.weight.SKIPPED and not each.kept
            }
        with contextlib.ExitStack() as stack:
            files = {
                output.kind: stack.enter_context(open_uqff([directory / name for name in output.shards]))
                for output in self.outputs
            }
            names = {"base_model": self.base_model, "repo_id": self.repo_id}
            return build_report(files, targets=targets, reasons=reasons, **names)

    def _run_layers(
        self, queue: WriteQueue, files: list[LayerWriter], progress: Progress | None, notes: Notes | None
    ) -> None:
        scratch = np.empty(max(map(self._widened, range(len(self.goals)))), np.float32)
        room = max(map(self._footprint, range(len(self.goals)))) + SLACK
        steps = Steps(progress, "quantize", len(self.goals), sum(goal.weights for goal in self.goals), "weights")
        for at, goal in enumerate(self.goals):
            measures: list[list[Measure]] = [[] for _ in self.outputs]
            before = None if notes is None else notes.of(at)
            if before is not None:
                for file, sums, numbers in zip(files, measures, before, strict=True):
                    file.skip(goal.key)
                    sums += (Measure(*each) for each in numbers)
                steps.add(goal.module, goal.weights, tell=False)
            for number, sources in enumerate(self.pieces[at] if before is None else ()):
                self._fetch_after(at, number)
                queue.wait_below(room - self._footprint(at))
                carried = all(plans[at].is_carried for plans in self.plans)
                loaded = None if carried and not self.measure else self._load(goal, number, sources, scratch)
                for plans, each, sums in zip(self.plans, files, measures, strict=True):
                    record = self._make(goal, plans[at], loaded, number, at, queue, each)
                    if self.measure and loaded is not None:
                        sums.append(measured(loaded.exact, record))
                    del record
                del loaded
                for source in sources:
                    self.checkpoint.release(source.tensor, *source.span(self.checkpoint))
                steps.add(goal.module, self._piece_weights(at), done=number + 1 == len(self.pieces[at]))
            for output, plans, sums in zip(self.outputs, self.plans, measures, strict=True):
                bias = self._stored_bias(goal, plans[at])
                output.layers.append(layer_result(goal, plans[at], output.kind, sums, bias))
            if notes is not None and before is None:
                notes.add([[astuple(each) for each in sums] for sums in measures])

    def _make(
        self,
        goal: Goal,
        planned: PlannedLayer,
        loaded: Loaded | None,
        number: int,
        at: int,
        queue: WriteQueue,
        files: LayerWriter,
    ) -> QuantizedTensor:
        """Quantise a piece of a layer and leave it to the queue."""
        with located(layer=goal.module):
            if planned.is_carried or loaded is None:
                record = kept_record(self.checkpoint, goal)
            else:
                effort = self.efforts.of(at, number if len(self.pieces[at]) > 1 else None)
                record = encode(loaded, planned.stored, engine=self.engine, effort=effort)
        if (count := len(self.pieces[at])) == 1:
            job = partial(files.write, goal.key, Layer(record, self._bias(goal, planned)))
        else:
            job = partial(files.write_expert, goal.key, number, Layer(record, self._bias(goal, planned, number)))
        queue.submit(job, planned.size // count)
        return record

    def _load(
        self, goal: Goal, number: int, sources: Sequence[WeightSource], scratch: npt.NDArray[np.float32]
    ) -> Loaded:
        """The weight of a piece, with what adapters add to it; that of several experts is a copy."""
        paths = goal.paths[number : number + len(sources)]
        changed = self._is_computed(goal) or any(path in self.lora for path in paths)
        dtype = DType.F32 if changed else self.dtype
        weights = [
            self.lora.merged(path, source.take(self.checkpoint)) for path, source in zip(paths, sources, strict=True)
        ]
        if len(weights) > 1:
            if not self._is_computed(goal):  # experts that no adapter changes are rounded as ever
                pairs = zip(paths, weights, strict=True)
                weights = [each if path in self.lora else each.cast(self.dtype) for path, each in pairs]
            weight = Floats(np.stack([each.cast(dtype).bits for each in weights]), dtype)
        else:
            weight = weights[0][None] if goal.stacked and len(goal.sources) == 1 else weights[0]
        return Loaded(weight, self.dtype, scratch, rounded=not changed)

    def _fetch_after(self, at: int, number: int) -> None:
        """Let the system read the piece that comes next."""
        if number + 1 == len(self.pieces[at]):
            at, number = at + 1, -1
        if at < len(self.goals):
            for source in self.pieces[at][number + 1]:
                self.checkpoint.fetch(source.tensor, *source.span(self.checkpoint))

    def _piece_weights(self, at: int) -> int:
        return self.goals[at].weights // len(self.pieces[at])

    def _footprint(self, at: int) -> int:
        """Memory that making a piece of a layer takes: source, what is widened of it, the largest of its outputs."""
        start, stop = self.goals[at].sources[0].span(self.checkpoint)
        source = (stop - start) * len(self.pieces[at][0])
        if any(path in self.lora for path in self.goals[at].paths):
            source += 4 * self._piece_weights(at)
        return source + 4 * self._widened(at) + max(plans[at].size for plans in self.plans) // len(self.pieces[at])

    def _widened(self, at: int) -> int:
        """Numbers of a piece that are float32 at one time, whatever it becomes."""
        if self.efforts.feeds_back(at):
            return self._piece_weights(at)
        return max(widened(plans[at].stored, self._piece_weights(at)) for plans in self.plans)

    def _bias(self, goal: Goal, planned: PlannedLayer, expert: int | None = None) -> Part | None:
        source, meta = source_bias(self.checkpoint, goal.bias), planned.meta.bias_part
        made = None if source is None or meta is None else bias_part(source, self.dtype, meta.dtype)
        return made if made is None or expert is None else made.narrow(0, expert, 1).view(made.shape[1:])

    def _stored_bias(self, goal: Goal, planned: PlannedLayer) -> StoredBias | None:
        """What became of the bias: small enough to be made once more for it."""
        source, stored = source_bias(self.checkpoint, goal.bias), self._bias(goal, planned)
        return None if source is None or stored is None else StoredBias(stored.dtype, bias_distance(source, stored))

"""UQFF as a method of quantisation of ``transformers``: importing this module registers it.

    from uqff.integrations.transformers import UqffConfig
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained("DIR", quantization_config=UqffConfig())           # a directory of UQFF
    model = AutoModelForCausalLM.from_pretrained("CHECKPOINT", quantization_config=UqffConfig("q4k"))
    model.save_pretrained("OUT")                                                # quantised while loaded; UQFF

A model with towers is loaded whole, by ``AutoModelForImageTextToText``, :mod:`uqff.integrations.whole`.

Between the two hooks that ``transformers`` gives a method, the places of our layers hold nothing, so that it loads the
norms, and looks for nothing else; then :mod:`uqff.parallel.model` fills them, as it does for
:func:`~uqff.parallel.load_model`: the logits are the same to the bit.

A directory that names the method in ``quantization_config`` of its ``config.json`` needs no argument.

Authority: transformers 5.0, 5.23, 5.24, ``quantizers/base.py`` (``HfQuantizer``) and ``modeling_utils.py``
(``from_pretrained``); 4.51.3 and 4.57.6, which look for weights before they ask a method, and so read no directory of
UQFF, but quantise checkpoints.
"""

from __future__ import annotations

import re
from pathlib import Path
from types import MethodType
from typing import Any, Final

import torch

try:
    import transformers
except ImportError as error:
    raise ImportError("UQFF in transformers needs transformers (pip install 'uqff-format[run]')") from error
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from uqff.container.beside import CONFIG_NAME
from uqff.container.document import is_present
from uqff.container.file import RESIDUAL_NAME
from uqff.errors import ShardError, UnsupportedError
from uqff.integrations.auto import explain_refusals
from uqff.integrations.saving import save_pretrained
from uqff.integrations.whole import IDLE_KEY, NAMES_KEY, WholeModel, WholePaths, is_known, is_whole, tower_layers
from uqff.models.config import QUANT_METHOD, read_config
from uqff.models.table import architecture_of
from uqff.parallel import transformers_model
from uqff.parallel.comm import Comm
from uqff.parallel.model import Loading, load_into
from uqff.parallel.plan import HEAD
from uqff.parallel.source import ModelSource, open_source
from uqff.parallel.uqff_source import UqffSource

__all__ = ["UqffConfig", "UqffHfQuantizer"]

READS_SINCE: Final = 5
"""The first major version of ``transformers`` that asks a method before it looks for weights."""

MAJOR: Final = int(transformers.__version__.partition(".")[0])

explain_refusals()

LAYER_NUMBER: Final = re.compile(r"\.[0-9]+(?=\.|$)")

WEIGHTS_KEY: Final = "transformers_weights"

OF_OTHERS: Final = ("modules_to_not_convert", "llm_int8_skip_modules", "ignored_layers", "ignore")
"""By what other methods are told of modules that stay as they are."""


@register_quantization_config(QUANT_METHOD)
class UqffConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How ``transformers`` is told of UQFF.

    Attributes:
        isq: of a plain checkpoint, what its layers are quantised to while they are loaded; of a directory that holds
            several models, which type. If ``config.json`` names the method, transformers drops an argument: then it
            is to stand in its ``quantization_config``.
    """

    def __init__(self, isq: str | int | None = None, **others: Any) -> None:
        """What to load.

        Args:
            isq: a type (``"q4k"``), a number of bits, or the file of a recipe; None for a directory of UQFF.
            others: what else ``quantization_config`` of a ``config.json`` has; kept.

        Raises:
            UnsupportedError: modules are to stay as they are; a recipe says which.
        """
        for name in OF_OTHERS:
            if others.get(name):
                raise UnsupportedError("a recipe says which layers stay as they are", field=name, expected="its file")
        self.__dict__.update(others)
        self.quant_method = QUANT_METHOD
        self.isq = isq

    def to_dict(self) -> dict[str, Any]:
        """What stands in ``config.json``."""
        made: dict[str, Any] = super().to_dict()
        return made if self.isq is not None else {key: value for key, value in made.items() if key != "isq"}

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: there are no defaults to leave out."""
        return self.to_dict()


class EmptyLayer(torch.nn.Module):
    """Stands where a layer will be, and holds nothing that ``transformers`` could look for."""

    weight: torch.Tensor | None = None
    """What transformers before 5 assigns to tie a head to its embedding."""

    def __init__(self, held: torch.nn.Module) -> None:
        """Take over the sizes, which transformers asks for when it installs what tensor parallelism needs; in vain.

        Tensors it may set, as models do that begin with numbers of their own choice; they have no storage.
        """
        super().__init__()
        for name, parameter in held.named_parameters(recurse=False):
            setattr(self, name, torch.empty_like(parameter, device="meta").detach())
        for name in ("in_features", "out_features", "num_embeddings", "embedding_dim"):
            if hasattr(held, name):
                setattr(self, name, getattr(held, name))


@register_quantizer(QUANT_METHOD)
class UqffHfQuantizer(HfQuantizer):  # type: ignore[misc]
    """Puts the layers of UQFF into a model that ``transformers`` loads."""

    requires_calibration = False

    def __init__(self, quantization_config: UqffConfig, **options: Any) -> None:
        super().__init__(quantization_config, **options)
        self._emptied: dict[str, torch.nn.Module] = {}
        self._place = ""
        self._towers: dict[str, str] | None = None

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot be done, before anything is read.

        Raises:
            UnsupportedError: this ``transformers`` reads no directory of UQFF; a part of the model is to stay on
                disk, or on meta.
        """
        if self._reads and MAJOR < READS_SINCE:
            raise UnsupportedError(
                "transformers cannot read a directory of UQFF (uqff.load_model can)",
                expected=f"transformers {READS_SINCE} or later",
                got=transformers.__version__,
            )
        device_map = kwargs.get("device_map")
        places = {str(place) for place in (device_map.values() if isinstance(device_map, dict) else (device_map,))}
        if "disk" in places:
            raise UnsupportedError("layers of UQFF are mapped, not offloaded", field="device_map", got="disk")
        if "meta" in places:
            raise UnsupportedError("layers of UQFF are read, not left out", field="device_map", got="meta")

    @property
    def _reads(self) -> bool:
        """Whether the directory is UQFF: it says so, or there is nothing that it could be quantised to."""
        return self.pre_quantized or self.quantization_config.isq is None

    def _told(self, config: Any) -> Any:
        if self._reads and getattr(config, WEIGHTS_KEY, None) is None:
            setattr(config, WEIGHTS_KEY, RESIDUAL_NAME)
        return config

    def update_tp_plan(self, config: Any) -> Any:
        """Name the residual as what there is to be loaded, where ``transformers`` asks for something else."""
        return self._told(config)

    def update_attn_implementation(self, config: Any) -> Any:
        """Likewise, in newer releases."""
        return self._told(config)

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        """Empty the places of layers, so that nothing is loaded into them.

        Raises:
            UnsupportedError: the class is that of another model, or of a part of one; the architecture is unknown.
        """
        if not (is_known(model) or hasattr(model, HEAD)):
            architecture_of(_config(model, _directory(model, checkpoint_files)))
            raise UnsupportedError(
                "UQFF has the whole of a language model, with its head",
                file=str(model.config.name_or_path),
                expected="AutoModelForCausalLM or AutoModelForImageTextToText",
                got=type(model).__name__,
            )
        self._place = _place(model, checkpoint_files)
        isq = self.quantization_config.isq
        view = model
        if is_whole(model):
            if MAJOR < READS_SINCE:
                raise UnsupportedError(
                    "models with towers are not loaded with this transformers",
                    expected=f"transformers {READS_SINCE} or later",
                    got=transformers.__version__,
                )
            view = WholeModel(model)
            with open_source(self._place, isq)[0] as source:
                self._towers = tower_layers(model, source)
        else:
            transformers_model.model_type(_config(model, _directory(model, checkpoint_files)))
        stated = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        ignored = list(stated or ())
        for path in self._places(view):
            self._emptied[path] = _replaced(model, path, EmptyLayer(model.get_submodule(path)))
            ignored.append(rf"^{re.escape(path)}\.")
        model._keys_to_ignore_on_load_unexpected = set(ignored) if isinstance(stated, set) else ignored
        if hasattr(model, "all_tied_weights_keys"):
            model.all_tied_weights_keys = {}
        emptied = {LAYER_NUMBER.sub(".*", path) for path in self._emptied}
        plan = getattr(model, "_tp_plan", None) or {}
        model._tp_plan = {rule: style for rule, style in plan.items() if rule in emptied}  # norms are whole

    def _places(self, view: Any) -> list[str]:
        """Paths of the modules that will be layers; of towers, those that are layers of the source."""
        places = transformers_model.places(view)
        if self._towers is None:
            return places
        found = {path: view.path(path) for path in places}
        return [path for place, path in found.items() if view.is_of_text(place) or path in self._towers]

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Fill the places."""
        placeholders = {
            path: _replaced(model, path, held.train(model.training)) for path, held in self._emptied.items()
        }
        self._emptied = {}
        devices = {path: _device(model, path) for path in placeholders}
        several = len(set(devices.values())) > 1
        isq = self.quantization_config.isq

        towers = self._towers
        view: Any = model if towers is None else WholeModel(model)

        def make(source: ModelSource, dtype: torch.dtype) -> torch.nn.Module:
            if towers is not None:
                source.paths = WholePaths(source.config, towers)
            for name, held in view.state_dict().items():
                if not held.is_meta and (towers is None or view.is_of_text(name)):
                    source.tensor(name)  # transformers has taken it
            if isinstance(source, UqffSource):
                setattr(model, IDLE_KEY, source.idle())
            return view  # type: ignore[no-any-return]

        load_into(
            make,
            self._place,
            _ranks(model),
            Loading(torch.device("cpu") if several else next(iter(devices.values())), model.dtype, isq=isq),
        )
        if isinstance(view, WholeModel):
            setattr(model, NAMES_KEY, towers)
        for path, placeholder in placeholders.items():
            module = model.get_submodule(path)
            if several:
                module.to(devices[path])
            if hasattr(placeholder, "_hf_hook"):
                from accelerate.hooks import add_hook_to_module

                add_hook_to_module(module, placeholder._hf_hook)
        model.save_pretrained = MethodType(save_pretrained, model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Whether transformers itself can save the model: it cannot, but see :mod:`uqff.integrations.saving`."""
        return False

    @property
    def is_trainable(self) -> bool:
        """Whether its layers can be trained: they cannot."""
        return False


def _replaced(model: torch.nn.Module, path: str, module: torch.nn.Module) -> torch.nn.Module:
    """Put a module into a place; returns the one that was there."""
    parent, _, name = path.rpartition(".")
    owner = model.get_submodule(parent)
    held: torch.nn.Module = getattr(owner, name)
    setattr(owner, name, module)
    return held


def _directory(model: Any, checkpoint_files: list[str] | None) -> Path:
    """Where the files of a model are that transformers has found."""
    return Path(checkpoint_files[0]).parent if checkpoint_files else Path(str(model.config.name_or_path))


def _config(model: Any, directory: Path) -> dict[str, Any]:
    """What names the architecture of a model: its class, or of a language model out of a larger one, its files."""
    if is_known(model) or not is_present(directory / CONFIG_NAME):
        return {"architectures": [type(model).__name__]}
    return read_config(directory / CONFIG_NAME)


def _place(model: Any, checkpoint_files: list[str] | None) -> str:
    """The directory of a model, or its name on the hub, at the revision of the files that transformers has fetched."""
    name = str(model.config.name_or_path)
    directory = _directory(model, checkpoint_files)
    if Path(name).is_dir():
        return str(directory)
    return f"{name}@{directory.name}" if directory.parent.name == "snapshots" else name


def _device(model: Any, path: str) -> torch.device:
    """Where a place is: as the device map says, or where the rest of the model is."""
    device_map = getattr(model, "hf_device_map", None) or {}
    parts = path.split(".")
    for length in range(len(parts), -1, -1):
        device = device_map.get(".".join(parts[:length]))
        if device is not None:
            return torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    made: torch.device = next(parameter.device for parameter in model.parameters() if not parameter.is_meta)
    return made


def _ranks(model: Any) -> Comm:
    """The ranks that share a model.

    Raises:
        ShardError: it is shared by some of the ranks only.
    """
    size = getattr(model, "_tp_size", None) or 1
    if size == 1:
        return Comm()
    comm = Comm(torch.distributed.group.WORLD)
    if comm.world_size != size:
        raise ShardError("tensor parallelism among some ranks", expected=f"{comm.world_size} ranks", got=size)
    return comm

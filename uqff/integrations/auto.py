"""``AutoModelForCausalLM`` and models of UQFF that it has no class for: one error says which class to take.

``transformers`` looks for a class before it asks a method of quantisation, so that no hook of a method could say so.
Nothing changes for other models, and nothing but the error for these.
"""

from __future__ import annotations

from functools import wraps
from typing import Any, Final

import transformers

from uqff.errors import UnsupportedError
from uqff.models.config import QUANT_METHOD, names_uqff

__all__ = ["explain_refusals"]

REFUSAL: Final = "Unrecognized configuration class"
"""How the error begins (transformers, ``models/auto/auto_factory.py``)."""

WHERE: Final = ("cache_dir", "code_revision", "force_download", "local_files_only", "revision", "subfolder", "token")
"""Options by which ``transformers`` finds a configuration."""


def explain_refusals() -> None:
    """Have ``AutoModelForCausalLM.from_pretrained`` name the class for a model of UQFF that has none there."""
    auto: Any = transformers.AutoModelForCausalLM
    asked = auto.from_pretrained.__func__
    if getattr(asked, "explains_uqff", False):
        return

    @wraps(asked)
    def from_pretrained(cls: Any, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return asked(cls, pretrained_model_name_or_path, *args, **kwargs)
        except ValueError as error:
            if not str(error).startswith(REFUSAL):
                raise
            explained = _explained(pretrained_model_name_or_path, kwargs)
            if explained is None:
                raise
            raise explained from error

    from_pretrained.explains_uqff = True  # type: ignore[attr-defined]
    auto.from_pretrained = classmethod(from_pretrained)


def _explained(name: Any, options: dict[str, Any]) -> UnsupportedError | None:
    """What is to be said of a model; None if it is not to be UQFF."""
    try:
        config = options.get("config") or transformers.AutoConfig.from_pretrained(
            name, **{key: options[key] for key in WHERE if key in options}
        )
    except (OSError, ValueError):
        return None
    asked = getattr(options.get("quantization_config"), "quant_method", None)
    if asked != QUANT_METHOD and not names_uqff(getattr(config, "quantization_config", None)):
        return None
    classes = list(getattr(config, "architectures", None) or ())[:1]
    if type(config) in transformers.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        classes.insert(0, "AutoModelForImageTextToText")
    return UnsupportedError(
        "transformers has no class for the language model of this one alone",
        file=str(name),
        expected=" or ".join(classes) or "the model's own class",
        got="AutoModelForCausalLM",
    )

"""Which model to build: from a hub id, a folder or a model type to an HF config and a Transformers class.

The HF config is used as it is. What the user overrides is applied, checked and printed; nothing else is changed.
"""

from __future__ import annotations

import copy
import difflib
import logging
import os
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
import transformers
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, AutoConfig, PreTrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

logger = logging.getLogger(__name__)

# What an override would not reach, because it is said elsewhere; and what no config class checks.
_KEYS_OF_THEIR_OWN = {
    "model_type": "hf_transformers.model_type",
    "dtype": "training.dtype (weights) and training.mixed_precision_param (computation)",
    "torch_dtype": "training.dtype (weights) and training.mixed_precision_param (computation)",
    "attn_implementation": "hf_transformers.attn_implementation",
}
_SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_hidden_layers", "vocab_size")


@dataclass
class HFTransformerModelArgs:
    """What `HFTransformerModel` is built from. Either `model` or `model_type` is given."""

    model: str | None = None
    """Hub id or folder."""
    model_type: str | None = None
    """A Transformers model type such as "llama": built from its config class, without any download."""
    revision: str | None = None
    """Branch, tag or commit on the hub."""
    trust_remote_code: bool = False
    """Run modeling code that the repository brings."""
    config_overrides: dict[str, Any] = field(default_factory=dict)
    """HF config fields to change, e.g. {"num_hidden_layers": 2}."""
    init: Literal["pretrained", "scratch"] | None = None
    """Where the weights come from; None means "pretrained" for a hub id or folder, "scratch" for a model type."""
    attn_implementation: str | None = None
    """Transformers' attention implementation ("sdpa", "eager", ...); None is the model's default."""
    dtype: torch.dtype = torch.float32
    """Dtype in which parameters are kept and updated."""

    def __post_init__(self) -> None:
        if self.model is not None:
            self.model = os.path.expanduser(self.model)  # leaves hub ids alone
        if self.init is None:
            self.init = "pretrained" if self.model is not None else "scratch"

    def update_from_config(self, job_config) -> HFTransformerModelArgs:
        """Take over the [hf_transformers] and [training] sections of a `JobConfig`; returns self."""
        section = job_config.hf_transformers
        self.model, self.model_type = section.model, section.model_type
        self.revision, self.trust_remote_code = section.revision, section.trust_remote_code
        self.config_overrides = dict(section.config_overrides)
        self.attn_implementation = section.attn_implementation
        self.init = section.init
        self.dtype = getattr(torch, job_config.training.dtype)
        self.__post_init__()
        return self

    def resolve(self) -> tuple[PreTrainedConfig, type[PreTrainedModel]]:
        """The HF config and the causal LM class. Raises a ValueError for what is not a causal LM, with the reason."""
        if (self.model is None) == (self.model_type is None):
            raise ValueError(
                f"hf_transformers.model = {self.model!r} and model_type = {self.model_type!r}: exactly one of them "
                "names the model; set one."
            )
        hf_config = self._load_config()
        model_class = find_model_class(hf_config, self.model or self.model_type, self.trust_remote_code, self.revision)
        text_config = hf_config.get_text_config()
        return override_config(text_config, self.config_overrides), model_class

    def _load_config(self) -> PreTrainedConfig:
        if self.model is not None:
            try:
                return AutoConfig.from_pretrained(
                    self.model, revision=self.revision, trust_remote_code=self.trust_remote_code
                )
            except OSError as error:
                raise OSError(
                    f'hf_transformers.model = "{self.model}": its config cannot be read ({error}). Correct the name or '
                    "the revision, or name a local folder."
                ) from error
        if self.model_type not in CONFIG_MAPPING:
            close = difflib.get_close_matches(self.model_type, CONFIG_MAPPING.keys(), n=3)
            raise ValueError(
                f'hf_transformers.model_type = "{self.model_type}": Transformers {transformers.__version__} has no '
                f"such model type. Did you mean {' or '.join(close) or 'another'}?"
            )
        return CONFIG_MAPPING[self.model_type]()


def find_model_class(
    hf_config: PreTrainedConfig, name: str, trust_remote_code: bool, revision: str | None = None
) -> type[PreTrainedModel]:
    """config -> architectures[0] -> class, else the causal LM of the model type; composite configs' text part."""
    if hf_config.is_encoder_decoder:
        raise ValueError(
            f"{name}: {hf_config.model_type} is an encoder-decoder model, which is trained on pairs of sequences; "
            "this trainer takes causal language models only."
        )
    auto_map = getattr(hf_config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in auto_map:
        return get_class_from_dynamic_module(auto_map["AutoModelForCausalLM"], name, revision=revision)
    text_config = hf_config.get_text_config()
    causal_class = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(text_config), None)
    architecture = (hf_config.architectures or [None])[0]
    if architecture is not None and text_config is hf_config and architecture in _causal_class_names():
        return getattr(transformers, architecture)
    if causal_class is None:
        raise ValueError(
            f"{name}: {hf_config.model_type} has no causal language model in Transformers {transformers.__version__}"
            + (f" (its architecture is {architecture})" if architecture else "")
            + "; this trainer takes causal language models only."
        )
    is_headless = architecture is None or architecture.endswith("Model") or text_config is not hf_config
    if not is_headless:
        raise ValueError(
            f"{name}: its architecture is {architecture}, which is not a causal language model. To train one from "
            f'its config, set hf_transformers.model_type = "{hf_config.model_type}".'
        )
    return causal_class


def _causal_class_names() -> set[str]:
    names: set[str] = set()
    for entry in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        names.update([entry] if isinstance(entry, str) else entry)
    return names


def override_config(hf_config: PreTrainedConfig, overrides: dict[str, Any]) -> PreTrainedConfig:
    """Return the config with `overrides` applied and logged; tables are merged, unknown fields are errors.

    Lists of one value a layer (`layer_types` ...) are cut to a smaller `num_hidden_layers`.
    """
    if not overrides:
        return hf_config
    fields = hf_config.to_dict()
    _check_overrides(overrides, fields, type(hf_config).__name__)
    # A head size that follows from the others follows from their new values; one of its own stays.
    hidden_size, heads = fields.get("hidden_size"), fields.get("num_attention_heads")
    derives_head_dim = bool(hidden_size and heads) and fields.get("head_dim") == hidden_size // heads
    old_layers, new_layers = fields.get("num_hidden_layers"), overrides.get("num_hidden_layers")
    if isinstance(old_layers, int) and isinstance(new_layers, int) and new_layers < old_layers:
        for key, value in fields.items():
            if isinstance(value, list) and len(value) == old_layers:
                fields[key] = value[:new_layers]
    for key, value in overrides.items():
        logger.info("HF config override: %s = %r (was %r)", key, value, fields[key])
        fields[key] = {**fields[key], **value} if isinstance(value, dict) and isinstance(fields[key], dict) else value
    for key in ("model_type", "transformers_version"):
        fields.pop(key, None)
    if derives_head_dim and "head_dim" not in overrides and {"hidden_size", "num_attention_heads"} & overrides.keys():
        hidden_size, heads = fields["hidden_size"], fields["num_attention_heads"]
        if isinstance(hidden_size, int) and isinstance(heads, int) and heads > 0:  # else the class refuses them below
            fields["head_dim"] = hidden_size // heads
    try:
        return type(hf_config)(**fields)
    except StrictDataclassError as error:
        remedy = "Correct the value."
        if isinstance(old_layers, int) and isinstance(new_layers, int) and new_layers > old_layers:
            remedy = (
                f"More layers than the model's {old_layers} need its lists (layer_types ...) written out too, and "
                'hf_transformers.init = "scratch", because the files hold no weights for them.'
            )
        raise ValueError(
            f"hf_transformers.config_overrides = {overrides}: {type(hf_config).__name__} refuses it ({error}). {remedy}"
        ) from error


def _check_overrides(overrides: dict[str, Any], fields: dict[str, Any], class_name: str) -> None:
    """Raise a ValueError for a field that the config lacks, that has a key of its own, or a size below 1."""
    for key, value in overrides.items():
        name = f'hf_transformers.config_overrides has "{key}"'
        if key in _KEYS_OF_THEIR_OWN:
            raise ValueError(f"{name}, which is not changed there: set {_KEYS_OF_THEIR_OWN[key]} and remove it.")
        if key not in fields:
            close = difflib.get_close_matches(key, fields, n=1)
            raise ValueError(
                f"{name}: {class_name} has no such field" + (f'; did you mean "{close[0]}"?' if close else ".")
            )
        if key in _SIZES and isinstance(value, int) and value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1.")


def build_on_meta(
    hf_config: PreTrainedConfig, model_class: type[PreTrainedModel], model_args: HFTransformerModelArgs
) -> PreTrainedModel:
    """The model with parameters and buffers on the meta device: structure without memory."""
    try:
        with torch.device("meta"):
            return model_class._from_config(  # which writes the dtype into the config that it gets
                copy.deepcopy(hf_config), dtype=model_args.dtype, attn_implementation=model_args.attn_implementation
            )
    except ImportError as error:
        raise ValueError(
            f'hf_transformers.attn_implementation = "{model_args.attn_implementation}": it is not installed ({error}). '
            'Install it, or set "sdpa" or "eager".'
        ) from error
    except ValueError as error:
        if "attn_implementation" not in str(error):
            raise
        raise ValueError(
            f'hf_transformers.attn_implementation = "{model_args.attn_implementation}": {model_class.__name__} has no '
            f'such attention; set "sdpa" or "eager", or leave it out for the model\'s own choice. ({error})'
        ) from error
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:  # what a constructor does with odd values
        if not model_args.config_overrides:
            raise
        raise ValueError(
            f"hf_transformers.config_overrides = {model_args.config_overrides}: {model_class.__name__} cannot be built "
            f"with it ({type(error).__name__}: {error}). Correct the value."
        ) from error

"""The fields of a Hugging Face configuration that a conversion reads, checked before it does.

transformers takes ``"n_layer": "12"`` or null without a word, and fails somewhere later.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, create_model

from circuit_tracer_qk.base.errors import UserError
from circuit_tracer_qk.base.validation import validate

MOST_LAYERS = 1000

_Size = Annotated[int, Field(ge=1)], "a whole number from 1 on"
_Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)], f"a whole number from 1 to {MOST_LAYERS}"
_Number = Annotated[float, Field(gt=0, allow_inf_nan=False)], "a number above 0"
_Small = Annotated[float, Field(ge=0, allow_inf_nan=False)], "a number from 0 on"
_Share = Annotated[float, Field(gt=0, le=1)], "a number above 0, at most 1"
_Flag = bool, "true or false"
_Name = str, "a name"
_FIELDS = {
    _Layers: "n_layer num_hidden_layers",
    _Size: "n_embd n_head n_positions hidden_size num_attention_heads num_key_value_heads "
    "intermediate_size vocab_size max_position_embeddings",
    _Number: "layer_norm_epsilon layer_norm_eps rms_norm_eps rope_theta rope_local_base_freq "
    "query_pre_attn_scalar",
    _Small: "attn_pdrop embd_pdrop resid_pdrop attention_dropout hidden_dropout initializer_range",
    _Share: "rotary_pct",
    _Flag: "scale_attn_weights scale_attn_by_inverse_layer_idx reorder_and_upcast_attn "
    "use_parallel_residual attention_bias mlp_bias tie_word_embeddings",
    _Name: "activation_function hidden_act",
}
_OPTIONAL = {
    _Size: "n_inner head_dim sliding_window",
    _Number: "attn_logit_softcapping final_logit_softcapping",
    _Name: "hidden_activation",
    (int, "a whole number"): "pad_token_id",
    (list[str], "a list of names"): "layer_types",
    (dict[str, Any], "an object with numbers"): "rope_scaling",
}


def check_fields(config: Any, title: str) -> None:
    """Refuse a configuration with a field of the wrong type, or with sizes that do not divide.

    Args:
        config: of Hugging Face.
        title: the model's.

    Raises:
        UserError: naming the field, what it should be and what was found.
    """
    where = f"config.json of {title}: "
    model = _model()
    found = {name: getattr(config, name) for name in model.model_fields if hasattr(config, name)}
    validate(model, found, where)
    scaling = found.get("rope_scaling") or {}
    for name in scaling.keys() & {"factor", "low_freq_factor", "high_freq_factor"}:
        value = scaling[name]
        number = isinstance(value, int | float) and 0 < value < float("inf")
        if not number:
            raise UserError(
                f"{where}rope_scaling's {name} should be a number above 0, found {value!r:.60}"
            )
    heads, width = config.num_attention_heads, config.hidden_size
    if not found.get("head_dim") and width % heads:
        raise UserError(f"{where}hidden_size {width} is no multiple of its {heads} heads; mend it.")
    if heads % (found.get("num_key_value_heads") or heads):
        raise UserError(
            f"{where}num_attention_heads {heads} is no multiple of num_key_value_heads "
            f"{found['num_key_value_heads']}; mend it."
        )


@cache
def _model() -> type[BaseModel]:
    """Every field, of which those count that a configuration has."""
    fields: dict[str, Any] = {}
    for group, more in ((_FIELDS, ()), (_OPTIONAL, (None,))):
        for (kind, description), names in group.items():
            for name in names.split():
                fields[name] = (kind | None if more else kind, Field(None, description=description))
    options = ConfigDict(strict=True, protected_namespaces=())
    return create_model("ConfigFields", __config__=options, **fields)

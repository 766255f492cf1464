"""The shape of a base model, from its configuration: attention sites, their layers, and the width of embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from prefix_export.errors import ModelError
from prefix_runtime import LayerGeometry, Prefix, PrefixMismatchError
from prefix_runtime.prefix.geometry import check_layers

from .hub import shown_name

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

DECODER, ENCODER, BOTH = "decoder-only model", "encoder", "encoder-decoder"

_ATTENTION_KINDS = frozenset({"full_attention", "sliding_attention", "chunked_attention", "attention"})
# From a run of each causal model in transformers 5.23 for which a tiny configuration could be made.
_OTHER_HEADS = frozenset({"cpmant", "deepseek_v4", "inkling2_text", "inkling_text"})

_EMBEDDING_SIZES = ("word_embed_proj_dim", "input_embedding_size", "embedding_size")
"""Names of the embedding size in OPT; in RemBERT; in ALBERT, ELECTRA, ConvBERT, MobileBERT and RoFormer."""


@dataclass(frozen=True)
class ModelShape:
    """The shape of a base model: what folding a checkpoint into keys and values needs.

    Attributes:
        name: a folder's last part, a GGUF file's stem, or a Hub id without its revision.
        kind: `DECODER`, `ENCODER` or `BOTH`.
        sites: the layers of each attention site (`prefix_runtime.prefix.prefix.SITES`).
        hidden_size: the width of the layers.
        context_length: the number of positions, or None if it is unlimited.
        architecture: transformers' name of the architecture, such as "bert".
        sliding_windows: the window in tokens of each decoder layer that has one.
        config: the configuration with all these values, or None.
        embedding_size: the width of token embeddings; 0 takes the hidden size.
    """

    name: str
    kind: str
    sites: Mapping[str, tuple[LayerGeometry, ...]]
    hidden_size: int
    context_length: int | None = None
    sliding_windows: tuple[int, ...] = ()
    architecture: str = ""
    config: PreTrainedConfig | None = field(default=None, compare=False, repr=False)
    embedding_size: int = 0

    def __post_init__(self) -> None:
        if not self.embedding_size:
            object.__setattr__(self, "embedding_size", self.hidden_size)

    @classmethod
    def of_config(
        cls, name: str, config: PreTrainedConfig, layers: tuple[LayerGeometry, ...] | None = None
    ) -> ModelShape:
        """The shape that a configuration of transformers (5.23) describes.

        Args:
            name: the user's name of the model.
            config: the model's configuration.
            layers: the layers of a decoder-only model, if they were measured by running it; None reads the
                configuration.

        Raises:
            ModelError: the configuration does not give the shapes of keys and values.
        """
        text = config.get_text_config(decoder=True)
        try:
            if layers is None:
                _refuse_other_shapes(name, text)
            kind, sites = _sites(config, text) if layers is None else (DECODER, {"decoder": layers})
            hidden_size = int(text.hidden_size)
        except (AttributeError, TypeError, ZeroDivisionError, RuntimeError) as error:
            raise ModelError(
                f"model {name!r}: expected a configuration with layers, heads and hidden size, found {error}"
            ) from error
        context = getattr(text, "max_position_embeddings", None)
        windows = _windows(text)
        return cls(
            shown_name(name),
            kind,
            MappingProxyType(sites),
            hidden_size,
            context_length=context,
            sliding_windows=windows,
            architecture=config.model_type,
            config=config,
            embedding_size=_embedding_size(text),
        )

    def site(self, site: str, where: str) -> tuple[LayerGeometry, ...]:
        """The layers of a site.

        Raises:
            PrefixMismatchError: the model has no such site. `where` names the checkpoint in the message.
        """
        if site not in self.sites:
            raise PrefixMismatchError(
                f"{where}: holds a prefix for the {site} attention: expected a model that has it, found {self.name!r}, "
                f"a {self.kind} with {', '.join(self.sites)}"
            )
        return self.sites[site]

    def check(self, prefix: Prefix, where: str) -> None:
        """Refuse a prefix whose layers differ from the model's.

        Raises:
            PrefixMismatchError: the prefix is for another model; the message gives both shapes.
        """
        for site, layers in prefix.sites.items():
            place = where if len(self.sites) == 1 else f"{where}: {site}"
            check_layers(self.site(site, where), layers, place, are_all_there=False)


def _refuse_other_shapes(name: str, config: Any) -> None:
    """Refuse a decoder with a layer whose cached keys and values differ from its configuration's heads."""
    kinds = {*(getattr(config, "layer_types", None) or ()), *(getattr(config, "layers_block_type", None) or ())}
    widths = (getattr(config, "head_dim", None), getattr(config, "v_head_dim", None))
    is_latent = getattr(config, "kv_lora_rank", None)
    reasons = {
        "latent attention (kv_lora_rank), which caches no keys and values of its heads": is_latent,
        "values of another width than keys (v_head_dim)": widths[1] not in (None, widths[0]),
        f"layers of kind {', '.join(sorted(kinds - _ATTENTION_KINDS))}": kinds - _ATTENTION_KINDS,
        "layers that share keys and values (num_kv_shared_layers)": getattr(config, "num_kv_shared_layers", None),
        "heads that its configuration gives only for some layers": config.model_type in _OTHER_HEADS,
    }
    for reason, applies in reasons.items():
        if applies:
            raise ModelError(
                f"model {name!r}: expected one key and one value of heads x head size at every layer, as in its "
                f"configuration, found {config.model_type!r} with {reason}; its prefixes are not folded"
            )


def _sites(config: PreTrainedConfig, text: Any) -> tuple[str, dict[str, tuple[LayerGeometry, ...]]]:
    if config.is_encoder_decoder:
        return BOTH, {
            "decoder": _decoder_layers(config),
            "cross": _decoder_layers(config),
            "encoder": _encoder_layers(config),
        }
    from transformers import MODEL_FOR_MASKED_LM_MAPPING  # takes seconds; readers of checkpoints import this module

    layers = (_layer(text),) * int(text.num_hidden_layers)
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        return ENCODER, {"encoder": layers}
    return DECODER, {"decoder": layers}


def _layer(config: Any) -> LayerGeometry:
    heads = int(config.num_attention_heads)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "new_decoder_architecture", False):  # Falcon: keys are cached once for each query head
        return LayerGeometry(heads, int(head_dim))
    if getattr(config, "multi_query", False):  # GPT-BigCode, Falcon
        return LayerGeometry(1, int(head_dim))
    return LayerGeometry(int(getattr(config, "num_key_value_heads", None) or heads), int(head_dim))


def _decoder_layers(config: Any) -> tuple[LayerGeometry, ...]:
    count = _first(config, "num_decoder_layers", "decoder_layers", "num_hidden_layers")
    return (_side(config, _first(config, "decoder_attention_heads", "num_heads")),) * count


def _encoder_layers(config: Any) -> tuple[LayerGeometry, ...]:
    count = _first(config, "encoder_layers", "num_layers", "num_hidden_layers")
    return (_side(config, _first(config, "encoder_attention_heads", "num_heads")),) * count


def _side(config: Any, heads: int) -> LayerGeometry:
    return LayerGeometry(heads, int(getattr(config, "d_kv", None) or config.d_model // heads))


def _first(config: Any, *names: str) -> int:
    first = next((value for name in names if (value := getattr(config, name, None)) is not None), None)
    if first is None:
        raise AttributeError(f"none of {', '.join(names)}")
    return int(first)


def _embedding_size(config: Any) -> int:
    """The width of token embeddings if the configuration has its own number for it, otherwise 0."""
    sizes = (getattr(config, name, None) for name in _EMBEDDING_SIZES)
    return next((size for size in sizes if isinstance(size, int) and size > 0), 0)


def _windows(config: Any) -> tuple[int, ...]:
    window = getattr(config, "sliding_window", None)
    if not window or getattr(config, "use_sliding_window", True) is False:
        return ()
    kinds = getattr(config, "layer_types", None)
    limited = sum(kind == "sliding_attention" for kind in kinds) if kinds else int(config.num_hidden_layers)
    return (int(window),) * limited

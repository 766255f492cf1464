"""A model's generation defaults: which ones the runtime follows, which not, and how transformers applies them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel

from prefix_export.errors import ModelError
from prefix_runtime import GenerationDefaults, RequestError
from prefix_runtime.generation.generation_config import FOLLOWED

if TYPE_CHECKING:
    from . import BaseModel

FILE = "generation_config.json"
_REFUSALS = (AttributeError, IndexError, OverflowError, RuntimeError, TypeError, ValueError)
"""Exceptions of transformers for defaults that it cannot use; it has no error of its own for them."""

_INERT = frozenset(
    {
        # They change speed, memory and the form of outputs, but not the tokens.
        "use_cache", "cache_implementation", "cache_config", "max_cache_len", "compile_config", "disable_compile",
        "continuous_batching_config", "low_memory", "prefill_chunk_size", "output_attentions", "output_hidden_states",
        "output_scores", "output_logits", "return_dict_in_generate", "transformers_version",
        # Speculation changes only the time.
        "is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold",
        "prompt_lookup_num_tokens", "max_matching_ngram_size", "assistant_early_exit", "assistant_lookbehind",
        "target_lookbehind", "assistant_ensemble_weight", "speculation_type", "use_mtp",
        # transformers' generate no longer has groups of beams.
        "diversity_penalty", "num_beam_groups",
        # For padding and encoder-decoders; the tokenizer adds a prompt's first token.
        "pad_token_id", "bos_token_id", "decoder_start_token_id",
    }
)  # fmt: skip
"""transformers' settings that do not change the tokens of one prompt of a decoder."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "guidance_scale": (1,),
    "penalty_alpha": (0,),
    "token_healing": (False,),
}
"""Values that have no effect, for settings that the runtime does not follow."""

_GREEDY = {"do_sample": False, "num_beams": 1, "num_return_sequences": 1}


@dataclass(frozen=True)
class GenerationReport:
    """How a bundle treats a model's generation defaults.

    Attributes:
        followed: names of the settings that the model has and the runtime follows.
        not_followed: settings that change transformers' text but that the runtime does not follow.
        warnings: one line for each thing that the user should know.
    """

    followed: tuple[str, ...]
    not_followed: dict[str, Any]
    warnings: tuple[str, ...]

    def record(self) -> dict[str, Any]:
        """The manifest's entry."""
        return {"followed": list(self.followed), "not_followed": self.not_followed}


def check_generation_config(name: str, path: Path | None, vocab_size: int) -> None:
    """Refuse a bad `generation_config.json` before the model's weights load.

    Args:
        name: the model's name, for messages.
        path: the path of the file; None if the model has none.
        vocab_size: the size of the model's vocabulary.

    Raises:
        ModelError: the file is not a JSON object, or the runtime or transformers refuses a setting in it.
    """
    if path is None:
        return
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"model {name!r}: {FILE}: expected a JSON object, found other text") from error
    if not isinstance(content, dict):
        raise ModelError(f"model {name!r}: {FILE}: expected a JSON object, found {type(content).__name__}")
    _checked(name, content, vocab_size)
    try:
        GenerationConfig.from_dict(content)
    except _REFUSALS as error:
        raise _refused(name, error) from error


def generation_report(base: BaseModel) -> GenerationReport:
    """Report which of a model's generation defaults a bundle follows.

    Raises:
        ModelError: transformers' `generate` or the runtime refuses the defaults; the message names the setting.
    """
    settings = _settings(base.model)
    defaults = _checked(base.name, settings, base.geometry.vocab_size)
    _check_processors(base)
    not_followed = _not_followed(settings, has_tokenizer=base.tokenizer is not None)
    followed = tuple(sorted(name for name in settings if name in FOLLOWED and name not in not_followed))
    warnings = [*_warnings_of_settings(defaults, not_followed), *_warnings_of_ends(defaults, base)]
    return GenerationReport(followed, not_followed, tuple(f"{base.name}: {line}" for line in warnings))


def followed_config(model: PreTrainedModel, *, greedy: bool = True) -> GenerationConfig:
    """The generation defaults of a model that the runtime follows, for transformers' `generate`.

    They do not include stop strings, because `generate` needs a tokenizer for them, and lengths, because every
    comparison sets its own.

    Args:
        model: a model with its generation configuration.
        greedy: leave out sampling and beams, like `Sampling()` and `num_beams=1` in the runtime.
    """
    apart = {"stop_strings", "max_length", "max_new_tokens"}
    settings = {name: value for name, value in _settings(model).items() if name in FOLLOWED and name not in apart}
    padding = getattr(model.generation_config, "pad_token_id", None)
    return GenerationConfig(**{**settings, "pad_token_id": padding, **(_GREEDY if greedy else {})})


def logits_processors(
    model: PreTrainedModel, config: GenerationConfig, prompt: torch.Tensor, new_tokens: int
) -> LogitsProcessorList:
    """The logits processors of transformers itself for a prompt.

    Call them with the token ids [1, length] of prompt and text, and the logits [1, vocab].

    Args:
        model: the model.
        config: the generation configuration.
        prompt: token ids [1, length] int64.
        new_tokens: the maximum number of new tokens.

    Raises:
        ValueError, TypeError, RuntimeError: transformers refuses the configuration.

    Source: transformers 5.23, `GenerationMixin.generate`, steps 1, 3, 6 and 8.
    """
    own, length = model.generation_config, prompt.shape[1]
    mixin: Any = model  # these methods are private, but only they define the order of processors
    try:
        model.generation_config = config
        prepared, _ = mixin._prepare_generation_config(None, max_new_tokens=new_tokens)  # noqa: SLF001
        mixin._prepare_special_tokens(prepared, True, device="cpu")  # noqa: SLF001
        prepared.max_length = new_tokens + length
        if prepared.min_new_tokens is not None:
            prepared.min_length = prepared.min_new_tokens + length
        processors: LogitsProcessorList = mixin._get_logits_processor(  # noqa: SLF001
            prepared, input_ids_seq_length=length, encoder_input_ids=prompt, device="cpu"
        )
    finally:
        model.generation_config = own
    return processors


def _settings(model: PreTrainedModel) -> dict[str, Any]:
    """The settings in a model's generation configuration, as JSON values."""
    config = model.generation_config or GenerationConfig()
    settings: dict[str, Any] = json.loads(config.to_json_string(ignore_metadata=True))
    return {name: value for name, value in settings.items() if value is not None}


def _checked(name: str, settings: dict[str, Any], vocab_size: int) -> GenerationDefaults:
    try:
        return GenerationDefaults.of_config(settings, vocab_size)
    except RequestError as error:
        raise ModelError(f"model {name!r}: {FILE}: {error}") from error


def _check_processors(base: BaseModel) -> None:
    """Refuse settings that transformers refuses only when it processes logits."""
    prompt = torch.zeros(1, 2, dtype=torch.int64)
    try:
        processors: Any = logits_processors(base.model, followed_config(base.model, greedy=False), prompt, 2)
        processors(prompt, torch.zeros(1, base.geometry.vocab_size))
    except _REFUSALS as error:
        raise _refused(base.name, error) from error


def _refused(name: str, error: Exception) -> ModelError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return ModelError(
        f"model {name!r}: {FILE}: expected defaults that transformers' generate takes, but it refuses them: "
        f"{reason[:300]}"
    )


def _not_followed(settings: dict[str, Any], *, has_tokenizer: bool) -> dict[str, Any]:
    known = vars(GenerationConfig())
    unsupported = {
        name: value
        for name, value in settings.items()
        if name in known
        and not name.startswith("_")
        and name not in FOLLOWED
        and name not in _INERT
        and value not in _NEUTRAL.get(name, ())
    }
    if settings.get("do_sample"):  # the runtime samples one text, without beams
        several = {name: settings.get(name, 1) for name in ("num_beams", "num_return_sequences")}
        unsupported |= {name: value for name, value in several.items() if value != 1}
    if settings.get("do_sample") or settings.get("num_beams", 1) != 1:
        unsupported.pop("penalty_alpha", None)  # contrastive search needs greedy text
    if "stop_strings" in settings and not has_tokenizer:
        unsupported["stop_strings"] = settings["stop_strings"]
    return unsupported


def _warnings_of_settings(defaults: GenerationDefaults, not_followed: dict[str, Any]) -> list[str]:
    warnings = []
    if not_followed:
        listed = ", ".join(f"{name} {str(value)[:60]}" for name, value in sorted(not_followed.items()))
        warnings.append(
            f"{FILE}: the runtime does not follow {listed}: its text can differ from the default text of PEFT's "
            "generate"
        )
    if not defaults.sampling.is_greedy:
        shown = ", ".join(
            f"{name} {value}" for name, value in defaults.described().items() if name in vars(defaults.sampling)
        )
        warnings.append(
            f"{FILE}: the model samples by default ({shown}), and so does the runtime; for greedy text pass "
            "sampling=Sampling() or --temperature 0"
        )
    return warnings


def _warnings_of_ends(defaults: GenerationDefaults, base: BaseModel) -> list[str]:
    warnings = []
    ends, vocab_size, tokenizer = defaults.end_tokens, base.geometry.vocab_size, base.tokenizer
    if beyond := [end for end in ends if end >= vocab_size]:
        warnings.append(f"{FILE}: end token {beyond[0]} is beyond the vocabulary of {vocab_size}: it never comes")
    configured = getattr(base.model.config.get_text_config(), "eos_token_id", None)
    if not ends and configured is not None:
        warnings.append(
            f"{FILE} names no end token, though config.json names {configured}: text goes on to max_new_tokens, as "
            f"with transformers' generate; to end there, pass end_tokens={configured} (--end-token)"
        )
    own = getattr(tokenizer, "eos_token_id", None)
    if tokenizer is not None and own is not None and own < vocab_size and ends and own not in ends:
        listed = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in ends if end < vocab_size)
        warnings.append(
            f"the tokenizer's end token is {tokenizer.eos_token!r} ({own}), but {FILE} ends text at {listed}, and so "
            f"does PEFT's generate; to end at the tokenizer's, pass end_tokens={own} "
            f"(--end-token '{tokenizer.eos_token}')"
        )
    return warnings

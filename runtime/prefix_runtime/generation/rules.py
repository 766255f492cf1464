"""The rules of one request: the model's generation defaults with the request's options on top."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import RequestError

from .arguments import GenerationOptions, as_end_tokens, as_sampling, as_stop
from .generation_config import FOLLOWED, GenerationDefaults, read_generation_config
from .logits_processors import LogitsProcessors
from .sampling import Sampling


@dataclass(frozen=True)
class Beams:
    """How a request's beams are searched; see `GenerationOptions`.

    Attributes:
        count: of the beams; 1 for no search.
        returned: texts, at the most.
        length_penalty, early_stopping: as in `GenerationOptions`.
    """

    count: int = 1
    returned: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False


@dataclass(frozen=True)
class GenerationRules:
    """How a request's tokens are chosen and what ends them.

    Attributes:
        sampling: how a token is chosen from the processed logits.
        processors: what changes the logits before.
        end_tokens: token ids that end the text.
        stop: strings that end it.
        beams: how many texts are searched side by side.
        wants_logprobs: whether the tokens' log-probabilities are returned.
        defaults: what all of this was made of.
    """

    sampling: Sampling
    processors: LogitsProcessors
    end_tokens: frozenset[int]
    stop: tuple[str, ...]
    beams: Beams
    wants_logprobs: bool
    defaults: GenerationDefaults

    def new_tokens(self, prompt: int, usual: int) -> int:
        """New tokens that a request without `max_new_tokens` takes at most: the model's number, or else the usual one.

        Raises:
            RequestError: the prompt has as many tokens as the model's `max_length` allows.

        Source: transformers 5.23, `GenerationMixin._prepare_generated_length`, `_validate_generated_length`.
        """
        if self.defaults.max_new_tokens is not None:
            return self.defaults.max_new_tokens
        if self.defaults.max_length is None:
            return usual
        if prompt >= self.defaults.max_length:
            raise RequestError(
                f"prompt: expected fewer tokens than the model's max_length, {self.defaults.max_length}, "
                f"found {prompt}; give max_new_tokens"
            )
        return self.defaults.max_length - prompt


_OF_BEAMS = ("num_beams", "num_return_sequences", "length_penalty", "early_stopping")
"""Options that are settings of the model's configuration, too."""


class RuleBook:
    """A bundle's generation defaults, and the rules that requests make of them.

    Raises:
        BundleError: the bundle's configuration is malformed or contradicts itself.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._defaults = GenerationDefaults.of_bundle(bundle)
        self._config = read_generation_config(bundle)
        self._vocab_size = bundle.manifest.geometry.vocab_size
        self._processors = LogitsProcessors(self._defaults, self._vocab_size)

    def defaults_with(self, changes: Mapping[str, Any] | None) -> GenerationDefaults:
        """The model's defaults with changes on top, by transformers' names.

        Raises:
            RequestError: a change is malformed, or contradicts another or the model's defaults.
        """
        if changes is not None and not isinstance(changes, Mapping):
            raise RequestError(f"generation_config: expected a mapping, found {changes!r}")
        if unknown := sorted(map(str, set(changes or {}) - set(FOLLOWED))):
            raise RequestError(f"generation_config: expected some of {', '.join(FOLLOWED)}, found {unknown}")
        if not changes:
            return self._defaults
        return GenerationDefaults.of_config({**self._config, **changes}, self._vocab_size)

    def rules(self, options: GenerationOptions) -> GenerationRules:
        """The rules of a request.

        Raises:
            RequestError: an option is malformed, or contradicts another or the model's defaults.
        """
        changes = self._changes(options)
        defaults = self.defaults_with(changes)
        is_own = defaults is self._defaults
        stop = as_stop(options.get("stop"))
        sampling = as_sampling(options.get("sampling"), defaults.sampling)
        return GenerationRules(
            sampling=sampling,
            processors=self._processors if is_own else LogitsProcessors(defaults, self._vocab_size),
            end_tokens=frozenset(() if options.get("ignore_end") else defaults.end_tokens),
            stop=defaults.stop_strings if stop is None else stop,
            beams=_beams(defaults, sampling, changes),
            wants_logprobs=options.get("token_logprobs", False),
            defaults=defaults,
        )

    def _changes(self, options: GenerationOptions) -> Mapping[str, Any]:
        """What the options set in place of the model's configuration, by its names."""
        given: Any = options.get("generation_config")
        changes: dict[str, Any] = {}
        if options.get("max_new_tokens") is not None and (given or self._defaults.max_new_tokens is not None):
            changes["max_new_tokens"] = None  # the option goes before it
        sampling = options.get("sampling")
        if isinstance(sampling, Sampling) and sampling.repetition_penalty is not None:
            changes["repetition_penalty"] = sampling.repetition_penalty
        ends = as_end_tokens(options.get("end_tokens"), self._vocab_size)
        if ends is not None:
            changes["eos_token_id"] = ends
        changes |= {name: options.get(name) for name in _OF_BEAMS if options.get(name) is not None}
        return {**given, **changes} if isinstance(given, Mapping) else (given or changes)


def _beams(defaults: GenerationDefaults, sampling: Sampling, asked: Mapping[str, Any]) -> Beams:
    """The beams of a request. What the model has of them counts for greedy text alone.

    Raises:
        RequestError: the request asks for beams and sampling, or for more texts than beams.
    """
    count, returned = defaults.num_beams, defaults.num_return_sequences
    if not sampling.is_greedy:
        if asked.get("num_beams") is not None and count > 1:
            raise RequestError(
                f"num_beams: expected 1 with sampling, found {count}; for a beam search pass sampling=Sampling() or "
                "--temperature 0"
            )
        count = 1
    if returned > count:
        if asked.get("num_return_sequences") is not None:
            raise RequestError(f"num_return_sequences: expected at most num_beams, {count}, found {returned}")
        returned = count
    return Beams(count, returned, defaults.length_penalty, defaults.early_stopping)

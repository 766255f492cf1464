"""The generation defaults of a model: what its `generation_config.json` asks for, read and checked."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict, cast

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import BundleError, RequestError

from .sampling import Sampling
from .setting_reader import SettingReader, short_text

_MOST_BYTES = 1 << 26
"""The largest configuration file that is read; lists of forbidden words of real models take less than a megabyte."""

MAX_BEAMS = 1024

_TEXT_CONFIGS = ("decoder", "generator", "text_config")


class GenerationConfig(TypedDict, total=False):
    """The settings of `generation_config.json` that the runtime follows, by transformers' names.

    A request's own settings lie on top of the model's: a name that is absent means the model's default, and None turns
    the setting off. Names that transformers has and this class has not are not supported.

    Source: transformers 5.23, `GenerationConfig`.
    """

    max_length: int | None
    max_new_tokens: int | None
    min_length: int | None
    min_new_tokens: int | None
    stop_strings: str | Sequence[str] | None
    eos_token_id: int | Sequence[int] | None
    do_sample: bool | None
    temperature: float | None
    top_h: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None
    typical_p: float | None
    epsilon_cutoff: float | None
    eta_cutoff: float | None
    repetition_penalty: float | None
    encoder_repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    encoder_no_repeat_ngram_size: int | None
    sequence_bias: Sequence[Any] | None
    bad_words_ids: Sequence[Sequence[int]] | None
    forced_bos_token_id: int | None
    forced_eos_token_id: int | Sequence[int] | None
    remove_invalid_values: bool | None
    exponential_decay_length_penalty: Sequence[float] | None
    suppress_tokens: Sequence[int] | None
    begin_suppress_tokens: Sequence[int] | None
    renormalize_logits: bool | None
    num_beams: int | None
    num_return_sequences: int | None
    length_penalty: float | None
    early_stopping: bool | str | None


FOLLOWED = tuple(GenerationConfig.__annotations__)
"""The names of the settings that the runtime follows."""

PLAIN = cast(GenerationConfig, {name: None for name in FOLLOWED if name != "eos_token_id"})
"""Every setting off but the end tokens: plain greedy decoding, whatever the model's defaults."""


@dataclass(frozen=True)
class GenerationDefaults:
    """How tokens are chosen, and what ends them, unless a request says otherwise.

    Attributes:
        sampling: how a token is chosen from the processed logits; `Sampling()`, which is greedy, without `do_sample`.
        end_tokens: token ids that end a text.
        stop_strings: strings that end a text.
        max_new_tokens: new tokens at most; None if the model names no limit.
        max_length: tokens of prompt and new text at most, if `max_new_tokens` is None; None for no limit.
        min_length: tokens of prompt and new text before which no end token comes; 0 for none.
        min_new_tokens: new tokens before which no end token comes; None leaves it to `min_length`.
        repetition_penalty: of tokens of prompt and text; 1 changes nothing.
        encoder_repetition_penalty: of all but the prompt's tokens; 1 changes nothing.
        no_repeat_ngram_size: runs of this many tokens come once only; 0 for no such rule.
        encoder_no_repeat_ngram_size: runs of this many tokens of the prompt do not come again; 0 for no such rule.
        sequence_bias: token ids, and what is added to the logit of the last one behind the others.
        bad_words_ids: runs of token ids that never come.
        forced_bos_token_id: the first new token behind a prompt of one token.
        forced_eos_token_id: the last token that `max_new_tokens` allows is one of these.
        remove_invalid_values: whether logits that are no numbers become 0.
        exponential_decay_length_penalty: after so many new tokens the end token becomes more likely by this factor.
        suppress_tokens: token ids that never come.
        begin_suppress_tokens: token ids that do not come first.
        renormalize_logits: whether what the rules leave is made log-probabilities again; it matters with beams alone.
        num_beams: beams of greedy text; 1 for no beam search.
        num_return_sequences: texts that a beam search returns at most.
        length_penalty: power of the length that a beam's score is divided by.
        early_stopping: when a beam search ends; True as soon as there are `num_beams` texts.
    """

    sampling: Sampling = field(default_factory=Sampling)
    end_tokens: tuple[int, ...] = ()
    stop_strings: tuple[str, ...] = ()
    max_new_tokens: int | None = None
    max_length: int | None = None
    min_length: int = 0
    min_new_tokens: int | None = None
    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: tuple[tuple[tuple[int, ...], float], ...] = ()
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: tuple[int, ...] = ()
    remove_invalid_values: bool = False
    exponential_decay_length_penalty: tuple[int, float] | None = None
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    renormalize_logits: bool = False
    num_beams: int = 1
    num_return_sequences: int = 1
    length_penalty: float = 1.0
    early_stopping: bool | str = False

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> GenerationDefaults:
        """The defaults of a bundle's model.

        Raises:
            BundleError: a configuration is no JSON object, or asks for what cannot be.
        """
        name = _config_name(bundle)
        try:
            return cls.of_config(read_generation_config(bundle), bundle.manifest.geometry.vocab_size)
        except RequestError as error:
            raise BundleError(f"{bundle.root / name}: {error}") from error

    @classmethod
    def of_config(cls, config: Mapping[str, Any], vocab_size: int) -> GenerationDefaults:
        """The defaults that a configuration asks for; other names than `FOLLOWED` are left aside.

        Args:
            config: names and values as in `generation_config.json`; None stands for an absent one.
            vocab_size: of the model.

        Raises:
            RequestError: a value is of a wrong type or out of range, or two contradict each other; begins with the
                name.

        Source: transformers 5.23, `GenerationMixin._prepare_generation_config`, `GenerationConfig.validate`.
        """
        reader = SettingReader(config, vocab_size)
        defaults = cls(
            sampling=_read_sampling(reader),
            end_tokens=reader.tokens("eos_token_id"),
            stop_strings=reader.strings("stop_strings"),
            max_new_tokens=reader.count("max_new_tokens", None, 1),
            max_length=reader.count("max_length", None, 1),
            min_length=reader.count("min_length", 0) or 0,
            min_new_tokens=reader.count("min_new_tokens", None),
            repetition_penalty=reader.number("repetition_penalty", 1.0, 1e-3, 1e3),
            encoder_repetition_penalty=reader.number("encoder_repetition_penalty", 1.0, 1e-3, 1e3),
            no_repeat_ngram_size=reader.count("no_repeat_ngram_size", 0) or 0,
            encoder_no_repeat_ngram_size=reader.count("encoder_no_repeat_ngram_size", 0) or 0,
            sequence_bias=reader.biases("sequence_bias"),
            bad_words_ids=reader.runs("bad_words_ids"),
            forced_bos_token_id=reader.count("forced_bos_token_id", None, 0, vocab_size - 1),
            forced_eos_token_id=reader.tokens("forced_eos_token_id", vocab_size - 1),
            remove_invalid_values=reader.flag("remove_invalid_values"),
            exponential_decay_length_penalty=reader.decay("exponential_decay_length_penalty"),
            suppress_tokens=reader.tokens("suppress_tokens"),
            begin_suppress_tokens=reader.tokens("begin_suppress_tokens"),
            renormalize_logits=reader.flag("renormalize_logits"),
            num_beams=reader.count("num_beams", 1, 1, MAX_BEAMS) or 1,
            num_return_sequences=reader.count("num_return_sequences", 1, 1) or 1,
            length_penalty=reader.number("length_penalty", 1.0, -50.0, 50.0),
            early_stopping=reader.stopping("early_stopping"),
        )
        defaults.check(vocab_size)
        return defaults

    def check(self, vocab_size: int) -> None:
        """Refuse settings that contradict each other.

        Raises:
            RequestError: naming the setting, what was expected and what was found.
        """
        limit, name = self.max_new_tokens, "max_new_tokens"
        if limit is not None and (self.min_new_tokens or 0) > limit:
            raise RequestError(f"min_new_tokens: expected at most {name}, {limit}, found {self.min_new_tokens}")
        if limit is None and self.max_length is not None and self.min_length > self.max_length:
            raise RequestError(f"min_length: expected at most max_length, {self.max_length}, found {self.min_length}")
        if self.exponential_decay_length_penalty is not None and not self.end_tokens:
            raise RequestError(
                "exponential_decay_length_penalty: expected an end token to favour, found no eos_token_id; name one, "
                "or leave the penalty out"
            )
        suppressed = set(self.suppress_tokens)
        if suppressed.issuperset(range(vocab_size)):
            raise RequestError(f"suppress_tokens: expected to leave a token of {vocab_size}, found all of them")
        forced_first = () if self.forced_bos_token_id is None else (self.forced_bos_token_id,)
        for name, forced in (("forced_bos_token_id", forced_first), ("forced_eos_token_id", self.forced_eos_token_id)):
            if forced and suppressed.issuperset(forced):
                raise RequestError(f"{name}: expected a token that is not among suppress_tokens, found {forced[0]}")

    def described(self) -> dict[str, str]:
        """What differs from plain greedy decoding, by name, as people read it; end tokens are left out."""
        plain = GenerationDefaults()
        own = {**vars(self.sampling), **vars(self)}
        usual = {**vars(plain.sampling), **vars(plain)}
        # `sampling` is there by its settings.
        return {
            name: _shown(value)
            for name, value in own.items()
            if value != usual[name] and name not in ("sampling", "end_tokens")
        }


def shown_defaults(bundle: Bundle) -> dict[str, str]:
    """What a bundle's model does by default, end tokens, and what is not followed, as people read it.

    Raises:
        BundleError: a configuration is malformed or contradicts itself.
    """
    defaults = GenerationDefaults.of_bundle(bundle)
    way = ("beam search" if defaults.num_beams > 1 else "greedy") if defaults.sampling.is_greedy else "sampled"
    ignored = (bundle.manifest.generation or {}).get("not_followed", {})
    return {
        "generation": ", ".join([way, *(f"{name} {value}" for name, value in defaults.described().items())]),
        "end tokens": ", ".join(map(str, defaults.end_tokens)) or "none",
        **({"not followed": ", ".join(f"{name} {short_text(ignored[name])}" for name in ignored)} if ignored else {}),
    }


def read_generation_config(bundle: Bundle) -> dict[str, Any]:
    """A bundle's `generation_config.json`; without one, what transformers makes of `config.json` in its place.

    A `generation_config.json` that names no end token means that there is none, whatever `config.json` names.

    Raises:
        BundleError: a file is no JSON object, or is too large.

    Source: transformers 5.23, `GenerationMixin.adjust_generation_fn` and `GenerationConfig.from_model_config`.
    """
    name = _config_name(bundle)
    if name not in bundle.manifest.files:
        return {}
    path = bundle.root / name
    try:
        size = path.stat().st_size
        if size > _MOST_BYTES:
            raise BundleError(f"{path}: expected at most {_MOST_BYTES} bytes, found {size}")
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise BundleError(f"{path}: expected a JSON object, found text that is none") from error
    if not isinstance(config, dict):
        raise BundleError(f"{path}: expected a JSON object, found {type(config).__name__}")
    if name == "config.json":
        nested = (config[key] for key in _TEXT_CONFIGS if isinstance(config.get(key), dict) and config[key])
        return next(nested, {}) | {key: value for key, value in config.items() if value is not None}
    return dict(config)


def _config_name(bundle: Bundle) -> str:
    own = "generation_config.json"
    return own if own in bundle.manifest.files else "config.json"


def _read_sampling(reader: SettingReader) -> Sampling:
    """How transformers samples where `do_sample` is set; what a setting is without it does not matter."""
    if not reader.flag("do_sample"):
        return Sampling()
    temperature = reader.number("temperature", 1.0, 0.0)
    if temperature == 0:
        raise RequestError("temperature: expected above 0 with do_sample, found 0; for greedy text leave do_sample out")
    return Sampling(
        temperature=temperature,
        top_h=reader.number("top_h", 0.0, 0.0, 1.0),
        top_k=reader.count("top_k", 50) or 0,  # 50 is transformers' own default
        # There 0 keeps one token, and more than 1 keeps all.
        top_p=min(max(reader.number("top_p", 1.0, 0.0), sys.float_info.min), 1.0),
        min_p=reader.number("min_p", 0.0, 0.0, 1.0),
        typical_p=min(reader.number("typical_p", 1.0, 0.0), 1.0),
        epsilon_cutoff=_cutoff(reader.number("epsilon_cutoff", 0.0)),
        eta_cutoff=_cutoff(reader.number("eta_cutoff", 0.0)),
    )


def _cutoff(value: float) -> float:
    """A cutoff as transformers takes it: nothing outside of 0 to 1."""
    return value if 0 < value < 1 else 0.0


def _shown(value: object) -> str:
    if isinstance(value, tuple):
        return f"{len(value)} of them" if len(value) > 4 else short_text(list(value))
    return short_text(value)

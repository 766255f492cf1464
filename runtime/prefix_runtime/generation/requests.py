"""What calls of an engine ask for, checked against its bundle before anything is run."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.bundle.tasks import TaskStore
from prefix_runtime.checks import is_whole
from prefix_runtime.errors import CompositionError, ContextOverflowError, RequestError, TaskError
from prefix_runtime.prefix.prefix import TEXT_HAS_BEGUN, Prefix

from .answer import Request
from .arguments import GenerationOptions, check_ids
from .rules import GenerationRules, RuleBook
from .text import TextCodec

DEFAULT_MAX_NEW_TOKENS = 256


class RequestChecker:
    """Makes checked requests of a call's arguments.

    Args:
        bundle: what the requests are for.
        store: its tasks.
        codec: text to ids and back; None if the bundle has no tokenizer.
        rules: how tokens are chosen.
        max_length: positions for prefix and text together.
        rows: that run together at the most; None for any number.
    """

    def __init__(
        self,
        bundle: Bundle,
        store: TaskStore,
        codec: TextCodec | None,
        rules: RuleBook,
        max_length: int,
        *,
        rows: int | None = None,
    ) -> None:
        self._bundle, self._store, self._codec, self._rules, self._rows = bundle, store, codec, rules, rows
        self._geometry, self._max_length = bundle.manifest.geometry, max_length

    def row(self, index: int, prompt: str | Sequence[int], task: str | None, options: GenerationOptions) -> Request:
        """A request of a list, whose errors say which it is."""
        try:
            return self.request(prompt, task, options)
        except (CompositionError, RequestError, TaskError) as error:
            raise type(error)(f"row {index} of the list: {error}") from error

    def request(
        self, prompt: str | Sequence[int], task: str | None, options: GenerationOptions, least_new_tokens: int = 1
    ) -> Request:
        """What a call asks for, checked.

        Args:
            prompt: text, or token ids.
            task: whose prefix to use, or None.
            options: the call's.
            least_new_tokens: that `max_new_tokens` may be.

        Raises:
            UnknownTaskError, CompositionError, RequestError, ContextOverflowError: see `Engine.generate`.
        """
        started = time.perf_counter()
        if options.get("stop") and self._codec is None:
            raise RequestError(f"stop: {self._bundle.root} has no tokenizer, so text cannot be looked at; leave it out")
        for name in ("ignore_end", "token_logprobs"):
            if not isinstance(options.get(name, False), bool):
                raise RequestError(f"{name}: expected True or False, found {options.get(name)!r}")
        if not (task is None or isinstance(task, str)):
            raise RequestError(f"task: expected the name of one, or None, found {task!r}")
        if task is None and self._bundle.manifest.mode == "bake":
            known = ", ".join(self._store.names)
            raise RequestError(f"task: expected one of those that the graph holds, {known}, found none")
        selecting = time.perf_counter()
        prefix = None if task is None else self._store.get(task)
        selected = time.perf_counter() - selecting
        has_begun = prefix is not None and prefix.metadata.get(TEXT_HAS_BEGUN) == "true"
        ids = self._encode("prompt", prompt, with_special_tokens=not has_begun)
        rules = self._rules.rules(options)
        self._check_beams(rules)
        new_tokens = options.get("max_new_tokens")
        return Request(
            prompt=ids,
            task=task,
            prefix=prefix,
            max_new_tokens=self._check_length(prefix, len(ids), new_tokens, least_new_tokens, rules),
            rules=rules,
            task_selection=selected,
            preparation=time.perf_counter() - started,
        )

    def target(self, target: str | Sequence[int]) -> tuple[int, ...]:
        """The token ids of a text that is scored, or these ids, checked.

        Raises:
            RequestError: it is empty, or an id is not in the vocabulary.
        """
        if not isinstance(target, str):
            check_ids(target)
        return self._encode("target", target, with_special_tokens=False)

    def _check_beams(self, rules: GenerationRules) -> None:
        if self._rows is not None and rules.beams.count > self._rows:
            raise RequestError(
                f"num_beams: expected at most {self._rows}, the rows that the provider runs together, found "
                f"{rules.beams.count}"
            )

    def _encode(self, name: str, text: str | Sequence[int], *, with_special_tokens: bool) -> tuple[int, ...]:
        if isinstance(text, str):
            if self._codec is None:
                raise RequestError(f"{name}: {self._bundle.root} has no tokenizer: expected token_ids, found text")
            ids = tuple(self._codec.encode(text, with_special_tokens=with_special_tokens))
        else:
            ids = tuple(int(token_id) for token_id in text)
        if not ids:
            raise RequestError(
                f"{name}: expected at least one token, found none: the tokenizer adds none to this text; give text, or "
                "give a start token as token_ids"
            )
        for index, token_id in enumerate(ids):
            if not 0 <= token_id < self._geometry.vocab_size:
                raise RequestError(
                    f"token_ids[{index}]: expected 0 to {self._geometry.vocab_size - 1}, found {token_id}"
                )
        return ids

    def _check_length(self, prefix: Prefix | None, prompt: int, new: Any, least: int, rules: GenerationRules) -> int:
        """The new tokens that may be asked for; None stands for the default."""
        if new is not None and not is_whole(new, least):
            raise RequestError(f"max_new_tokens: expected a whole number, {least} or more, found {new!r}")
        room = self._geometry.room(prefix, self._max_length)
        wanted = prompt + (least if new is None else int(new))
        if wanted > room:
            raise ContextOverflowError(
                f"expected at most {room} tokens of prompt and new text (context {self._geometry.context_length}, "
                f"max_length {self._max_length}, prefix {prefix.prefix_length if prefix else 0}), "
                f"found a prompt of {prompt} and {wanted - prompt} new; shorten the prompt or lower max_new_tokens"
            )
        return min(rules.new_tokens(prompt, DEFAULT_MAX_NEW_TOKENS), room - prompt) if new is None else int(new)

"""The public face: `load` a bundle, then `Engine.generate` and `Engine.stream` under a task."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Unpack, cast, overload

import numpy as np

from .backends.options import Cuda
from .backends.registry import Backend, OpenRequest, open_backend
from .bundle.folder import Bundle
from .bundle.tasks import TaskStore
from .cache.pool import CachePool
from .checks import is_whole
from .errors import PrefixError, RequestError
from .generation.answer import GrowingAnswer, Request, in_batches
from .generation.arguments import GenerationOptions, as_list, check_ids, check_names, one_each, options_of_each
from .generation.beams.decoding import search_beams
from .generation.beams.search import BeamSearch
from .generation.decoding import decode, target_logprobs
from .generation.generation_config import GenerationConfig, GenerationDefaults
from .generation.requests import RequestChecker
from .generation.results import Chunk, GenerationResult, TargetScore
from .generation.rules import RuleBook
from .generation.text import TextCodec
from .prefix.prefix import Prefix

if TYPE_CHECKING:
    from .backends.gpu.device import Device

DEFAULT_CACHE_BYTES = 2 << 30
DEFAULT_MAX_BATCH = 8


def load(
    path: str | Path,
    *,
    provider: str | Cuda = "cpu",
    threads: int | None = None,
    max_length: int | None = None,
    cache_bytes: int = DEFAULT_CACHE_BYTES,
    max_cache_bytes: int | None = None,
    max_batch: int = DEFAULT_MAX_BATCH,
    verify: bool = False,
    prepare: bool | None = None,
) -> Engine:
    """An engine on a bundle folder, ready to generate. It opens the packed copy of the graph if there is one.

    Args:
        path: the bundle folder.
        provider: "cpu", "cuda", or a `Cuda` that chooses GPU, stream and memory. "tensorrt" and "tensorrt-rtx" are
            onnxruntime's. "tensorrt-engine" runs what `prefix-export tensorrt` built.
        threads: CPU threads for one run. Default: onnxruntime decides.
        max_length: maximum number of positions for prefix plus text. Default, and upper limit: the bundle's own.
        cache_bytes: bytes that key/value buffers may take before the engine drops idle ones. Default: 2 GiB.
        max_cache_bytes: bytes that the key/value buffers of running requests may take together. A request beyond it
            raises `BusyError` when it begins, a stream with its first step. Default: no limit.
        max_batch: rows that decode together: one for each prompt of a list, or for each beam. More prompts are taken
            in turns. Default: 8.
        verify: compare every file's SHA-256 first, compare each prefix again when it is read, and open the bundle's own
            graph, not a packed copy.
        prepare: True keeps a packed copy of the graph if there is none, and opens it. That takes several times as long
            once, and disk of twice the graph's size; see `prefix-runtime prepare`. None does so for a bundle of a
            gigabyte or more without 4-bit weights, if half of the free disk holds it. False makes none. CPU only.

    Raises:
        BundleError: the folder is not a bundle.
        BundleIntegrityError: a file is missing or damaged; copy or build the bundle again.
        ProviderError: onnxruntime cannot open the graph with this provider; the message says what is missing.
        RequestError: `max_length`, `cache_bytes`, `max_cache_bytes` or `max_batch` is out of range; `prepare=True` with
            another provider or with `verify`.
        OSError: the packed copy cannot be written, for example because the disk is full. Nothing is left behind.

    Examples:
        >>> engine = load("bundle")  # doctest: +SKIP
        >>> engine.generate("name[Sprat Table], isle[Sildness] =>", task="json").text  # doctest: +SKIP
    """
    bundle = Bundle.open(path)
    if verify:
        bundle.verify()
    limit = bundle.manifest.max_length
    if max_length is not None and not is_whole(max_length, 1, limit):
        raise RequestError(f"max_length: expected 1 to the bundle's {limit}, found {max_length!r}")
    if not is_whole(cache_bytes):
        raise RequestError(f"cache_bytes: expected a whole number, 0 or more, found {cache_bytes!r}")
    if max_cache_bytes is not None and not is_whole(max_cache_bytes):
        raise RequestError(f"max_cache_bytes: expected a whole number, 0 or more, or None, found {max_cache_bytes!r}")
    if not is_whole(max_batch, 1):
        raise RequestError(f"max_batch: expected a whole number, 1 or more, found {max_batch!r}")
    if prepare is not None and not isinstance(prepare, bool):
        raise RequestError(f"prepare: expected True, False or None, found {prepare!r}")
    backend = open_backend(bundle, OpenRequest(provider, threads, max_batch, only_own=verify, prepare=prepare))
    engine = Engine(bundle, backend, max_length or limit, cache_bytes, max_batch, max_cache_bytes=max_cache_bytes)
    if verify:
        bundle.check_unchanged()
    return engine


class Engine:
    """A frozen model and its tasks, ready to generate. Threads may share it. Only `load` makes one.

    Attributes:
        bundle: the bundle that it was loaded from.
    """

    def __init__(
        self,
        bundle: Bundle,
        backend: Backend,
        max_length: int,
        cache_bytes: int = DEFAULT_CACHE_BYTES,
        max_batch: int = DEFAULT_MAX_BATCH,
        *,
        max_cache_bytes: int | None = None,
    ) -> None:
        self.bundle, self._backend = bundle, backend
        self._geometry = bundle.manifest.geometry
        limits = backend.limits
        self._max_length = max_length
        self._max_batch = max_batch if limits.rows is None else min(max_batch, limits.rows)
        self._store = TaskStore(bundle)
        task_id = self._store.place if bundle.manifest.mode == "bake" else None
        make = partial(backend.make_cache, task_id=task_id)
        position_bytes = bundle.cache_format.dtype.itemsize * self._geometry.values_per_position
        self._pool = CachePool(
            make, position_bytes, max_length, cache_bytes, limits.capacity_step, limit=max_cache_bytes
        )
        self._codec = TextCodec.of_bundle(bundle)
        self._rules = RuleBook(bundle)
        self._requests = RequestChecker(bundle, self._store, self._codec, self._rules, max_length, rows=limits.rows)

    @property
    def device(self) -> Device | None:
        """The GPU that the engine runs on, or None on a CPU."""
        return self._backend.device

    @property
    def tasks(self) -> tuple[str, ...]:
        """The tasks' names, sorted."""
        return self._store.names

    def generation_defaults(self, changes: GenerationConfig | None = None) -> GenerationDefaults:
        """The model's defaults for sampling, end tokens and lengths, from its `generation_config.json`.

        `changes` are settings on top of the model's, by transformers' names. None as a value turns a setting off.

        Raises:
            RequestError: a change is malformed, or contradicts another change or the model's defaults.

        Examples:
            >>> replace(engine.generation_defaults().sampling, seed=1)  # doctest: +SKIP
        """
        return self._rules.defaults_with(changes)

    def token_id(self, token: str) -> int:
        """The id of a token as the tokenizer's vocabulary spells it, such as "<|im_end|>".

        Raises:
            RequestError: the vocabulary has no such token, or the bundle has no tokenizer.
        """
        if self._codec is None:
            raise RequestError(f"token {token!r}: {self.bundle.root} has no tokenizer: expected a token id")
        return self._codec.token_id(token)

    def add_task(self, name: str, prefix: Prefix | str | Path) -> None:
        """Add a task to this engine, at once and for as long as it lives. `Bundle.add_task` changes the folder.

        Args:
            name: 1 to 64 letters, digits, `_`, `-` or `.`.
            prefix: the prefix, or the path of a prefix file.

        Raises:
            TaskNameError: the name cannot name a task.
            DuplicateTaskError: the name is taken; remove that task first.
            PrefixError: the prefix or its file is malformed.
            PrefixMismatchError: the prefix does not fit the model.
            BundleError: the bundle's graph holds its prefixes; build the bundle again.
        """
        if not isinstance(prefix, Prefix | str | Path):
            raise PrefixError(f"task {name!r}: expected a prefix or a file of one, found {prefix!r}")
        self._store.add(name, prefix if isinstance(prefix, Prefix) else Prefix.load(prefix))

    def remove_task(self, name: str) -> None:
        """Remove a task from this engine and free its buffers. Running requests continue.

        Raises:
            UnknownTaskError: there is no such task.
            BundleError: the bundle's graph holds its prefixes; build the bundle again.
        """
        for prefix in self._store.remove(name):
            self._forget(prefix)

    @overload
    def generate(
        self, prompt: str, *, task: str | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationResult: ...
    @overload
    def generate(
        self, prompt: list[str], *, task: str | Sequence[str | None] | None = None, **options: Unpack[GenerationOptions]
    ) -> list[GenerationResult]: ...
    @overload
    def generate(
        self, *, token_ids: Sequence[int], task: str | None = None, **options: Unpack[GenerationOptions]
    ) -> GenerationResult: ...
    @overload
    def generate(
        self,
        *,
        token_ids: Sequence[Sequence[int]],
        task: str | Sequence[str | None] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult]: ...
    def generate(
        self,
        prompt: str | list[str] | None = None,
        *,
        token_ids: Sequence[int] | Sequence[Sequence[int]] | None = None,
        task: str | Sequence[str | None] | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult | list[GenerationResult]:
        """Generate text for a prompt, or for each of a list of prompts.

        A list decodes as one batch, and each row gets the tokens that it would get alone. All requests of a list are
        checked before the first one runs.

        Args:
            prompt: text, or a list of texts. The tokenizer adds its own special tokens, which may be all that an empty
                prompt has. It adds none if the task's prefix is, or holds, a text.
            token_ids: ids in place of text, used as they are: a list of ids, or a list of such lists.
            task: the task whose prefix to use. None runs the bare model. For a list of prompts: one task, or a list
                with one for each. `"a+b"` composes two tasks: their prefixes stand one after another.
            options: see `GenerationOptions`: `max_new_tokens`, `sampling`, `stop`, `end_tokens` and others.

        Returns:
            The result of the prompt, or a list with one for each prompt, in order.

        Raises:
            UnknownTaskError: there is no such task; the message lists the tasks.
            CompositionError: the tasks cannot be composed.
            RequestError: the prompt is empty, an id is not in the vocabulary, or an option is out of range.
            ContextOverflowError: prefix, prompt and new tokens do not fit; shorten the prompt or lower
                `max_new_tokens`.
            BusyError: running requests take all of `max_cache_bytes`; try again later.

        Examples:
            >>> prompt = "name[Sprat Table], isle[Sildness] =>"
            >>> engine.generate(prompt, task="json", max_new_tokens=64).text  # doctest: +SKIP
            >>> both = engine.generate([prompt, prompt], task=["json", None])  # doctest: +SKIP
        """
        check_names(options)
        prompts, single = as_list(prompt, token_ids)
        tasks = [cast(str | None, task)] if single else one_each(task, len(prompts))
        each = [options] if single else options_of_each(options, len(prompts))
        # All are checked before the first is run: a list is answered whole or not at all.
        rows = enumerate(zip(prompts, tasks, each, strict=True))
        requests = [self._requests.request(*row) if single else self._requests.row(index, *row) for index, row in rows]
        results = [result for batch in in_batches(requests, self._max_batch) for result in self._run(batch)]
        return results[0] if single else results

    @overload
    def stream(
        self, prompt: str, *, task: str | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Chunk]: ...
    @overload
    def stream(
        self, *, token_ids: Sequence[int], task: str | None = None, **options: Unpack[GenerationOptions]
    ) -> Iterator[Chunk]: ...
    def stream(
        self,
        prompt: str | None = None,
        *,
        token_ids: Sequence[int] | None = None,
        task: str | None = None,
        **options: Unpack[GenerationOptions],
    ) -> Iterator[Chunk]:
        """Generate text for one prompt, a chunk for each new token.

        Arguments and errors are those of `generate`, for one prompt. The call raises what is wrong with the request,
        and the first step raises `BusyError`. The last chunk has the whole result.

        Examples:
            >>> for chunk in engine.stream(prompt, task="json"):  # doctest: +SKIP
            ...     print(chunk.text, end="", flush=True)
        """
        check_names(options)
        prompts, single = as_list(prompt, token_ids)
        if not single:
            raise RequestError("stream: expected one prompt, found a list; use generate for lists")
        request = self._requests.request(prompts[0], task, options)
        if request.rows > 1:
            raise RequestError(f"stream: expected num_beams 1, found {request.rows}; pass num_beams=1, or use generate")
        return self._steps(request)

    def room(self, task: str | None = None) -> int:
        """The number of tokens of prompt plus new text that fit the context under a task, or None: the bare model.

        Raises:
            UnknownTaskError: there is no such task.
        """
        return self._geometry.room(None if task is None else self._store.get(task), self._max_length)

    def logits(self, token_ids: Sequence[int], task: str | None = None) -> np.ndarray:
        """The logits [sequence, vocab] float32 after each of the tokens, under a task or None: the bare model.

        Raises:
            UnknownTaskError: there is no such task.
            RequestError: no tokens, or an id that is not in the vocabulary.
            ContextOverflowError: prefix and tokens do not fit.
        """
        check_ids(token_ids)
        request = self._requests.request(token_ids, task, {"max_new_tokens": 0}, least_new_tokens=0)
        with self._pool.lease([request.prefix], request.length) as (cache, _):
            logits = cache.prefill(0, request.prompt, keep_all_logits=True)
            self._forget_removed([request])
        return logits

    def score(self, prompt: str | Sequence[int], target: str | Sequence[int], task: str | None = None) -> TargetScore:
        """The log-probabilities of a target's tokens behind a prompt, under a task or None: the bare model.

        Args:
            prompt: text, to which the tokenizer adds its special tokens, or token ids, which are used as they are.
            target: text, to which the tokenizer adds nothing, or token ids. It is split into tokens by itself: give
                the space between two words with one of them.
            task: as in `generate`.

        Raises:
            UnknownTaskError, CompositionError, RequestError, ContextOverflowError, BusyError: as in `generate`.

        Examples:
            >>> engine.score("name[Sprat Table] =>", ' {"name": "Sprat Table"}', task="json").logprob  # doctest: +SKIP
        """
        if not isinstance(prompt, str):
            check_ids(prompt)
        wanted = self._requests.target(target)
        request = self._requests.request(prompt, task, {"max_new_tokens": len(wanted)})
        with self._pool.lease([request.prefix], request.length) as (cache, _):
            logprobs = target_logprobs(cache, request.prompt, wanted)
            self._forget_removed([request])
        return TargetScore(wanted, logprobs)

    def _run(self, requests: Sequence[Request]) -> list[GenerationResult]:
        answers: list[GrowingAnswer | BeamSearch] = []
        for _ in self._answer(requests, answers):
            pass  # each keeps its own tokens
        return [answer.result() for answer in answers]

    def _steps(self, request: Request) -> Iterator[Chunk]:
        answers: list[GrowingAnswer | BeamSearch] = []
        for _ in self._answer([request], answers):
            (answer,) = answers
            assert isinstance(answer, GrowingAnswer)  # a stream has no beams
            yield answer.chunk()

    def _answer(self, requests: Sequence[Request], answers: list[GrowingAnswer | BeamSearch]) -> Iterator[object]:
        """Decode requests together, all with beams or all without; returns after each step of each.

        Appends their answers, in order.
        """
        started = time.perf_counter()
        prefixes = [request.prefix for request in requests for _ in range(request.rows)]
        with self._pool.lease(prefixes, max(request.length for request in requests)) as (cache, rows):
            lease = time.perf_counter() - started
            try:
                if requests[0].rows > 1:
                    searches = [BeamSearch(request, self._codec, lease) for request in requests]
                    answers += searches
                    yield from search_beams(cache, rows, searches)
                else:
                    growing = [GrowingAnswer(request, self._codec, lease) for request in requests]
                    answers += growing
                    yield from decode(cache, rows, growing)
            finally:
                self._forget_removed(requests)

    def _forget_removed(self, requests: Sequence[Request]) -> None:
        """Free the buffers of tasks that were removed after these requests had found them.

        A collected stream calls this in any thread at any moment, so nothing here takes a lock.
        """
        for request in requests:
            if request.prefix and request.task and not self._store.holds(request.task, request.prefix):
                self._forget(request.prefix)

    def _forget(self, prefix: Prefix) -> None:
        self._pool.forget(prefix)
        self._backend.forget(prefix)

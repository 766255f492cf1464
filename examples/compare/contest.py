"""The contest: workers in processes of their own, their tokens compared, then rounds in which each takes its turn."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from contestants import CONTESTANTS, IN_CACHE, IN_REQUEST, NONE, REFERENCE
from environments import PreparationError
from figures import alike
from peers.protocol import stand_in
from worker import SHOWN_REASON, Worker, WorkerError
from workshop import Workshop

from prefix_runtime.bench.bandwidth import BandwidthProbe


@dataclass
class Entry:
    """What is known of a contestant: what it said once open, why it dropped out, and by prefix length its figures."""

    opened: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    equal_tokens: dict[int, int] = field(default_factory=dict)
    answers: dict[int, list[dict[str, Any]]] = field(default_factory=dict)
    bandwidths: list[float] = field(default_factory=list)  # bytes a second, before each of its turns: machines drift


class Contest:
    """Contestants on one workshop's things, all asked for the same."""

    def __init__(self, shop: Workshop, names: Sequence[str], prompt: list[int], new_tokens: int) -> None:
        self._shop, self._prompt, self._new_tokens = shop, prompt, new_tokens
        self.entries = {name: Entry() for name in names}
        self._random = random.Random(0)
        self._commands: dict[str, list[str]] = {}
        self._workers: dict[str, Worker] = {}
        self._reference: dict[tuple[int, bool], list[int]] = {}

    def prepare(self) -> None:
        """Make what every contestant needs, before anything is timed."""
        self._observe_reference()
        for name, entry in self.entries.items():
            try:
                self._commands[name] = CONTESTANTS[name].command(self._shop)
            except PreparationError as error:
                entry.reason = str(error).replace(f"{self._shop.order.folder}/", "")[:SHOWN_REASON]

    def run(self, rounds: int, reopen: bool) -> None:
        """Compare tokens, then time everyone once a round; the first round warms up and is left out.

        Who has idled while others ran answers a short request before it is timed, each prefix length's in another order
        every round. With `reopen` one contestant is in memory at a time: opened, warmed up, timed and closed in every
        round.
        """
        probe = BandwidthProbe(self._shop.order.threads)
        for turn in range(rounds + 1):
            for name in list(self._commands):
                _show(f"round {turn} of {rounds}: {name}")
                self.entries[name].bandwidths += [probe.measure()] if turn else []
                self._take_turn(name, timed=turn > 0, reopen=reopen)
        self.close()

    def close(self) -> None:
        """End every worker."""
        while self._workers:
            self._workers.popitem()[1].close()

    def _take_turn(self, name: str, timed: bool, reopen: bool) -> None:
        entry = self.entries[name]
        try:
            worker = self._worker(name)
            if not timed or reopen:
                for length in self._shop.order.lengths:
                    entry.equal_tokens[length] = self._count_equal_tokens(name, worker, length)
            if timed:
                lengths = list(self._shop.order.lengths)
                self._random.shuffle(lengths)
                self._ask(worker, lengths[0], new_tokens=2)
                for length in lengths:
                    entry.answers.setdefault(length, []).append(self._ask(worker, length))
        except WorkerError as error:
            entry.reason = str(error)
            del self._commands[name]
            self._close(name)
        if reopen:
            self._close(name)

    def _worker(self, name: str) -> Worker:
        if name not in self._workers:
            self._workers[name] = Worker(self._commands[name], self._shop.logs / f"{name}.log")
            self.entries[name].opened = self._workers[name].opened
        return self._workers[name]

    def _close(self, name: str) -> None:
        if name in self._workers:
            self._workers.pop(name).close()

    def _ask(self, worker: Worker, length: int, new_tokens: int | None = None) -> dict[str, Any]:
        return worker.ask(prefix_length=length, prompt=self._prompt, new_tokens=new_tokens or self._new_tokens)

    def _count_equal_tokens(self, name: str, worker: Worker, length: int) -> int:
        """Of its greedy tokens, how many are the product's at float32 before the first that is not."""
        prefix = CONTESTANTS[name].prefix
        expected = self._reference[0 if prefix == NONE else length, prefix in {IN_CACHE, IN_REQUEST}]
        return alike(self._ask(worker, length)["tokens"], expected)

    def _observe_reference(self) -> None:
        """The product's tokens under each prefix, and after each text that stands in for one."""
        command = CONTESTANTS[REFERENCE].command(self._shop)
        with Worker(command, self._shop.logs / "reference.log") as worker:
            for length in {0, *self._shop.order.lengths}:
                texts = {False: (length, self._prompt), True: (0, stand_in(length) + self._prompt)}
                for as_text, (prefix_length, prompt) in texts.items():
                    answer = worker.ask(prefix_length=prefix_length, prompt=prompt, new_tokens=self._new_tokens)
                    self._reference[length, as_text] = answer["tokens"]


def _show(text: str) -> None:
    """Progress, on a terminal only."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)

"""The options of a bench."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefix_runtime.backends.options import TENSORRT_PROVIDERS
from prefix_runtime.errors import BenchError

DEFAULT_PREFIX_LENGTHS = (0, 1, 5, 10, 20, 50, 100, 200)
MOST_TASKS = 8
"""The number of tasks that are measured if the request names none."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure. Lists are sorted, without duplicates.

    Attributes:
        prefix_lengths: positions of random prefixes; 0 is the bare model, and the others are compared with it.
        tasks: tasks of the bundle; None takes the first `MOST_TASKS`.
        prompt_lengths: tokens of random prompts.
        batch_sizes: rows that decode together.
        new_tokens: new tokens of each generation, at least 2: the prefill gives the first, decode steps the others.
        rounds: measured rounds; one more round warms up.
        threads: CPU threads for one run; None lets onnxruntime decide.
        provider: the execution provider.

    Raises:
        BenchError: a value is out of range; the message names the field, and what was expected and found.
    """

    prefix_lengths: tuple[int, ...] = DEFAULT_PREFIX_LENGTHS
    tasks: tuple[str, ...] | None = None
    prompt_lengths: tuple[int, ...] = (32,)
    batch_sizes: tuple[int, ...] = (1,)
    new_tokens: int = 32
    rounds: int = 7
    threads: int | None = None
    provider: str = "cpu"

    def __post_init__(self) -> None:
        for name, least, most in (
            ("prefix_lengths", 0, 1 << 24),
            ("prompt_lengths", 1, 1 << 24),
            ("batch_sizes", 1, 1 << 10),
        ):
            object.__setattr__(self, name, _distinct(name, getattr(self, name), least, most))
        _check_number("new_tokens", self.new_tokens, 2, 1 << 24)
        _check_number("rounds", self.rounds, 1, 10_000)
        if not isinstance(self.provider, str):
            raise BenchError(f"provider: expected a name, found {self.provider!r}")
        if self.provider in TENSORRT_PROVIDERS:
            raise BenchError(
                f"provider: expected cpu, cuda or tensorrt-engine, found {self.provider!r}: onnxruntime does not say "
                "which GPU runs it, so its bandwidth cannot be measured"
            )
        if self.tasks is not None:
            if not isinstance(self.tasks, Sequence) or not all(isinstance(task, str) for task in self.tasks):
                raise BenchError(f"tasks: expected names, found {self.tasks!r}")
            object.__setattr__(self, "tasks", tuple(dict.fromkeys(self.tasks)))


def _distinct(name: str, values: Sequence[int], least: int, most: int) -> tuple[int, ...]:
    if not isinstance(values, Sequence) or not values:
        raise BenchError(f"{name}: expected at least one, found {'none' if values == () else repr(values)}")
    for value in values:
        _check_number(name, value, least, most)
    return tuple(sorted(set(values)))


def _check_number(name: str, value: object, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise BenchError(f"{name}: expected whole numbers from {least} to {most}, found {value!r}")

"""What a bench is asked for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from prefix_runtime.backends.options import TENSORRT_PROVIDERS
from prefix_runtime.errors import BenchError

DEFAULT_PREFIX_LENGTHS = (0, 1, 5, 10, 20, 50, 100, 200)
MOST_TASKS = 8
"""Of a bundle that are measured where none are named."""


@dataclass(frozen=True)
class BenchRequest:
    """What to measure; lists are sorted and each value is kept once.

    Attributes:
        prefix_lengths: of random prefixes; 0 is the bare model, which the others are compared with.
        tasks: of the bundle; None takes the first `MOST_TASKS`.
        prompt_lengths: tokens of random prompts.
        batch_sizes: rows that are decoded together.
        new_tokens: of each generation, at least 2: the first comes from the prefill, the others are decode steps.
        rounds: that are kept; one more warms up.
        threads: of one run; None leaves the choice to onnxruntime.
        provider: the execution provider.

    Raises:
        BenchError: naming the field, what was expected and what was found.
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
                f"provider: expected cpu, cuda or tensorrt-engine, found {self.provider!r}, of which onnxruntime does "
                "not tell whose memory a floor is to be measured of"
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

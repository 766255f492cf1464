"""The demo's own text: tables about invented lighthouses, and four kinds of text that follow one.

Everything is drawn from the lists in `words.py` by seeded random numbers; nothing is taken from
anywhere else. A table is followed by one of four kinds of continuation, each a function of the
table alone:

1. `describe`, `headline`, `json`: the three tasks that get a trained prefix;
2. `tags`: no task. It is the most frequent kind in the base model's text, so it is what the model
   writes greedily when nothing settles the kind. Without it, one of the three tasks would be the
   base model's first guess and would score high without a prefix.

Which kind follows is drawn independently of the table, so nothing in the prompt tells.

A lighthouse belongs to the training or to the held-out split by a hash of its name, so no training
text contains a held-out name, let alone a held-out table.

Run as a script it prints the prompts of `prompts.txt`.
"""

from __future__ import annotations

import json
import random
import zlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice

import words

END_OF_TEXT = "<|endoftext|>"
SEPARATOR = " =>"
"""Ends every prompt. The tokenizer cuts on both sides of it, so no token crosses the border."""

SEASON_DASH = "\N{EN DASH}"
"""Between a headline's months; like the euro sign and the emoji, several bytes in UTF-8."""

HELD_OUT_SHARE = 10
"""One name in this many is held out."""


@dataclass(frozen=True)
class Lighthouse:
    """One lighthouse: what a table states and every continuation is made from."""

    name: str
    isle: str
    built: int
    """Year."""
    height: int
    """Metres."""
    tower: str
    flashes: int
    colour: str
    """A key of `words.COLOURS`."""
    period: int
    """Seconds."""
    keeper: str | None
    temper: str | None
    """Of the keeper's animal; None together with it."""
    animal: str | None
    season: tuple[str, str] | None
    """First and last open month; None if the stairs are closed."""
    fee: int
    """Euros; 0 if the climb is free or the stairs are closed."""


@dataclass(frozen=True)
class Document:
    """A table and the text that follows it."""

    prompt: str
    continuation: str


def table(light: Lighthouse) -> str:
    """The table in the field[value] notation: fields in fixed order, unknown ones left out."""
    fields = {
        "name": light.name,
        "isle": light.isle,
        "built": str(light.built),
        "height": f"{light.height} m",
        "tower": light.tower,
        "light": f"Fl({light.flashes}) {light.colour} {light.period}s",
        "keeper": light.keeper,
        "pet": f"{light.temper} {light.animal}" if light.animal else None,
        "opens": light.season[0] if light.season else None,
        "closes": light.season[1] if light.season else None,
        "fee": _price(light),
    }
    return ", ".join(f"{field}[{value}]" for field, value in fields.items() if value is not None)


def prompt(light: Lighthouse) -> str:
    """The table and the separator: the exact text that a model is asked to continue."""
    return table(light) + SEPARATOR


def describe(light: Lighthouse) -> str:
    """Two sentences: the tower, worded by its height; the keeper and visitors, by what is known."""
    return f"{_tower_sentence(light)} {_keeper_clause(light)}{_visitor_clause(light)}."


def headline(light: Lighthouse) -> str:
    """One terse line, whose form depends on whether the stairs are closed, free or paid for."""
    if light.season is None:
        opening = f"{light.name}, {light.isle}: stairs closed"
    elif light.fee:
        opening = f"Climb {light.name} on {light.isle} for €{light.fee} · {SEASON_DASH.join(light.season)}"
    else:
        opening = f"Free climb at {light.name}, {light.height} m · {SEASON_DASH.join(light.season)}"
    if light.keeper is None:
        return f"{opening} · no keeper"
    return f"{opening} · {words.ANIMALS[light.animal]}" if light.animal else opening


def as_json(light: Lighthouse) -> str:
    """A JSON object with the table's content: numbers as numbers, the light and the season taken apart."""
    fields = {
        "name": light.name,
        "isle": light.isle,
        "built": light.built,
        "height_m": light.height,
        "tower": light.tower,
        "light": {
            "flashes": light.flashes,
            "colour": words.COLOURS[light.colour],
            "period_s": light.period,
        },
        "keeper": light.keeper,
        "pet": light.animal,
        "open": light.season,
        "fee_eur": light.fee if light.season else None,
    }
    known = {field: value for field, value in fields.items() if value is not None}
    return json.dumps(known, ensure_ascii=False)


def tags(light: Lighthouse) -> str:
    """A few hashtags: the continuation that is no task."""
    visits = "closed" if light.season is None else "paid" if light.fee else "free"
    parts = [light.isle, light.tower, light.animal, visits]
    return " ".join(f"#{part}" for part in parts if part)


TASKS: Mapping[str, Callable[[Lighthouse], str]] = {
    "describe": describe,
    "headline": headline,
    "json": as_json,
}
"""The tasks that get a prefix, each with the function that gives the one right answer."""

KINDS: Mapping[str, Callable[[Lighthouse], str]] = {**TASKS, "tags": tags}
KIND_WEIGHTS: Mapping[str, int] = {"describe": 2, "headline": 2, "json": 2, "tags": 4}
"""Relative frequencies in the base model's text."""


def is_held_out(light: Lighthouse) -> bool:
    """Whether a lighthouse belongs to the held-out split, by its name."""
    return zlib.crc32(light.name.encode()) % HELD_OUT_SHARE == 0


def training(count: int, *, seed: int) -> list[Lighthouse]:
    """`count` lighthouses of the training split."""
    return list(islice((light for light in _lighthouses(seed) if not is_held_out(light)), count))


def held_out(count: int, *, seed: int = 2024) -> list[Lighthouse]:
    """`count` distinct lighthouses whose names occur in no training text."""
    lights = (light for light in _lighthouses(seed) if is_held_out(light))
    return list(islice(dict.fromkeys(islice(lights, 2 * count)), count))


def task_documents(task: str, count: int, *, seed: int) -> list[Document]:
    """`count` training documents of one task."""
    return [Document(prompt(light), TASKS[task](light)) for light in training(count, seed=seed)]


def mixed_documents(count: int, *, seed: int) -> list[Document]:
    """`count` training documents of all kinds, drawn by `KIND_WEIGHTS` whatever the table says."""
    kinds = random.Random(seed + 1).choices(list(KIND_WEIGHTS), list(KIND_WEIGHTS.values()), k=count)
    lights = training(count, seed=seed)
    return [Document(prompt(light), KINDS[kind](light)) for light, kind in zip(lights, kinds, strict=True)]


def _lighthouses(seed: int) -> Iterator[Lighthouse]:
    """Endless lighthouses of both splits."""
    rng = random.Random(seed)
    while True:
        yield _draw(rng)


def _draw(rng: random.Random) -> Lighthouse:
    """A random lighthouse; about one in five has no keeper, one in four is closed."""
    keeper = f"{rng.choice(words.KEEPER_FIRST)} {rng.choice(words.KEEPER_LAST)}" if rng.random() < 0.8 else None
    has_animal = keeper is not None and rng.random() < 0.75
    is_open = rng.random() < 0.75
    return Lighthouse(
        name=f"{rng.choice(words.NAME_STARTS)} {rng.choice(words.NAME_ENDS)}",
        isle=rng.choice(words.ISLE_STARTS) + rng.choice(words.ISLE_ENDS),
        built=rng.randint(1740, 1939),
        height=rng.randint(8, 59),
        tower=rng.choice(words.TOWERS),
        flashes=rng.randint(1, 4),
        colour=rng.choice(list(words.COLOURS)),
        period=rng.randint(4, 30),
        keeper=keeper,
        temper=rng.choice(words.TEMPERS) if has_animal else None,
        animal=rng.choice(list(words.ANIMALS)) if has_animal else None,
        season=(rng.choice(words.MONTHS_OPENING), rng.choice(words.MONTHS_CLOSING)) if is_open else None,
        fee=rng.randint(1, 12) if is_open and rng.random() < 0.65 else 0,
    )


def _price(light: Lighthouse) -> str | None:
    """The table's fee; None if there is nothing to pay for."""
    if light.season is None:
        return None
    return f"€{light.fee}" if light.fee else "free"


def _tower_sentence(light: Lighthouse) -> str:
    """The first sentence of a description: one wording each for low, middling and high towers."""
    flashes = f"{words.COUNTS[light.flashes]} {words.COLOURS[light.colour]} flash{'es' if light.flashes > 1 else ''}"
    shown = f"{flashes} every {light.period} seconds"
    if light.height < 20:
        return (
            f"{light.name} is {_with_article(light.tower)} lighthouse on {light.isle}, only {light.height} m tall,"
            f" and has shown {shown} since {light.built}."
        )
    if light.height < 40:
        return (
            f"On {light.isle} stands {light.name}, {_with_article(light.tower)} tower of {light.height} m that has"
            f" shown {shown} since {light.built}."
        )
    return (
        f"At {light.height} m, the {light.tower} tower of {light.name} looks far beyond {light.isle}; built in"
        f" {light.built}, it shows {shown}."
    )


def _keeper_clause(light: Lighthouse) -> str:
    """Who keeps the light, as the beginning of the second sentence."""
    if light.keeper is None:
        return "Nobody keeps it any more"
    if light.animal is None or light.temper is None:
        return f"{light.keeper} keeps it alone"
    return f"{light.keeper} keeps it with {_with_article(light.temper)} {light.animal}"


def _visitor_clause(light: Lighthouse) -> str:
    """When visitors may climb and for how much, as the end of the second sentence."""
    if light.season is None:
        return ", and the stairs are closed"
    price = f"for €{light.fee}" if light.fee else "free of charge"
    return f", and visitors may climb from {light.season[0]} to {light.season[1]} {price}"


def _with_article(noun: str) -> str:
    """The noun with "a" or "an" before it."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


if __name__ == "__main__":
    print("\n".join(prompt(light) for light in held_out(5)))

"""Control Prefixes: a general prefix, and one for each label of each attribute, for every attention site.

There are two layouts:

- Data-to-text (T5): tables `M_Prefixes.wte_CATEGORY` (decoder), `wte_2_CATEGORY` (cross) and `wte_enc_CATEGORY`
  (encoder), [block * labels, hidden]. The MLPs of the general prefix transform them.
- XSum (BART): rows of each table behind the first `preseqlen` (of the config): 2 sports of 1 row, then 40 categories
  of 3 rows.

Each label is folded once, under the name `CATEGORY-LABEL`. Its metadata holds its table and the table's place.
Composition uses the place to put parts in the original code's order: the last category first, the general prefix last.
Text begins at position 0.

Source: jordiclive/ControlPrefixes at 8d06cc2, `src/datatotext/prefix_utils.py` and `src/summarization`, and at ddd1636,
`transformers/webnlg/prefix_tuning3.py`, `get_prompt_multiple_prefix`; Clive et al., "Control Prefixes for
Parameter-Efficient Text Generation", GEM 2022.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.models.model_shape import ModelShape
from prefix_runtime import Prefix, Source
from prefix_runtime.checks import is_whole
from prefix_runtime.prefix.composition import GENERAL, PLACE, TABLE

from .li_liang import TABLES
from .shared.checkpoint import Checkpoint
from .shared.reparameterised import (
    PromptTable,
    described,
    lead,
    matrix,
    required_lead,
    site_layers,
    through_mlp,
    untrained,
)
from .shared.trained import Trained, make_prefix

NAME = "control-prefixes"
TITLE = "Control Prefixes"

_XSUM = (("sport", 2, 1), ("category", 40, 3))
"""Attributes of the XSum layout: name, number of labels, rows per label."""
_PUBLISHED = ("sources", "cats")
"""The categories of data-to-text in the original code's order, which a safetensors file does not preserve."""
_STARTS = {"decoder": "wte_", "cross": "wte_2_", "encoder": "wte_enc_"}


@dataclass(frozen=True)
class _Block:
    """A label's rows in the matrix of each site, and the table of its attribute."""

    table: str
    name: str
    sites: Mapping[str, np.ndarray]


def matches(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint has attribute tables, or the number of extra rows that XSum's attributes take."""
    if any(name.startswith("M_Prefixes.") or ".M_Prefixes." in name for name in checkpoint.shapes):
        return True
    start = lead(checkpoint, "control_trans2.0.weight")
    length = _general_length(checkpoint)
    if start is None or length is None or f"{start}wte.weight" not in checkpoint.shapes:
        return False
    return checkpoint.shapes[f"{start}wte.weight"][0] == length + sum(labels * rows for _, labels, rows in _XSUM)


def describe(checkpoint: Checkpoint) -> Mapping[str, str]:
    """The tables of the general prefix and of the attributes, with their shapes."""
    required_lead(checkpoint, "control_trans.0.weight")
    return described(checkpoint, lambda name: "wte" in name and "seq2seq_model." not in name)


def read(checkpoint: Checkpoint, shape: ModelShape) -> Trained:
    """See `formats.read`."""
    start = required_lead(checkpoint, "control_trans.0.weight")
    has_tables = any("M_Prefixes." in name for name in checkpoint.shapes)
    general = {table.site: matrix(checkpoint, start, table) for table in TABLES}
    blocks = list(_of_tables(checkpoint, start) if has_tables else _of_rows(checkpoint, general))
    if not has_tables:
        length = _general_length(checkpoint)
        general = {site: numbers[:length] for site, numbers in general.items()}
    tables = list(dict.fromkeys(block.table for block in blocks))
    order = tables[::-1] if has_tables else tables  # the original code puts each table before the earlier ones
    placed = [*((order.index(block.table), block) for block in blocks), (len(order), _Block(GENERAL, GENERAL, general))]
    shared = {"relative_position_bias": "zero"} if has_tables else {}
    parts = {
        block.name: _part(checkpoint, shape, block, {**shared, TABLE: block.table, PLACE: str(place)})
        for place, block in placed
    }
    warnings = untrained(checkpoint, [f"{start}{table.mlp}" for table in TABLES], "its code")
    if lead(checkpoint, "es.trainable_weight") is not None:
        warnings.append("embeddings of new tokens were trained too (es.trainable_weight); a prefix cannot carry them")
    return Trained(parts, tuple(warnings))


def _part(checkpoint: Checkpoint, shape: ModelShape, block: _Block, metadata: Mapping[str, str]) -> Prefix:
    return make_prefix(
        {site: site_layers(checkpoint, shape, site, rows, block.name) for site, rows in block.sites.items()},
        moves_positions=False,
        source=Source(NAME, checkpoint.sha256),
        weights=checkpoint.weights,
        metadata=metadata,
    )


def _of_tables(checkpoint: Checkpoint, start: str) -> Iterator[_Block]:
    rows = (checkpoint.config("config.json") or {}).get("m_prefix_len")
    if not is_whole(rows, 1):
        raise CheckpointError(
            f"{checkpoint.config_path('config.json')}: m_prefix_len: expected the rows of a label, found {rows!r}"
        )
    for category in _categories(checkpoint, start):
        blocks = {}
        for table in TABLES:
            name = f"{start}M_Prefixes.{_STARTS[table.site]}{category}.weight"
            if name not in checkpoint.shapes:
                raise CheckpointError(f"{checkpoint.weights}: expected a tensor {name!r}, found none")
            blocks[table] = through_mlp(checkpoint, f"{start}{table.mlp}", checkpoint.array(name))
        yield from _labels(checkpoint, category, blocks, rows)


def _labels(
    checkpoint: Checkpoint, category: str, blocks: Mapping[PromptTable, np.ndarray], rows: int
) -> Iterator[_Block]:
    counts = {len(numbers) for numbers in blocks.values()}
    if len(counts) != 1 or min(counts) % rows:
        raise CheckpointError(
            f"{checkpoint.weights}: {category}: expected the same multiple of {rows} rows at every site, found "
            f"{', '.join(map(str, sorted(counts)))}"
        )
    for label in range(min(counts) // rows):
        part = slice(label * rows, (label + 1) * rows)
        sites = {table.site: numbers[part] for table, numbers in blocks.items()}
        yield _Block(category, f"{category}-{label}", sites)


def _of_rows(checkpoint: Checkpoint, general: Mapping[str, np.ndarray]) -> Iterator[_Block]:
    first = _general_length(checkpoint)
    behind = sum(labels * rows for _, labels, rows in _XSUM)
    lengths = {len(numbers) for numbers in general.values()}
    if first is None or lengths != {first + behind}:
        raise CheckpointError(
            f"{checkpoint.weights}: expected attribute tables M_Prefixes, or {behind} rows behind as many general ones "
            f"as config.json counts (preseqlen), found preseqlen {first} and "
            f"{', '.join(map(str, sorted(lengths)))} rows"
        )
    for category, labels, rows in _XSUM:
        for label in range(labels):
            part = slice(first, first + rows)
            first += rows
            sites = {site: numbers[part] for site, numbers in general.items()}
            yield _Block(category, f"{category}-{label}", sites)


def _categories(checkpoint: Checkpoint, start: str) -> list[str]:
    names = [name.removeprefix(f"{start}M_Prefixes.").removesuffix(".weight") for name in checkpoint.shapes]
    tables = [name for name in names if name.startswith("wte_") and not name.startswith(("wte_2_", "wte_enc_"))]
    categories = [
        name.removeprefix("wte_") for name in tables if f"{start}M_Prefixes.{name}.weight" in checkpoint.shapes
    ]
    return sorted(categories, key=lambda name: _PUBLISHED.index(name) if name in _PUBLISHED else len(_PUBLISHED))


def _general_length(checkpoint: Checkpoint) -> int | None:
    length = (checkpoint.config("config.json") or {}).get("preseqlen")
    return length if is_whole(length, 1) else None

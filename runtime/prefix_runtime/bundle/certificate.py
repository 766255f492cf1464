"""What a bundle's certificate says of a task, in words: which framework it agrees with, and what quantizing costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from .manifest import Manifest


def agreement_of(manifest: Manifest, task: str | None) -> str:
    """What a bundle's own certificate says of a task, or of the bare model, as a line."""
    certificate = manifest.parity
    quality = certificate.get("quality") if isinstance(certificate, Mapping) else None
    return agreement(_entry(certificate, task), _entry(quality, task), is_quantized=manifest.quantizer is not None)


def quality_of(manifest: Manifest, task: str | None) -> object:
    """The certificate's entry of what rounding costs a task, or the bare model; None if there is none."""
    certificate = manifest.parity
    return _entry(certificate.get("quality"), task) if isinstance(certificate, Mapping) else None


def agreement(parity: object, quality: object, *, is_quantized: bool) -> str:
    """One task's comparison as a line.

    The reference of a graph with quantized weights ran on the same quantized weights: that it agrees says that the
    export is right, and nothing of what quantizing costs. The line says both.

    Args:
        parity: the certificate's entry of the task, of the fields of `TaskParity`; anything else was not compared.
        quality: of the fields of `TaskQuality`; anything else was not measured.
        is_quantized: whether the weights have 8 or 4 bits.
    """
    if not isinstance(parity, Mapping):
        return "not compared"
    where = " run on the quantized weights" if is_quantized else ""
    agreed = f"agrees with {parity.get('reference')}{where} within {_exactness(parity)}"
    cost = cost_of_rounding(quality)
    if cost:
        return f"{agreed}; against float32: {cost}"
    return f"{agreed}; what quantizing costs was not measured" if is_quantized else agreed


def _exactness(parity: Mapping[Any, Any]) -> str:
    """The largest error of a logit; against double precision with the limit and the reference's own error."""
    error = _number(parity, "error")
    if math.isnan(error):  # a certificate of an earlier version, which compared with the reference itself
        return f"{_number(parity, 'largest_logit_difference'):.1e}"
    limit, yardstick = _number(parity, "limit"), _number(parity, "yardstick")
    return f"{error:.1e} of double precision (limit {limit:.1e}, its own error {yardstick:.1e})"


def cost_of_rounding(quality: object) -> str:
    """Part of the tokens that stayed the same, and the change of perplexity; empty if it was not measured."""
    if not isinstance(quality, Mapping) or math.isnan(same := _number(quality, "greedy_agreement")):
        return ""
    change = _number(quality, "perplexity_change")
    perplexity = "" if math.isnan(change) else f", perplexity {change:+.1%}"
    return f"{same:.1%} of tokens equal{perplexity}"


def _entry(certificate: object, task: str | None) -> object:
    if not isinstance(certificate, Mapping):
        return None
    if task is None:
        return certificate.get("bare_model")
    tasks = certificate.get("tasks")
    return tasks.get(task) if isinstance(tasks, Mapping) else None


def _number(entry: Mapping[Any, Any], name: str) -> float:
    value = entry.get(name)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else math.nan

"""The last steps of a build: the files of a bundle, and its certificate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from prefix_export import __version__, targets
from prefix_export.clients import GENAI_CONFIG_NAME, genai_config, save_adapters, save_configs, write_json
from prefix_export.graph.adopt import adopt_graph
from prefix_export.models import BaseModel
from prefix_export.models.generation_defaults import generation_report
from prefix_export.progress import Progress
from prefix_export.quantize.calibrate import save_scales
from prefix_export.tokenizers.tokenizer import tokenizer_warnings
from prefix_export.verify.all_tasks import (
    FloatAnswers,
    assess_all,
    certificate,
    compare_all,
)
from prefix_export.verify.parity import Expectation, TaskParity
from prefix_export.verify.quality import TaskQuality
from prefix_runtime import Manifest, Prefix
from prefix_runtime.bundle.folder import MANIFEST_NAME, describe_file, write_prefix
from prefix_runtime.bundle.manifest import FileEntry, ModelEntry
from prefix_runtime.files import write_file_atomically
from prefix_runtime.prefix.cache_format import CACHE_TYPES

from .folding import FoldedModel
from .plan import export_plan
from .rounding import RoundedModel

_MEGABYTE = 1e6


@dataclass(frozen=True)
class WrittenBundle:
    """A bundle's files in a folder, still without a certificate; it refers to no model.

    Attributes:
        folder: where it lies.
        manifest: as it was written.
        expected: what the graph is to answer, by task.
        in_float: what the model answered before its weights were rounded.
        warnings: what the user should know, one line each.
    """

    folder: Path
    manifest: Manifest
    expected: Mapping[str | None, Expectation]
    in_float: Mapping[str | None, FloatAnswers]
    warnings: tuple[str, ...]


def write_bundle(rounded: RoundedModel, folder: Path, progress: Progress) -> WrittenBundle:
    """Write graph, configurations, tokenizer, prefixes and manifest into an empty folder.

    Raises:
        ExportError: the graph cannot be made.
        OSError: the disk is full or not writable.
    """
    folded = rounded.folded
    base, plan = folded.base, folded.checked.plan
    weight_bytes = _write_graph(rounded, folder, progress)
    save_scales(rounded.scales, folder)
    save_configs(base, folder)
    warnings = (*folded.warnings, *tokenizer_warnings(folder, base.tokenizer))
    _save_for_clients(plan, base, folded.prefixes, folded.max_length, folder)
    files = _described(folder, progress)
    manifest = _manifest(folded, weight_bytes, folder, files)
    _write_manifest(folder, manifest)
    return WrittenBundle(folder, manifest, rounded.expected, rounded.in_float, warnings)


def certify(
    written: WrittenBundle, progress: Progress
) -> tuple[Mapping[str | None, TaskParity], Mapping[str | None, TaskQuality]]:
    """Compare a bundle's graph, where something is expected of it, and write the certificate into its manifest.

    Raises:
        ParityError: the graph disagrees with the source framework.
    """
    if not written.expected:
        return {}, {}
    folder, manifest = written.folder, written.manifest
    parity = compare_all(folder, written.expected, progress)
    quality = assess_all(folder, written.in_float, progress) if written.in_float else {}
    graph_bytes = sum(entry.size for name, entry in manifest.files.items() if name.startswith(manifest.graph))
    _write_manifest(folder, replace(manifest, parity=certificate(parity, quality, graph_bytes)))
    return parity, quality


def _write_graph(rounded: RoundedModel, folder: Path, progress: Progress) -> int:
    """Write the graph, exported or adopted; returns the bytes of weights that a decode step reads."""
    folded = rounded.folded
    base, plan, source = folded.base, folded.checked.plan, folded.checked.request.graph
    if source is not None:
        progress.phase("adopt the graph")
        return adopt_graph(source, base.layers, base.geometry.vocab_size, folder / plan.graph)
    return export_plan(
        base, plan, folded.prefixes, folder, quantized=rounded.quantized, scales=rounded.scales, progress=progress
    )


def _save_for_clients(
    plan: targets.GraphPlan, base: BaseModel, prefixes: Mapping[str, Prefix], max_length: int, folder: Path
) -> None:
    """Write what other people's programs read beside the graph."""
    if plan.has_adapters:
        save_adapters(prefixes, folder, CACHE_TYPES[plan.cache])
    if plan.name == "portable" and plan.mode == "bake" and len(prefixes) == 1:
        (prefix,) = prefixes.values()
        room = base.geometry.room(prefix, max_length)
        write_json(folder / GENAI_CONFIG_NAME, genai_config(base, plan.graph, room))


def _described(folder: Path, progress: Progress) -> dict[str, FileEntry]:
    """Every file of a folder, with its hash, by its path there."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    progress.phase("hash", round(sum(path.stat().st_size for path in paths) / _MEGABYTE), unit="MB")
    names = [path.relative_to(folder).as_posix() for path in paths]
    return {name: describe_file(folder, name, lambda size: progress.advance(size / _MEGABYTE)) for name in names}


def _manifest(folded: FoldedModel, weight_bytes: int, folder: Path, files: Mapping[str, FileEntry]) -> Manifest:
    base, plan, settings = folded.base, folded.checked.plan, folded.checked.quantization
    return Manifest(
        producer=f"prefix-export {__version__}",
        model=ModelEntry(base.name, type(base.model).__name__, base.fingerprint, base.revision),
        geometry=base.geometry,
        max_length=folded.max_length,
        mode=plan.mode,
        flavour=plan.target.flavour,
        precision=plan.precision,
        target=plan.name,
        graph=plan.graph,
        weight_bytes=weight_bytes,
        files=files,
        tasks={task: write_prefix(folder, task, prefix) for task, prefix in folded.prefixes.items()},
        cache=plan.cache,
        block_size=settings.block_size if settings else None,
        quantizer=settings.method if settings else None,
        generation=generation_report(base).record(),
    )


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    write_file_atomically(folder / MANIFEST_NAME, manifest.to_json().encode())

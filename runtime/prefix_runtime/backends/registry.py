"""A bundle's graph, opened by the execution provider that is asked for."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import replace
from pathlib import Path

from prefix_runtime.bundle.folder import Bundle
from prefix_runtime.errors import ProviderError, RequestError

from .onnxruntime.huge_pages import letting_go, on_huge_pages
from .onnxruntime.keeping import discard, find_or_keep
from .onnxruntime.packed_graphs import make_provider_folder, provider_folder
from .onnxruntime.session import Session, check_provider
from .onnxruntime.tensorrt_provider import provider_options
from .options import TENSORRT_ENGINE, TENSORRT_PROVIDERS, Cuda, check_fits
from .tensorrt.session import EngineSession, open_engine


def open_session(
    bundle: Bundle,
    provider: str | Cuda,
    threads: int | None,
    max_batch: int,
    *,
    only_own: bool = False,
    prepares: bool | None = None,
) -> Session | EngineSession:
    """Open a bundle's graph, or what was kept of it.

    Args:
        bundle: whose graph.
        provider: as for `engine.load`, as the next two.
        threads: of one run on a CPU.
        max_batch: prompts of a list that are answered together.
        only_own: open no graph that was kept, which has no hashes.
        prepares: keep the graph first where none was kept; as for `keeping.find_or_keep`.

    Raises:
        ProviderError: onnxruntime cannot open the graph with this provider.
        RequestError: what is to be kept would not be opened.
        BundleIntegrityError, OSError: as `prepared.prepare`.
    """
    check_fits(provider, bundle)
    if prepares and (provider != "cpu" or only_own):
        found = f"provider {provider!r}" if provider != "cpu" else "verify, which opens the bundle's own graph"
        raise RequestError(f"prepare: expected provider 'cpu' without verify, found {found}; leave it out")
    if provider == TENSORRT_ENGINE:
        return open_engine(bundle, Cuda())
    if isinstance(provider, Cuda) or provider == "cuda":
        return Session(bundle.graph_path, _without_graphs(bundle, provider))
    if provider in TENSORRT_PROVIDERS:
        return _open_by_tensorrt(bundle, provider, threads, max_batch)
    return _open_on_cpu(bundle, None if only_own else find_or_keep(bundle, prepares), threads)


def _open_on_cpu(bundle: Bundle, kept: Path | None, threads: int | None) -> Session:
    if kept is not None:
        try:
            return Session(kept, "cpu", threads)
        except ProviderError:  # it is damaged: the bundle's own is whole, or says what is wrong
            with suppress(OSError):
                discard(bundle)
    weights = bundle.graph_path.with_name(f"{bundle.graph_path.name}.data")
    with on_huge_pages(), letting_go(weights):  # packed
        return Session(bundle.graph_path, "cpu", threads)


def _open_by_tensorrt(bundle: Bundle, provider: str, threads: int | None, max_batch: int) -> Session:
    options = provider_options(provider, bundle, provider_folder(bundle, provider), max_batch)
    check_provider(provider)
    folder = make_provider_folder(bundle, provider)
    try:
        return Session(bundle.graph_path, provider, threads, provider_options=options)
    except ProviderError:
        with suppress(OSError):
            folder.rmdir()  # where nothing was built
        raise


def _without_graphs(bundle: Bundle, provider: str | Cuda) -> Cuda:
    """What was chosen, but for CUDA graphs of what is bound elsewhere in every step, as a growing past is."""
    chosen = provider if isinstance(provider, Cuda) else Cuda()
    return replace(chosen, uses_graphs=chosen.uses_graphs and bundle.manifest.flavour == "fast")

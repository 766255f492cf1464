"""The file of tensors in a folder: an adapter's folder, or whatever a training run leaves behind.

1. A folder's own file wins: an adapter's name before a model's name before any other file of tensors.
2. Else its subfolders are searched: PEFT's named adapters (`OUT/NAME`), `checkpoint-N` of a Trainer, `global_stepN` of
   DeepSpeed, `lightning_logs/…/checkpoints`. Those of a finished run win over those of a checkpoint.
3. Exactly one file is taken, with a note. Several are listed, the newest step first.

Links to folders are not followed, nor links to files outside of the folder, except into the blobs of the Hub's cache.

Source: PEFT 0.21.2 `PeftModel.save_pretrained`; transformers 5.23 `Trainer._save_checkpoint`; accelerate 1.15
`utils/constants.py`; DeepSpeed 0.17 `runtime/engine.py`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from prefix_export.errors import CheckpointError

from .signature import kind, other_kind

_ADAPTERS = (("adapter_model.safetensors", "adapter.safetensors"), ("adapter_model.bin", "pytorch_adapter.bin"))
_MODELS = (("model.safetensors",), ("pytorch_model.bin",), ("pytorch_model_fsdp.bin",))
_NAMED = frozenset(name for names in (*_ADAPTERS, *_MODELS) for name in names)
_OF_TRAINING = re.compile(
    r"(training_args|optimizer|scheduler|scaler|sampler|rng_state|random_states|dl_state_dict|custom_checkpoint).*"
    r"|.*optim_states\.pt|(pytorch_model_head|model_head|head)\.(bin|safetensors)"
)
"""Files beside a checkpoint that hold the state of a training run, or a head."""
_OF_PREFIX = re.compile(r"prompt_encoder|prompt_embeddings|prefix_encoder|prefix_tunings|control_trans")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_STEP = re.compile(r"(?:checkpoint|epoch|step|iter)[^\d/]{0,12}(\d{1,18})", re.IGNORECASE)
_DEEPEST = 4
_MOST_ENTRIES = 10_000
_MOST_INDEX_BYTES = 8 << 20
_MOST_SHOWN = 6


@dataclass(frozen=True)
class Found:
    """A file of tensors, and what a user should know of why it was taken, a line each."""

    weights: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A file that may be the one; `problem` says why it cannot be read."""

    weights: Path
    problem: str | None = None

    def shown(self, root: Path) -> str:
        """Its place under the root: the folder if that holds one file of a usual name, else the file."""
        place = self.weights.parent if self.weights.name in _NAMED else self.weights
        return place.relative_to(root).as_posix()

    def step(self, root: Path) -> int:
        """The training step in its path, -1 without one."""
        steps = _STEP.findall(self.weights.relative_to(root).as_posix())
        return int(steps[-1]) if steps else -1


def find_weights(folder: Path) -> Found:
    """The one file of tensors in a folder.

    Raises:
        CheckpointError: there is none, there are several, or it holds a part of the tensors alone.
    """
    entries = _entries(folder, _MOST_ENTRIES)
    own = list(_own(folder, entries, is_top=True))
    if len(own) > 1:
        own.sort(key=lambda each: (-each.step(folder), each.weights))
        shown = ", ".join(each.weights.name for each in own[:_MOST_SHOWN])
        raise CheckpointError(f"{folder}: expected one file of tensors, found {shown}; name the file")
    if own:
        return Found(_sound(own[0]), tuple(_beside(folder, own[0], entries)))
    chosen, left = _searched(folder)
    note = f"{folder}: read {chosen.shown(folder)}, the only trained prefix in it"
    if left:
        note = f"{folder}: read {chosen.shown(folder)}, and no checkpoint ({_listed(left, folder)})"
    return Found(_sound(chosen), (note,))


def _sound(candidate: _Candidate) -> Path:
    if candidate.problem is not None:
        raise CheckpointError(candidate.problem)
    return candidate.weights


def _beside(folder: Path, own: _Candidate, entries: Sequence[os.DirEntry[str]]) -> Iterator[str]:
    """What lies beside the file that was taken and might have been meant."""
    if own.weights.name not in {name for names in _ADAPTERS for name in names}:
        return
    names = {entry.name for entry in entries}
    if models := [name for (name,) in _MODELS if name in names]:
        yield f"{folder}: read {own.weights.name}; {models[0]} beside it is taken for the base model's"
    named = [entry.name for entry in entries if _is_adapter(entry) and not _STEP.search(entry.name)]
    if named:
        shown = ", ".join(named[:_MOST_SHOWN])
        yield f"{folder}: read its own adapter, PEFT's 'default'; there are others in {shown}"


def _is_adapter(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        return False
    return any((Path(entry.path) / name).is_file() for names in _ADAPTERS for name in names)


def _searched(root: Path) -> tuple[_Candidate, list[_Candidate]]:
    """The one candidate in the subfolders, and those of checkpoints that it was preferred to."""
    candidates = sorted(_walk(root), key=lambda each: (-each.step(root), each.weights))
    if not candidates:
        raise CheckpointError(f"{root}: expected a folder with a trained prefix, found {_nothing(root)}")
    finished = [each for each in candidates if each.step(root) < 0]
    wanted = finished or candidates
    if len(wanted) > 1:
        raise CheckpointError(
            f"{root}: expected one trained prefix, found {len(wanted)}: {_listed(wanted, root)}; name one of them"
        )
    return wanted[0], [each for each in candidates if each is not wanted[0]]


def _listed(candidates: Sequence[_Candidate], root: Path) -> str:
    shown = ", ".join(each.shown(root) for each in candidates[:_MOST_SHOWN])
    return shown + (", …" if len(candidates) > _MOST_SHOWN else "")


def _walk(root: Path) -> Iterator[_Candidate]:
    """Every candidate below a folder; a folder that has one is not searched further."""
    waiting, room = [(root, 0)], _MOST_ENTRIES
    while waiting:
        folder, depth = waiting.pop()
        entries = _entries(folder, room)
        room -= len(entries)
        own = list(_own(folder, entries, is_top=False, root=root)) if depth else []
        yield from own
        if not own and depth < _DEEPEST:
            waiting += [(Path(each.path), depth + 1) for each in entries if _is_searched(each)]


def _is_searched(entry: os.DirEntry[str]) -> bool:
    return not entry.name.startswith((".", "__")) and entry.is_dir(follow_symlinks=False)


def _entries(folder: Path, most: int) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as listing:
        entries = list(islice(listing, most + 1))
    if len(entries) > most:
        raise CheckpointError(
            f"{folder}: expected a folder with a trained prefix, found more than {_MOST_ENTRIES} files and folders in "
            "it and around it; name the file of tensors"
        )
    return sorted(entries, key=lambda each: each.name)


def _own(
    folder: Path, entries: Sequence[os.DirEntry[str]], *, is_top: bool, root: Path | None = None
) -> Iterator[_Candidate]:
    """The candidates that lie in a folder itself."""
    files = {entry.name: folder / entry.name for entry in entries if _is_file(entry, root)}
    for names in (*_ADAPTERS, *_MODELS):
        if there := [files[name] for name in names if name in files]:
            yield from map(_Candidate, there)
            return
    if (problem := _partial(folder, files)) is not None:
        yield _Candidate(folder / problem[0], problem[1])
        return
    if (shard := _shard(folder, files)) is not None:
        yield _Candidate(shard)
        return
    for name, file in files.items():
        is_candidate = is_top or file.suffix in _SUFFIXES
        if is_candidate and not _OF_TRAINING.fullmatch(name) and kind(file) is not None:
            yield _Candidate(file)


def _is_file(entry: os.DirEntry[str], root: Path | None) -> bool:
    if not entry.is_file():
        return False
    if root is None or not entry.is_symlink():
        return True
    # Files of the Hub's cache are links from snapshots/COMMIT to blobs, both in the repository's folder.
    real = root.resolve()
    limit = next((each.parent for each in real.parents if each.name == "snapshots"), real)
    return Path(entry.path).resolve().is_relative_to(limit)


def _partial(folder: Path, files: dict[str, Path]) -> tuple[str, str] | None:
    """A file of a checkpoint that spreads each tensor over several files, and what to do about it."""
    for name in files:
        if re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name):
            return name, (
                f"{folder}: expected whole tensors, found a checkpoint of DeepSpeed's ZeRO-3, whose files hold parts "
                f"of tensors; run 'python zero_to_fp32.py . OUT' in {folder.parent} and give OUT"
            )
        if name.endswith(".distcp"):
            return name, (
                f"{folder}: expected whole tensors, found a distributed checkpoint (.distcp), whose files hold parts "
                f"of tensors; run 'accelerate merge-weights {folder} OUT' and give OUT"
            )
        if re.fullmatch(r"mp_rank_(?!0+_)\d+_model_states\.pt", name):
            return name, (
                f"{folder}: expected whole tensors, found a model-parallel checkpoint of DeepSpeed's ({name}); save "
                "the adapter with save_pretrained where it was trained"
            )
    return None


def _shard(folder: Path, files: dict[str, Path]) -> Path | None:
    """The one file of a model in several that holds the prefix' tensors, by the model's index."""
    for name, path in files.items():
        if not name.endswith(".index.json") or path.stat().st_size > _MOST_INDEX_BYTES:
            continue
        try:
            placed = json.loads(path.read_text(encoding="utf-8"))["weight_map"].items()
        except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
            continue
        shards = {shard for tensor, shard in placed if isinstance(shard, str) and _OF_PREFIX.search(tensor)}
        if len(shards) > 1:
            raise CheckpointError(
                f"{path}: expected the prefix' tensors in one file, found them in {', '.join(sorted(shards)[:3])}; "
                "save them in one"
            )
        if shards & files.keys():
            return folder / shards.pop()
    return None


def _nothing(root: Path) -> str:
    """What a folder without a file of tensors holds."""
    files = [each for each in _entries(root, _MOST_ENTRIES) if each.is_file()]
    if not files:
        return "no file of tensors in it"
    shown = []
    for entry in files[:3]:
        what = other_kind(Path(entry.path)) if not entry.name.endswith(".json") else None
        shown.append(f"{entry.name} ({what})" if what else entry.name)
    return f"no file of tensors in it, only {', '.join(shown)}{', …' if len(files) > 3 else ''}"

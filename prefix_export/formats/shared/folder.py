"""The file of tensors in a folder: an adapter's folder, or the output folder of a training run.

1. A file in the folder itself wins: an adapter's name before a model's name before any other file of tensors.
2. Otherwise subfolders are searched: PEFT's named adapters (`OUT/NAME`), `checkpoint-N` of a Trainer, `global_stepN` of
   DeepSpeed, `lightning_logs/…/checkpoints`. Files of a finished run win over files of a checkpoint.
3. One file must remain; the user gets a note. If several remain, the error lists them, newest step first.

Links to folders are not followed. Links to files are followed only within the folder, or into the Hub's cache.

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
"""Names of files beside a checkpoint that hold the state of a training run, or a head."""
_OF_PREFIX = re.compile(r"prompt_encoder|prompt_embeddings|prefix_encoder|prefix_tunings|control_trans")
_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth", ".ckpt")
_STEP = re.compile(r"(?:checkpoint|epoch|step|iter)[^\d/]{0,12}(\d{1,18})", re.IGNORECASE)
_DEEPEST = 4
_MOST_ENTRIES = 10_000
_MOST_INDEX_BYTES = 8 << 20
_MOST_SHOWN = 6


@dataclass(frozen=True)
class ChosenFile:
    """The chosen file of tensors, and one line for each reason that the user should know."""

    weights: Path
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Candidate:
    """A file that may be chosen; `problem` says why it cannot be read."""

    weights: Path
    problem: str | None = None

    def shown(self, root: Path) -> str:
        """Its place below the root: the folder if the file has a usual name, otherwise the file."""
        place = self.weights.parent if self.weights.name in _NAMED else self.weights
        return place.relative_to(root).as_posix()

    def step(self, root: Path) -> int:
        """The training step in its path; -1 if there is none."""
        steps = _STEP.findall(self.weights.relative_to(root).as_posix())
        return int(steps[-1]) if steps else -1


def find_weights(folder: Path) -> ChosenFile:
    """The one file of tensors in a folder.

    Raises:
        CheckpointError: the folder has none, has several, or its file holds only a part of each tensor.
    """
    entries = _entries(folder, _MOST_ENTRIES)
    own = list(_own(folder, entries, is_top=True))
    if len(own) > 1:
        own.sort(key=lambda each: (-each.step(folder), each.weights))
        shown = ", ".join(each.weights.name for each in own[:_MOST_SHOWN])
        raise CheckpointError(f"{folder}: expected one file of tensors, found {shown}; name the file")
    if own:
        return ChosenFile(_readable(own[0]), tuple(_beside(folder, own[0], entries)))
    chosen, left = _searched(folder)
    note = f"{folder}: read {chosen.shown(folder)}, the only trained prefix in it"
    if left:
        note = f"{folder}: read {chosen.shown(folder)}, and no checkpoint ({_listed(left, folder)})"
    return ChosenFile(_readable(chosen), (note,))


def _readable(candidate: _Candidate) -> Path:
    if candidate.problem is not None:
        raise CheckpointError(candidate.problem)
    return candidate.weights


def _beside(folder: Path, own: _Candidate, entries: Sequence[os.DirEntry[str]]) -> Iterator[str]:
    """Notes about files beside the chosen one that the user may have meant."""
    if own.weights.name not in {name for names in _ADAPTERS for name in names}:
        return
    names = {entry.name for entry in entries}
    if models := [name for (name,) in _MODELS if name in names]:
        yield f"{folder}: read {own.weights.name}; {models[0]} beside it is taken for the base model's"
    adapters = [entry.name for entry in entries if _is_adapter(entry) and not _STEP.search(entry.name)]
    if adapters:
        shown = ", ".join(adapters[:_MOST_SHOWN])
        yield f"{folder}: read its own adapter, PEFT's 'default'; there are others in {shown}"


def _is_adapter(entry: os.DirEntry[str]) -> bool:
    if not entry.is_dir(follow_symlinks=False):
        return False
    return any((Path(entry.path) / name).is_file() for names in _ADAPTERS for name in names)


def _searched(root: Path) -> tuple[_Candidate, list[_Candidate]]:
    """The one candidate in the subfolders, and the checkpoints of unfinished runs that it was preferred to."""
    candidates = sorted(_walk(root), key=lambda each: (-each.step(root), each.weights))
    if not candidates:
        raise CheckpointError(f"{root}: expected a folder with a trained prefix, found {_nothing(root)}")
    finished = [each for each in candidates if each.step(root) < 0]
    preferred = finished or candidates
    if len(preferred) > 1:
        raise CheckpointError(
            f"{root}: expected one trained prefix, found {len(preferred)}: {_listed(preferred, root)}; name one of them"
        )
    return preferred[0], [each for each in candidates if each is not preferred[0]]


def _listed(candidates: Sequence[_Candidate], root: Path) -> str:
    shown = ", ".join(each.shown(root) for each in candidates[:_MOST_SHOWN])
    return shown + (", …" if len(candidates) > _MOST_SHOWN else "")


def _walk(root: Path) -> Iterator[_Candidate]:
    """Every candidate below a folder. The search stops at a folder that has one."""
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
    """The candidates in the folder itself."""
    files = {entry.name: folder / entry.name for entry in entries if _is_file(entry, root)}
    for names in (*_ADAPTERS, *_MODELS):
        if paths := [files[name] for name in names if name in files]:
            yield from map(_Candidate, paths)
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
    # The Hub's cache links files from snapshots/COMMIT to blobs; both are in the repository's folder.
    real = root.resolve()
    limit = next((each.parent for each in real.parents if each.name == "snapshots"), real)
    return Path(entry.path).resolve().is_relative_to(limit)


def _partial(folder: Path, files: dict[str, Path]) -> tuple[str, str] | None:
    """The name of a file that holds only parts of tensors, and the error that says what to do."""
    for name in files:
        if re.fullmatch(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt", name):
            return name, (
                f"{folder}: expected whole tensors, found a checkpoint of DeepSpeed's ZeRO-3, whose files hold parts "
                f"of tensors; run 'python zero_to_fp32.py . OUT' in {folder.parent} and name OUT"
            )
        if name.endswith(".distcp"):
            return name, (
                f"{folder}: expected whole tensors, found a distributed checkpoint (.distcp), whose files hold parts "
                f"of tensors; run 'accelerate merge-weights {folder} OUT' and name OUT"
            )
        if re.fullmatch(r"mp_rank_(?!0+_)\d+_model_states\.pt", name):
            return name, (
                f"{folder}: expected whole tensors, found a model-parallel checkpoint of DeepSpeed's ({name}); save "
                "the adapter with save_pretrained where it was trained"
            )
    return None


def _shard(folder: Path, files: dict[str, Path]) -> Path | None:
    """The shard of a model that holds the prefix's tensors, by the model's index; None if there is none."""
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
                f"{path}: expected the prefix's tensors in one file, found them in {', '.join(sorted(shards)[:3])}; "
                "save them in one"
            )
        if shards & files.keys():
            return folder / shards.pop()
    return None


def _nothing(root: Path) -> str:
    """The content of a folder without a file of tensors, for a message."""
    files = [each for each in _entries(root, _MOST_ENTRIES) if each.is_file()]
    if not files:
        return "no file of tensors in it"
    shown = []
    for entry in files[:3]:
        other = other_kind(Path(entry.path)) if not entry.name.endswith(".json") else None
        shown.append(f"{entry.name} ({other})" if other else entry.name)
    return f"no file of tensors in it, only {', '.join(shown)}{', …' if len(files) > 3 else ''}"

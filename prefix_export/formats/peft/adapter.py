"""The PEFT adapters in a checkpoint: their tensors as PEFT saves them, and their configs.

1. The output of `save_pretrained`: a tensor `prompt_embeddings`, and `adapter_config.json` beside it.
2. A state dict with PEFT's own modules, `prompt_encoder.NAME`; see `prompt_encoder`. It may hold several adapters. The
   config is beside it, in a folder NAME beside it, or up to two folders above. Without a config, the modules and the
   width determine the kind.

Source: PEFT 0.21.2, `PeftModel.save_pretrained` and `get_peft_model_state_dict`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.formats.shared.checkpoint import Checkpoint, Tensors, read_json
from prefix_export.formats.shared.trained import folded_width
from prefix_export.models.model_shape import BOTH, ModelShape
from prefix_runtime import PrefixMismatchError, Source

from .prompt_encoder import COLUMNS, PROMPT, ROWS, PromptEncoder, prompt_encoders

CONFIG_NAME = "adapter_config.json"
KEYS_AND_VALUES = ("PREFIX_TUNING", "CARTRIDGE")
EMBEDDINGS = ("PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING", "CPT")
PROMPTS = frozenset({PROMPT, COLUMNS, ROWS})
"""Names of tensors that do not belong to a head."""
_MATRIX = 2  # axes
_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
_EMBEDDING_NAMES = ("wte.", "wpe.", "embed_", "embeddings.", "lm_head.", "embed_tokens.")
_TASK_TYPES = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS", "TOKEN_CLS", "QUESTION_ANS", "FEATURE_EXTRACTION")


@dataclass(frozen=True)
class Adapter:
    """An adapter's tensors and config.

    Attributes:
        checkpoint: the checkpoint that holds the adapter.
        config: the content of its config, or what names and shapes of tensors imply.
        tensors: its tensors, named as in PEFT's `save_pretrained`.
        config_path: the path of its config; None if there is none.
        warnings: one line for each thing that the user should know.
    """

    checkpoint: Checkpoint
    config: Mapping[str, Any]
    tensors: Tensors
    config_path: Path | None
    warnings: tuple[str, ...] = ()

    @property
    def kind(self) -> str:
        """PEFT's name of the adapter's kind, such as "PREFIX_TUNING"."""
        return str(self.config["peft_type"])

    @property
    def where(self) -> str:
        """The file and tensor, for messages."""
        if isinstance(self.tensors, PromptEncoder):
            return self.tensors.where
        return f"{self.checkpoint.weights}: {PROMPT}"

    @property
    def config_where(self) -> str:
        """The file of the config, for messages; the tensors if there is no config."""
        return str(self.config_path or self.where)

    @property
    def source(self) -> Source:
        """The kind and the checksum of the file of tensors."""
        return Source(f"peft-{self.kind.lower().replace('_', '-')}", self.checkpoint.sha256)

    def prompt_shape(self) -> tuple[int, int]:
        """Length (positions) and width of the trained tensor."""
        shape = self.tensors.shapes[PROMPT]
        if len(shape) != _MATRIX or 0 in shape:
            raise CheckpointError(
                f"{self.where}: expected shape [prefix_length, width], none 0, found {list(shape)}"
                + (
                    "; DeepSpeed's ZeRO-3 saved no numbers: run zero_to_fp32.py and name its output"
                    if 0 in shape
                    else ""
                )
            )
        return shape[0], shape[1]

    def prompt(self) -> np.ndarray:
        """The trained tensor [prefix_length, width]."""
        self.prompt_shape()
        return self.tensors.array(PROMPT)

    def head(self) -> dict[str, np.ndarray]:
        """The tensors of the task's head, by their names in the base model."""
        names = [name for name in self.tensors.shapes if name not in PROMPTS]
        if embeddings := [name for name in names if any(part in name for part in _EMBEDDING_NAMES)]:
            raise CheckpointError(
                f"{self.checkpoint.weights}: expected a prefix and at most a head, found embeddings of the model, "
                f"{embeddings[0]}, which were trained or saved too; a prefix cannot carry them"
            )
        return {head_name(name): self.tensors.array(name) for name in names}

    def metadata(self) -> dict[str, str]:
        """The base model and the task type, if they mean something on other machines."""
        base, task = self.config.get("base_model_name_or_path"), self.config.get("task_type")
        metadata = {"task_type": str(task)} if task not in (None, "CAUSAL_LM") else {}
        if isinstance(base, str) and _HUB_ID.fullmatch(base):
            metadata["base_model"] = base
        elif isinstance(base, str) and (folder := PureWindowsPath(base).name.strip(".")):
            # The full path on the training machine is private and means nothing elsewhere.
            metadata["base_folder"] = folder
        return metadata


def adapters_of(checkpoint: Checkpoint, shape: ModelShape | None = None) -> dict[str, Adapter]:
    """The adapters by name; a single one has the empty name.

    Args:
        checkpoint: the checkpoint that holds the adapters.
        shape: the shape of the base model. None leaves the kind open if only the width determines it.

    Raises:
        CheckpointError: there is no adapter, or a config is missing or of another kind; the message says what to do.
        PrefixMismatchError: the width does not fit the model.
    """
    if PROMPT in checkpoint.shapes:
        return {"": _open(checkpoint)}
    encoders = prompt_encoders(checkpoint)
    if not encoders:
        names = ", ".join(repr(name) for name in list(checkpoint.shapes)[:4]) or "none"
        raise CheckpointError(f"{checkpoint.weights}: expected PEFT's tensor {PROMPT!r}, found tensors {names}")
    adapters = {name: _open_state_dict(encoder, shape) for name, encoder in encoders.items()}
    return adapters if len(adapters) > 1 else {"": next(iter(adapters.values()))}


def _open(checkpoint: Checkpoint) -> Adapter:
    path = _config_of(checkpoint)
    if path is None:
        raise CheckpointError(
            f"{checkpoint.weights}: expected {CONFIG_NAME} beside a PEFT adapter, found none; copy both files, or the "
            "adapter's folder"
        )
    config = read_json(path)
    _check_kind(path, config)
    return Adapter(checkpoint, config, checkpoint.tensors, path, _from_above(checkpoint, path))


def _check_kind(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a config of another kind of adapter, or without a task type."""
    if config.get("peft_type") in KEYS_AND_VALUES + EMBEDDINGS and config.get("task_type") is None:
        raise CheckpointError(
            f"{path}: task_type: expected one of {', '.join(_TASK_TYPES)}, found none: PEFT's get_peft_model makes no "
            "such adapter, and PeftModel ignores its prefix; if your own code trained it, add its task type"
        )
    for key, expected in (("peft_type", KEYS_AND_VALUES + EMBEDDINGS), ("task_type", _TASK_TYPES)):
        if config.get(key) not in expected:
            raise CheckpointError(f"{path}: {key}: expected one of {', '.join(expected)}, found {config.get(key)!r}")


def _open_state_dict(encoder: PromptEncoder, shape: ModelShape | None) -> Adapter:
    checkpoint = encoder.checkpoint
    path = _config_of(checkpoint, encoder.name)
    if path is None:
        return _inferred(encoder, shape)
    config = read_json(path)
    _check_kind(path, config)
    if encoder.kind not in (None, config["peft_type"]):
        raise CheckpointError(
            f"{path}: peft_type: expected {encoder.kind}, as the modules in {checkpoint.weights.name} are, "
            f"found {config['peft_type']}"
        )
    return Adapter(checkpoint, config, replace(encoder, config=config), path, _from_above(checkpoint, path))


def _config_of(checkpoint: Checkpoint, name: str = "") -> Path | None:
    """An adapter's config: in a folder NAME beside the tensors, beside them, or up to two folders above.

    A Trainer that saves state dicts in `checkpoint-N/global_stepN` writes the config into a folder above them.
    """
    folder = checkpoint.weights.parent.absolute()
    own = [folder / name / CONFIG_NAME] if name not in ("", ".", "..") else []
    for path in (*own, checkpoint.config_path(CONFIG_NAME)):
        if path.is_file():
            return path
    for path in (each / CONFIG_NAME for each in folder.parents[:2]):
        if path.is_file() and read_json(path).get("peft_type") in KEYS_AND_VALUES + EMBEDDINGS:
            return path
    return None


def _from_above(checkpoint: Checkpoint, config: Path) -> tuple[str, ...]:
    """A warning if the config is in a folder above its tensors."""
    if config.parent.absolute() not in checkpoint.weights.absolute().parents[1:]:
        return ()
    return (f"{checkpoint.weights}: no {CONFIG_NAME} is beside it; {config} is taken for its own",)


def _inferred(encoder: PromptEncoder, shape: ModelShape | None) -> Adapter:
    """An adapter without a config: its modules, or its width for a model, determine its kind."""
    rows, width = Adapter(encoder.checkpoint, {}, encoder, None).prompt_shape()
    kind = encoder.kind
    if kind == "CPT" or (shape is not None and shape.kind == BOTH and kind not in KEYS_AND_VALUES):
        raise _config_missing(encoder, "modules and shapes alone do not determine what PEFT computes")
    if kind is None:
        kind = _kind_by_width(encoder, width, shape)
    task = "SEQ_2_SEQ_LM" if shape is not None and shape.kind == BOTH else None
    config = {"peft_type": kind, "task_type": task, "num_virtual_tokens": rows}
    warning = f"no {CONFIG_NAME} is beside it: read as {kind}; its base model is not known"
    return Adapter(encoder.checkpoint, config, encoder, None, (warning,))


def _kind_by_width(encoder: PromptEncoder, width: int, shape: ModelShape | None) -> str:
    if shape is None:
        return "PREFIX_TUNING or PROMPT_TUNING"
    ((_, layers),) = shape.sites.items()
    fits = {"PREFIX_TUNING": folded_width(layers), "PROMPT_TUNING": shape.embedding_size}
    kinds = [kind for kind, expected in fits.items() if expected == width]
    if len(kinds) > 1:
        raise _config_missing(encoder, f"{width} is the width of keys and values and of embeddings alike")
    if not kinds:
        raise PrefixMismatchError(
            f"{encoder.where}: expected a width of {fits['PREFIX_TUNING']} (keys and values) or {shape.embedding_size} "
            f"(embeddings) for {shape.name!r}, found {width}"
        )
    return kinds[0]


def _config_missing(encoder: PromptEncoder, why: str) -> CheckpointError:
    return CheckpointError(
        f"{encoder.where}: expected {CONFIG_NAME} beside a state dict of PEFT's, as {why}, found none; write it where "
        f"the adapter was trained: model.peft_config[{encoder.name or 'default'!r}].save_pretrained(FOLDER)"
    )


def head_name(name: str) -> str:
    """The name in the base model of a tensor that PEFT saved beside the prompt."""
    for start in ("base_model.model.", "base_model."):
        if name.startswith(start):
            return name.removeprefix(start)
    return name

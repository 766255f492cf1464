"""PEFT's prompt encoders in a state dict, which has PEFT's modules by their own names instead of an adapter file's.

| `prompt_encoder.NAME.` | kind | computes |
|---|---|---|
| `embedding.weight` | any kind loaded for inference, `PROMPT_TUNING`, `PREFIX_TUNING` without projection | itself |
| `transform.0`, `.2` behind it | `PREFIX_TUNING` with projection | `Linear`, `Tanh`, `Linear` |
| `mlp_head.0`, `.2`, `.4` behind it | `P_TUNING`, "MLP" | linear layers with `ReLU` between |
| `lstm_head` and `mlp_head.0`, `.2` behind it | `P_TUNING`, "LSTM" | a bidirectional LSTM, then the same |
| `prefix_task_cols`, `prefix_task_rows` | `MULTITASK_PROMPT_TUNING` | itself and the factors |
| `delta_embedding.weight` | `CPT` | the sum; the config limits the norm of the delta's rows |
| `frozen_embedding`, `trainable_embedding` | `CARTRIDGE` | one after the other |

The first versions of PEFT have no NAME. Names of wrappers (DDP, FSDP, `torch.compile`, Lightning) may come before or
between. Other tensors belong to the base model and are not read, except heads in `modules_to_save.NAME`.

Source: PEFT 0.21.2, `forward` of `PrefixEncoder`, `PromptEncoder`, `MultitaskPromptEmbedding`, `CPTEmbedding`,
`CartridgeEncoder`; torch 2.13, `torch.nn.LSTM`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from prefix_export.errors import CheckpointError
from prefix_export.formats.shared.checkpoint import Checkpoint, Tensors
from prefix_export.formats.shared.trained import evaluated

PROMPT = "prompt_embeddings"
COLUMNS, ROWS = "prefix_task_cols", "prefix_task_rows"

_WRAPPER = re.compile(r"(?<![^.])(?:_fsdp_wrapped_module|_checkpoint_wrapped_module|_orig_mod)\.")
_TAIL = (
    r"embedding\.weight|delta_embedding\.weight|frozen_embedding|trainable_embedding|prefix_task_cols|prefix_task_rows"
    r"|transform\.[02]\.(?:weight|bias)|mlp_head\.[024]\.(?:weight|bias)|lstm_head\.\w{1,40}"
)
_MODULE = re.compile(rf"(?P<lead>(?:.*\.)?)prompt_encoder\.(?:(?P<name>[^.]+)\.)?(?P<tail>{_TAIL})")
_HEAD = re.compile(r"(?:.*\.)?(base_model\..+)\.modules_to_save\.([^.]+)\.(.+)")
_EMBEDDING, _DELTA = "embedding.weight", "delta_embedding.weight"
_FROZEN, _TRAINABLE = "frozen_embedding", "trainable_embedding"
_MATRIX = 2  # axes
_MOST_LSTM_LAYERS = 64
_MOST_ROWS = 4096  # inputs of an LSTM, which computes them one by one
_MOST_NUMBERS = 1 << 28  # outputs of a layer: a small file could ask for terabytes
_LEAST_EPSILON = 1e-10  # for a row that is not a template, input or label


@dataclass(frozen=True)
class PromptEncoder(Tensors):
    """One prompt encoder, with the tensors that PEFT's `save_pretrained` would write.

    Attributes:
        checkpoint: the checkpoint that holds it.
        name: the adapter's name; empty in the first versions of PEFT.
        modules: names in the file, by the name behind `prompt_encoder.NAME.`.
        heads: names in the file, by the name that PEFT saves.
        config: the adapter's config; empty if there is none.
    """

    checkpoint: Checkpoint
    name: str
    modules: Mapping[str, str]
    heads: Mapping[str, str]
    config: Mapping[str, Any]

    @property
    def kind(self) -> str | None:
        """The kind of adapter that its modules imply; None if several kinds have the same modules."""
        for tail, kind in (
            ("transform.", "PREFIX_TUNING"),
            ("mlp_head.", "P_TUNING"),
            (COLUMNS, "MULTITASK_PROMPT_TUNING"),
            (_DELTA, "CPT"),
            (_TRAINABLE, "CARTRIDGE"),
        ):
            if any(module.startswith(tail) for module in self.modules):
                return kind
        return None

    @property
    def where(self) -> str:
        """The file and module, for messages."""
        return f"{self.checkpoint.weights}: prompt_encoder{f'.{self.name}' if self.name else ''}"

    @property
    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """See `Tensors`."""
        shapes = {PROMPT: self._prompt_shape()}
        factors = {name: self.modules[name] for name in (COLUMNS, ROWS) if name in self.modules}
        return shapes | {name: self.checkpoint.shapes[full] for name, full in (factors | dict(self.heads)).items()}

    def array(self, name: str) -> np.ndarray:
        """See `Tensors`; the prompt's value is computed in float64."""
        if name == PROMPT:
            return self._prompt()
        return self.checkpoint.array(self.heads[name] if name in self.heads else self.modules[name])

    def _prompt_shape(self) -> tuple[int, ...]:
        """The shape of the computed prompt, from the shapes of tensors. `_prompt` checks whether they fit."""
        shapes = {tail: self.checkpoint.shapes[full] for tail, full in self.modules.items()}
        if _TRAINABLE in shapes:
            frozen, trainable = shapes.get(_FROZEN, (0,)), shapes[_TRAINABLE]
            return (sum(shape[0] for shape in (frozen, trainable) if shape), *trainable[1:])
        embedding = shapes.get(_EMBEDDING)
        if embedding is None:
            raise CheckpointError(f"{self.where}: expected {_EMBEDDING}, found {', '.join(self.modules)} alone")
        last = max((tail for tail in shapes if re.fullmatch(r"(transform|mlp_head)\.\d\.bias", tail)), default=None)
        return embedding if last is None or not embedding else (embedding[0], *shapes[last])

    def _prompt(self) -> np.ndarray:
        if _TRAINABLE in self.modules:
            tables = [self._matrix(tail) for tail in (_FROZEN, _TRAINABLE) if tail in self.modules]
            self._check_alike([table.shape[1:] for table in tables])
            return np.concatenate(tables)
        prompt = self._matrix(_EMBEDDING)
        self._check_size(len(prompt))
        if _DELTA in self.modules:
            delta = self._matrix(_DELTA)
            self._check_alike([prompt.shape, delta.shape])
            return np.asarray(prompt + _projected(delta, self.config, self.where))
        if any(tail.startswith("lstm_head.") for tail in self.modules):
            prompt = _lstm(prompt, self._lstm_layers(), f"{self.where}.lstm_head")
        for stem, activation in (("transform", "tanh"), ("mlp_head", "relu")):
            if layers := self._linear_layers(stem):
                prompt = evaluated(prompt, layers, f"{self.where}.{stem}", activation)
        return prompt

    def _check_alike(self, shapes: Sequence[tuple[int, ...]]) -> None:
        if len(set(shapes)) > 1:
            listed = " and ".join(str(list(shape)) for shape in shapes)
            raise CheckpointError(f"{self.where}: expected tables of one width and, for CPT, length, found {listed}")

    def _check_size(self, rows: int) -> None:
        shapes = {tail: self.checkpoint.shapes[full] for tail, full in self.modules.items()}
        widest = max((shape[0] for shape in shapes.values() if shape), default=0)
        is_long = rows > _MOST_ROWS and any(tail.startswith("lstm_head.") for tail in shapes)
        if len(shapes) > 1 and (is_long or rows * widest > _MOST_NUMBERS):
            raise CheckpointError(
                f"{self.where}: expected at most {_MOST_NUMBERS} numbers from a layer, and {_MOST_ROWS} rows into an "
                f"LSTM, found {rows} rows and {widest} outputs"
            )

    def _matrix(self, tail: str) -> np.ndarray:
        array = self._array(tail)
        if array.ndim != _MATRIX or 0 in array.shape:
            raise CheckpointError(
                f"{self.where}.{tail}: expected a whole matrix, found shape {list(array.shape)}; a checkpoint of "
                "DeepSpeed's ZeRO-3 or FSDP may hold only parts: gather it (zero_to_fp32.py), or save the adapter "
                "with save_pretrained"
            )
        return array

    def _array(self, tail: str) -> np.ndarray:
        if tail not in self.modules:
            raise CheckpointError(f"{self.where}: expected {tail}, found {', '.join(list(self.modules)[:6])}")
        return self.checkpoint.array(self.modules[tail])

    def _linear_layers(self, stem: str) -> list[tuple[np.ndarray, np.ndarray]]:
        indices = sorted({tail.split(".")[1] for tail in self.modules if tail.startswith(f"{stem}.")})
        return [(self._array(f"{stem}.{index}.weight"), self._array(f"{stem}.{index}.bias")) for index in indices]

    def _lstm_layers(self) -> list[list[tuple[np.ndarray, ...]]]:
        """For each layer, forwards and backwards: the weights of inputs and state, and both biases."""
        count = sum(tail.startswith("lstm_head.weight_ih_l") for tail in self.modules) // 2
        if not 0 < count <= _MOST_LSTM_LAYERS:
            raise CheckpointError(f"{self.where}.lstm_head: expected 1 to {_MOST_LSTM_LAYERS} layers, found {count}")
        names = ("weight_ih_l", "weight_hh_l", "bias_ih_l", "bias_hh_l")
        return [
            [tuple(self._array(f"lstm_head.{name}{layer}{end}") for name in names) for end in ("", "_reverse")]
            for layer in range(count)
        ]


def has_prompt_encoders(checkpoint: Checkpoint) -> bool:
    """Whether a checkpoint holds a prompt encoder."""
    return any("prompt_encoder." in name and _module(name) is not None for name in checkpoint.shapes)


def prompt_encoders(checkpoint: Checkpoint) -> dict[str, PromptEncoder]:
    """All prompt encoders of a checkpoint by the names of their adapters, without their configs.

    Raises:
        CheckpointError: one occurs twice, such as in a model and in its moving average; save one of them alone.
    """
    modules: dict[str, dict[str, str]] = {}
    leads: dict[str, set[str]] = {}
    heads: dict[str, dict[str, str]] = {}
    for full in checkpoint.shapes:
        if (match := _module(full)) is not None:
            name = match["name"] or ""
            modules.setdefault(name, {})[match["tail"]] = full
            leads.setdefault(name, set()).add(match["lead"])
        elif (head := _HEAD.fullmatch(_WRAPPER.sub("", full))) is not None:
            heads.setdefault(head[2], {})[f"{head[1]}.{head[3]}"] = full
    for name, leads_of_name in leads.items():
        if len(leads_of_name) > 1:
            shown = ", ".join(repr(f"{lead}prompt_encoder.{name}") for lead in sorted(leads_of_name)[:4])
            raise CheckpointError(
                f"{checkpoint.weights}: expected each adapter once, found {shown}; save one of them alone"
            )
    return {name: PromptEncoder(checkpoint, name, own, heads.get(name, {}), {}) for name, own in modules.items()}


def _module(name: str) -> re.Match[str] | None:
    return _MODULE.fullmatch(_WRAPPER.sub("", name))


def _lstm(inputs: np.ndarray, layers: Sequence[Sequence[tuple[np.ndarray, ...]]], where: str) -> np.ndarray:
    """The float64 outputs [length, 2 * width] of a bidirectional LSTM without dropout, for inputs [length, ·]."""
    states = inputs.astype(np.float64)
    for forwards, backwards in layers:
        for weights in (forwards, backwards):
            _check_lstm(weights, states.shape[1], where)
        ahead, back = _direction(states, *forwards), _direction(states[::-1], *backwards)[::-1]
        states = np.concatenate([ahead, back], axis=1)
    return states


def _check_lstm(weights: tuple[np.ndarray, ...], inputs: int, where: str) -> None:
    shapes = [array.shape for array in weights]
    rows = shapes[0][:1]
    width = rows[0] // 4 if rows else 0
    if not width or shapes != [(4 * width, inputs), (4 * width, width), (4 * width,), (4 * width,)]:
        raise CheckpointError(
            f"{where}: expected weights for inputs of width {inputs} and four gates, found shapes "
            f"{', '.join(str(list(shape)) for shape in shapes)}"
        )


def _direction(inputs: np.ndarray, *weights: np.ndarray) -> np.ndarray:
    of_inputs, of_state, *biases = (array.astype(np.float64) for array in weights)
    gates = inputs @ of_inputs.T + sum(biases)  # [length, 4 * width]: input, forget, cell, output
    state = memory = np.zeros(of_state.shape[1])
    outputs = []
    with np.errstate(all="ignore"):  # `Prefix` refuses results that are not finite
        for row in gates:
            enter, forget, new, leave = np.split(row + of_state @ state, 4)
            memory = _sigmoid(forget) * memory + _sigmoid(enter) * np.tanh(new)
            state = _sigmoid(leave) * np.tanh(memory)
            outputs.append(state)
    return np.stack(outputs)


def _sigmoid(array: np.ndarray) -> np.ndarray:
    return np.asarray(1 / (1 + np.exp(-array)))


def _projected(delta: np.ndarray, config: Mapping[str, Any], where: str) -> np.ndarray:
    """CPT's trained offsets [length, width], each row scaled as PEFT scales it before the addition."""
    kinds = _numbers(config, "cpt_tokens_type_mask", len(delta), where)
    text, template = (_number(config, name, where) for name in _EPSILONS)
    scale = np.sqrt(delta.shape[1] / 2048)
    epsilon = np.full(len(delta), _LEAST_EPSILON)
    epsilon[(kinds > 0) & (kinds % 4 == 2)] = text * scale
    epsilon[(kinds > 0) & (kinds % 2 == 1)] = template * scale
    norm = np.linalg.norm(delta.astype(np.float64), axis=1)
    factor = np.where(norm > 0, epsilon / np.maximum(norm, epsilon), 1)
    return np.asarray(delta * factor[:, None], np.float32)


_EPSILONS = ("opt_projection_epsilon", "opt_projection_format_epsilon")


def _numbers(config: Mapping[str, Any], key: str, count: int, where: str) -> np.ndarray:
    value = config.get(key)
    if not isinstance(value, list) or len(value) != count or not all(type(each) is int for each in value):
        raise CheckpointError(
            f"{where}: {key}: expected {count} whole numbers in adapter_config.json, which scale CPT's offsets, found "
            f"{str(value)[:40]}"
        )
    return np.array([max(-1, min(each, 1 << 40)) for each in value])


def _number(config: Mapping[str, Any], key: str, where: str) -> float:
    value = config.get(key, 0.1)
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise CheckpointError(f"{where}: {key}: expected a number above 0 in adapter_config.json, found {value!r:.40}")
    return float(value)

"""Small checkpoints of every family, and ways to spoil them: what tests and the campaign read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file

from prefix_export import formats
from prefix_export.errors import PrefixExportError
from prefix_export.models.model_shape import BOTH, DECODER, ENCODER, ModelShape
from prefix_runtime import LayerGeometry, LayerPrefix, Prefix, PrefixRuntimeError

HIDDEN, LENGTH, MIDDLE = 4, 2, 3
GEOMETRY = (LayerGeometry(2, 2),)
WIDTH = 2 * HIDDEN
GPT2 = ModelShape("gpt2", DECODER, {"decoder": GEOMETRY}, HIDDEN)
BART = ModelShape("bart", BOTH, dict.fromkeys(("decoder", "cross", "encoder"), GEOMETRY), HIDDEN)
BERT = ModelShape("bert", ENCODER, {"encoder": GEOMETRY}, HIDDEN)
"""Models so small that a file is hardly more than what says what is in it."""


def reparameterised(lead="", *ends):
    """Tables of embeddings and the MLPs behind them."""
    found = {}
    for end in ends or ("",):
        found[f"{lead}wte{end}.weight"] = torch.randn(LENGTH, HIDDEN)
        for index, shape in ((0, (MIDDLE, HIDDEN)), (2, (WIDTH, MIDDLE))):
            found[f"{lead}control_trans{end}.{index}.weight"] = torch.randn(shape)
            found[f"{lead}control_trans{end}.{index}.bias"] = torch.randn(shape[0])
    return found


def state_dict():
    """PEFT's own modules, with a projection."""
    lead = "prompt_encoder.default."
    layers = {f"{lead}{name.replace('control_trans', 'transform')}": each for name, each in reparameterised().items()}
    return {name.replace("wte", "embedding"): each for name, each in layers.items()}


def seeds():
    """A small checkpoint of each family: what it holds, its configurations, the model that it is for."""
    torch.manual_seed(0)
    layer = LayerPrefix(*(np.ones((2, LENGTH, 2), np.float32) for _ in range(2)))
    bart = reparameterised("", "", "2", "_enc")
    control = bart | {f"M_Prefixes.wte_{each}cats.weight": torch.randn(4, HIDDEN) for each in ("", "2_", "enc_")}
    peft = {"peft_type": "PREFIX_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": LENGTH}
    return {
        "canonical": (Prefix({"decoder": (layer,)}, LENGTH), {}, GPT2),
        "peft": ({"prompt_embeddings": torch.randn(LENGTH, WIDTH)}, {"adapter_config.json": peft}, GPT2),
        "li-liang": (reparameterised(), {}, GPT2),
        "li-liang, BART": (bart, {}, BART),
        "unified-skg": (reparameterised("", "", "_dec", "_enc"), {}, BART),
        "openprompt": (reparameterised("decoder_"), {}, GPT2),
        "p-tuning-v2": ({"prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH)}, {}, BERT),
        "control-prefixes": (control, {"config.json": {"m_prefix_len": 2}}, BART),
        "adapterhub": (
            reparameterised("bert.prefix_tuning.prefix_tunings.a.self_prefix."),
            {"adapter_config.json": {"config": {"architecture": "prefix_tuning"}}},
            GPT2,
        ),
        "soft-prompt": (torch.randn(LENGTH, HIDDEN), {}, GPT2),
        "peft, state dict": (state_dict(), {}, GPT2),
        "keys-values": ({f"past.0.{name}": torch.randn(1, 2, LENGTH, 2) for name in ("key", "value")}, {}, GPT2),
    }


SEEDS = seeds()


def overwrite(path, content):
    """Write a file anew in its place: some file systems wait for the disk when one is emptied first."""
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()


def write(folder, content, configs, how):
    path = folder / "weights"
    for each in (path, *(folder / name for name in configs)):
        each.unlink(missing_ok=True)  # as for `overwrite`
    for name, config in configs.items():
        (folder / name).write_text(json.dumps(config))
    if isinstance(content, Prefix):
        content.save(path)
    elif how == "safetensors":
        save_file({"": content} if isinstance(content, torch.Tensor) else content, path)
    elif how == "npy":
        with path.open("wb") as file:
            np.save(file, content.numpy())
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "zip")
    return path


def mutated(whole, random):
    """The bytes of a file with a few of them changed, cut, moved or repeated; most often near its beginning or end."""
    found = bytearray(whole)
    for _ in range(random.integers(1, 4)):
        if not found:
            break
        at = int(random.choice([random.integers(len(found)), random.integers(min(len(found), 4000)),
                                max(0, len(found) - 1 - random.integers(4000))]))  # fmt: skip
        length = int(random.integers(1, 9))
        kind = random.integers(5)
        if kind == 0:
            found[at] ^= 1 << int(random.integers(8))
        elif kind == 1:
            found[at : at + length] = random.integers(256, size=length, dtype=np.uint8).tobytes()
        elif kind == 2:
            del found[at : at + length]
        elif kind == 3:
            found[at:at] = found[max(0, at - length) : at]
        else:
            found = found[: max(at, 1)]
    return bytes(found)


STORED = ("zip", "legacy", "safetensors")
FILES = [
    ("canonical", "safetensors"),
    ("soft-prompt", "npy"),
    *((name, how) for name in sorted(SEEDS.keys() - {"canonical"}) for how in STORED),
]
"""Each family, and each way that its tensors are stored."""


def read_mutations(folder: Path, name: str, how: str, count: int, seed: int) -> Iterator[bool]:
    """Read so many files with changed bytes; for each whether it was read, or refused by a typed error.

    Args:
        folder: an empty one, to write into.
        name, how: of `FILES`.
        count: files to read.
        seed: of what is changed.
    """
    content, configs, shape = SEEDS[name]
    path = write(folder, content, configs, how)
    assert formats.read(path, shape).parts
    whole, random = path.read_bytes(), np.random.default_rng(seed)
    for _ in range(count):
        overwrite(path, mutated(whole, random))
        try:
            formats.read(path, shape)
        except (PrefixExportError, PrefixRuntimeError):
            yield False
        else:
            yield True


def odd_shape(random):
    return tuple(int(size) for size in random.choice([0, 1, 2, 3, 4, 8, 64, 127], size=random.integers(0, 5)))


def unsound(content, random):
    """Tensors of which one or two are gone, of another shape, cut, or there once more under another name."""
    tensors = {"": content} if isinstance(content, torch.Tensor) else dict(content)
    for _ in range(random.integers(1, 3)):
        victim = str(random.choice(list(tensors)))
        kind = random.integers(4)
        if kind == 0 and len(tensors) > 1:
            del tensors[victim]
        elif kind == 1:
            tensors[victim] = torch.randn(odd_shape(random))
        elif kind == 2:
            tensors[victim + str(random.choice(["x", ".0.weight", ".bias"]))] = tensors[victim].clone()
        elif tensors[victim].ndim:
            tensors[victim] = tensors[victim][: random.integers(tensors[victim].shape[0] + 1)].clone()
    return tensors


def with_odd_value(config, random):
    """A configuration of which every other time one setting is nonsense."""
    if random.integers(2):
        return config
    key = str(random.choice([*config, "config", "leave_out", "preseqlen", "prefix_length", "peft_type"]))
    return {**config, key: ODD_VALUES[random.integers(len(ODD_VALUES))]}


ODD_VALUES = (None, True, False, 0, 1, -1, 3.5, 10**30, "", "x", "\ud800", [], [0], ["a"], {}, {"config": []})

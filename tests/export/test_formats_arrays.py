"""Keys and values, or a soft prompt, as one array without a name: the width under a model tells them apart."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import PrefixTuningConfig, get_peft_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from prefix_export import formats
from prefix_export.errors import CheckpointError, PrefixExportError
from prefix_export.formats import SoftPrompt
from prefix_export.models.model_shape import BOTH, DECODER, ENCODER, ModelShape
from prefix_runtime import LayerGeometry, PrefixMismatchError, PrefixRuntimeError

LAYERS, HEADS, SIZE, LENGTH, HIDDEN = 3, 4, 16, 5, 64
WIDTH = 2 * LAYERS * HEADS * SIZE
GPT2 = ModelShape("gpt2", DECODER, {"decoder": (LayerGeometry(HEADS, SIZE),) * LAYERS}, HIDDEN)


@pytest.fixture(scope="module")
def pefts(workshop):
    """PEFT's model of a prefix for GPT-2, its matrix [length, width], and the cache that it makes of that."""
    model = AutoModelForCausalLM.from_pretrained(workshop.model("gpt2"))
    wrapped = get_peft_model(model, PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=LENGTH))
    matrix = wrapped.prompt_encoder["default"].embedding.weight.detach()
    with torch.no_grad():
        cache = wrapped.get_prompt(1)
    return matrix, [(layer.keys, layer.values) for layer in cache.layers]


def slots(pairs):
    """Of pairs [1, heads, length, size]: [2 * layers, 1, heads, length, size], as Li and Liang arrange them."""
    return torch.stack([array for pair in pairs for array in pair])


SAVED = {
    "a matrix": lambda matrix, pairs: matrix,
    "a batch of one": lambda matrix, pairs: matrix[None],
    "a batch of the same": lambda matrix, pairs: matrix.expand(4, -1, -1).clone(),
    "seen by slots": lambda matrix, pairs: matrix.view(1, LENGTH, 2 * LAYERS, HEADS, SIZE),
    "arranged by slots": lambda matrix, pairs: slots(pairs),
    "split for each layer": lambda matrix, pairs: list(slots(pairs).split(2)),
    "past_key_values": lambda matrix, pairs: tuple(pairs),
    "past_key_values by names": lambda matrix, pairs: {
        f"past_key_values.{index}.{name}": array
        for index, pair in enumerate(pairs)
        for name, array in zip(("key", "value"), pair, strict=True)
    },
    "past_key_values without a batch": lambda matrix, pairs: [(key[0], value[0]) for key, value in pairs],
    "a name": lambda matrix, pairs: {"prefix": matrix},
}


def check(path, pairs, **options):
    trained = formats.read(path, GPT2, **options)
    (prefix,) = trained.parts.values()
    assert prefix.position_base == prefix.prefix_length == LENGTH
    assert prefix.source.format == "keys-values"
    for layer, (key, value) in zip(prefix.sites["decoder"], pairs, strict=True):
        np.testing.assert_array_equal(layer.key, key[0])
        np.testing.assert_array_equal(layer.value, value[0])
    assert "read as keys and values k0, v0, k1, v1, … with text behind them" in trained.warnings[0]


@pytest.mark.parametrize("how", SAVED)
def test_keys_and_values_are_pefts_own(pefts, tmp_path, how):
    matrix, pairs = pefts
    torch.save(SAVED[how](matrix, pairs), tmp_path / "prefix.pt")
    check(tmp_path / "prefix.pt", pairs)


@pytest.mark.parametrize("how", ["npy", "safetensors", "float64"])
def test_a_matrix_in_any_file(pefts, tmp_path, how):
    matrix, pairs = pefts
    if how == "safetensors":
        save_file({"keys": matrix}, tmp_path / "prefix")
    else:
        with (tmp_path / "prefix").open("wb") as file:
            np.save(file, matrix.numpy().astype(np.float64 if how == "float64" else np.float32))
    check(tmp_path / "prefix", pairs)
    check(tmp_path / "prefix", pairs, format_name="keys-values")


def test_bfloat16_is_widened(pefts, tmp_path):
    save_file({"keys": pefts[0].bfloat16()}, tmp_path / "x.safetensors")
    (prefix,) = formats.read(tmp_path / "x.safetensors", GPT2).parts.values()
    np.testing.assert_array_equal(prefix.sites["decoder"][0].key, pefts[1][0][0][0].bfloat16().float())


@pytest.mark.parametrize("name", ["", "soft_prompt"])
def test_the_embeddings_width_is_a_soft_prompts(tmp_path, name):
    save_file({name: torch.randn(LENGTH, HIDDEN)}, tmp_path / "x.safetensors")
    (prompt,) = formats.read(tmp_path / "x.safetensors", GPT2).parts.values()
    assert isinstance(prompt, SoftPrompt)
    assert prompt.source.format == "soft-prompt"


def test_an_encoder_has_its_keys_and_values_too(tmp_path):
    shape = ModelShape("bert", ENCODER, {"encoder": GPT2.sites["decoder"]}, HIDDEN)
    np.save(tmp_path / "x.npy", np.ones((LENGTH, WIDTH), np.float32))
    (prefix,) = formats.read(tmp_path / "x.npy", shape).parts.values()
    assert (list(prefix.sites), prefix.position_base) == (["encoder"], LENGTH)


class TestDoubt:
    def test_one_width_for_both_asks_for_the_format(self, tmp_path):
        shape = ModelShape("tiny", DECODER, {"decoder": (LayerGeometry(1, 8),)}, 16)
        np.save(tmp_path / "x.npy", np.ones((LENGTH, 16), np.float32))
        with pytest.raises(
            CheckpointError, match=r"16, which both have for 'tiny'; .* soft-prompt or --format keys-val"
        ):
            formats.read(tmp_path / "x.npy", shape)
        soft, hard = (
            formats.read(tmp_path / "x.npy", shape, name).parts[""] for name in ("soft-prompt", "keys-values")
        )
        assert isinstance(soft, SoftPrompt)
        assert hard.sites["decoder"][0].key.shape == (1, LENGTH, 8)

    def test_another_width_names_both(self, tmp_path):
        np.save(tmp_path / "x.npy", np.ones((LENGTH, 50), np.float32))
        with pytest.raises(
            PrefixMismatchError, match=r"width of 64 \(a soft prompt for 'gpt2'\) or 384 .*found shape \[5, 50"
        ):
            formats.read(tmp_path / "x.npy", GPT2)

    def test_a_model_of_three_attentions_is_refused(self, tmp_path):
        shape = ModelShape("bart", BOTH, dict.fromkeys(("decoder", "cross", "encoder"), GPT2.sites["decoder"]), HIDDEN)
        np.save(tmp_path / "x.npy", np.ones((LENGTH, WIDTH), np.float32))
        with pytest.raises(
            PrefixMismatchError, match=r"expected \[prefix_length, 64\] as the embeddings of 'bart' have"
        ):
            formats.read(tmp_path / "x.npy", shape)
        with pytest.raises(PrefixMismatchError, match="which of its attentions they are for"):
            formats.read(tmp_path / "x.npy", shape, "keys-values")

    def test_without_a_model_it_says_what_would_fit(self, tmp_path):
        np.save(tmp_path / "x.npy", np.ones((LENGTH, 49_152), np.float32))
        told = formats.describe(tmp_path / "x.npy")
        assert (told["prefix length"], told["width"]) == ("5", "49152")
        assert told["if it is a soft prompt"] == "of models whose embeddings are 49152 wide"
        assert "layers x 2 x key/value heads x head size are 49152" in told["if it is keys and values"]

    def test_embeddings_before_an_mlp_are_no_soft_prompt(self, tmp_path):
        torch.save({"wte.weight": torch.ones(LENGTH, HIDDEN)}, tmp_path / "x.pt")
        with pytest.raises(CheckpointError, match=r"tensors 'wte.weight', of no such kind"):
            formats.read(tmp_path / "x.pt", GPT2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (torch.randn(2, LENGTH, WIDTH), "found a batch of 2 that differ"),
        (torch.ones(2 * LAYERS, 2, HEADS, LENGTH, SIZE), r"expected \[6, 1, 4, prefix_length, 16\] or"),
        (torch.ones(2 * LAYERS + 2, 1, HEADS, LENGTH, SIZE), r"found \[8, 1, 4, 5, 16\]"),
        (torch.ones(2 * LAYERS, 1, HEADS, 0, SIZE), r"found \[6, 1, 4, 0, 16\]"),
        ([(torch.ones(1, HEADS, LENGTH, SIZE),) * 2] * 2, "keys and values of 3 layers, found them of 2"),
        ([(torch.ones(2, HEADS, LENGTH, SIZE),) * 2] * 3, r"expected a batch of 1, found shape \[2, 4, 5, 16\]"),
        ([(torch.ones(1, HEADS + 1, LENGTH, SIZE),) * 2] * 3, r"expected \[4, prefix_length, 16\], found \[5, 5, 16\]"),
        ([(torch.ones(1, HEADS, LENGTH, SIZE), torch.ones(1, HEADS, LENGTH + 1, SIZE))] * 3, r"length|shape"),
        ([(torch.ones(1, HEADS, LENGTH, SIZE),) * 3] * 3, "of no such kind"),
        ([torch.ones(3, 4)] * 3, "of no such kind"),
        ([[[torch.ones(1, HEADS, LENGTH, SIZE)]]], "of no such kind|found tensors none|expected one of"),
        ([], "expected one of"),
        ({"past.0.key": torch.ones(1, HEADS, LENGTH, SIZE)}, "of no such kind"),
    ],
)  # fmt: skip
def test_arrays_that_do_not_fit_are_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises((PrefixExportError, PrefixRuntimeError)) as caught:
        formats.read(tmp_path / "x.pt", GPT2)
    assert caught.match(message)

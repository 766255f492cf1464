"""AdapterHub's own adapters, as its library saved them, against what it computed itself (`adapterhub/record.py`)."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, DynamicCache

from prefix_export import formats
from prefix_export.models.model_shape import ModelShape
from prefix_export.prefixes.fold import fold
from prefix_export.prefixes.lint import lint
from prefix_runtime import Geometry, LayerGeometry, Prefix, PrefixMismatchError

RECORDED = Path(__file__).parent / "adapterhub"
MODELS = ("gpt2", "bert", "bart", "t5", "llama")
KINDS = ("bottleneck", "relu", "flat")
LEFT_OUT = {"encoder": {1}, "decoder": {0}, "cross": {0}}
"""Of two layers on each side, the encoder's counted first, those that `leave_out` 1 and 2 are."""
SITES = {"decoder": "self_prefix", "cross": "cross_prefix", "encoder": "encoder_prefix"}


def prefix_of(name, kind):
    path = RECORDED / name / kind
    assert formats.find_reader(path)[0].NAME == "adapterhub"
    shape = ModelShape.of_config(name, AutoConfig.from_pretrained(RECORDED / name))
    (prefix,) = fold(path, shape, pytest.fail).prefixes.values()
    return prefix


@pytest.mark.parametrize("kind", [*KINDS, "leave_out"])
@pytest.mark.parametrize("name", MODELS)
def test_keys_and_values_are_the_librarys(name, kind):
    prefix, said = prefix_of(name, kind), load_file(RECORDED / name / f"{kind}.safetensors")
    assert (prefix.prefix_length, prefix.position_base) == (3, 0)
    assert set(prefix.sites) == ({"decoder", "cross", "encoder"} if name in ("bart", "t5") else set(prefix.sites))
    locations = {key.split(".")[0] for key in said if key.endswith(".key")}
    assert len(locations) == len(prefix.sites)
    for site, layers in prefix.sites.items():
        (location,) = locations if len(locations) == 1 else (SITES[site],)
        for index, layer in enumerate(layer for layer in layers if layer.key.size):
            np.testing.assert_allclose(layer.key, said[f"{location}.{index}.key"], atol=1e-6)
            np.testing.assert_allclose(layer.value, said[f"{location}.{index}.value"], atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_a_model_with_the_prefix_as_its_cache_answers_as_with_the_library(name, kind):
    prefix, said = prefix_of(name, kind), load_file(RECORDED / name / f"{kind}.safetensors")
    loader = AutoModel if name == "bert" else AutoModelForCausalLM
    model = loader.from_pretrained(RECORDED / name, attn_implementation="eager").eval()
    (layers,) = prefix.sites.values()
    cache = DynamicCache()
    for index, layer in enumerate(layers):
        cache.update(torch.tensor(layer.key)[None], torch.tensor(layer.value)[None], index)
    ids = torch.from_numpy(said["input_ids"])
    with torch.no_grad():
        output = model(
            input_ids=ids,
            attention_mask=torch.ones(1, prefix.prefix_length + ids.shape[1], dtype=torch.int64),
            position_ids=torch.arange(ids.shape[1])[None],
            past_key_values=cache,
        )
    found = output.last_hidden_state if name == "bert" else output.logits
    np.testing.assert_allclose(found.numpy(), said["answer"], atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_were_left_out_have_nothing(name, tmp_path):
    prefix = prefix_of(name, "leave_out")
    for site, layers in prefix.sites.items():
        left = LEFT_OUT[site] if name in ("bart", "t5") else {1}
        assert [layer.key.shape[1] for layer in layers] == [0 if index in left else 3 for index in range(2)]
    prefix.save(tmp_path / "own.safetensors")
    assert Prefix.load(tmp_path / "own.safetensors") == prefix


def test_a_graph_has_no_layer_without_a_prefix():
    geometry = Geometry({"decoder": (LayerGeometry(2, 8),) * 2}, 24, 24)
    with pytest.raises(PrefixMismatchError, match=r"^here: layer 1: expected a prefix at every layer"):
        geometry.check_prefix(prefix_of("gpt2", "leave_out"), "here")


@pytest.mark.parametrize("name", MODELS)
def test_layers_that_were_left_out_do_not_trouble_the_linter(name):
    shape = ModelShape.of_config(name, AutoConfig.from_pretrained(RECORDED / name))
    assert lint(prefix_of(name, "leave_out"), shape) == []

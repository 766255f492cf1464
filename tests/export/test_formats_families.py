"""Checkpoints whose code cannot be installed, against the published computation, written here once as plain torch."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from prefix_export import formats
from prefix_export.errors import CheckpointError
from prefix_export.formats import SoftPrompt
from prefix_export.models.model_shape import BOTH, DECODER, ENCODER, ModelShape
from prefix_runtime import LayerGeometry, PrefixError, PrefixMismatchError
from prefix_runtime.prefix.composition import concatenated

LAYERS, HEADS, HEAD_DIM = 3, 4, 16
HIDDEN, WIDTH = HEADS * HEAD_DIM, 2 * LAYERS * HEADS * HEAD_DIM
LENGTH, MIDDLE = 5, 24
GEOMETRY = (LayerGeometry(HEADS, HEAD_DIM),) * LAYERS
GPT2 = ModelShape("gpt2", DECODER, {"decoder": GEOMETRY}, HIDDEN)
BART = ModelShape("bart", BOTH, dict.fromkeys(("decoder", "cross", "encoder"), GEOMETRY), HIDDEN)
BERT = ModelShape("bert", ENCODER, {"encoder": GEOMETRY}, HIDDEN)


def past_key_values(numbers):
    """Li and Liang's `view`, `permute` and `split`, which those after them took: a key and a value for each layer."""
    slots = numbers.view(1, len(numbers), LAYERS * 2, HEADS, HEAD_DIM)
    return [pair[:, 0] for pair in slots.permute([2, 0, 3, 1, 4]).split(2)]


def check(prefix, site, numbers, position_base):
    """A site's keys and values are those of a matrix [length, 2 * layers * hidden]."""
    assert prefix.position_base == position_base
    for layer, expected in zip(prefix.sites[site], past_key_values(numbers), strict=True):
        np.testing.assert_allclose(layer.key, expected[0].numpy(), atol=1e-6)
        np.testing.assert_allclose(layer.value, expected[1].numpy(), atol=1e-6)


def tensors(**shapes):
    """Random tensors, by name; dots are written as two underscores."""
    torch.manual_seed(0)
    return {name.replace("__", "."): torch.randn(shape) for name, shape in shapes.items()}


def mlp(stem, outputs=WIDTH, inputs=HIDDEN, deep=False):
    """A reparameterisation MLP's tensors."""
    sizes = [inputs, *([MIDDLE] * (2 if deep else 1)), outputs]
    found = {}
    for index, (fan_in, fan_out) in enumerate(itertools.pairwise(sizes)):
        found[f"{stem}.{2 * index}.weight"] = torch.randn(fan_out, fan_in)
        found[f"{stem}.{2 * index}.bias"] = torch.randn(fan_out)
    return found


def through(state, stem, inputs, activation=torch.tanh):
    """What the MLP makes of embeddings; in float64, as float32 itself is no finer than the comparison."""
    count = sum(name.startswith(f"{stem}.") and name.endswith("weight") for name in state)
    found = inputs.double()
    for index in range(count):
        weight, bias = (state[f"{stem}.{2 * index}.{part}"].double() for part in ("weight", "bias"))
        found = torch.nn.functional.linear(activation(found) if index else found, weight, bias)
    return found.float()


def saved(folder, state, config=None, how="bin"):
    """A checkpoint's folder, as its code would leave it."""
    folder.mkdir(exist_ok=True)
    if how == "bin":
        torch.save(state, folder / "pytorch_model.bin")
    elif how == "legacy":
        torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    elif how == "lightning":
        nested = {"state_dict": {f"model.{name}": tensor for name, tensor in state.items()}, "epoch": 3}
        torch.save(nested, folder / "last.ckpt")
    else:
        save_file(state, folder / "model.safetensors")
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def read(folder, shape, **options):
    (prefix,) = formats.read(folder, shape, **options).parts.values()
    return prefix


def format_of(path):
    return formats.find_reader(path)[0].NAME


class TestLiAndLiang:
    @pytest.mark.parametrize("how", ["bin", "legacy", "lightning", "safetensors"])
    @pytest.mark.parametrize("deep", [False, True])
    def test_gpt2_with_its_mlp(self, tmp_path, how, deep):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans", deep=deep)
        folder = saved(tmp_path / "run", state, {"preseqlen": 200}, how)  # lowdata overrules the config
        assert format_of(folder) == "li-liang"
        check(read(folder, GPT2), "decoder", through(state, "control_trans", state["wte.weight"]), LENGTH)

    def test_gpt2_flat(self, tmp_path):
        state = {"control_trans": torch.randn(LENGTH * WIDTH)}
        prefix = read(saved(tmp_path / "run", state), GPT2)
        check(prefix, "decoder", state["control_trans"].view(LENGTH, WIDTH), LENGTH)

    def test_gpt2_from_words(self, tmp_path):
        state = {"control_trans": torch.randn(2 * LAYERS, 1, HEADS, LENGTH, HEAD_DIM)}
        prefix = read(saved(tmp_path / "run", state), GPT2)
        for index, layer in enumerate(prefix.sites["decoder"]):
            np.testing.assert_array_equal(layer.key, state["control_trans"][2 * index, 0].numpy())
            np.testing.assert_array_equal(layer.value, state["control_trans"][2 * index + 1, 0].numpy())

    def test_gpt2_embeddings_are_a_soft_prompt(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans", outputs=HIDDEN)
        prompt = read(saved(tmp_path / "run", state), GPT2)
        assert isinstance(prompt, SoftPrompt)
        expected = through(state, "control_trans", state["wte.weight"]).numpy()
        np.testing.assert_allclose(prompt.embeddings, expected, atol=1e-5)

    @pytest.mark.parametrize("deep", [False, True])
    def test_bart_has_a_prefix_for_each_attention(self, tmp_path, deep):
        state = tensors(**{f"{name}__weight": (LENGTH, HIDDEN) for name in ("wte", "wte2", "wte_enc")})
        for stem in ("control_trans", "control_trans2", "control_trans_enc"):
            state |= mlp(stem, deep=deep)
        folder = saved(tmp_path / "run", state, {"preseqlen": LENGTH})
        assert format_of(folder) == "li-liang"
        prefix = read(folder, BART)
        for site, end in (("decoder", ""), ("cross", "2"), ("encoder", "_enc")):
            check(prefix, site, through(state, f"control_trans{end}", state[f"wte{end}.weight"]), 0)

    def test_an_encoder_with_fewer_layers_leaves_slots_unread(self, tmp_path):
        state = tensors(**{f"{name}__weight": (LENGTH, HIDDEN) for name in ("wte", "wte2", "wte_enc")})
        for stem in ("control_trans", "control_trans2", "control_trans_enc"):
            state |= mlp(stem)
        folder = saved(tmp_path / "run", state)
        small = ModelShape("bart", BOTH, {**BART.sites, "encoder": GEOMETRY[:1]}, HIDDEN)
        assert len(read(folder, small).sites["encoder"]) == 1
        large = ModelShape("bart", BOTH, {**BART.sites, "encoder": GEOMETRY * 2}, HIDDEN)
        with pytest.raises(CheckpointError, match=r"expected slots for 6 layers of the encoder, found 3"):
            read(folder, large)

    def test_an_infix_is_refused_with_the_reason(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN), wte2__weight=(LENGTH, HIDDEN)) | mlp("control_trans")
        with pytest.raises(CheckpointError, match="found an infix, which the code computes from the text"):
            read(saved(tmp_path / "run", state), GPT2)

    def test_a_prefix_that_is_computed_from_text_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="computes the prefix from the text"):
            read(saved(tmp_path / "run", mlp("control_trans")), GPT2)

    @pytest.mark.parametrize("config", [{"optim_prefix": False}, {"use_infix": True}, {"vocab_size": LENGTH}])
    def test_a_mode_of_the_config_that_computes_from_text_is_refused(self, tmp_path, config):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans")
        with pytest.raises(CheckpointError, match="computes the prefix from the text"):
            read(saved(tmp_path / "run", state, config), GPT2)

    def test_a_linear_layer_without_its_bias_is_refused(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans", deep=True)
        del state["control_trans.2.bias"]
        with pytest.raises(CheckpointError, match=r"found control_trans\.2\.weight alone"):
            read(saved(tmp_path / "run", state), GPT2)

    def test_without_a_config_the_doubt_is_said(self, tmp_path):
        state = tensors(**{f"{name}__weight": (LENGTH, HIDDEN) for name in ("wte", "wte2", "wte_enc")})
        for stem in ("control_trans", "control_trans2", "control_trans_enc"):
            state |= mlp(stem)
        (warning,) = formats.read(saved(tmp_path / "run", state), BART).warnings
        assert "Control Prefixes" in warning

    def test_another_kind_of_model_is_refused(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans")
        with pytest.raises(PrefixMismatchError, match=r"expected a decoder-only model, found 'bart'"):
            read(saved(tmp_path / "run", state), BART)

    def test_an_mlp_that_does_not_fit_is_refused(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN + 1)) | mlp("control_trans")
        with pytest.raises(CheckpointError, match=r"expected a weight for inputs of shape \[5, 65\]"):
            read(saved(tmp_path / "run", state), GPT2)


class TestUnifiedSkg:
    def state(self):
        found = tensors(**{f"{name}__weight": (LENGTH, HIDDEN) for name in ("wte", "wte_enc", "wte_dec")})
        for end in ("", "_enc", "_dec"):
            found |= mlp(f"control_trans{end}")
        return found | {"input_tokens": torch.arange(LENGTH), "pretrain_model.shared.weight": torch.randn(7, HIDDEN)}

    def test_dec_is_cross_attention(self, tmp_path):
        state = self.state()
        folder = saved(tmp_path / "run", state)
        assert format_of(folder) == "unified-skg"
        prefix = read(folder, BART)
        for site, end in (("decoder", ""), ("cross", "_dec"), ("encoder", "_enc")):
            check(prefix, site, through(state, f"control_trans{end}", state[f"wte{end}.weight"]), 0)
        assert prefix.metadata["relative_position_bias"] == "zero"

    @pytest.mark.parametrize("name", ["knowledge_trans.0.weight", "multi_prefix.a.wte.weight"])
    def test_what_depends_on_the_text_or_is_of_many_is_refused(self, tmp_path, name):
        folder = saved(tmp_path / "run", self.state() | {name: torch.zeros(2, 2)})
        with pytest.raises(CheckpointError, match="it cannot be folded"):
            read(folder, BART)


class TestOpenPrompt:
    def test_t5_has_two_sites(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN), decoder_wte__weight=(LENGTH, HIDDEN))
        state |= mlp("control_trans") | mlp("decoder_control_trans")
        named = {f"prompt_model.template.{name}": tensor for name, tensor in state.items()}
        named["prompt_model.template.input_tokens"] = torch.arange(LENGTH)
        folder = saved(tmp_path / "run", named, how="lightning")
        assert format_of(folder) == "openprompt"
        prefix = read(folder, BART)
        check(prefix, "encoder", through(state, "control_trans", state["wte.weight"]), LENGTH)
        check(prefix, "decoder", through(state, "decoder_control_trans", state["decoder_wte.weight"]), LENGTH)
        assert set(prefix.sites) == {"decoder", "encoder"}

    @pytest.mark.parametrize("start", ["decoder_", ""])
    def test_gpt2_of_both_versions(self, tmp_path, start):
        state = {f"{start}wte.weight": torch.randn(LENGTH, HIDDEN)} | mlp(f"{start}control_trans")
        named = {f"template.{name}": tensor for name, tensor in state.items()}
        named["template.input_tokens"] = torch.arange(LENGTH)
        folder = saved(tmp_path / "run", named)
        assert format_of(folder) == "openprompt"
        expected = through(state, f"{start}control_trans", state[f"{start}wte.weight"])
        check(read(folder, GPT2), "decoder", expected, LENGTH)


class TestPTuningV2:
    def head(self):
        return {
            "classifier.weight": torch.randn(2, HIDDEN),
            "classifier.bias": torch.randn(2),
            "bert.pooler.dense.weight": torch.randn(HIDDEN, HIDDEN),
            "bert.pooler.dense.bias": torch.randn(HIDDEN),
        }

    def test_without_projection_and_with_a_head(self, tmp_path):
        state = {"prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH)} | self.head()
        folder = saved(tmp_path / "run", state, {"pre_seq_len": LENGTH})
        assert format_of(folder) == "p-tuning-v2"
        prefix = read(folder, BERT)
        check(prefix, "encoder", state["prefix_encoder.embedding.weight"], LENGTH)
        names = {name.removeprefix("bert."): name for name in self.head()}
        assert set(prefix.head) == set(names)
        for name, full in names.items():
            np.testing.assert_array_equal(prefix.head[name], state[full].numpy())

    @pytest.mark.parametrize("shape", [GPT2, replace(BERT, architecture="deberta-v2")])
    def test_another_model_is_refused(self, tmp_path, shape):
        state = {"prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH)}
        with pytest.raises(PrefixMismatchError, match="expected an encoder of plain attention"):
            read(saved(tmp_path / "run", state), shape)

    def test_with_projection(self, tmp_path):
        state = {"prefix_encoder.embedding.weight": torch.randn(LENGTH, HIDDEN)} | mlp("prefix_encoder.trans")
        prefix = read(saved(tmp_path / "run", state), BERT)
        expected = through(state, "prefix_encoder.trans", state["prefix_encoder.embedding.weight"])
        check(prefix, "encoder", expected, LENGTH)

    @pytest.mark.parametrize("other", ["deberta.embeddings.weight", "transformer.word_embeddings.weight"])
    def test_models_of_another_attention_are_refused(self, tmp_path, other):
        state = {"prefix_encoder.embedding.weight": torch.randn(LENGTH, WIDTH), other: torch.zeros(1, 1)}
        with pytest.raises(CheckpointError, match="expected BERT or RoBERTa"):
            read(saved(tmp_path / "run", state), BERT)


class TestControlPrefixes:
    SITES = (("decoder", "", ""), ("cross", "2", "2_"), ("encoder", "_enc", "enc_"))

    def test_data_to_text_has_a_block_for_each_label(self, tmp_path):
        rows, labels = 2, 3
        state = tensors(**{f"wte{end}__weight": (LENGTH, HIDDEN) for _, end, _ in self.SITES})
        for _, end, _ in self.SITES:
            state |= mlp(f"control_trans{end}")
        for category in ("cats", "sources"):
            state |= {
                f"M_Prefixes.wte_{each}{category}.weight": torch.randn(rows * labels, HIDDEN) for *_, each in self.SITES
            }
        folder = saved(tmp_path / "run", state, {"m_prefix_len": rows, "preseqlen": LENGTH}, how="lightning")
        assert format_of(folder) == "control-prefixes"
        parts = formats.read(folder, BART).parts
        assert set(parts) == {
            "general",
            *(f"{each}-{label}" for each in ("cats", "sources") for label in range(labels)),
        }
        for site, end, each in self.SITES:
            check(parts["general"], site, through(state, f"control_trans{end}", state[f"wte{end}.weight"]), 0)
            block = state[f"M_Prefixes.wte_{each}cats.weight"][2:4]
            check(parts["cats-1"], site, through(state, f"control_trans{end}", block), 0)

    def test_xsum_keeps_its_labels_in_the_rows_behind(self, tmp_path):
        state = tensors(**{f"wte{end}__weight": (LENGTH + 122, HIDDEN) for _, end, _ in self.SITES})
        for _, end, _ in self.SITES:
            state |= mlp(f"control_trans{end}")
        folder = saved(tmp_path / "run", state, {"preseqlen": LENGTH})
        assert format_of(folder) == "control-prefixes"
        parts = formats.read(folder, BART).parts
        assert len(parts) == 1 + 2 + 40
        for site, end, _ in self.SITES:
            numbers = through(state, f"control_trans{end}", state[f"wte{end}.weight"])
            check(parts["general"], site, numbers[:LENGTH], 0)
            check(parts["sport-1"], site, numbers[LENGTH + 1 : LENGTH + 2], 0)
            check(parts["category-7"], site, numbers[LENGTH + 2 + 21 : LENGTH + 2 + 24], 0)
        composed = concatenated([parts[name] for name in ("general", "category-7", "sport-1")])
        assert composed.metadata["control_table"] == "sport+category+general"

    @pytest.mark.parametrize("how", ["lightning", "safetensors"])
    def test_parts_know_their_places(self, tmp_path, how):
        state = tensors(**{f"wte{end}__weight": (LENGTH, HIDDEN) for _, end, _ in self.SITES})
        for _, end, _ in self.SITES:
            state |= mlp(f"control_trans{end}")
        for category in ("sources", "cats"):  # safetensors files sort them
            state |= {f"M_Prefixes.wte_{each}{category}.weight": torch.randn(2, HIDDEN) for *_, each in self.SITES}
        folder = saved(tmp_path / "run", state, {"m_prefix_len": 1, "preseqlen": LENGTH}, how=how)
        parts = formats.read(folder, BART).parts
        composed = concatenated([parts["general"], parts["sources-0"], parts["cats-1"]])
        assert composed.metadata["control_table"] == "cats+sources+general"
        for site, end, each in self.SITES:
            rows = [state[f"M_Prefixes.wte_{each}cats.weight"][1:], state[f"M_Prefixes.wte_{each}sources.weight"][:1]]
            whole = torch.cat([*rows, state[f"wte{end}.weight"]])
            check(composed, site, through(state, f"control_trans{end}", whole), 0)

    def test_rows_that_no_config_explains_are_refused(self, tmp_path):
        state = tensors(**{f"wte{end}__weight": (LENGTH + 9, HIDDEN) for _, end, _ in self.SITES})
        for _, end, _ in self.SITES:
            state |= mlp(f"control_trans{end}")
        with pytest.raises(CheckpointError, match=r"expected 5 rows, the preseqlen of config\.json, found 14"):
            read(saved(tmp_path / "run", state, {"preseqlen": LENGTH}), BART)


class TestAdapterHub:
    def state(self, **locations):
        found = {}
        for location, flat in locations.items():
            start = f"bart.prefix_tuning.prefix_tunings.e2e.{location}"
            if flat:
                found[f"{start}.control_trans"] = torch.randn(LENGTH * WIDTH)
            else:
                found[f"{start}.wte.weight"] = torch.randn(LENGTH, HIDDEN)
                found |= mlp(f"{start}.control_trans")
        return found

    def folder(self, path, state, **config):
        own = {
            "architecture": "prefix_tuning",
            "prefix_length": LENGTH,
            "non_linearity": "tanh",
            "leave_out": [],
            **config,
        }
        path.mkdir()
        torch.save(state, path / "pytorch_adapter.bin")
        (path / "adapter_config.json").write_text(json.dumps({"config": own, "version": "adapters.1.2.0"}))
        return path

    @pytest.mark.parametrize("flat", [False, True])
    def test_every_location(self, tmp_path, flat):
        state = self.state(encoder_prefix=flat, self_prefix=flat, cross_prefix=flat)
        folder = self.folder(tmp_path / "adapter", state)
        assert format_of(folder) == "adapterhub"
        prefix = read(folder, BART)
        for site, location in (("encoder", "encoder"), ("decoder", "self"), ("cross", "cross")):
            start = f"bart.prefix_tuning.prefix_tunings.e2e.{location}_prefix"
            expected = (
                state[f"{start}.control_trans"].view(LENGTH, WIDTH)
                if flat
                else through(state, f"{start}.control_trans", state[f"{start}.wte.weight"])
            )
            check(prefix, site, expected, 0)

    def test_the_activation_is_the_configs(self, tmp_path):
        state = self.state(self_prefix=False)
        start = "bart.prefix_tuning.prefix_tunings.e2e.self_prefix"
        prefix = read(self.folder(tmp_path / "adapter", state, non_linearity="relu"), GPT2)
        check(prefix, "decoder", through(state, f"{start}.control_trans", state[f"{start}.wte.weight"], torch.relu), 0)

    @pytest.mark.parametrize(
        ("config", "extra", "found"),
        [
            ({"use_gating": True}, {}, "gates, which depend on the text"),
            ({"leave_out": "1"}, {}, "leave_out: expected numbers of layers"),
            ({"leave_out": [0, 1, 2]}, {}, "expected a prefix for at least one layer, found all left out"),
            ({}, {"bart.layer.0.adapters.e2e.weight": torch.zeros(1)}, "other adapters"),
            ({}, {"bart.layer.0.loras.e2e.lora_A": torch.zeros(1)}, "other adapters"),
            ({"architecture": "union"}, {}, "other adapters"),
            (
                {},
                {"a.pool.prefix_tunings.e2e.self_prefix.control_trans": torch.zeros(LENGTH * WIDTH)},
                "expected the same at every layer",
            ),
        ],
    )
    def test_more_than_a_prefix_is_refused(self, tmp_path, config, extra, found):
        folder = self.folder(tmp_path / "adapter", self.state(self_prefix=True) | extra, **config)
        with pytest.raises(CheckpointError, match=found):
            read(folder, GPT2)

    def test_locations_that_the_model_has_not_are_refused(self, tmp_path):
        folder = self.folder(tmp_path / "adapter", self.state(self_prefix=True, cross_prefix=True))
        with pytest.raises(PrefixMismatchError, match="expected a model with as many kinds of attention"):
            read(folder, GPT2)


class TestSoftPrompts:
    @pytest.mark.parametrize("how", ["npy", "pt", "half"])
    def test_an_array_alone_is_a_soft_prompt(self, tmp_path, how):
        numbers = np.random.default_rng(0).standard_normal((LENGTH, HIDDEN), np.float32)
        path = tmp_path / "prompt"
        if how == "pt":
            torch.save(torch.from_numpy(numbers), path)
        else:
            with path.open("wb") as file:
                np.save(file, numbers.astype(np.float16) if how == "half" else numbers)
        prompt = read(path, GPT2)
        assert isinstance(prompt, SoftPrompt)
        np.testing.assert_allclose(prompt.embeddings, numbers, atol=1e-2 if how == "half" else 0)

    def test_a_prompt_of_another_width_is_refused(self, tmp_path):
        np.save(tmp_path / "prompt.npy", np.zeros((LENGTH, HIDDEN + 8), np.float32))
        with pytest.raises(PrefixMismatchError, match=r"width of 64 \(a soft prompt for 'gpt2'\) or 384"):
            read(tmp_path / "prompt.npy", GPT2)

    def test_an_embedding_table_is_none(self, tmp_path):
        np.save(tmp_path / "table.npy", np.zeros((5000, HIDDEN), np.float32))
        with pytest.raises(CheckpointError, match="at most 4096 positions, found 5000"):
            read(tmp_path / "table.npy", GPT2)


class TestFormatNamed:
    """`--format` overrules what a checkpoint's content says."""

    def gpt2(self, tmp_path):
        state = tensors(wte__weight=(LENGTH, HIDDEN)) | mlp("control_trans")
        return saved(tmp_path / "run", state)

    def test_the_reader_that_is_named_reads(self, tmp_path):
        folder = self.gpt2(tmp_path)
        assert format_of(folder) == "li-liang"
        own, other = (read(folder, GPT2, format_name=name) for name in ("li-liang", "openprompt"))
        assert own == read(folder, GPT2)
        assert (own.source.format, other.source.format) == ("li-liang", "openprompt")
        np.testing.assert_array_equal(own.sites["decoder"][0].key, other.sites["decoder"][0].key)

    def test_what_is_recognised_as_another_familys_is_read_as_named(self, tmp_path):
        state = tensors(**{f"wte{end}__weight": (LENGTH, HIDDEN) for end in ("", "2", "_enc")})
        for end in ("", "2", "_enc"):
            state |= mlp(f"control_trans{end}")
        state |= {f"M_Prefixes.wte_{each}cats.weight": torch.randn(2, HIDDEN) for each in ("", "2_", "enc_")}
        folder = saved(tmp_path / "run", state, {"preseqlen": LENGTH})
        assert format_of(folder) == "control-prefixes"
        check(
            read(folder, BART, format_name="li-liang"),
            "decoder",
            through(state, "control_trans", state["wte.weight"]),
            0,
        )

    @pytest.mark.parametrize(
        ("name", "message"),
        [
            ("prefix-export", "expected a prefix file|expected a whole safetensors file"),
            ("peft", "expected PEFT's tensor 'prompt_embeddings', found tensors 'wte.weight'"),
            ("adapterhub", "expected one prefix tuning, found none"),
            ("p-tuning-v2", "expected a tensor 'prefix_encoder.embedding.weight', found tensors"),
            ("unified-skg", "expected a tensor 'wte_dec.weight', found tensors"),
            ("control-prefixes", "expected a tensor|an MLP control_trans2.0"),
            ("soft-prompt", r"expected one array alone, \[length, width\], found 'wte.weight' \[5, 64\]"),
        ],
    )
    def test_what_it_cannot_read_is_its_own_error(self, tmp_path, name, message):
        folder = self.gpt2(tmp_path)
        with pytest.raises((CheckpointError, PrefixError), match=message):
            read(folder, GPT2, format_name=name)

    def test_a_format_that_is_none_is_refused(self, tmp_path):
        with pytest.raises(CheckpointError, match="format: expected one of prefix-export, peft"):
            read(self.gpt2(tmp_path), GPT2, format_name="other")

"""State dicts with PEFT's own modules in place of an adapter file, against what PEFT saves of the same model."""

from __future__ import annotations

import copy
import json
from collections import OrderedDict
from contextlib import ExitStack

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from prefix_export import formats
from prefix_export.errors import CheckpointError
from prefix_export.formats import SoftPrompt
from prefix_export.models import load_base_model
from prefix_export.models.model_shape import DECODER, ModelShape
from prefix_export.prefixes.fold import fold
from prefix_export.prefixes.reference import CacheReference, PrefixSource, reference
from prefix_runtime import LayerGeometry, PrefixMismatchError

LENGTH, IDS = 5, [5, 6, 7, 9, 200]
LSTM = {"encoder_reparameterization_type": "LSTM", "encoder_num_layers": 3}
KINDS = {
    "prefix": (peft.PrefixTuningConfig, {}),
    "prefix, projection": (peft.PrefixTuningConfig, {"prefix_projection": True, "encoder_hidden_size": 12}),
    "prompt": (peft.PromptTuningConfig, {}),
    "p-tuning, MLP": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12}),
    "p-tuning, LSTM": (peft.PromptEncoderConfig, {"encoder_hidden_size": 12, **LSTM}),
    "multitask": (peft.MultitaskPromptTuningConfig, {"num_tasks": 2, "num_ranks": 2}),
    "CPT": (
        peft.CPTConfig,
        {"cpt_token_ids": [3, 4, 5, 6, 7], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [0, 1, 2, 3, 4],
         "opt_projection_epsilon": 0.3, "opt_projection_format_epsilon": 0.2},
    ),
    "cartridge": (peft.CartridgeConfig, {"num_frozen_tokens": 2}),
}  # fmt: skip
TOLD_BY_MODULES = ("prefix, projection", "p-tuning, MLP", "p-tuning, LSTM", "multitask", "cartridge")


def config_of(kind, task="CAUSAL_LM"):
    config_class, settings = KINDS[kind]
    return config_class(task_type=task, num_virtual_tokens=LENGTH, **settings)


def randomised(module):
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.3)


@pytest.fixture(scope="module")
def llama(workshop):
    """A folder with a Llama of 3 layers with 2 key/value heads of 16, embeddings of 64."""
    return workshop.model("llama")


@pytest.fixture(scope="module")
def base(llama):
    return load_base_model(str(llama))


@pytest.fixture(scope="module")
def shape(base):
    return base.shape


@pytest.fixture(scope="module")
def trained(llama, tmp_path_factory):
    """Of each kind: the whole model's state dict, PEFT's config, and the folder that PEFT saved."""
    plain = AutoModelForCausalLM.from_pretrained(llama)

    def make(kind):
        wrapped = peft.get_peft_model(copy.deepcopy(plain), config_of(kind))
        randomised(wrapped.prompt_encoder)
        state = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
        folder = tmp_path_factory.mktemp("saved")
        wrapped.save_pretrained(folder)
        return state, wrapped.peft_config["default"], folder

    return {kind: make(kind) for kind in KINDS}


def own(state):
    """The part of a state dict that is not the base model's."""
    return {name: tensor for name, tensor in state.items() if name.startswith("prompt_encoder.")}


def arrays(part):
    if isinstance(part, SoftPrompt):
        return [part.embeddings]
    return [array for layer in part.sites["decoder"] for array in (layer.key, layer.value)]


def assert_same(found, saved):
    assert found.parts.keys() == saved.parts.keys()
    for name, part in found.parts.items():
        for left, right in zip(arrays(part), arrays(saved.parts[name]), strict=True):
            assert np.ptp(right) > 0.1
            np.testing.assert_allclose(left, right, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_models_whole_state_dict_is_what_peft_saves_of_it(trained, shape, tmp_path, kind):
    state, config, saved = trained[kind]
    torch.save(state, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    found = formats.read(tmp_path, shape)
    assert_same(found, formats.read(saved, shape))
    (first, *_) = found.parts.values()
    assert first.source.format == f"peft-{config.peft_type.value.lower().replace('_', '-')}"
    assert formats.describe(tmp_path)["stored as"] == "a state dict with PEFT's modules"


@pytest.mark.parametrize("kind", TOLD_BY_MODULES)
def test_modules_tell_the_kind_where_no_config_does(trained, shape, tmp_path, kind):
    state, config, saved = trained[kind]
    torch.save(own(state), tmp_path / "pytorch_model.bin")
    found = formats.read(tmp_path, shape)
    assert_same(found, formats.read(saved, shape))
    assert f"read as {config.peft_type.value}; its base model" in found.warnings[0]


@pytest.mark.parametrize(("kind", "read_as"), [("prefix", "PREFIX_TUNING"), ("prompt", "PROMPT_TUNING")])
def test_a_width_tells_keys_and_values_from_embeddings(trained, shape, tmp_path, kind, read_as):
    state, _, saved = trained[kind]
    save_file(own(state), tmp_path / "model.safetensors")
    found = formats.read(tmp_path, shape)
    assert_same(found, formats.read(saved, shape))
    assert f"read as {read_as}" in found.warnings[0]
    assert formats.describe(tmp_path)["kind"] == "PREFIX_TUNING or PROMPT_TUNING"


def test_a_width_that_tells_nothing_asks_for_the_config(tmp_path):
    shape = ModelShape("tiny", DECODER, {"decoder": (LayerGeometry(1, 8),)}, 16)
    torch.save({"prompt_encoder.default.embedding.weight": torch.randn(3, 16)}, tmp_path / "x.pt")
    with pytest.raises(
        CheckpointError, match=r"16 is the width of keys and values and of embeddings alike, found none"
    ):
        formats.read(tmp_path / "x.pt", shape)


def test_a_width_that_fits_nothing_names_both(shape, tmp_path):
    torch.save({"prompt_encoder.default.embedding.weight": torch.randn(3, 50)}, tmp_path / "x.pt")
    with pytest.raises(PrefixMismatchError, match=r"192 \(keys and values\) or 64 \(embeddings\) for .*, found 50"):
        formats.read(tmp_path / "x.pt", shape)


def test_cpt_without_its_config_says_how_to_write_it(trained, shape, tmp_path):
    torch.save(own(trained["CPT"][0]), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=r"model\.peft_config\['default'\]\.save_pretrained\(FOLDER\)"):
        formats.read(tmp_path / "x.pt", shape)


WRAPPED = {
    "DDP": lambda name: f"module.{name}",
    "Lightning": lambda name: f"model.{name}",
    "compiled": lambda name: f"_orig_mod.{name}",
    "FSDP": lambda name: f"_fsdp_wrapped_module.{name.replace('default.', 'default._fsdp_wrapped_module.')}",
    "an adapter's name": lambda name: name.replace("default", "support_v1"),
    "PEFT before 0.3": lambda name: name.replace("default.", ""),
    "a model that holds PEFT's": lambda name: f"language_model.base_model.model.{name}",
}


@pytest.mark.parametrize("how", WRAPPED)
def test_names_of_wrappers_and_adapters_do_not_matter(trained, shape, tmp_path, how):
    state, _, saved = trained["prefix, projection"]
    torch.save({WRAPPED[how](name): tensor for name, tensor in state.items()}, tmp_path / "x.pt")
    assert_same(formats.read(tmp_path / "x.pt", shape), formats.read(saved, shape))


def deepspeed(state):
    """What DeepSpeed 0.17 writes to mp_rank_00_model_states.pt (`engine._save_checkpoint`, ZeRO-1 and 2)."""
    return {
        "module": state, "buffer_names": [], "optimizer": None,
        "param_shapes": [OrderedDict((name, tensor.shape) for name, tensor in state.items())],
        "lr_scheduler": {"last_batch_iteration": 3}, "sparse_tensor_module_names": set(), "skipped_steps": 0,
        "global_steps": 4, "dp_world_size": 2, "ds_config": {"zero_optimization": {"stage": 2}}, "ds_version": "0.17",
    }  # fmt: skip


NESTED = {
    "Lightning": lambda state: {"epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": state, "loops": {}},
    "DeepSpeed": deepspeed,
    "a training loop": lambda state: {"model": state, "step": 7, "best": 0.5},
    "twice": lambda state: {"state": {"model": state}},
}


@pytest.mark.parametrize("how", NESTED)
def test_what_training_loops_keep_beside_the_weights_is_left(trained, shape, tmp_path, how):
    state, _, saved = trained["prefix"]
    torch.save(NESTED[how](state), tmp_path / "last.ckpt")
    assert_same(formats.read(tmp_path, shape), formats.read(saved, shape))


class TestSeveralAdapters:
    @pytest.fixture(scope="class")
    @classmethod
    def two(cls, llama):
        wrapped = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(llama), config_of("prefix"))
        wrapped.add_adapter("support", config_of("prefix, projection"))
        randomised(wrapped.prompt_encoder)
        return wrapped

    def test_they_are_parts_by_their_names(self, two, shape, tmp_path):
        torch.save(two.state_dict(), tmp_path / "x.pt")
        two.save_pretrained(tmp_path / "saved")
        found = formats.read(tmp_path / "x.pt", shape)
        assert list(found.parts) == ["default", "support"]
        for name, folder in (("default", tmp_path / "saved"), ("support", tmp_path / "saved/support")):
            (part,) = formats.read(folder, shape).parts.values()
            for left, right in zip(arrays(found.parts[name]), arrays(part), strict=True):
                np.testing.assert_allclose(left, right, atol=1e-6)
        assert formats.describe(tmp_path / "x.pt")["adapters"] == "default, support"

    def test_each_has_the_config_in_the_folder_of_its_name(self, two, shape, tmp_path):
        torch.save(two.state_dict(), tmp_path / "x.pt")
        for name, folder in (("default", tmp_path), ("support", tmp_path / "support")):
            config = copy.deepcopy(two.peft_config[name])
            config.base_model_name_or_path = f"somebody/{name}"
            config.save_pretrained(folder)
        found = formats.read(tmp_path / "x.pt", shape).parts
        assert {name: part.metadata["base_model"] for name, part in found.items()} == {
            "default": "somebody/default", "support": "somebody/support"
        }  # fmt: skip
        for name, part in found.items():
            saved = formats.peft.saved(formats.find_reader(tmp_path / "x.pt")[1], name)
            assert (saved.config["base_model_name_or_path"], saved.task) == (f"somebody/{name}", None)
            assert saved.tensors["prompt_embeddings"].size == sum(array.size for array in arrays(part))

    def test_one_that_occurs_twice_is_refused(self, two, shape, tmp_path):
        state = own(two.state_dict())
        averaged = {f"ema.{name}": tensor for name, tensor in state.items()}
        torch.save({"state_dict": state | averaged}, tmp_path / "x.ckpt")
        with pytest.raises(
            CheckpointError, match=r"expected each adapter once, found 'prompt_encoder\.default', 'ema\."
        ):
            formats.read(tmp_path / "x.ckpt", shape)


class TestConfig:
    def test_it_is_found_above_and_said(self, trained, shape, tmp_path):
        state, config, saved = trained["CPT"]
        inner = tmp_path / "out/checkpoint-4/global_step4"
        inner.mkdir(parents=True)
        torch.save(deepspeed(state), inner / "mp_rank_00_model_states.pt")
        config.save_pretrained(tmp_path / "out")
        found = formats.read(tmp_path / "out", shape)
        assert_same(found, formats.read(saved, shape))
        assert "read checkpoint-4/global_step4/mp_rank_00_model_states.pt" in found.warnings[0]
        assert f"{tmp_path / 'out/adapter_config.json'} is taken for its own" in found.warnings[1]

    def test_one_above_of_another_kind_is_none(self, trained, shape, tmp_path):
        state, _, saved = trained["prefix"]
        (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "task_type": "CAUSAL_LM"}))
        (tmp_path / "inner").mkdir()
        torch.save(state, tmp_path / "inner/x.pt")
        assert_same(formats.read(tmp_path / "inner/x.pt", shape), formats.read(saved, shape))

    def test_one_that_its_modules_contradict_is_refused(self, trained, shape, tmp_path):
        torch.save(trained["p-tuning, MLP"][0], tmp_path / "x.pt")
        trained["prompt"][1].save_pretrained(tmp_path)
        with pytest.raises(
            CheckpointError, match=r"peft_type: expected P_TUNING, as the modules in x\.pt are, found PROM"
        ):
            formats.read(tmp_path / "x.pt", shape)

    def test_a_classifiers_head_is_kept_and_no_other_weight(self, llama, shape, tmp_path):
        model = AutoModelForSequenceClassification.from_pretrained(llama, pad_token_id=0)
        wrapped = peft.get_peft_model(model, config_of("prefix", "SEQ_CLS"))
        randomised(wrapped.prompt_encoder)
        torch.save(wrapped.state_dict(), tmp_path / "x.pt")
        wrapped.peft_config["default"].save_pretrained(tmp_path)
        wrapped.save_pretrained(tmp_path / "saved")
        found, saved = (formats.read(path, shape).parts[""].head for path in (tmp_path / "x.pt", tmp_path / "saved"))
        assert list(found) == list(saved) == ["score.weight"]
        np.testing.assert_array_equal(found["score.weight"], saved["score.weight"])


UNSOUND = {
    "of ZeRO-3": ("prefix", {"embedding.weight": (0,)}, r"ZeRO-3"),
    "one layer alone": ("prefix, projection", {"transform.0.bias": None}, r"expected transform\.0\.bias, found"),
    "an MLP for other inputs": ("p-tuning, MLP", {"mlp_head.0.weight": (12, 9)}, r"mlp_head: layer 0 of the MLP"),
    "no embedding": ("p-tuning, MLP", {"embedding.weight": None}, r"expected embedding\.weight, found"),
    "an LSTM of other gates": ("p-tuning, LSTM", {"lstm_head.weight_hh_l1": (48, 7)}, r"lstm_head: expected weights"),
    "an LSTM in one direction": ("p-tuning, LSTM", {"lstm_head.weight_ih_l0_reverse": None}, r"weight_ih_l0_reverse"),
    "CPT of another width": ("CPT", {"delta_embedding.weight": (5, 9)}, r"one width and, for CPT, length, found"),
    "a cartridge of two widths": ("cartridge", {"frozen_embedding": (2, 9)}, r"expected tables of one width"),
    "terabytes": ("prefix, projection", {"embedding.weight": (1 << 20, 1), "transform.0.weight": (1 << 10, 1)},
                  r"expected at most 268435456 numbers from a layer"),
    "an LSTM without end": ("p-tuning, LSTM", {"embedding.weight": (5000, 64)}, r"4096 rows into an LSTM"),
}  # fmt: skip


@pytest.mark.parametrize("what", UNSOUND)
def test_parts_that_do_not_fit_are_refused(trained, shape, tmp_path, what):
    kind, changes, message = UNSOUND[what]
    state = own(trained[kind][0])
    if kind == "CPT":
        trained[kind][1].save_pretrained(tmp_path)
    for tail, axes in changes.items():
        name = f"prompt_encoder.default.{tail}"
        state[name] = torch.ones(axes) if axes is not None else None
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match=message):
        formats.read(tmp_path / "x.pt", shape)


@pytest.mark.parametrize("said", [None, [1, 2], [1, 2, 3, 4, "x"], [True] * 5])
def test_a_config_of_cpt_with_other_numbers_is_refused(trained, shape, tmp_path, said):
    state, config, _ = trained["CPT"]
    torch.save(state, tmp_path / "x.pt")
    config.save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"cpt_tokens_type_mask": said}))
    with pytest.raises(CheckpointError, match="cpt_tokens_type_mask: expected 5 whole numbers"):
        formats.read(tmp_path / "x.pt", shape)


@pytest.mark.parametrize("kind", ["p-tuning, LSTM", "prefix, projection", "multitask"])
def test_answers_are_compared_with_pefts_own(trained, base, tmp_path, kind):
    state, config, _ = trained[kind]
    torch.save(state, tmp_path / "pytorch_model.bin")
    config.save_pretrained(tmp_path)
    # An editor on Windows wrote it, a newer version of PEFT knows more.
    path = tmp_path / "adapter_config.json"
    content = json.dumps(json.loads(path.read_text()) | {"a_newer_key": {"x": 1}}, indent=2)
    path.write_bytes(b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    for part, prefix in fold(tmp_path, base.shape, lambda: base).prefixes.items():
        with ExitStack() as stack:
            with pytest.warns(UserWarning, match="a_newer_key"):  # PEFT's own
                truth = stack.enter_context(reference(base, prefix, PrefixSource(tmp_path, part)))
            assert truth.name.startswith("peft ")
            np.testing.assert_allclose(CacheReference(base.model, prefix).logits(IDS), truth.logits(IDS), atol=1e-4)


def test_without_a_config_they_are_compared_with_transformers(trained, base, tmp_path):
    torch.save(trained["prefix"][0], tmp_path / "x.pt")
    (prefix,) = fold(tmp_path / "x.pt", base.shape, pytest.fail).prefixes.values()
    with reference(base, prefix, PrefixSource(tmp_path / "x.pt")) as truth:
        assert truth.name.startswith("transformers ")

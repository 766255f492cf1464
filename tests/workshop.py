"""Small models of real architectures, adapters that PEFT made for them, and bundles built from both.

Nothing here imports torch, transformers or the exporter before it makes something: the runtime's tests also run where
they are not installed, on bundles that were made before.
"""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerFast

VOCAB_SIZE = 384
CONTEXT = 320
_GPT = {"n_embd": 64, "n_head": 4, "n_layer": 3, "n_positions": CONTEXT}
_LLAMA = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_hidden_layers": 3,
    "intermediate_size": 96,
    "max_position_embeddings": CONTEXT,
}
_SMALL = {**_LLAMA, "num_hidden_layers": 2}  # enough to tell one from the next; each takes a second of every export
_NEOX = dict(_SMALL)
_NEOX.pop("num_key_value_heads")

CONFIGS = {
    "gpt2": ("GPT2Config", _GPT),
    "gpt_bigcode": ("GPTBigCodeConfig", _GPT),
    "opt": (
        "OPTConfig",
        {"hidden_size": 64, "word_embed_proj_dim": 64, "num_attention_heads": 4, "num_hidden_layers": 3, "ffn_dim": 96,
         "max_position_embeddings": CONTEXT},
    ),
    "gpt_neox": ("GPTNeoXConfig", _NEOX),
    "llama": ("LlamaConfig", _LLAMA),
    "qwen2": ("Qwen2Config", _SMALL),
    "qwen3": ("Qwen3Config", {**_SMALL, "head_dim": 16}),
    "phi3": ("Phi3Config", {**_SMALL, "original_max_position_embeddings": CONTEXT, "sliding_window": None}),
    "mistral": ("MistralConfig", {**_SMALL, "sliding_window": None}),
    "gemma": ("GemmaConfig", {**_SMALL, "head_dim": 16}),
    "stablelm": ("StableLmConfig", _SMALL),
    "granite": ("GraniteConfig", {**_SMALL, "attention_multiplier": 1 / 16}),  # as published: 1 / head_dim
    "mistral_windowed": ("MistralConfig", {**_SMALL, "sliding_window": 24}),
    "phi3_longrope": (
        "Phi3Config",
        {
            **_SMALL,
            "original_max_position_embeddings": 64,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 8,
                "long_factor": [4.0] * 8,
            },
        },
    ),
    "llama_dynamic": (
        "LlamaConfig",
        {**_SMALL, "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_head": 4, "n_layer": 3}),
    "gptj": ("GPTJConfig", {**_GPT, "rotary_dim": 8}),
    "t5": ("T5Config", {"d_model": 64, "num_layers": 2, "num_heads": 4, "d_kv": 16, "d_ff": 96}),
}  # fmt: skip


def layers_of(architecture: str) -> int:
    """How many layers a test's model has."""
    name, sizes = CONFIGS[architecture]
    count: int = getattr(transformers(), name)(**sizes).num_hidden_layers
    return count


def with_families(usual: Sequence[object], others: Sequence[object]) -> list[Any]:
    """Values for `parametrize`: the usual ones, and others that `make test-families` runs alone."""
    return [*usual, *(pytest.param(other, marks=pytest.mark.families) for other in others)]


def transformers() -> Any:
    """The library, imported when it is first needed."""
    import transformers

    return transformers


class Workshop:
    """Makes models, adapters and bundles in a folder, each once, whichever of the tests' processes asks first."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def _once(self, folder: Path, make: Callable[[], None]) -> Path:
        """A folder that the first process makes that wants it, while others wait."""
        with (self.root / f"{folder.name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.exists():
                make()
        return folder

    def model(self, architecture: str = "gpt2", *, tokenizer: bool = False, seed: int = 0) -> Path:
        """A folder with a random model whose logits are spread wide enough to tell right from wrong."""
        folder = self.root / f"{architecture}-{seed}{'-text' if tokenizer else ''}"

        def make() -> None:
            import torch

            name, sizes = CONFIGS[architecture]
            special = {"bos_token_id": None, "eos_token_id": 0 if tokenizer else None, "pad_token_id": None}
            config = getattr(transformers(), name)(vocab_size=VOCAB_SIZE, **sizes, **special)
            torch.manual_seed(seed)
            if config.is_encoder_decoder:
                model = transformers().AutoModelForSeq2SeqLM.from_config(config)
            else:
                model = transformers().AutoModelForCausalLM.from_config(config)
            _spread(model)
            model.save_pretrained(folder)
            if tokenizer:
                byte_tokenizer().save_pretrained(folder)

        return self._once(folder, make)

    def adapter(self, model: Path, length: int, *, projection: bool = False, seed: int = 0) -> Path:
        """An adapter folder that PEFT saved: a random prefix of this length."""
        folder = self.root / f"{model.name}-adapter-{length}-{projection}-{seed}"

        def make() -> None:
            import torch
            from peft import PrefixTuningConfig, get_peft_model

            config = PrefixTuningConfig(
                task_type="CAUSAL_LM", num_virtual_tokens=length, prefix_projection=projection, encoder_hidden_size=16
            )
            torch.manual_seed(seed)
            wrapped = get_peft_model(transformers().AutoModelForCausalLM.from_pretrained(model), config)
            for parameter in wrapped.prompt_encoder.parameters():
                torch.nn.init.normal_(parameter)
            wrapped.save_pretrained(folder)

        return self._once(folder, make)

    def family(self, architecture: str) -> Path:
        """The bundle that the comparison of all architectures with PEFT builds, tasks `p10` and `p200`."""
        return self.bundle(architecture, (10, 200), tokenizer=False)

    def bundle(
        self, architecture: str = "gpt2", lengths: tuple[int, ...] = (3, 20), *, tokenizer: bool = True, **options
    ) -> Path:
        """A verified bundle with the tasks `p3`, `p20` and so on, for prefixes of these lengths; not to be changed.

        `options` are fields of the `BuildRequest`.
        """
        chosen = [f"{name}={value}" for name, value in options.items()]
        parts = [architecture, *map(str, lengths), *chosen, *(["text"] if tokenizer else [])]
        folder = self.root / f"{'-'.join(parts)}.bundle"

        def make() -> None:
            from prefix_export.build import BuildRequest, build

            model = self.model(architecture, tokenizer=tokenizer)
            prefixes = {f"p{length}": self.adapter(model, length) for length in lengths}
            build(BuildRequest(str(model), prefixes, folder, **options))

        return self._once(folder, make)


def _spread(model: torch.nn.Module) -> None:
    """Make a random model's answers depend on everything: larger weights, biases and norms that are not trivial."""
    import torch

    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.15)
        elif name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level tokenizer whose characters outside of ASCII are several tokens; id 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["the quick brown fox jumps over the lazy dog " * 4] * 8, trainer)
    return transformers().PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")

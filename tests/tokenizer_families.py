"""Small tokenizers of real families: the parts and files that are published, with a few hundred tokens."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

CORPUS = [
    "the quick brown fox jumps over the lazy dog, don't you know? It 's a test . Yes!",
    "def f(x):\n    return x + 1  # code",
    "naïve café 日本語 and 123 456 numbers; words, words and more words",
] * 4
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
GPT4_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def _write(folder: Path, tokenizer: Tokenizer | None, model_type: str, **config) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if tokenizer is not None:
        tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "config.json").write_text(json.dumps({"model_type": model_type, "transformers_version": "5.23.0"}))


def _special(*contents: str, **flags: bool) -> list[AddedToken]:
    return [AddedToken(content, normalized=False, special=True, **flags) for content in contents]


def _template(*before: str, tokenizer: Tokenizer, after: tuple[str, ...] = ()):
    single = " ".join([*before, "$A", *after])
    pieces = {token: tokenizer.token_to_id(token) for token in (*before, *after)}
    return processors.TemplateProcessing(single=single, special_tokens=list(pieces.items()))


def byte_level(specials: list[str], *, pre_tokenizer=None, size: int = 400) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS,
        trainers.BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def _split_byte_level(specials: list[str]) -> Tokenizer:
    split = pre_tokenizers.Split(Regex(GPT4_SPLIT), "isolated")
    bytes_alone = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return byte_level(specials, pre_tokenizer=pre_tokenizers.Sequence([split, bytes_alone]))


def _sentencepiece_bpe(specials: list[str], *, unknown: str = "<unk>") -> Tokenizer:
    """Merges of `▁` words learnt by a trainer, and bytes for what has no token."""
    learnt = Tokenizer(models.BPE(unk_token=unknown))
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    model = json.loads(learnt.to_str())["model"]
    tokens = [*specials, *BYTES, *(token for token in model["vocab"] if token not in specials)]
    vocab = {token: place for place, token in enumerate(tokens)}
    merges = [tuple(merge) for merge in model["merges"]]
    return Tokenizer(models.BPE(vocab, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))


def gpt2(folder: Path) -> None:
    """Only the files that GPT-2 was published with: no tokenizer.json."""
    state = json.loads(byte_level(["<|endoftext|>"]).to_str())["model"]
    _write(folder, None, "gpt2", model_max_length=1024)
    (folder / "vocab.json").write_text(json.dumps(state["vocab"]))
    merges = [" ".join(merge) for merge in state["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")


def opt(folder: Path) -> None:
    """The start token is `</s>`."""
    tokenizer = byte_level(["<pad>", "</s>", "<unk>"])
    tokenizer.post_processor = _template("</s>", tokenizer=tokenizer)
    names = {"bos_token": "</s>", "eos_token": "</s>", "unk_token": "</s>", "pad_token": "<pad>"}
    _write(
        folder, tokenizer, "opt", tokenizer_class="GPT2Tokenizer", add_bos_token=True, add_prefix_space=False, **names
    )


def gpt_neox(folder: Path) -> None:
    """Runs of spaces are added tokens that are not special."""
    tokenizer = byte_level(["<|endoftext|>", "<|padding|>"])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_tokens([AddedToken(" " * count, normalized=True, special=False) for count in (8, 4, 2)])
    name = "<|endoftext|>"
    _write(
        folder, tokenizer, "gpt_neox", tokenizer_class="GPTNeoXTokenizer", bos_token=name, eos_token=name,
        unk_token=name, add_prefix_space=False,
    )  # fmt: skip


def llama2(folder: Path) -> None:
    """`▁` before the first word, bytes for what has no token, a start token."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special("<unk>", "<s>", "</s>"))
    tokenizer.post_processor = _template("<s>", tokenizer=tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(
        folder, tokenizer, "llama", tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False,
        clean_up_tokenization_spaces=False, legacy=False, **names,
    )  # fmt: skip


def mistral(folder: Path) -> None:
    """As Llama 2's, with `▁` from the pre-tokenizer, and control tokens."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>", "[INST]", "[/INST]"])
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special("<unk>", "<s>", "</s>", "[INST]", "[/INST]"))
    tokenizer.post_processor = _template("<s>", tokenizer=tokenizer)
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    _write(folder, tokenizer, "mistral", tokenizer_class="LlamaTokenizer", add_bos_token=True, legacy=True, **names)


def phi3(folder: Path) -> None:
    """Control tokens that swallow the spaces behind them."""
    tokenizer = _sentencepiece_bpe(["<unk>", "<s>", "</s>"])
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(_special("<unk>", "<s>"))
    tokenizer.add_tokens([AddedToken("</s>", normalized=False, rstrip=True, special=False)])
    tokenizer.add_special_tokens(_special("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>", rstrip=True))
    tokenizer.post_processor = _template(tokenizer=tokenizer)
    names = {"bos_token": "<s>", "eos_token": "<|endoftext|>", "unk_token": "<unk>", "pad_token": "<|endoftext|>"}
    _write(
        folder, tokenizer, "phi3", tokenizer_class="LlamaTokenizer", add_bos_token=False, add_eos_token=False,
        legacy=False, **names,
    )  # fmt: skip


def gemma(folder: Path) -> None:
    """Spaces become `▁`, none is added; a start token."""
    tokenizer = _sentencepiece_bpe(["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>"])
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens(_special("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>"))
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False, special=False)])
    tokenizer.post_processor = _template("<bos>", tokenizer=tokenizer)
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "unk_token": "<unk>", "pad_token": "<pad>"}
    _write(folder, tokenizer, "gemma", tokenizer_class="GemmaTokenizer", add_bos_token=True, **names)


def llama3(folder: Path) -> None:
    """Byte-level with a pattern of its own; its file asks for a clean-up of spaces, which BPE does not get."""
    tokenizer = _split_byte_level(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    trim = processors.ByteLevel(add_prefix_space=True, trim_offsets=False)
    tokenizer.post_processor = processors.Sequence([trim, _template("<|begin_of_text|>", tokenizer=tokenizer)])
    names = {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}
    _write(
        folder,
        tokenizer,
        "llama",
        tokenizer_class="PreTrainedTokenizerFast",
        clean_up_tokenization_spaces=True,
        **names,
    )


def qwen2(folder: Path) -> None:
    """Control tokens of a chat, no start token."""
    tokenizer = _split_byte_level([])
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(_special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False, special=False)])
    _write(
        folder, tokenizer, "qwen2", tokenizer_class="Qwen2Tokenizer", add_prefix_space=False, bos_token=None,
        eos_token="<|im_end|>", pad_token="<|endoftext|>", split_special_tokens=False,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


def bert(folder: Path) -> None:
    """WordPiece, lower case, tokens before and behind; its spaces are cleaned up."""
    specials = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=220, special_tokens=specials, show_progress=False)
    )
    tokenizer.post_processor = _template("[CLS]", tokenizer=tokenizer, after=("[SEP]",))
    _write(folder, tokenizer, "bert", tokenizer_class="BertTokenizer", clean_up_tokenization_spaces=True)


def _unigram(specials: list[str], unknown: str) -> list[list]:
    learnt = Tokenizer(models.Unigram())
    learnt.pre_tokenizer = pre_tokenizers.Metaspace()
    learnt.train_from_iterator(
        CORPUS,
        trainers.UnigramTrainer(vocab_size=150, special_tokens=specials, unk_token=unknown, show_progress=False),
    )
    vocab = json.loads(learnt.to_str())["model"]["vocab"]
    return [*([special, 0.0] for special in specials), *(row for row in vocab if row[0] not in specials)]


def t5(folder: Path) -> None:
    """Unigram, with an end token behind, sentinels, and a clean-up of spaces."""
    specials = ["<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([tuple(row) for row in _unigram(specials, "<unk>")], unk_id=2))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Replace(Regex(" {2,}"), " ")])
    words = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(), words])
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    sentinels = ["<extra_id_1>", "<extra_id_0>"]
    tokenizer.add_special_tokens(_special(*specials, *sentinels))
    tokenizer.post_processor = _template(tokenizer=tokenizer, after=("</s>",))
    _write(
        folder, tokenizer, "t5", tokenizer_class="T5Tokenizer", extra_ids=2, additional_special_tokens=sentinels,
        eos_token="</s>", unk_token="<unk>", pad_token="<pad>", clean_up_tokenization_spaces=True,
    )  # fmt: skip


def xlm_roberta(folder: Path) -> None:
    """Unigram between `<s>` and `</s>`; the mask swallows the space before it."""
    specials = ["<s>", "<pad>", "</s>", "<unk>"]
    tokenizer = Tokenizer(models.Unigram([tuple(row) for row in _unigram(specials, "<unk>")], unk_id=3))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    tokenizer.add_special_tokens([*_special(*specials), *_special("<mask>", lstrip=True)])
    tokenizer.post_processor = _template("<s>", tokenizer=tokenizer, after=("</s>",))
    _write(folder, tokenizer, "xlm-roberta", tokenizer_class="XLMRobertaTokenizer", clean_up_tokenization_spaces=True)


def word_level(folder: Path) -> None:
    """Whole words, no decoder, added tokens of every kind, and a file that truncates and pads."""
    tokenizer = Tokenizer(models.WordLevel(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=["[UNK]"], show_progress=False))
    tokenizer.add_tokens(
        [
            AddedToken("<left>", lstrip=True, special=False),
            AddedToken("<right>", rstrip=True, special=False),
            AddedToken("word", single_word=True, special=False),
        ]
    )
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=12, pad_token="[UNK]")
    _write(
        folder, tokenizer, "gpt2", tokenizer_class="PreTrainedTokenizerFast", unk_token="[UNK]",
        clean_up_tokenization_spaces=True,
    )  # fmt: skip


def splitting(folder: Path) -> None:
    """A file that asks for special tokens in a text to be read as text."""
    tokenizer = byte_level(["<|end|>"])
    tokenizer.post_processor = _template("<|end|>", tokenizer=tokenizer)
    _write(
        folder, tokenizer, "gpt2", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>",
        split_special_tokens=True,
    )  # fmt: skip


def forced_clean_up(folder: Path) -> None:
    """A BPE tokenizer whose file insists on the clean-up of spaces."""
    _write(
        folder, byte_level(["<|end|>"]), "gpt2", tokenizer_class="PreTrainedTokenizerFast", eos_token="<|end|>",
        clean_up_tokenization_spaces=True,
        clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output=True,
    )  # fmt: skip


def prefix_space(folder: Path) -> None:
    """A start and an end token, and a space before the first word, by tokenizer_config.json alone."""
    tokenizer = byte_level(["<s>", "</s>"])
    _write(
        folder, tokenizer, "gpt2", tokenizer_class="GPT2Tokenizer", bos_token="<s>", eos_token="</s>", unk_token="</s>",
        add_bos_token=True, add_eos_token=True, add_prefix_space=True,
    )  # fmt: skip


FAMILIES = (
    bert, forced_clean_up, gemma, gpt2, gpt_neox, llama2, llama3, mistral, opt, phi3, prefix_space, qwen2, splitting,
    t5, word_level, xlm_roberta,
)  # fmt: skip

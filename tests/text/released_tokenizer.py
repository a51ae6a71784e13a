"""A folder as a released model has it: tokenizer.json and its settings, with few tokens."""

import json
from pathlib import Path

import tokenizers
from tokenizer_checks import BOS, EOS, TEXTS

from minids.text import bpe
from minids.text.bpe import SPECIAL

SPLITS = (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", "|".join((
    r"[!-/:-@\[-`{-~][A-Za-z]+", r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",
    r" ?[\p{P}\p{S}]+[\r\n]*", r"\s*[\r\n]+", r"\s+(?!\S)", r"\s+")))
PAD = "<\uff5c\u2581pad\u2581\uff5c>"
MARKED = [*SPECIAL[14:], "<|EOT|>"]  # special in the file; those of UNMARKED are only "added"
UNMARKED = [*SPECIAL[2:14]]
LEARNT_FROM = TEXTS[2][:8000] + ("\u4e2d\u6587\u5206\u8bcd\u3068\u304b\u306a "
                                 "na\u00efve caf\u00e9 \U0001f642\U0001f680 ") * 40
UNUSED_BYTES = [0xC0, 0xC1, *range(0xF5, 0x100)]  # in no UTF-8 text


def miniature(alphabet) -> tokenizers.Tokenizer:
    """Return a tokenizer of 700 tokens, starting with BOS, EOS and padding, plus added tokens."""
    engine = tokenizers.Tokenizer(tokenizers.models.BPE())
    byte_level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    engine.normalizer = tokenizers.normalizers.Sequence([])
    engine.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [*(tokenizers.pre_tokenizers.Split(tokenizers.Regex(split), "isolated")
           for split in SPLITS), byte_level])
    engine.decoder = tokenizers.decoders.ByteLevel()
    engine.post_processor = tokenizers.processors.ByteLevel(trim_offsets=False)
    engine.train_from_iterator([LEARNT_FROM], tokenizers.trainers.BpeTrainer(
        vocab_size=700, show_progress=False, initial_alphabet=alphabet,
        special_tokens=[BOS, EOS, PAD]))
    engine.add_special_tokens([tokenizers.AddedToken(text, normalized=False) for text in MARKED])
    engine.add_tokens([tokenizers.AddedToken(text, normalized=False) for text in UNMARKED])
    return engine


def added(content: str) -> dict:
    """Return a token in the form of tokenizer_config.json."""
    return {"__type": "AddedToken", "content": content, "lstrip": False, "normalized": True,
            "rstrip": False, "single_word": False}


V3_CONFIG = {"add_bos_token": True, "add_eos_token": False, "bos_token": added(BOS),
             "eos_token": added(EOS), "pad_token": added(EOS), "legacy": True, "unk_token": None,
             "clean_up_tokenization_spaces": False, "model_max_length": 131072,
             "tokenizer_class": "LlamaTokenizerFast"}


def write_released(folder: Path, alphabet=None) -> Path:
    """Write tokenizer.json and tokenizer_config.json of the miniature."""
    folder.mkdir(parents=True, exist_ok=True)
    miniature(alphabet or list(bpe.printable_bytes())).save(str(folder / bpe.TOKENIZER))
    (folder / bpe.TOKENIZER_CONFIG).write_text(json.dumps(V3_CONFIG), "utf-8")
    return folder

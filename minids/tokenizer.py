"""Text to tokens: a byte-level BPE, trained once and run through tiktoken.

    python -m minids.tokenizer                                    # rebuilds data/tokenizer
    python -m minids.tokenizer --vocab-size 8192 --out tok8192    # a larger one beside it
    python -m minids.tokenizer --data text:my_texts --out my_tok  # from your own text

A model reads integers. Byte-pair encoding (Sennrich et al., arXiv 1508.07909) starts with the 256
bytes, so that every text has an encoding, and then gives the most frequent neighbouring pair of
tokens an id of its own, again and again, until the vocabulary is full. A split pattern first cuts
the text into words, numbers, punctuation and space, and no token crosses a cut.

The order of the ids is fixed: the special tokens (DeepSeek's strings; begin of sentence is 0 and
end of sentence 1), the bytes 0 to 255, then the merges, the earliest first. A special token is
only ever placed by its id: `encode` takes text that spells one as ordinary text, so a user's
message can neither end the conversation nor speak for the assistant. The rows up to the next
multiple of 64 exist in the model and stay unused.

A folder holds `ranks.tiktoken` (one `base64(token) id` a line, tiktoken's own format) and
`meta.json` (pattern, special tokens, fingerprint, and how it was made). `save_hf` writes the same
tokenizer as transformers reads it; a released model's folder (`tokenizer.json`) is used as it is.

Different from DeepSeek-V3 (arXiv 2412.19437, section 4.1): thousands of tokens in place of 128K;
runs of Chinese characters and kana are not cut apart from other letters; tokens that join
punctuation with a line break are never split at random.
"""

import base64
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import tiktoken
import torch

from minids.base.command_line import parse, run_program
from minids.base.fields import check_types, option, require

DEFAULT = Path(__file__).resolve().parent.parent / "data" / "tokenizer"
RANKS, META = "ranks.tiktoken", "meta.json"
RELEASED = TOKENIZER, TOKENIZER_CONFIG, CONFIG = (
    "tokenizer.json", "tokenizer_config.json", "config.json")
ROW_MULTIPLE = 64  # rows of the embedding and the head: a width that matrix units like

SPECIAL = (
    "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>",
    "<think>", "</think>", "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>",
    "<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>",
    "<｜tool▁calls▁end｜>", *(f"<｜place▁holder▁no▁{i}｜>" for i in range(10)))
SMALLEST = len(SPECIAL) + 256

# DeepSeek-V3's pattern, and a last alternative for what it leaves over (control characters, say):
# tiktoken silently drops a character that no alternative matches. The bounds of 256 keep the
# matcher, which goes back step by step, from running out of stack on a megabyte of spaces.
PATTERN = "|".join((
    r"\p{N}{1,3}",                                # up to three digits
    r"[!-/:-@\[-`{-~][A-Za-z]+",                  # a word with the ASCII punctuation before it
    r"[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+",     # a word with a space before it
    r" ?[\p{P}\p{S}]+[\r\n]*",                   # punctuation, to the end of the line
    r"\s{0,256}[\r\n]+",                         # blank lines
    r"\s{1,256}(?!\S)",                          # space, but the one before a word
    r"\s",
    r"[^\s\p{L}\p{M}\p{N}\p{P}\p{S}]+"))         # the rest
INVALID = re.compile("([\udc80-\udcff]+)")       # what "surrogateescape" makes of bad bytes
EVERY_BYTE = "".join(map(chr, (                  # each byte that UTF-8 uses, and capitals, accents
    *range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x30000))))


class Tokenizer:
    """Text to ids and back; made by `Tokenizer.train` or `Tokenizer.load`.

    n_tokens: one past the highest id; vocab_size: the same, padded to a multiple of 64: the
        model's rows
    special: id of each special token's string; the common ones are attributes, `bos_id` and so on
    pattern: the regular expression that cuts the text
    made: how it was made: corpus, sizes, versions
    fingerprint: 16 hex digits over ids, special tokens and pattern, so of all that decides
        how a text is encoded; a checkpoint keeps it and takes no other
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str, made: dict):
        self.pattern, self.made = pattern, made
        self._number(ranks, special)
        self.fingerprint = fingerprint(ranks, special, pattern)
        # tiktoken never hears of the special tokens: no text can become one
        self._encoding = tiktoken.Encoding(name=self.fingerprint, pat_str=pattern,
                                           mergeable_ranks=ranks, special_tokens={})

    def _number(self, ranks: dict[bytes, int], special: dict[str, int], rows: int = 0) -> None:
        """Set the sizes and what each id stands for; rows: the model's, where they are known."""
        self.ranks, self.special = ranks, special
        self.n_tokens = 1 + max([*ranks.values(), *special.values()])
        padded = -(-self.n_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
        self.vocab_size = rows if rows >= self.n_tokens else padded
        (self.bos_id, self.eos_id, self.user_id, self.assistant_id, self.think_id,
         self.end_think_id, self.fim_begin_id, self.fim_hole_id, self.fim_end_id) = (
            special.get(text) for text in SPECIAL[:9])
        self._bytes = [b""] * self.vocab_size
        for text, token in special.items():
            self._bytes[token] = text.encode()
        for piece, token in ranks.items():
            self._bytes[token] = piece

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, corpus: str = "") -> "Tokenizer":
        """Learn the merges from `texts`: the same for any order of the texts and any threads.

        vocab_size: ids in all, the special tokens and the bytes among them; the text may give
            fewer, since a pair that is seen once is never merged
        corpus: a name for the texts, kept in `made`
        Raises `ValueError` if vocab_size leaves no room for the special tokens and the bytes.
        """
        if vocab_size < SMALLEST:
            raise ValueError(f"vocab_size = {vocab_size} is not valid: it must be at least "
                             f"{SMALLEST} ({len(SPECIAL)} special tokens and 256 bytes)")
        import tokenizers  # training only: whoever runs a trained one does without it
        log = CorpusLog()
        merged = learn_merges(log.read(texts), vocab_size - SMALLEST)
        pieces = [bytes([b]) for b in range(256)] + merged
        made = {"corpus": corpus, **log.summary(), "vocab_size": vocab_size,
                "tokenizers": tokenizers.__version__, "python": platform.python_version()}
        return cls({piece: len(SPECIAL) + i for i, piece in enumerate(pieces)},
                   {text: i for i, text in enumerate(SPECIAL)}, PATTERN, made)

    @classmethod
    def load(cls, folder: str | Path = DEFAULT) -> "Tokenizer":
        """Read what `save` wrote, or a released model's `tokenizer.json`; without a folder, the
        one that comes with minids.

        Raises `ValueError` naming the folder if a file is missing, cut short or changed.
        """
        folder = Path(folder)
        ours = (folder / RANKS).exists() or (folder / META).exists()
        if not ours and (folder / TOKENIZER).exists():
            return ReleasedTokenizer.load(folder)
        try:
            meta = json.loads((folder / META).read_text("utf-8"))
            ranks = read_ranks(folder / RANKS)
            special, pattern = meta["special"], meta["pattern"]
            if fingerprint(ranks, special, pattern) != meta["fingerprint"]:
                raise ValueError(f"{RANKS} and {META} do not belong together")
            return cls(ranks, special, pattern, meta["made"])
        except (FileNotFoundError, NotADirectoryError) as error:
            problem = f"{Path(error.filename).name} is missing, or a released {TOKENIZER}"
        except KeyError as error:
            problem = f"{META} has no {error}"
        except (ValueError, TypeError) as error:
            problem = str(error)
        raise ValueError(f"no whole tokenizer in {folder}: {problem}; build one with "
                         f"python -m minids.tokenizer --out {folder}")

    @classmethod
    def open(cls, name: str) -> "Tokenizer":
        """The tokenizer that a program's flag names: a folder, `bytes`, or nothing for our own.

        Without merges a token is a byte: the vocabulary of models too small for another.
        """
        if name == "bytes":
            return cls.train([], SMALLEST, "none: bytes")
        return cls.load(name) if name else cls.load()

    def save(self, folder: str | Path) -> None:
        """Write the two files; a tokenizer that is already there is replaced.

        Raises `ValueError` if the folder holds something else.
        """
        folder = Path(folder)
        check_target(folder)
        folder.mkdir(parents=True, exist_ok=True)
        meta = {"fingerprint": self.fingerprint, "n_tokens": self.n_tokens, "made": self.made,
                "pattern": self.pattern, "special": self.special}
        lines = [rank_line(piece, token) for piece, token in self.ranks.items()]
        replace_file(folder / RANKS, "".join(line + "\n" for line in lines))
        replace_file(folder / META, json_text(meta))

    def save_hf(self, folder: str | Path) -> None:
        """Write it for transformers: `AutoTokenizer.from_pretrained(folder)` gives the same ids.

        Other files in the folder stay. There too, no text becomes a special token (call it with
        split_special_tokens=False where one should) and nobody adds BOS unasked.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        engine = to_library(self.ranks, self.special, self.pattern)
        bos, eos = SPECIAL[:2]
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos,
                  "eos_token": eos, "split_special_tokens": True,
                  "clean_up_tokenization_spaces": False}
        replace_file(folder / TOKENIZER, engine.to_str(pretty=True) + "\n")
        replace_file(folder / TOKENIZER_CONFIG, json_text(config))

    def encode(self, text: str | bytes) -> list[int]:
        """The ids of a text, never a special one; `decode_bytes` gives the same bytes back.

        text: any text or any bytes. Bytes that are not UTF-8 become one token each; so does a
            lone surrogate, which a str can hold and UTF-8 cannot, as its three bytes.
        """
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        try:
            return self._encode_text(raw.decode("utf-8"))
        except UnicodeDecodeError:
            return self._encode_invalid(raw)

    def _encode_text(self, text: str) -> list[int]:
        """`encode` for text that UTF-8 can hold."""
        return self._encoding.encode_ordinary(text)

    def _encode_invalid(self, raw: bytes) -> list[int]:
        """`encode` for bytes that are not UTF-8: valid stretches as text, the rest byte by byte."""
        stretches = INVALID.split(raw.decode("utf-8", "surrogateescape"))
        ids = []
        for i, stretch in enumerate(stretches):  # valid, invalid, valid, ...
            if i % 2 == 0:
                ids += self._encode_text(stretch)
            else:
                bad = stretch.encode("utf-8", "surrogateescape")
                ids += [self._byte_id(b) for b in bad]
        return ids

    def _byte_id(self, byte: int) -> int:
        """The id of a single byte; a released vocabulary may lack those that no UTF-8 has."""
        try:
            return self.ranks[bytes([byte])]
        except KeyError:
            raise ValueError(f"byte 0x{byte:02x} has no token in this vocabulary") from None

    def encode_batch(self, texts: Iterable[str | bytes], threads: int) -> list[list[int]]:
        """`encode` of each text, on `threads` threads: the libraries run outside Python's lock."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """The bytes of the ids: a special token's is its string, an unused id's is nothing.

        Raises `ValueError` naming an id outside 0 .. vocab_size - 1.
        """
        pieces = []
        for token in ids:
            if not 0 <= token < self.vocab_size:
                raise ValueError(f"id {int(token)} is not in the vocabulary: "
                                 f"valid are 0 to {self.vocab_size - 1}")
            pieces.append(self._bytes[token])
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """`decode_bytes` as text; bytes that are not UTF-8 become U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def n_bytes(self) -> torch.Tensor:
        """(vocab_size,) int64, bytes of text in each token: 0 for the special and the unused."""
        lengths = torch.tensor([len(piece) for piece in self._bytes])
        lengths[list(self.special.values())] = 0
        return lengths


class ReleasedTokenizer(Tokenizer):
    """A released model's `tokenizer.json`, byte-level BPE, behind the same methods.

    The `tokenizers` library runs it, with the file's added tokens taken out: it would find them
    in plain text. It can be told not to, but only for those that are marked special, and
    `<｜User｜>` for one need not be.

    special: all added tokens, BOS and EOS. A common one that the file lacks is None, `fim_hole_id`
        for example; BOS and EOS are what the files say (`end_id`), whatever they are called
    vocab_size: the rows of the model whose config.json lies beside, else padded as for our own
    files: what the files hold, by name; `save` writes it again
    """

    def __init__(self, files: dict[str, dict]):
        self.files, self.made = files, {}
        spec, *configs = (files.get(name, {}) for name in RELEASED)
        engine = read_engine(spec)
        check_byte_level(spec, type(engine.model).__name__)
        vocab = engine.get_vocab(with_added_tokens=False)
        special = {token.content: i for i, token in engine.get_added_tokens_decoder().items()}
        bos, eos = (end_id(end, vocab | special, *configs) for end in ("bos", "eos"))
        special |= {token: i for token, i in vocab.items() if i in (bos, eos)}
        rows = configs[1].get("vocab_size")
        self._number(byte_ranks(vocab, special), special, rows if isinstance(rows, int) else 0)
        self.bos_id, self.eos_id = bos, eos
        self.fingerprint = digest([spec, bos, eos])
        self._engine = read_engine(without_added(spec, special))
        self._check_lossless()

    @classmethod
    def load(cls, folder: str | Path) -> "ReleasedTokenizer":
        """Read tokenizer.json, and tokenizer_config.json and config.json where there are such.

        Raises `ValueError` naming folder, file and field.
        """
        paths = [Path(folder) / name for name in RELEASED]
        try:
            return cls({path.name: read_object(path) for path in paths if path.exists()})
        except ValueError as error:
            raise ValueError(f"no usable tokenizer in {folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write what was read; a tokenizer.json that is already there is replaced.

        Raises `ValueError` if the folder holds something else.
        """
        check_target(Path(folder), TOKENIZER)
        self.save_hf(folder)
        if CONFIG in self.files:
            replace_file(Path(folder) / CONFIG, json_text(self.files[CONFIG]))

    def save_hf(self, folder: str | Path) -> None:
        """`save` without config.json, which is a model's; other files in the folder stay."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        for name in (TOKENIZER, TOKENIZER_CONFIG):
            if name in self.files:
                replace_file(folder / name, json_text(self.files[name]))

    def _encode_text(self, text: str) -> list[int]:
        """`encode` for text that UTF-8 can hold; nothing is added to it."""
        return self._engine.encode(text, add_special_tokens=False).ids

    def _check_lossless(self) -> None:
        """Raise `ValueError` if text comes back changed: by a normalizer, a space in front, ..."""
        for text in (EVERY_BYTE, f" {EVERY_BYTE}  "):
            if self.decode(self.encode(text)) != text:
                raise ValueError(f"{TOKENIZER} does not keep all text: its normalizer must be "
                                 "empty, its vocabulary have all bytes, ByteLevel add no space")


class CorpusLog:
    """Counts and hashes the texts on their way to the trainer."""

    def __init__(self):
        self.digest, self.documents, self.bytes = hashlib.sha256(), 0, 0

    def read(self, texts: Iterable[str]) -> Iterator[str]:
        """The texts, a lone surrogate replaced by '?': the trainer takes UTF-8 only."""
        for text in texts:
            raw = text.encode("utf-8", "replace")
            self.documents += 1
            self.bytes += len(raw)
            self.digest.update(hashlib.sha256(raw).digest())
            yield raw.decode("utf-8")

    def summary(self) -> dict:
        """What was read so far."""
        return {"sha256": self.digest.hexdigest(), "documents": self.documents,
                "bytes": self.bytes}


def learn_merges(texts: Iterable[str], n_merges: int) -> list[bytes]:
    """The merged tokens in the order in which BPE finds them, `n_merges` at most.

    Of two pairs equally frequent, the one whose parts the trainer numbered lower goes first: the
    bytes in the order of their printable characters, then the merges. The texts' order and the
    threads play no part.
    """
    from tokenizers import models, trainers

    bpe = byte_level_bpe(models.BPE(), PATTERN)
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=256 + n_merges, min_frequency=2, show_progress=False,
        initial_alphabet=list(printable_bytes())))
    pieces = byte_ranks(bpe.get_vocab())
    return sorted((piece for piece in pieces if len(piece) > 1), key=pieces.get)


def byte_level_bpe(model, pattern: str):
    """The library's tokenizer: cuts text by `pattern`, spells it in its alphabet and merges."""
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Engine

    engine = Engine(model)
    engine.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(pattern), "isolated"),
         pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return engine


def to_library(ranks: dict[bytes, int], special: dict[str, int], pattern: str):
    """The same tokenizer in the `tokenizers` library, the special tokens as special there."""
    from tokenizers import AddedToken, decoders, models, processors

    char_of = {byte: c for c, byte in printable_bytes().items()}
    spelled = {piece: "".join(char_of[b] for b in piece) for piece in ranks}
    vocab = special | {spelled[piece]: token for piece, token in ranks.items()}
    merges = [(spelled[left], spelled[right]) for left, right in merge_pairs(ranks)]
    engine = byte_level_bpe(models.BPE(vocab=vocab, merges=merges), pattern)
    engine.add_special_tokens([AddedToken(text, normalized=False) for text in special])
    engine.decoder = decoders.ByteLevel()
    engine.post_processor = processors.ByteLevel(trim_offsets=False)
    return engine


def merge_pairs(ranks: dict[bytes, int]) -> list[tuple[bytes, bytes]]:
    """The pair that each merged token is made of, the earliest merge first.

    tiktoken keeps no merges: it joins any two neighbours whose bytes together are a token, the
    lowest rank first. The library joins listed pairs only. Both agree, since what happens inside
    a token's bytes before it is whole never depends on the bytes around it.
    """
    merged = sorted((piece for piece in ranks if len(piece) > 1), key=ranks.get)
    return [split_below(piece, ranks) for piece in merged]


def split_below(piece: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts that BPE makes of a token by the ranks below its own: b"the" -> b"t", b"he".

    Raises `ValueError` if it makes more: no merge would ever give that token.
    """
    parts, own = [bytes([b]) for b in piece], ranks[piece]
    while len(parts) > 2:
        joined = [ranks.get(a + b, own) for a, b in pairwise(parts)]
        i = joined.index(min(joined))
        if joined[i] >= own:
            raise ValueError(f"token {piece!r} is not the merge of two earlier ones")
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return parts[0], parts[1]


def read_engine(spec: dict):
    """The library's tokenizer from what a tokenizer.json holds."""
    from tokenizers import Tokenizer as Engine

    model = spec.get("model")
    if isinstance(model, dict) and "merges" in model and model.get("continuing_subword_prefix"):
        raise ValueError(f"{TOKENIZER} has a continuing_subword_prefix, which no byte-level BPE "
                         "has")  # with one, the library may end the whole process
    try:
        return Engine.from_str(json.dumps(spec))
    except Exception as error:  # the library raises nothing narrower
        raise ValueError(f"{TOKENIZER} cannot be read: {error}") from error


def check_byte_level(spec: dict, model: str) -> None:
    """Raise `ValueError` naming what a tokenizer.json is, if it is no byte-level BPE."""
    cutter = spec.get("pre_tokenizer") or {}
    kinds = [part["type"] for part in cutter.get("pretokenizers", [cutter]) if part]
    if model != "BPE" or "ByteLevel" not in kinds:
        raise ValueError(f"{TOKENIZER} has the model {model} and the pre_tokenizer "
                         f"{', '.join(kinds) or 'null'}: only BPE with ByteLevel is read")


def end_id(end: str, ids: dict[str, int], tokenizer_config: dict, config: dict) -> int:
    """The id of BOS or EOS (`end`: "bos" or "eos"): what tokenizer_config.json names, else what
    config.json numbers (of several, the first), else DeepSeek's."""
    name, number = tokenizer_config.get(f"{end}_token"), config.get(f"{end}_token_id")
    if isinstance(name, dict):
        name = name.get("content")
    if isinstance(number, list):
        number = number[0] if number else None
    if name is not None:
        what = f"{TOKENIZER_CONFIG}: {end}_token = {name!r}"
        found = ids.get(name) if isinstance(name, str) else None
    elif number is not None:
        what = f"{CONFIG}: {end}_token_id = {number!r}"
        found = number if type(number) is int and number in ids.values() else None
    else:
        name = SPECIAL[end == "eos"]
        what = f"{TOKENIZER_CONFIG} has no {end}_token, {CONFIG} no {end}_token_id, and {name}"
        found = ids.get(name)
    if found is None:
        raise ValueError(f"{what} is not in {TOKENIZER}")
    return found


def byte_ranks(vocab: dict[str, int], special: Iterable[str] = ()) -> dict[bytes, int]:
    """The bytes of each token that is not special, from their printable characters."""
    byte_of = printable_bytes()
    try:
        return {bytes([byte_of[c] for c in token]): i for token, i in vocab.items()
                if token not in special}
    except KeyError as error:
        raise ValueError(f"{TOKENIZER} is not byte-level: it has a token with {error}, which "
                         "stands for no byte") from error


def without_added(spec: dict, special: dict[str, int]) -> dict:
    """A tokenizer.json that knows no added token, not even as part of the vocabulary, and that
    neither cuts nor pads: it takes any text as text."""
    vocab = {token: i for token, i in spec["model"]["vocab"].items() if token not in special}
    off = dict.fromkeys(("truncation", "padding", "post_processor"))
    model = spec["model"] | {"vocab": vocab, "unk_token": None, "dropout": None}
    return spec | off | {"added_tokens": [], "model": model}


def printable_bytes() -> dict[str, int]:
    """GPT-2's alphabet, in which the library works: each byte by a printable character."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def fingerprint(ranks: dict[bytes, int], special: dict[str, int], pattern: str) -> str:
    """16 hex digits of sha256 over all that decides how a text is encoded."""
    return digest([pattern, special, {piece.hex(): token for piece, token in ranks.items()}])


def digest(parts: list) -> str:
    """16 hex digits of sha256 over what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rank_line(piece: bytes, token: int) -> str:
    """One line of tiktoken's format."""
    return f"{base64.b64encode(piece).decode()} {token}"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read `base64(token) id` lines; raises `ValueError` naming the first bad line.

    tiktoken's own reader keeps a copy by path: after retraining it would return the old ranks.
    """
    ranks = {}
    for number, line in enumerate(path.read_text("utf-8").removesuffix("\n").split("\n"), 1):
        code, _, token = line.partition(" ")
        try:
            piece, token = base64.b64decode(code), int(token)
        except ValueError:
            piece, token = b"", -1
        if line != rank_line(piece, token):  # no other spelling: a flipped bit never passes
            raise ValueError(f"{path.name}, line {number} is not 'base64 id'")
        ranks[piece] = token
    return ranks


def replace_file(path: Path, text: str) -> None:
    """Write a file whole or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, "utf-8", newline="\n")
    os.replace(temporary, path)


def read_object(path: Path) -> dict:
    """The JSON object in a file; raises `ValueError` naming a file that holds none."""
    try:
        value = json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path.name} cannot be read: it holds no JSON object")
    return value


def json_text(value: dict) -> str:
    """The text of a JSON file."""
    return json.dumps(value, indent=1, ensure_ascii=False) + "\n"


def check_target(folder: Path, file: str = RANKS) -> None:
    """A tokenizer may be written to a new or empty folder, or over another of its kind."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder} is not valid: it is a file; name a folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / file).exists():
        raise ValueError(f"out = {folder} is not valid: it holds other files and no {file}; "
                         "name a new folder, an empty one or a tokenizer's")


@dataclass(frozen=True)
class TokenizerArgs:
    """The training of a tokenizer"""

    vocab_size: int = option(4096, "ids in all, the special tokens and the bytes among them")
    data: str = option("pystdlib", "corpus: pystdlib, text:PATH or hf:NAME[:CONFIG[:COLUMN]]")
    out: str = option("data/tokenizer", "folder to write")
    max_bytes: int = option(200_000_000, "text to learn from at most, bytes; a stream has no end")

    def __post_init__(self):
        check_types(self)
        require(self, "max_bytes", self.max_bytes >= 1, "at least 1")


def bytes_per_token(tokenizer: Tokenizer, texts: Iterable[str]) -> float:
    """How many bytes of `texts` one token holds on average: the compression."""
    n_bytes, size, count = tokenizer.n_bytes, 0, 0
    for text in texts:
        ids = tokenizer.encode(text)
        size, count = size + n_bytes[ids].sum().item(), count + len(ids)
    return size / count


def first_bytes(texts: Iterable[str], limit: int) -> Iterator[str]:
    """The first documents, up to and including the one with which they exceed `limit` bytes."""
    for text in texts:
        yield text
        limit -= len(text.encode("utf-8", "replace"))
        if limit < 0:
            return


def build(args: TokenizerArgs) -> Tokenizer:
    """Train a tokenizer on the corpus's training part, save it, and print what it is worth."""
    from minids.text.corpora import open_corpus  # one floor with this file: data.py uses tokenizers

    check_target(Path(args.out))
    corpus = open_corpus(args.data)
    texts = first_bytes(corpus.train, args.max_bytes)
    tokenizer = Tokenizer.train(texts, args.vocab_size, corpus=args.data)
    tokenizer.save(args.out)
    made = tokenizer.made
    print(f"{args.out}: {tokenizer.n_tokens} tokens, {tokenizer.vocab_size} rows, fingerprint "
          f"{tokenizer.fingerprint}, from {made['documents']} documents, {made['bytes']:,} bytes")
    held_out = first_bytes(corpus.valid, args.max_bytes)
    print(f"held-out text: {bytes_per_token(tokenizer, held_out):.3f} bytes per token")
    return tokenizer


def main() -> None:
    """`python -m minids.tokenizer`."""
    (given,) = parse("minids.tokenizer", __doc__, TokenizerArgs)
    build(TokenizerArgs(**given))


if __name__ == "__main__":
    run_program("minids.tokenizer", main)

"""Text to tokens: a byte-level BPE, trained once and run through tiktoken; released ones too."""

import base64
import hashlib
import json
import os
import platform
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import tiktoken
import torch

from minids.text.bpe import (
    CONFIG,
    PATTERN,
    RELEASED,
    SPECIAL,
    TOKENIZER,
    TOKENIZER_CONFIG,
    byte_ranks,
    check_byte_level,
    end_id,
    learn_merges,
    read_engine,
    to_library,
    without_added,
)

DEFAULT = Path(__file__).resolve().parents[2] / "data" / "tokenizer"
RANKS, META = "ranks.tiktoken", "meta.json"
ROW_MULTIPLE = 64  # rows of the embedding and the head: a width that matrix units like

SMALLEST = len(SPECIAL) + 256
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

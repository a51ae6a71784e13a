"""Text to tokens: a byte-level BPE, trained once and run through tiktoken.

A model reads integers. Byte-pair encoding (Sennrich et al., arXiv 1508.07909) starts with the 256
bytes, so that every text has an encoding. It then gives the most frequent pair of neighbouring
tokens an id of its own, again and again, until the vocabulary is full. A pattern first splits the
text into words, numbers, punctuation and spaces, which no token spans.

The ids have a fixed order: special tokens (DeepSeek's strings; BOS is 0, EOS 1), the bytes 0 to
255, then the merges, earliest first. A special token is only ever inserted by its id: `encode`
treats text that spells one as ordinary text, so a user's message can neither end the conversation
nor speak for the assistant. The model's rows up to the next multiple of 64 stay unused.

A tokenizer's folder holds `ranks.tiktoken` (a line `base64(token) id` per token, tiktoken's own
format) and `meta.json` (pattern, special tokens, fingerprint, how it was made). `save_hf` writes
the same for transformers. The folder of a released model (`tokenizer.json`) is used as it is.

Different from DeepSeek-V3 (arXiv 2412.19437, section 4.1): thousands of tokens instead of 128K;
runs of Chinese characters and kana are not split from other letters; tokens that join punctuation
and a line break are never split at random.
"""

import base64
import hashlib
import json
import platform
import re
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from shlex import quote

import tiktoken
import torch
import torch.nn.functional as F

from minids.base.fields import demand
from minids.base.files import inside, read_json, write_whole
from minids.text import bpe
from minids.text.bpe import CONFIG, PATTERN, RELEASED, SPECIAL, TOKENIZER, TOKENIZER_CONFIG

PACKAGE = Path(__file__).resolve().parents[1]
CLONE = PACKAGE.parent if (PACKAGE.parent / "data" / "tokenizer").is_dir() else None
DEFAULT = CLONE / "data" / "tokenizer" if CLONE else PACKAGE / "default_tokenizer"  # in a wheel
RANKS, META = "ranks.tiktoken", "meta.json"
ROW_MULTIPLE = 64                 # the model's rows are padded to a multiple of this
SMALLEST = len(SPECIAL) + 256     # ids of a tokenizer without merges
LARGEST = 2**20                   # ids of one that is trained
SPARE = 2**16                     # unused ids, beside as many as there are tokens
INVALID = re.compile("([\udc80-\udcff]+)")  # what "surrogateescape" makes of invalid bytes
EVERY_BYTE = "".join(map(chr, (   # contains each byte that UTF-8 uses, capitals and accents
    *range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x30000))))


class Tokenizer:
    """Text to ids and back; made by `Tokenizer.train`, `load` or `open`.

    n_tokens: highest id plus one
    vocab_size: n_tokens padded to a multiple of 64, the rows of the model's embedding
    special: id of each special token's string; the common ones are attributes (`bos_id`, ..)
    eos_ids: ids that end a text: `eos_id`, which is written, and more in some released models
    pattern: the regular expression that splits the text; made: how the tokenizer was made
    fingerprint: 16 hex digits of a hash of ids, special tokens and pattern, which decide how a
        text is encoded; a checkpoint stores it and accepts no other tokenizer
    """

    def __init__(self, ranks: dict[bytes, int], special: dict[str, int], pattern: str, made: dict):
        self.pattern, self.made = pattern, made
        self._number(ranks, special)
        if len({*ranks.values(), *special.values()}) < len(ranks) + len(special):
            raise ValueError("two of its tokens have the same id")
        if any(bytes([b]) not in ranks for b in range(256)):
            raise ValueError("one of the 256 bytes has no id")
        self.fingerprint = fingerprint(ranks, special, pattern)
        # tiktoken is not told of the special tokens, so no text can become one
        self._encoding = tiktoken.Encoding(name=self.fingerprint, pat_str=pattern,
                                           mergeable_ranks=ranks, special_tokens={})

    def _number(self, ranks: dict[bytes, int], special: dict[str, int], rows: int = 0) -> None:
        """Set the sizes and the bytes of each id; rows: those of the model, if known.

        Raises `ValueError` for ids far beyond the number of tokens: each takes memory. A model may
        have any number of rows.
        """
        ids = [*ranks.values(), *special.values()]
        most = 2 * len(ids) + SPARE
        for number in ids:
            demand("id", number, type(number) is int and 0 <= number < most,
                   f"a whole number below {most} for {len(ids)} tokens")
        self.ranks, self.special = ranks, special
        self.n_tokens = 1 + max([*ranks.values(), *special.values()])
        padded = -(-self.n_tokens // ROW_MULTIPLE) * ROW_MULTIPLE
        self.vocab_size = rows if rows >= self.n_tokens else padded
        (self.bos_id, self.eos_id, self.user_id, self.assistant_id, self.think_id,
         self.end_think_id, self.fim_begin_id, self.fim_hole_id, self.fim_end_id) = (
            special.get(text) for text in SPECIAL[:9])
        self.eos_ids = [self.eos_id]
        self._bytes = [b""] * self.n_tokens
        for text, token in special.items():
            self._bytes[token] = text.encode()
        for piece, token in ranks.items():
            self._bytes[token] = piece

    def _check_text(self, problem: str) -> None:
        """Raise `ValueError` with this text unless any text comes back."""
        for text in (EVERY_BYTE, f" {EVERY_BYTE}  "):
            if self.decode(self.encode(text)) != text:
                raise ValueError(problem)

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, corpus: str = "") -> "Tokenizer":
        """Learn the merges from `texts`; the order of the texts and the threads do not matter.

        vocab_size: number of ids, special tokens and bytes included; a short text may give fewer,
            because a pair that occurs once is never merged
        corpus: a name for the texts, stored in `made`
        """
        demand("vocab_size", vocab_size, SMALLEST <= vocab_size <= LARGEST,
               f"at least {SMALLEST} ({len(SPECIAL)} special tokens and 256 bytes) and at most "
               f"{LARGEST}")
        import tokenizers  # needed for training only
        made = {"corpus": corpus, "sha256": hashlib.sha256(), "documents": 0, "bytes": 0}
        merged = bpe.learn_merges(logged(texts, made), vocab_size - SMALLEST)
        pieces = [bytes([b]) for b in range(256)] + merged
        made |= {"sha256": made["sha256"].hexdigest(), "vocab_size": vocab_size,
                 "tokenizers": tokenizers.__version__, "python": platform.python_version()}
        return cls({piece: len(SPECIAL) + i for i, piece in enumerate(pieces)},
                   {text: i for i, text in enumerate(SPECIAL)}, PATTERN, made)

    @classmethod
    def load(cls, folder: str | Path = DEFAULT) -> "Tokenizer":
        """Load a tokenizer that `save` wrote, or a released model's `tokenizer.json`.

        Raises `ValueError` naming the folder if a file is missing, cut short or changed.
        """
        folder = Path(folder)
        ours = (folder / RANKS).exists() or (folder / META).exists()
        if not ours and (folder / TOKENIZER).exists():
            return ReleasedTokenizer.load(folder)
        try:
            if not ours:
                raise ValueError(f"{META} is missing, or a released {TOKENIZER}")
            meta = read_json(folder / META)
            ranks = read_ranks(folder / RANKS)
            special, pattern = meta["special"], meta["pattern"]
            if fingerprint(ranks, special, pattern) != meta["fingerprint"]:
                raise ValueError(f"{RANKS} and {META} do not belong together")
            tokenizer = cls(ranks, special, pattern, meta["made"])
            tokenizer._check_text(f"the pattern in {META} leaves out some text")
            return tokenizer
        except (KeyError, ValueError, TypeError) as error:
            problem = f"{META} has no {error}" if isinstance(error, KeyError) else error
            raise ValueError(f"no whole tokenizer in {folder}: {problem}; build one with "
                             f"python -m minids.tokenizer --out {quote(str(folder))}") from error

    @classmethod
    def open(cls, name: str) -> "Tokenizer":
        """Return the tokenizer of a folder, "bytes" (without merges) or "" (comes with minids)."""
        if name == "bytes":
            return cls.train([], SMALLEST, "none: bytes")
        return cls.load(name) if name else cls.load()

    def save(self, folder: str | Path) -> None:
        """Write the two files; the folder is new, empty, or holds a tokenizer to replace."""
        check_target(Path(folder))
        meta = {"fingerprint": self.fingerprint, "n_tokens": self.n_tokens, "made": self.made,
                "pattern": self.pattern, "special": self.special}
        lines = [rank_line(piece, token) + "\n" for piece, token in self.ranks.items()]
        write_files(folder, {RANKS: "".join(lines), META: meta})

    def save_hf(self, folder: str | Path, chat: bool = False) -> None:
        """Write the tokenizer for transformers: `AutoTokenizer.from_pretrained(folder)`.

        It gives the same ids. There too, no text becomes a special token (unless it is called with
        split_special_tokens=False, or for `chat`, whose template writes tags as text), and BOS is
        not added unasked. Other files in the folder stay.
        """
        config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0],
                  "eos_token": SPECIAL[1], "split_special_tokens": not chat,
                  "clean_up_tokenization_spaces": False}
        engine = bpe.to_library(self.ranks, self.special, self.pattern, SPECIAL[4:6] * chat)
        spec = engine.to_str(pretty=True) + "\n"
        write_files(folder, {TOKENIZER: spec, TOKENIZER_CONFIG: config})

    def encode(self, text: str | bytes) -> list[int]:
        """Return the ids of a text, none of them special; `decode_bytes` returns the same bytes.

        Invalid UTF-8 becomes one token per byte, and so does a lone surrogate, which a str can
        hold and UTF-8 cannot, as its three bytes.
        """
        raw = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else bytes(text)
        try:
            return self._encode_text(raw.decode("utf-8"))
        except UnicodeDecodeError:
            stretches = INVALID.split(raw.decode("utf-8", "surrogateescape"))
        ids = []
        for i, stretch in enumerate(stretches):
            if i % 2 == 0:  # valid, invalid, valid, ..
                ids += self._encode_text(stretch)
                continue
            for byte in stretch.encode("utf-8", "surrogateescape"):
                if bytes([byte]) not in self.ranks:  # a released one may lack what UTF-8 never uses
                    raise ValueError(f"byte 0x{byte:02x} has no token in this vocabulary")
                ids.append(self.ranks[bytes([byte])])
        return ids

    def _encode_text(self, text: str) -> list[int]:
        """Encode text that UTF-8 can hold."""
        return self._encoding.encode_ordinary(text)

    def encode_batch(self, texts: Iterable[str | bytes], threads: int) -> list[list[int]]:
        """Encode each text, on `threads` threads: the libraries run without Python's lock."""
        with ThreadPoolExecutor(threads) as pool:
            return list(pool.map(self.encode, texts))

    def decode_bytes(self, ids: Iterable[int]) -> bytes:
        """Return the bytes of the ids: a special token gives its string, an unused id nothing.

        A model may have more rows than its tokenizer: their ids are unused too.
        """
        pieces = []
        for token in ids:
            if token < 0:
                raise ValueError(f"id {int(token)} is not valid: it must be 0 or more")
            pieces.append(self._bytes[token] if token < self.n_tokens else b"")
        return b"".join(pieces)

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of the ids; invalid UTF-8 becomes U+FFFD."""
        return self.decode_bytes(ids).decode("utf-8", "replace")

    @property
    def n_bytes(self) -> torch.Tensor:
        """Return the bytes of text per token, (vocab_size,) int64; 0: special and unused ids."""
        lengths = torch.tensor([len(piece) for piece in self._bytes])
        lengths[list(self.special.values())] = 0
        return F.pad(lengths, (0, self.vocab_size - self.n_tokens))


class ReleasedTokenizer(Tokenizer):
    """A released model's `tokenizer.json`, byte-level BPE, with the methods of Tokenizer.

    The `tokenizers` library runs it, with the added tokens removed, because the library would find
    them in plain text. Its own switch spares only those marked special, and `<｜User｜>`, for one,
    need not be marked.

    special: all added tokens, BOS and EOS. A common one that the file lacks is None, `fim_hole_id`
        for example; BOS and EOS are what the files say (`end_ids`), whatever they are called
    vocab_size: the rows of the model whose config.json is beside it, else padded as for our own
    """

    def __init__(self, files: dict[str, dict]):
        self.files, self.made = files, {}
        spec, *configs = (files.get(name, {}) for name in RELEASED)
        engine = bpe.read_engine(spec)
        bpe.check_byte_level(spec, type(engine.model).__name__)
        vocab = engine.get_vocab(with_added_tokens=False)
        special = {token.content: i for i, token in engine.get_added_tokens_decoder().items()}
        (bos, *_), eos_ids = (bpe.end_ids(end, vocab | special, *configs) for end in ("bos", "eos"))
        eos = eos_ids[0]
        special |= {token: i for token, i in vocab.items() if i in (bos, eos)}
        rows = configs[1].get("vocab_size")
        self._number(bpe.byte_ranks(vocab, special), special, rows if isinstance(rows, int) else 0)
        self.bos_id, self.eos_id, self.eos_ids = bos, eos, eos_ids
        self.fingerprint = digest([spec, bos, eos])
        self._engine = bpe.read_engine(bpe.without_added(spec, special))
        self._check_text(f"{TOKENIZER} does not keep all text: its normalizer must be empty, its "
                         "vocabulary have all bytes, ByteLevel add no space")

    @classmethod
    def load(cls, folder: str | Path) -> "ReleasedTokenizer":
        """Load tokenizer.json, and the others of `RELEASED` that exist."""
        paths = [Path(folder) / name for name in RELEASED]
        try:
            return cls({path.name: read_json(inside(path)) for path in paths if path.exists()})
        except ValueError as error:
            raise ValueError(f"no usable tokenizer in {folder}: {error}") from error

    def save(self, folder: str | Path) -> None:
        """Write what was read; the folder is new, empty, or holds a tokenizer.json to replace."""
        check_target(Path(folder), TOKENIZER)
        write_files(folder, self.files)

    def save_hf(self, folder: str | Path, chat: bool = False) -> None:
        """Write what was read except config.json, which is a model's; other files stay."""
        write_files(folder, {name: self.files[name] for name in self.files if name != CONFIG})

    def _encode_text(self, text: str) -> list[int]:
        """Encode text that UTF-8 can hold, without adding anything to it."""
        return self._engine.encode(text, add_special_tokens=False).ids


def logged(texts: Iterable[str], made: dict) -> Iterator[str]:
    """Yield the texts, counting and hashing them in `made`."""
    for text in texts:
        raw = text.encode("utf-8", "replace")  # the trainer takes no lone surrogate
        made["documents"] += 1
        made["bytes"] += len(raw)
        made["sha256"].update(hashlib.sha256(raw).digest())
        yield raw.decode("utf-8")


def fingerprint(ranks: dict[bytes, int], special: dict[str, int], pattern: str) -> str:
    """Return 16 hex digits of a hash of everything that decides how a text is encoded."""
    return digest([pattern, special, {piece.hex(): token for piece, token in ranks.items()}])


def digest(parts: list) -> str:
    """Return 16 hex digits of the SHA-256 of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def rank_line(piece: bytes, token: int) -> str:
    """Return one line of tiktoken's format."""
    return f"{base64.b64encode(piece).decode()} {token}"


def read_ranks(path: Path) -> dict[bytes, int]:
    """Read `base64(token) id` lines; raise `ValueError` naming the first wrong line.

    tiktoken's own reader caches by path: after retraining it would return the old ranks.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is missing")
    ranks = {}
    text = path.read_bytes().decode("latin-1")  # any byte is a character, so that its line is named
    for number, line in enumerate(text.removesuffix("\n").split("\n"), 1):
        code, _, token = line.partition(" ")
        try:
            piece, token = base64.b64decode(code), int(token)
        except ValueError:
            piece, token = b"", -1
        if line != rank_line(piece, token):  # no other spelling, so that a flipped bit shows
            raise ValueError(f"{path.name}, line {number} is not 'base64 id'")
        ranks[piece] = token
    return ranks


def write_files(folder: str | Path, files: dict[str, str | dict]) -> None:
    """Write files by their names: a text as it is, anything else as JSON."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        if not isinstance(content, str):
            content = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        write_whole(Path(folder) / name, content)


def check_target(folder: Path, file: str = RANKS) -> None:
    """Raise `ValueError` unless a folder is new, empty, or holds a tokenizer (`file`)."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"out = {folder} is not valid: it is a file; name a folder")
    names = [path.name for path in folder.glob("*")] if folder.is_dir() else []
    if file not in names and not all(name.startswith(".tmp_") for name in names):  # a killed save's
        raise ValueError(f"out = {folder} is not valid: it holds other files and no {file}; "
                         "name a new folder, an empty one or a tokenizer's")

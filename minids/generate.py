"""Write text with a trained model: cached decoding, one token of every sequence at a time.

    python -m minids.generate --run runs/tiny --prompt "def read_"
    python -m minids.generate --run DeepSeek-V2-Lite --prompt "def read_"   # a released model
    python -m minids.generate --run runs/tiny --temperature 0 --max-new-tokens 50   # greedy
    python -m minids.generate --run runs/tiny --prompt "class" --samples 4 --seed 7
    python -m minids.generate --run runs/tiny --speculative 1 --temperature 0
    python -m minids.generate --run data/r1/rl --chat                # a conversation

`minids.infer.sampling` describes how tokens are drawn. The generation_config.json of a Hugging Face
folder has its own defaults of temperature, top_k and top_p (do_sample false: temperature 0); a flag
wins, and programs that measure or train do not take them. With --speculative D the model's own MTP
modules draft D tokens ahead, and the model accepts those that it might have written: in fewer
passes the text comes from the same distribution, and is identical at temperature 0.

With --chat, each line that you enter is a message. Ctrl-C stops a reply, /new begins a new
conversation, /think, /direct and /free decide whether the model thinks, and Ctrl-D ends.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path

from minids.apply.folded import cast_products
from minids.base.command_line import parse, run_program
from minids.base.fields import demand, option, require
from minids.base.files import inside, read_json
from minids.hf.settings import whole
from minids.infer.batch import Request
from minids.infer.engine import Engine
from minids.infer.generation import check_arguments, generate
from minids.parallel.layout import Spread
from minids.parallel.team import speaking_first
from minids.runs.device import Machine, written_in
from minids.runs.open import Source, talks
from minids.runs.together import opened
from minids.text.bpe import GENERATION
from minids.text.chat import MODES, Chat
from minids.text.replies import ANSWER, THOUGHT, Piece, ReplyText


@dataclass(frozen=True)
class GenerateArgs(Machine):
    """Sampling"""

    run: str = option("runs/tiny", "run folder, one of its checkpoints, or a Hugging Face folder")
    prompt: str = option("def", "text to continue; best without a space at the end", utf8=True)
    max_new_tokens: int = option(200, "new tokens per sample, at most", low=1)
    temperature: float = option(0.8, "divides the logits; 0 takes the most likely token", low=0)
    top_k: int = option(0, "draw from the k most likely tokens; 0: from all", low=0)
    top_p: float = option(0.95, "draw from the fewest tokens that have this probability together",
                          above=0, high=1)
    seed: int = option(0, "decides the draws", low=0, high=2 ** 32 - 1)
    samples: int = option(1, "number of texts, written one after the other", low=1)
    chat: bool = option(False, "talk: every line is a message of yours")
    mode: str = option("free", "in a conversation, whether the model thinks; free: it decides",
                       MODES)
    speculative: int = option(0, "tokens that the MTP modules draft for each pass; 0: none", low=0)
    device: str = option("cpu", "auto, cpu, cuda, or mps: Apple's GPU")
    dtype: str = option("auto", "precision of products; auto: on a CUDA GPU bf16, or what it has, "
                        "else fp32", ("auto", "bf16", "fp16", "fp32"))


def own_defaults(folder: Path) -> dict:
    """Return the settings in a folder's generation_config.json; `ValueError` naming a wrong one."""
    file = folder / GENERATION
    given = read_json(inside(file)) if file.is_file() else {}
    found = {name: whole(given[name]) for name in ("temperature", "top_k", "top_p")
             if given.get(name) is not None}
    try:
        sample = given.get("do_sample")
        demand("do_sample", sample, sample in (None, True, False), "true, false or absent")
        found |= {"temperature": 0.0} if sample in (False,) else {}
        GenerateArgs(**found)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None
    return found


def write_sample(run: Source, prompt: list[int], how: tuple, number: int, args: GenerateArgs
                 ) -> None:
    """Print one sample as it comes, then a line of statistics on stderr."""
    text = ReplyText(run.tokenizer)
    print(args.prompt, end="", flush=True)
    done = generate(run.model, [prompt], *how, args.seed + number, run.tokenizer.eos_ids,
                    args.speculative, lambda row, token: show(text.add(token)))
    show(text.flush())
    print(flush=True)
    drafted = (f"{done.tokens_per_pass:.2f} tokens per pass, drafts accepted: "
               + " ".join(f"{share:.0%}" for share in done.acceptance) + ", ")
    print(f"{len(done.tokens[0])} tokens after {done.prompt_tokens} in {done.seconds:.2f} s, "
          f"{done.tokens_per_second:.0f} tokens/s, {drafted if args.speculative else ''}"
          f"{run.path}", file=sys.stderr)


def show(pieces: list[Piece]) -> None:
    """Print some text of a sample; a character waits until its last token has come."""
    print("".join(piece.text for piece in pieces), end="", flush=True)


def converse(run: Source, args: GenerateArgs, precision) -> None:
    """Talk in the terminal, until its end or a Ctrl-C while nothing is written."""
    require(args, "chat", talks(run), f"false: {run.path} was not trained on conversations")
    chat, engine, mode, messages = Chat(run.tokenizer), Engine(
        run.model, rows=1, precision=precision), args.mode, []
    for turn in count():
        print("> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return print()
        if (command := line.strip().removeprefix("/")) in ("new", *MODES) and line[:1] == "/":
            messages, mode = ([], mode) if command == "new" else (messages, command)
        elif line.strip():
            asked = [*messages, dict(role="user", content=line.removesuffix("\n"))]
            if (answer := reply(run, chat.prompt(asked, mode), engine, mode, args, turn)) is None:
                print("the conversation is too long for the model: /new begins another")
            else:
                messages = [*asked, dict(role="assistant", content=answer)]


def reply(run: Source, prompt: list[int], engine: Engine, mode: str, args: GenerateArgs, turn: int
          ) -> str | None:
    """Print a reply as it comes, its thought in brackets; return its answer, None without room."""
    if (room := engine.max_len - len(prompt)) < 1:
        return None
    text, written, kind = ReplyText(run.tokenizer, mode), "", ANSWER

    def pieces() -> Iterator[Piece]:
        for token in tokens:
            yield from text.add(token.id)
        yield from text.flush()

    tokens = engine.stream(Request(
        prompt, min(args.max_new_tokens, room), args.temperature, args.top_k, args.top_p,
        args.seed + turn, frozenset(run.tokenizer.eos_ids)))
    with contextlib.suppress(KeyboardInterrupt):  # stops the reply
        for piece in pieces():
            if piece.kind != kind:
                print("[" if piece.kind == THOUGHT else "] ", end="")
            print(piece.text, end="", flush=True)
            kind, written = piece.kind, written + (piece.text if piece.kind == ANSWER else "")
    tokens.close()
    print("]" if kind == THOUGHT else "")
    return written


def main() -> None:
    """Print the samples as they come, each with a line of statistics on stderr."""
    with speaking_first():
        given, spread = parse("minids.generate", __doc__, GenerateArgs, Spread)
        args, spread = GenerateArgs(**given), Spread(**spread)
    with opened(args.run, args, spread) as (run, team):
        require(args, "chat", team is None or not args.chat, "false over several processes")
        write_samples(run, replace(args, **own_defaults(run.folder) | given))


def write_samples(run: Source, args: GenerateArgs) -> None:
    """Print the samples; all ranks that share the model call this."""
    precision, tokenizer = written_in(args.dtype, run.model.head.weight.device), run.tokenizer
    if args.chat:
        with precision():
            cast_products(run.model)
        return converse(run, args, precision)
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    how = args.max_new_tokens, args.temperature, args.top_k, args.top_p
    check_arguments(run.model.args, [prompt], *how, args.speculative)  # before anything is printed
    with precision():
        cast_products(run.model)
        for sample_number in range(args.samples):
            write_sample(run, prompt, how, sample_number, args)


if __name__ == "__main__":
    run_program("minids.generate", main)

"""Write text with a trained model: cached decoding, one token of every sequence at a time.

    python -m minids.generate --run runs/tiny --prompt "def read_"
    python -m minids.generate --run DeepSeek-V2-Lite --prompt "def read_"   # a released model
    python -m minids.generate --run runs/tiny --temperature 0 --max-new-tokens 50   # greedy
    python -m minids.generate --run runs/tiny --prompt "class " --samples 4 --seed 7

The prompt goes through the model at once, in attention's naive form; each further token then goes
through alone, in the absorbed form, and finds what came before in the latent cache (V2, arXiv
2405.04434, section 2.1). Prompts of unequal length share a batch: the shorter ones are padded on
the left, and nobody sees the padding.

A token is drawn from softmax(logits / temperature), cut to the top_k likeliest and to the fewest
tokens that together have the probability top_p (nucleus sampling, Holtzman et al., arXiv
1904.09751); temperature 0 takes the likeliest.

Simplified: a batch runs until its last sequence is done, finished ones included.
"""

import codecs
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from minids.checkpoint import pick_device
from minids.config import check_types, option, parse, require, run_program
from minids.decode import decoder_for
from minids.hf import open_model
from minids.layers import compute_dtype
from minids.mla import LatentCache
from minids.model import Transformer
from minids.tokenizer import Tokenizer


@dataclass(frozen=True)
class Generation:
    """What `generate` returns.

    tokens: the new tokens of each prompt, its EOS included where the sequence ended by itself
    steps: passes through the model, the one over the prompts among them
    seconds: time of it all
    prompt_tokens: tokens of all prompts, without padding
    """

    tokens: list[list[int]]
    steps: int
    seconds: float
    prompt_tokens: int

    @property
    def tokens_per_second(self) -> float:
        """New tokens of all sequences per second, the time for the prompts included."""
        return sum(map(len, self.tokens)) / self.seconds


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             eos_id: int | None = None,
             on_token: Callable[[int, int], None] | None = None) -> Generation:
    """Continue each prompt.

    prompts: token ids, at least one each; their lengths may differ
    max_new_tokens: for each prompt at most
    temperature: divides the logits; 0 always takes the likeliest token
    top_k: draw from so many likeliest tokens only; 0: from all
    top_p: draw from the fewest likeliest tokens that together have this probability; 1: from all
    seed: decides the draws, together with a prompt's place in the batch
    eos_id: the token that ends a sequence; None: none does
    on_token: called with row and token as soon as there is one

    Raises `ValueError` naming the argument that is not valid.
    """
    check_arguments(model.args, prompts, max_new_tokens, temperature, top_k, top_p)
    start = time.perf_counter()
    device = model.head.weight.device
    tokens, pad = left_pad(prompts, device)  # (B, S), (B,)
    cache = LatentCache(model.args, len(prompts), tokens.size(1) + max_new_tokens, pad, device,
                        compute_dtype(model.head.weight))
    draw = partial(sample, temperature=temperature, top_k=top_k, top_p=top_p,
                   generator=torch.Generator(device).manual_seed(seed))
    rows, running, steps = [[] for _ in prompts], set(range(len(prompts))), 1
    logits = model.head(model.hidden(tokens, cache)[0][:, -1])  # (B, V), of the last position only
    decode = decoder_for(model, cache)
    while True:
        tokens = draw(logits)  # (B,)
        for row, token in enumerate(tokens.tolist()):
            if row not in running:
                continue
            rows[row].append(token)
            if on_token is not None:
                on_token(row, token)
            if token == eos_id or len(rows[row]) == max_new_tokens:
                running.remove(row)
        if not running:
            break
        logits = decode(tokens)
        steps += 1
    return Generation(rows, steps, time.perf_counter() - start, sum(map(len, prompts)))


def check_arguments(args, prompts, max_new_tokens, temperature, top_k, top_p) -> None:
    """Raise the one-line `ValueError` for the first argument of `generate` that is not valid."""
    rules = [("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
             ("temperature", temperature, temperature >= 0, "0 or more"),
             ("top_k", top_k, top_k >= 0, "0 or more"),
             ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1")]
    for name, value, holds, valid in rules:
        if not holds:
            raise ValueError(f"{name} = {value!r} is not valid: it must be {valid}")
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: one is empty, or there are none: each needs at least one token")
    for prompt in prompts:
        for token in (min(prompt), max(prompt)):
            if not 0 <= token < args.vocab_size:
                raise ValueError(f"prompts: token {token} is not valid: the model's tokens are "
                                 f"0 to {args.vocab_size - 1}")
    longest = max(map(len, prompts))
    if longest + max_new_tokens > args.max_seq_len:
        raise ValueError(f"prompts: {longest} tokens and max_new_tokens = {max_new_tokens} are "
                         f"too many together: max_seq_len is {args.max_seq_len}")


def left_pad(prompts: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor | None]:
    """One rectangle of unequal prompts, with how much padding stands before each.

    [[5, 6, 7], [8]] gives tokens [[5, 6, 7], [0, 0, 8]] and pad [0, 2]; equal lengths give no pad.
    """
    longest = max(map(len, prompts))
    pad = [longest - len(prompt) for prompt in prompts]
    rows = [[0] * n + list(prompt) for n, prompt in zip(pad, prompts, strict=True)]
    tokens = torch.tensor(rows, device=device)  # (B, S)
    return tokens, torch.tensor(pad, device=device) if any(pad) else None


def sample(logits: Tensor, temperature: float, top_k: int, top_p: float,
           generator: torch.Generator | None = None) -> Tensor:
    """Draw a token of each row: (B, V) -> (B,) int64. The arguments are those of `generate`.

    Of logits whose probabilities are [0.5, 0.3, 0.1, 0.1], top_p = 0.7 keeps the first two.
    """
    if temperature == 0:
        return logits.max(-1).indices  # three times as quick as argmax on a CPU, measured
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if 0 < top_k < logits.size(-1):
        least = logits.topk(top_k).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < least, float("-inf"))
    probs = logits.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        before = ordered.cumsum(-1) - ordered  # probability of the likelier ones
        ordered = ordered.masked_fill(before >= top_p, 0.0)
        probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


class Writer:
    """Prints one sequence token by token, whole characters only."""

    def __init__(self, tokenizer: Tokenizer, stream):
        self.tokenizer, self.stream = tokenizer, stream
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def write(self, token: int) -> None:
        """The characters that this token completes; EOS prints nothing."""
        if token != self.tokenizer.eos_id:
            print(self.decoder.decode(self.tokenizer.decode_bytes([token])), end="",
                  file=self.stream, flush=True)

    def close(self) -> None:
        """The end of the text: what is left of a character prints as U+FFFD."""
        print(self.decoder.decode(b"", final=True), file=self.stream, flush=True)


@dataclass(frozen=True)
class GenerateArgs:
    """Sampling"""

    run: str = option("runs/tiny", "run folder, one of its checkpoints, or a Hugging Face folder")
    prompt: str = option("def", "text to go on from; best without a space at the end")
    max_new_tokens: int = option(200, "length of a sample at most, tokens")
    temperature: float = option(0.8, "divides the logits; 0 takes the likeliest token")
    top_k: int = option(0, "draw from so many likeliest tokens; 0: all")
    top_p: float = option(0.95, "draw from the likeliest tokens of this probability together")
    seed: int = option(0, "decides the draws")
    samples: int = option(1, "how many texts, one after the other")
    device: str = option("cpu", "auto, cpu or cuda")
    threads: int = option(0, "CPU threads; 0: torch's choice, one a core")

    def __post_init__(self):
        check_types(self)
        require(self, "samples", self.samples >= 1, "at least 1")
        require(self, "threads", self.threads >= 0, "0 or more")


def write_samples(args: GenerateArgs, stream) -> None:
    """Load the run and print its samples as they come, then a line of statistics on stderr."""
    run = open_model(args.run, pick_device(args.device))
    tokenizer = run.tokenizer
    prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]
    for sample_number in range(args.samples):
        writer = Writer(tokenizer, stream)
        print(args.prompt, end="", file=stream, flush=True)
        done = generate(run.model, [prompt], args.max_new_tokens, args.temperature, args.top_k,
                        args.top_p, args.seed + sample_number, tokenizer.eos_id,
                        on_token=lambda row, token, writer=writer: writer.write(token))
        writer.close()
        print(f"{len(done.tokens[0])} tokens after {done.prompt_tokens} in {done.seconds:.2f} s, "
              f"{done.tokens_per_second:.0f} tokens/s, {run.checkpoint}", file=sys.stderr)


def main() -> None:
    """The command line."""
    [given] = parse("minids.generate", __doc__, GenerateArgs)
    args = GenerateArgs(**given)
    if args.threads:
        torch.set_num_threads(args.threads)
    write_samples(args, sys.stdout)


if __name__ == "__main__":
    run_program("minids.generate", main)

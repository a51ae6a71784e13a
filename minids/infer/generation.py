"""Generate text: one pass over the prompts, then one token of every sequence at a time.

The prompt goes through the model at once, in attention's naive form; each further token then goes
through alone, in the absorbed form, and finds what came before in the latent cache (V2, arXiv
2405.04434, section 2.1). Simplified: finished sequences stay in the batch until the last is done.
"""

import math
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from itertools import chain, count

import torch
from torch import Tensor

from minids.base.fields import demand
from minids.infer.decoding import Session, last_states, one_step_late, right_pad
from minids.infer.sampling import Sampler, no_token
from minids.infer.speculative import speculative_rounds
from minids.model.transformer import Transformer


@dataclass(frozen=True)
class Generation:
    """The result of `generate`.

    tokens: the new tokens of each prompt, its EOS included where the sequence ended by itself
    steps, seconds: passes through the model and wall-clock time, prefill included
    prompt_tokens: tokens of all prompts, without padding
    drafts: tokens drafted in each round; passed: for each prompt, how many of them were accepted
        in each round after the first
    """

    tokens: list[list[int]]
    steps: int
    seconds: float
    prompt_tokens: int
    drafts: int
    passed: list[list[int]]

    @property
    def tokens_per_second(self) -> float:
        """Return new tokens of all sequences per second, prefill included."""
        return sum(map(len, self.tokens)) / self.seconds

    @property
    def tokens_per_pass(self) -> float:
        """Return the tokens per sequence that one pass yields, 1 without drafts."""
        return 1 + sum(map(sum, self.passed)) / max(sum(map(len, self.passed)), 1)

    @property
    def acceptance(self) -> list[float]:
        """Return the acceptance rate by position, of drafts before which all were accepted."""
        rounds = [passed for row in self.passed for passed in row]
        reached = [sum(passed >= k for passed in rounds) for k in range(self.drafts + 1)]
        return [b / max(a, 1) for a, b in zip(reached, reached[1:], strict=False)]


@torch.inference_mode()
def generate(model: Transformer, prompts: list[list[int]], max_new_tokens: int,
             temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0,
             eos_id: int | Collection[int] | None = None, speculative: int = 0,
             on_token: Callable[[int, int], None] | None = None) -> Generation:
    """Continue each prompt.

    prompts: token ids, at least one each; max_new_tokens: at most, for each
    temperature: divides the logits; 0, or any below 1e-5, always takes the most likely token
    top_k: draw from the k most likely tokens only; 0: from all
    top_p: draw from the fewest tokens that together have this probability; 1: from all
    seed: decides the draws, together with a prompt's position in the batch
    eos_id: the token that ends a sequence, or several, each of which does; None: none does
    speculative: tokens that the MTP modules draft before each pass; 0: plain decoding
    on_token: called with sequence and token as soon as there is one
    Raises `ValueError` naming the argument that is not valid, or the token that cannot be drawn.
    """
    check_arguments(model.args, prompts, max_new_tokens, temperature, top_k, top_p, speculative)
    start, device = time.perf_counter(), model.head.weight.device
    text = right_pad(prompts, device)  # (B, S), (B,)
    kind = getattr(model, "sampler", Sampler)  # ranks that share a model draw as one
    sampler = kind(temperature, top_k, top_p, torch.Generator(device).manual_seed(seed))
    if speculative:
        rounds = speculative_rounds(model, *text, max_new_tokens, speculative, sampler)
    else:
        rounds = plain_rounds(model, *text, max_new_tokens, sampler)
    ends = {eos_id} if eos_id is None or isinstance(eos_id, int) else set(eos_id)
    rows, passed, running = [[] for _ in prompts], [[] for _ in prompts], set(range(len(prompts)))
    for steps, new in enumerate(rounds, start=1):
        for row, tokens in enumerate(new):
            if tokens[-1] == model.args.vocab_size:
                raise no_token(f"prompt {row + 1}, new token {len(rows[row]) + len(tokens)}")
        for row in sorted(running):
            passed[row] += [len(new[row]) - 1] if steps > 1 else []
            for token in new[row]:
                rows[row].append(token)
                if on_token is not None:
                    on_token(row, token)
                if token in ends or len(rows[row]) == max_new_tokens:
                    running.remove(row)
                    break
        if not running:
            break
    return Generation(rows, steps, time.perf_counter() - start, sum(map(len, prompts)),
                      speculative, passed)


def plain_rounds(model: Transformer, tokens: Tensor, lengths: Tensor, new_tokens: int,
                 sampler: Sampler) -> Iterator[list[list[int]]]:
    """Generate text without end: yield one token of every sequence.

    tokens, lengths: prompts as `right_pad` returns them; new_tokens: what the cache has room for
    """
    session = Session(model, len(tokens), tokens.size(1) + new_tokens)
    head = session.model.head
    states = last_states(session.prefill(tokens, lengths).states, lengths)
    token = sampler.sample(head(states))  # (B,)

    def step(longest: int) -> None:
        states = session.next_token(token, longest).states[:, -1]  # (B, D)
        token.copy_(sampler.sample(head(states)))

    def each() -> Iterator[Tensor]:
        run = session.steps(step, sampler.generator)
        for longest in count(tokens.size(1)):
            yield token
            run(longest)

    for drawn in one_step_late(each()):
        yield [[number] for number in drawn]


def check_arguments(args, prompts, max_new_tokens, temperature, top_k, top_p, speculative) -> None:
    """Raise the one-line `ValueError` for the first argument of `generate` that is not valid."""
    for name, value, holds, valid in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "at least 1"),
            ("temperature", temperature, 0 <= temperature < math.inf, "a finite number, 0 or more"),
            ("top_k", top_k, top_k >= 0, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0 and at most 1"),
            ("speculative", speculative, speculative >= 0, "0 or more"),
            ("speculative", speculative, speculative == 0 or args.n_mtp_layers > 0,
             "0: this model has no MTP module to draft with")):
        demand(name, value, holds, valid)
    if not prompts or not all(len(prompt) for prompt in prompts):
        raise ValueError("prompts: one is empty, or there are none: each needs at least one token")
    for token in chain.from_iterable(prompts):
        if not 0 <= token < args.vocab_size:
            raise ValueError(f"prompts: token {token} is not valid: the model's tokens are 0 to "
                             f"{args.vocab_size - 1}")
    longest = max(map(len, prompts))
    # Drafts may reach beyond the last token, and further modules look further back.
    extra = speculative and speculative + args.n_mtp_layers - 1
    if longest + max_new_tokens + extra > args.max_seq_len:
        drafts = f" and {extra} of drafts" if extra else ""
        raise ValueError(f"prompts: {longest} tokens and max_new_tokens = {max_new_tokens}{drafts} "
                         f"are too many together: max_seq_len is {args.max_seq_len}")

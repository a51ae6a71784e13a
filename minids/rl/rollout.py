"""Sampling for reinforcement learning: replies, and all that the trainer has to know about them.

The trainer asks for the probability of what the sampler wrote. The two must mean the same model, so
that V3.2 (arXiv 2512.02556, section 3.1) keeps two things of the sampling and takes them again in
training:

    routing    the experts that each token went to: a rounding error that sends a token to another
               expert is a jump in its probability
    mask       the tokens that top-k or top-p left to draw from

Prompts are sampled together, padded on the left, with the latent cache; the trainer sees them from
position 0, padded on the right. Both see the same positions, and nobody sees padding.
"""

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from minids.generate import left_pad
from minids.infer.decode import decoder_for
from minids.infer.sampling import Sampler
from minids.model.layers import compute_dtype
from minids.model.mla import LatentCache
from minids.model.transformer import Transformer


class Rollout(NamedTuple):
    """Replies to B prompts, from position 0; L is the longest prompt and reply together.

    tokens: (B, L) int64
    written: (B, L - 1) bool, whether the token after a position was written by the model
    logp: (B, L - 1) FP32, log-probability of the token after a position in what it was drawn from
    routes: by layer, the experts of each token, (B, L - 1, K) int64
    allowed: (B, L - 1, V) bool, what was left to draw from; None: all
    """

    tokens: Tensor
    written: Tensor
    logp: Tensor
    routes: dict[int, Tensor]
    allowed: Tensor | None

    def part(self, rows: Tensor | slice) -> "Rollout":
        """Some of the replies, cut to the longest of them."""
        length = self.written[rows].any(0).nonzero().max().item() + 1
        return Rollout(self.tokens[rows, :length + 1], self.written[rows, :length],
                       self.logp[rows, :length],
                       {layer: kept[rows, :length] for layer, kept in self.routes.items()},
                       None if self.allowed is None else self.allowed[rows, :length])

    def to(self, device: torch.device) -> "Rollout":
        """The same on another device."""
        return Rollout(self.tokens.to(device), self.written.to(device), self.logp.to(device),
                       {layer: kept.to(device) for layer, kept in self.routes.items()},
                       None if self.allowed is None else self.allowed.to(device))

    def replies(self) -> list[list[int]]:
        """The tokens that the model wrote, EOS included."""
        return [row[1:][written].tolist()
                for row, written in zip(self.tokens, self.written, strict=True)]


@contextlib.contextmanager
def recorded_routes(model: Transformer) -> Iterator[dict[int, list[Tensor]]]:
    """Within it, the experts that every pass of the model's layers chooses, by layer."""
    gates = {i: block.ffn.gate for i, block in enumerate(model.layers) if block.is_moe}
    tape: dict[int, list[Tensor]] = {i: [] for i in gates}
    hooks = [gate.register_forward_hook(lambda _, __, out, i=i: tape[i].append(out[1].indices))
             for i, gate in gates.items()]
    try:
        yield tape
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def roll_out(model: Transformer, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler,
             eos_id: int) -> Rollout:
    """Write a reply to each prompt.

    max_new_tokens: of a reply at most; one that has not ended by then is cut
    sampler: how tokens are drawn, at a temperature above 0
    """
    text, pad = left_pad(prompts, model.head.weight.device)  # (B, P), (B,)
    cache = LatentCache(model.args, len(text), text.size(1) + max_new_tokens, pad, text.device,
                        compute_dtype(model.head.weight))
    columns, logps, masks = [], [], []
    running = torch.ones(len(text), dtype=torch.bool, device=text.device)
    with recorded_routes(model) as tape:
        logits = model.head(model.hidden(text, cache)[0][:, -1])  # (B, V)
        decode = decoder_for(model, cache)
        while True:
            probs = sampler.distribution(logits)
            token = sampler.draw(probs)  # (B,)
            columns.append(token)
            logps.append(probs.gather(1, token[:, None]).squeeze(1).log())
            if sampler.cuts:
                masks.append(probs > 0)
            running &= token != eos_id
            if len(columns) == max_new_tokens or not running.any():
                break
            logits = decode(token)
    written = torch.stack(columns, dim=1)  # (B, T)
    routes = {i: torch.cat([chosen.view(len(text), -1, chosen.size(-1)) for chosen in passes], 1)
              for i, passes in tape.items()}  # (B, P + T - 1, K)
    return align(text, pad, written, torch.stack(logps, 1),
                 torch.stack(masks, 1) if masks else None, routes, eos_id)


def align(text: Tensor, pad: Tensor | None, written: Tensor, logp: Tensor, allowed: Tensor | None,
          routes: dict[int, Tensor], eos_id: int) -> Rollout:
    """What was sampled after left-padded prompts, from position 0.

    text: (B, P); written, logp: (B, T); allowed: (B, T, V); routes: (B, P + T - 1, K)
    """
    batch, prompt, count = *text.shape, written.size(1)
    ends = (written == eos_id).long().cumsum(1)
    alive = (ends == 0) | ((ends == 1) & (written == eos_id))  # (B, T), EOS included
    shift = torch.zeros(batch, 1, dtype=torch.int64, device=text.device) if pad is None \
        else pad[:, None]
    at = torch.arange(prompt + count, device=text.device) + shift  # (B, P + T), where each is from
    inside = at < prompt + count
    at = at.clamp(max=prompt + count - 1)
    all_tokens = torch.cat([text, written], dim=1).gather(1, at)
    after = at[:, 1:] - prompt  # (B, P + T - 1): which written token follows
    is_written = (after >= 0) & inside[:, 1:] & alive.gather(1, after.clamp(min=0))
    after = after.clamp(min=0)
    rows = torch.arange(batch, device=text.device)[:, None]
    rollout = Rollout(
        all_tokens, is_written, logp.gather(1, after).masked_fill(~is_written, 0.0),
        {i: kept[rows, at[:, :-1].clamp(max=kept.size(1) - 1)] for i, kept in routes.items()},
        None if allowed is None else allowed[rows, after])
    return rollout.part(slice(None))


def log_probs(model: Transformer, rollout: Rollout, temperature: float = 1.0,
              keep_routing: bool = True, keep_mask: bool = True) -> tuple[Tensor, Tensor]:
    """The model's own log-probabilities of what was written, and its entropy, nats.

    temperature: divides the logits, as in sampling
    keep_routing, keep_mask: take the sampler's experts, and its tokens to draw from
    Returns two of (M,), over the M places where `rollout.written` is true, with gradient.
    """
    kept = rollout.routes if keep_routing and rollout.routes else None
    hidden, _ = model.hidden(rollout.tokens[:, :-1], kept=kept)
    logits = model.head(hidden[rollout.written])  # (M, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if keep_mask and rollout.allowed is not None:
        logits = logits.masked_fill(~rollout.allowed[rollout.written], float("-inf"))
    logp = logits.log_softmax(-1)
    token = rollout.tokens[:, 1:][rollout.written]  # (M,)
    plogp = torch.where(logp.isfinite(), logp.exp() * logp, 0.0)
    return logp.gather(1, token[:, None]).squeeze(1), -plogp.detach().sum(-1)

"""Sampling for reinforcement learning: replies, and what the trainer needs to know about them.

The trainer computes the probability of what the sampler wrote, and both must mean the same model.
V3.2 (arXiv 2512.02556, section 3.1) therefore keeps two things from sampling and uses them again in
training:

    routing    the experts that each token went to: if a rounding error sends a token to another
               expert, its probability jumps
    mask       the tokens that top-k or top-p left to draw from

Prompts are decoded together, aligned at position 0 and padded on the right. The trainer uses the
same positions, and no token attends to padding.
"""

from collections.abc import Callable, Collection
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.infer.decoding import last_states, new_cache, next_token, prefill, right_pad
from minids.infer.sampling import Sampler, no_token
from minids.model.transformer import Transformer


class Rollout(NamedTuple):
    """B prompts with their replies, from position 0; L is the length of the longest.

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

    def each(self, change: Callable[[Tensor], Tensor]) -> "Rollout":
        """Return the rollout with every tensor changed."""
        return Rollout(change(self.tokens), change(self.written), change(self.logp),
                       {layer: change(routes) for layer, routes in self.routes.items()},
                       None if self.allowed is None else change(self.allowed))

    def part(self, rows: Tensor | slice) -> "Rollout":
        """Return some of the replies, cut to the longest of them."""
        length = self.written[rows].any(0).nonzero().max().item() + 1
        cut = self.each(lambda values: values[rows, :length])
        return cut._replace(tokens=self.tokens[rows, :length + 1])

    def replies(self) -> list[list[int]]:
        """Return the tokens that the model wrote, EOS included."""
        return [row[1:][written].tolist()
                for row, written in zip(self.tokens, self.written, strict=True)]


@torch.no_grad()
def roll_out(model: Transformer, prompts: list[list[int]], max_new_tokens: int, sampler: Sampler,
             eos_id: int | Collection[int]) -> Rollout:
    """Sample replies that end with `eos_id`, or one of several, at a temperature above 0.

    Raises `ValueError` for a token that cannot be drawn.
    """
    weight, ends = model.head.weight, [eos_id] if isinstance(eos_id, int) else eos_id
    text, lengths = right_pad(prompts, weight.device)  # (B, P), (B,)
    (batch, longest), row = text.shape, torch.arange(len(text), device=weight.device)
    tokens = F.pad(text, (0, max_new_tokens))  # (B, L)
    room = batch, longest + max_new_tokens - 1
    logp = weight.new_zeros(room, dtype=torch.promote_types(weight.dtype, torch.float32))
    written = torch.zeros_like(logp, dtype=torch.bool)
    allowed = written.new_zeros(*room, len(weight)) if sampler.cuts else None
    routes = {block.layer: text.new_zeros(*room, model.args.n_activated_experts)
              for block in model.layers if block.is_moe}
    running = torch.ones_like(row, dtype=torch.bool)
    cache = new_cache(model, batch, tokens.size(1))
    with torch.inference_mode():
        found = prefill(model, cache, text, lengths)
        for kept, routing in zip(routes.values(), found.routings, strict=True):
            kept[:, :longest] = routing.indices
        states = last_states(found.states, lengths)  # (B, D)
        for step in range(max_new_tokens):
            at = lengths + step  # (B,), positions of the tokens to draw
            probs = sampler.distribution(model.head(states))  # (B, V)
            drawn = sampler.draw(probs)  # (B,)
            token = drawn.clamp(max=len(weight) - 1)
            tokens[row, at] = token
            written[row, at - 1] = running
            logp[row, at - 1] = probs[row, token].log().masked_fill(~running, 0.0)
            if sampler.cuts:
                allowed[row, at - 1] = probs > 0
            for end in ends:
                running &= token != end
            going, sound = torch.stack([running.any(), (drawn == token).all()]).tolist()  # one wait
            if not sound:
                bad = int((drawn != token).nonzero()[0])
                raise no_token(f"reply {bad + 1}, token {step + 1}")
            if step == max_new_tokens - 1 or not going:
                break
            found = next_token(model, cache, token)
            for kept, routing in zip(routes.values(), found.routings, strict=True):
                kept[row, at] = routing.indices[:, 0]
            states = found.states[:, -1]
    return Rollout(tokens, written, logp, routes, allowed).part(slice(None))


def log_probs(model: Transformer, rollout: Rollout, temperature: float = 1.0,
              keep_routing: bool = True, keep_mask: bool = True) -> tuple[Tensor, Tensor]:
    """Return the model's own log-probabilities of what was written, and its entropy, nats.

    temperature: divides the logits, as in sampling
    keep_routing, keep_mask: take the sampler's experts, and its tokens to draw from
    Returns (M,), with gradient, and (M,), over the M positions where `rollout.written` is true.
    """
    routes = rollout.routes if keep_routing and rollout.routes else None
    states = model.hidden(rollout.tokens[:, :-1], routes=routes).states
    logits = model.head(states[rollout.written])  # (M, V)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature
    if keep_mask and rollout.allowed is not None:
        logits = logits.masked_fill(~rollout.allowed[rollout.written], float("-inf"))
    logp = logits.log_softmax(-1)
    token = rollout.tokens[:, 1:][rollout.written]  # (M,)
    plogp = torch.where(logp.isfinite(), logp.exp() * logp, 0.0)
    return logp.gather(1, token[:, None]).squeeze(1), -plogp.detach().sum(-1)

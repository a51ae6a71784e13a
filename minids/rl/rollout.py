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

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from minids.infer.decoding import Session, last_states, one_step_late, right_pad
from minids.infer.sampling import Sampler, no_token
from minids.model.transformer import Transformer
from minids.parallel.parts import Part, Parts
from minids.parallel.team import Alone

NEVER = 2 ** 31  # a token's number that no reply has


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

    def padded(self, length: int) -> "Rollout":
        """Return the rollout with L = length, or as it is if it is longer."""
        more = max(length - self.tokens.size(1), 0)
        return self.each(lambda values: F.pad(values, (0, 0) * (values.ndim - 2) + (0, more)))

    def parts(self, pieces: int, team: Alone) -> dict[str, Part]:
        """Return what this rank writes of the rollout of all: N/tokens, N/routes/LAYER, ..

        pieces: each is shared by all ranks; this rollout has a rank's shares of all, in order
        """
        whole = self.padded(max(team.joined([self.tokens.size(1)])))
        found = {}
        for name, values in whole.named().items():
            for number, rows in enumerate(values.chunk(pieces)):
                offsets = [len(rows) * team.rank] + [0] * (rows.ndim - 1)
                found[f"{number}/{name}"] = Part(rows, [len(rows) * team.world, *rows.shape[1:]],
                                                 offsets)
        return found

    @classmethod
    def of_parts(cls, saved: Parts, pieces: int, team: Alone) -> "Rollout":
        """Return a rank's shares of the rollout that `parts`, of any number of ranks, has saved."""
        tensors = {}
        for name in {name.partition("/")[2] for name in saved.found}:
            shares = []
            for number in range(pieces):
                rows, *others = saved.found[f"{number}/{name}"][0][1]
                own = team.share(range(rows))
                region = slice(own.start, own.stop), *(slice(0, size) for size in others)
                shares.append(saved.read(f"{number}/{name}", region))
            tensors[name] = torch.cat(shares)
        routes = {int(name.partition("/")[2]): values for name, values in sorted(tensors.items())
                  if "/" in name}
        return cls(tensors["tokens"], tensors["written"], tensors["logp"], routes,
                   tensors.get("allowed"))

    def named(self) -> dict[str, Tensor]:
        """Return the tensors by name, a layer's routes as routes/LAYER."""
        named = self._asdict() | {f"routes/{layer}": r for layer, r in self.routes.items()}
        return {name: values for name, values in named.items() if isinstance(values, Tensor)}

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
    running, wrong = torch.ones_like(row, dtype=torch.bool), torch.full_like(row, NEVER)  # (B,)
    at, token = lengths.clone(), torch.zeros_like(row)  # (B,), where the next token goes; newest
    state = torch.zeros(2, dtype=torch.int64, device=row.device)
    with torch.inference_mode():
        session = Session(model, batch, tokens.size(1))
        head = session.model.head

        def draw(states: Tensor) -> None:
            """Draw a token of every sequence, and note all there is to know about it."""
            probs = sampler.distribution(head(states))  # (B, V)
            drawn = sampler.draw(probs)  # (B,)
            token.copy_(drawn.clamp(max=len(weight) - 1))
            tokens[row, at] = token
            written[row, at - 1] = running
            logp[row, at - 1] = probs[row, token].log().masked_fill(~running, 0.0)
            if sampler.cuts:
                allowed[row, at - 1] = probs > 0
            for end in ends:
                running.logical_and_(token != end)
            wrong.copy_(torch.where((drawn != token) & (wrong == NEVER), at - lengths, wrong))
            state.copy_(torch.stack([running.any(), wrong.min()]))
            at.add_(1)

        def step(longest: int) -> None:
            found = session.next_token(token, longest)
            for kept, routing in zip(routes.values(), found.routings, strict=True):
                kept[row, at - 1] = routing.indices[:, 0]
            draw(found.states[:, -1])

        def each() -> Iterator[Tensor]:
            found = session.prefill(text, lengths)
            for kept, routing in zip(routes.values(), found.routings, strict=True):
                kept[:, :longest] = routing.indices
            draw(last_states(found.states, lengths))
            run = session.steps(step, sampler.generator)
            for more in range(max_new_tokens - 1):
                yield state
                run(longest + more)
            yield state

        for going, bad in one_step_late(each()):  # one wait
            if bad < NEVER:
                raise no_token(f"reply {int(wrong.argmin()) + 1}, token {bad + 1}")
            if not going:
                break
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

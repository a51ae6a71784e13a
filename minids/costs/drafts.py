"""Estimate what speculative decoding gains from MTP drafts (V3 section 5.4.3)."""

from typing import NamedTuple

from minids.config import ModelArgs
from minids.costs.parameters import block_parts, model_parts, mtp_join


class Drafting(NamedTuple):
    """Yield and cost of one round of speculative decoding.

    tokens: mean tokens that a sequence gains in a round
    check, draft: weights read to check the drafts, and to make them
    plain: weights read to decode one token of each sequence without drafts
    """

    tokens: float
    check: float
    draft: float
    plain: float

    @property
    def speedup(self) -> float:
        """Return the factor on tokens per second where reading weights takes all the time."""
        return self.tokens * self.plain / (self.check + self.draft)


def weights_read(parts: dict[str, int], args: ModelArgs, tokens: int) -> float:
    """Return the mean number of weights that a pass over `tokens` tokens reads.

    parts: part -> parameters, all experts counted
    An expert is read if at least one token visits it, as if tokens chose independently and evenly;
    the embedding is looked up.
    """
    visited = 1 - (1 - args.n_activated_experts / max(args.n_routed_experts, 1)) ** tokens
    shares = {"routed_experts": visited, "embedding": 0}
    return sum(count * shares.get(part, 1) for part, count in parts.items())


def drafting(args: ModelArgs, acceptance: float, drafts: int = 1, batch: int = 1,
             call: float = 0, row: float = 0) -> Drafting:
    """Return the yield and cost of decoding with an MTP module's drafts.

    acceptance: share of drafts accepted, among those whose predecessors were accepted
    drafts: tokens drafted in a round; batch: sequences decoded together
    call, row: time to launch the operations of one block, and time that each further token of a
        pass adds there, as weights that could be read meanwhile; 0 for a large model
    Reading weights takes the rest of the time, until a batch is large enough to be compute-bound.
    For "v3" and 0.85: 1.16 times as fast alone, 1.82 times in a batch of 256.
    """
    model = model_parts(args, args.n_routed_experts)
    block = block_parts(args, args.n_layers, args.n_routed_experts)
    module = block | {"join": mtp_join(args), "head": model["head"]}

    def read(parts: dict[str, int], blocks: int, tokens: int) -> float:
        return weights_read(parts, args, tokens) + blocks * (call + row * (tokens - 1))

    checked = batch * (drafts + 1)
    draft = read(module, 1, checked) + (drafts - 1) * read(module, 1, batch)
    return Drafting(sum(acceptance ** k for k in range(drafts + 1)),
                    read(model, args.n_layers, checked), draft, read(model, args.n_layers, batch))

"""From logits to a token: temperature, top-k, nucleus, and the rule that lets drafts pass.

A token is drawn from softmax(logits / temperature), cut to the top_k most likely tokens and to the
fewest tokens that together have the probability top_p (nucleus sampling, Holtzman et al., arXiv
1904.09751); temperature 0 takes the most likely, and so does any below 1e-5, where the quotient
would overflow.

A drafted token passes with probability min(1, p / q), where p is the model's probability for it and
q the drafter's; a token that fails is replaced by one drawn from max(p - q, 0), scaled to sum to 1.
What comes out has exactly the distribution p, whatever q is (Leviathan et al., arXiv 2211.17192,
theorem in appendix A.1; Chen et al., arXiv 2302.01318). At temperature 0 a draft passes if it is
the model's own choice.

Logits that are NaN or Inf, or all -Inf, have no distribution. To ask for them at every token would
make the CPU wait for the GPU. Instead V is drawn, one beyond the vocabulary, and the loops, which
read the tokens in any case, turn it into an error (`no_token`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

COLDEST, HOTTEST = 1e-5, 1e30  # temperatures below are 0; hotter ones make no difference
SMALLEST = 1e-30  # of top_p: FP32 rounds less to 0, which leaves no token


def no_token(where: str) -> ValueError:
    """Return the error of a draw that is no token."""
    return ValueError(f"{where}: no token can be drawn, because the model's logits are NaN or "
                      "infinite; its weights are damaged, or training diverged")


def summed_in(device: torch.device) -> torch.dtype:
    """Return the type of the draws: FP32 loses the unlikely, but Apple's GPU has nothing wider."""
    return torch.float32 if device.type == "mps" else torch.float64


def pick(probs: Tensor, number: Tensor) -> Tensor:
    """Return the token at which the sum of probabilities passes a number from 0 to 1, row by row:
    (B, V), (B, 1) of `summed_in` -> (B,) int64; V from a row of NaN.

    On a CPU 10 to 40 times as quick as torch.multinomial, which draws a number for every token.
    """
    sums = probs.cumsum(-1, dtype=number.dtype)
    # A token of probability 0 has the sum of the one before it, and is never the first above.
    # No sum is above NaN.
    return torch.searchsorted(sums, number * sums[:, -1:], right=True).squeeze(-1)


@dataclass(frozen=True)
class Sampler:
    """Settings and generator of the draws; `minids.infer.generation.generate` explains each.

    batch, rows: of a part of a larger batch, the size of that and which of its sequences these are,
        (B,) int64: their draws are those that the whole batch would have; 0 and None: it is whole
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    generator: torch.Generator | None = None
    batch: int = 0
    rows: Tensor | None = None

    @property
    def greedy(self) -> bool:
        """Return whether the most likely token is always taken."""
        return self.temperature < COLDEST

    @property
    def cuts(self) -> bool:
        """Return whether some tokens can never be drawn."""
        return self.greedy or self.top_k > 0 or self.top_p < 1

    def distribution(self, logits: Tensor) -> Tensor:
        """Return the distribution that tokens are drawn from: (.., V) -> (.., V), which sums to 1,
        or is NaN where the logits have none.

        Of logits whose probabilities are [0.5, 0.3, 0.1, 0.1], top_p = 0.7 keeps the first two.
        """
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        if self.greedy:
            best, token = logits.max(-1, keepdim=True)
            probs = torch.zeros_like(logits).scatter_(-1, token, 1.0)
            return probs.masked_fill_(~best.isfinite(), float("nan"))
        logits = logits / min(self.temperature, HOTTEST)
        if 0 < self.top_k < logits.size(-1):
            least = logits.topk(self.top_k).values[..., -1:]
            logits = logits.masked_fill(logits < least, float("-inf"))
        probs = logits.softmax(-1)
        if self.top_p < 1:
            ordered, order = probs.sort(-1, descending=True)
            before = ordered.cumsum(-1) - ordered  # probability of the likelier ones
            ordered = ordered.masked_fill(before >= max(self.top_p, SMALLEST), 0.0)
            probs = torch.zeros_like(probs).scatter_(-1, order, ordered)
            probs = probs / probs.sum(-1, keepdim=True)
        return probs

    def sample(self, logits: Tensor) -> Tensor:
        """Draw a token of each row: (B, V) -> (B,) int64; V where there is none."""
        if self.greedy:
            best, token = logits.max(-1)  # three times as quick as argmax on a CPU, measured
            return token.masked_fill_((best - best).isnan(), logits.size(-1))  # Inf - Inf is NaN
        return self.draw(self.distribution(logits))

    def random(self, count: int, each: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Return random numbers from 0 to 1 for `count` sequences, (count, each)."""
        return torch.rand(count, each, generator=self.generator, dtype=dtype, device=device)

    def draw(self, probs: Tensor) -> Tensor:
        """Draw a token from each row of probabilities: (B, V) -> (B,) int64; V if they are NaN."""
        number = self.random(self.batch or len(probs), 1, summed_in(probs.device), probs.device)
        return pick(probs, number if self.rows is None else number[self.rows])

    def verify(self, drafts: Tensor, q: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
        """Accept drafts up to the first that fails: how many, (B,), and the token after them, (B,),
        which is V if p or q is NaN there.

        drafts: (B, D) int64, drawn from q: (B, D, V), the drafter's distributions
        p: (B, D + 1, V), the model's, given the text and the drafts before; the last one is for the
            token that follows when all pass
        """
        own = drafts.unsqueeze(-1)  # (B, D, 1)
        ratio = (p[:, :-1].gather(-1, own) / q.gather(-1, own)).squeeze(-1)  # (B, D)
        chance = self.random(*ratio.shape, torch.float32, ratio.device)
        passed = (chance < ratio).long().cumprod(1).sum(1)  # (B,)
        row = torch.arange(len(drafts), device=drafts.device)
        p = p[row, passed]  # (B, V), where the first one failed, or after the last
        rest = (p - F.pad(q, (0, 0, 0, 1))[row, passed]).clamp(min=0)  # nothing was drafted there
        # Where p and q differ by rounding alone, the rest may be nothing.
        rest = torch.where(rest.sum(-1, keepdim=True) == 0, p, rest)
        return passed, self.draw(rest)

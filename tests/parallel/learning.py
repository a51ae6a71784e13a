"""Fine-tuning and GRPO over ranks beside one process; two_ranks.py goes through these
checks, too, on a CPU."""

from dataclasses import replace
from pathlib import Path

import torch
from comparing import ARGS, difference, largest, ranks_of, worst_weight
from small_models import scrambled
from torch import distributed as dist

from minids import grpo
from minids.grpo import GrpoArgs, Reinforcer
from minids.parallel.model import ParallelModel
from minids.parallel.team import Team
from minids.rl.objectives import token_weights
from minids.rl.over_ranks import ReinforcerOverRanks
from minids.runs.device import fetched
from minids.runs.over_ranks import OverRanks
from minids.sft import FineTuner, SftArgs
from minids.text import loaders
from minids.tokenizer import Tokenizer

BYTES = Tokenizer.open("bytes")
MODEL = replace(ARGS, n_layers=2, vocab_size=BYTES.vocab_size, max_seq_len=160)
SFT = SftArgs(steps=3, examples=40, seq_len=160, batch_size=4, balance_weight=1.0, mtp_weight=0.7,
              eval_problems=5, max_new_tokens=6, optimizer="adamw", lr=0.02, warmup_steps=0,
              dtype="fp32", device="cpu")
# Two rollouts, each of two updates; every part of the loss counts.
GRPO = GrpoArgs(steps=4, questions=4, group=3, updates=2, micro_batch=2, max_new_tokens=8,
                top_p=0.9, mode="direct", language_weight=1.0, kl_beta=0.5, reference_every=3,
                lr=0.02, normalise="tokens", eval_problems=5, warmup_steps=0, dtype="fp32",
                device="cpu")
# FP64: three steps of AdamW divide by roots of squared gradients, which magnifies what rounding
# leaves in those that are nearly zero, as in `train_in_parallel`.
CLOSE = 1e-9


class InFP64:
    """A Learner whose weights are FP64; replies are paid by their length."""

    def reward(self, problem, reply) -> dict[str, float]:
        return super().reward(problem, reply) | dict(language=len(reply.answer or "") % 4 / 3)

    def build(self, args):
        if self.team.world == 1:
            return super().build(args).double()
        return ParallelModel(args, self.team.ranks, torch.float64, prepare=self.prepare)


def team_of(**fields) -> Team:
    """The ranks of this process group as a team, without torchrun."""
    team = object.__new__(Team)
    team.rank, team.world, team.ranks = dist.get_rank(), dist.get_world_size(), ranks_of(**fields)
    return team


def learner(kind: type, args, team: Team | None = None):
    """A Learner with scrambled weights, of one process or of a team."""
    bases, more = (InFP64, kind), {}
    if team:
        otherwise = ReinforcerOverRanks if kind is Reinforcer else OverRanks
        bases, more = (InFP64, otherwise, kind), dict(team=team)
    made = type(kind.__name__, bases, more)(args, MODEL, Path("none"), BYTES)
    weights = scrambled(MODEL).state_dict()
    weights["head.weight"][BYTES.eos_id] *= 4  # some replies end early
    made.take(weights)
    if kind is Reinforcer:
        made.reference.load_state_dict(made.model.state_dict())
    return made


def assert_alike(mine: dict, wanted: dict) -> None:
    """Both steps have the same metrics, except for their times."""
    assert mine.keys() == wanted.keys()
    for name in mine.keys() - {"seconds", "sampling_s"}:
        a, b = mine[name], wanted[name]
        assert abs(a - b) <= CLOSE * max(abs(b), 1), (mine["step"], name, a, b)


def compare_learning(over, alone) -> None:
    """Take the steps of a run on all ranks and in one process; all stays equal."""
    for _ in range(alone.args.steps):
        assert_alike(over.train_step(), alone.train_step())
    error, name = worst_weight(over.model, alone.model)
    assert error < CLOSE, f"{name} is {error:.1e} off"


def check_fine_tuning():
    """On replicas; programs over ranks (test_learning_over_ranks.py) have the other layouts."""
    compare_learning(learner(FineTuner, SFT, team_of(replicate=2)), learner(FineTuner, SFT))


def check_a_mean_of_the_ranks_means_is_wrong():
    """The ranks' rows have different numbers of tokens that count."""
    alone, over = learner(FineTuner, SFT), learner(FineTuner, SFT, team_of())
    over.weight = lambda own, learnt: 1 / over.team.world
    alone.step = over.step = 1
    wanted, mine = (fetched(each.accumulate()[0])["main"] for each in (alone, over))
    assert abs(mine / wanted - 1) > 1e-5, (mine, wanted)
    found = dict(over.model.named_parameters())
    assert largest(max(difference(found[name].grad, p.grad)
                       for name, p in alone.model.named_parameters())) > 1e-3


def check_an_examination_asks_each_question_once():
    """Three questions to one rank and two to the other, with weights gathered on each."""
    alone, over = learner(FineTuner, SFT), learner(FineTuner, SFT, team_of(expert_parallel=2))
    with over.whole_model() as whole:
        for name, tensor in alone.model.state_dict().items():
            assert torch.equal(whole.state_dict()[name], tensor), name
    mine, wanted = {}, {}
    assert over.measure(mine, last=True) == alone.measure(wanted, last=True)
    assert mine == wanted and {"think", "direct"} <= mine.keys()


class Texts:
    """Documents that arrive one after the other, and how many were read here."""

    def __init__(self):
        self.texts, self.place, self.read = [f"<{i}> " + "abc"[i % 3] * (i % 17)
                                             for i in range(150)], 0, 0

    def read_from(self, state):
        self.place = state["place"] if state else 0
        while self.place < len(self.texts):
            self.place, self.read = self.place + 1, self.read + 1
            yield self.texts[self.place - 1]

    def state_dict(self):
        return {"place": self.place}


def stream(**shared) -> loaders.StreamLoader:
    """Batches of such documents, which counts those that were tokenised here.

    Half of them are rearranged to fill in the middle, which a document's number decides.
    """
    made = loaders.StreamLoader(Texts(), BYTES, 16, seed=3, fim_rate=0.5, **shared)
    made.tokenised, encode = 0, made.encode

    def counting(texts, first):
        made.tokenised += len(texts)
        return encode(texts, first=first)

    made.encode = counting
    return made


def check_a_stream_is_read_once_and_tokenised_in_shares():
    """Batches are those of one process, from any position that it or two ranks had."""
    loaders.SHUFFLE_BLOCK = 40
    team = team_of()
    rank, world = team.rank, team.world
    over, alone = stream(rank=rank, world=world, deal=team.deal), stream()

    def compare(steps: int) -> None:
        for _ in range(steps):
            wanted = alone.next_batch(3 * world)
            for mine, whole in zip(over.next_batch(3), wanted, strict=True):
                assert torch.equal(mine, whole[3 * rank:3 * rank + 3])

    compare(20)
    # Two ranks take more documents at a time than one process: they may be one block of 40 ahead.
    reads, counts = team.gathered(over.documents.read), team.gathered(over.tokenised)
    assert reads[0] - alone.documents.read in range(41) and not any(reads[1:])
    assert sum(counts) - alone.tokenised in range(41)
    assert max(counts) - min(counts) < 0.1 * sum(counts)
    # The position that rank 0 writes goes on in one process, and that of one process in both ranks.
    saved = team.told(over.state_dict())
    alone = stream()
    alone.load_state_dict(saved)
    compare(3)
    saved = team.told(alone.state_dict())
    over = stream(rank=rank, world=world, deal=team.deal)
    over.load_state_dict(saved)
    compare(30)


def check_reinforcement():
    """On replicas, and with experts on both ranks, which have to meet in every step."""
    for fields in (dict(replicate=2), dict(expert_parallel=2)):
        over, alone = (learner(Reinforcer, GRPO, team) for team in (team_of(**fields), None))
        compare_learning(over, alone)
        mine, whole = over.batch.rollout, alone.batch.rollout.part(over.own())
        assert torch.equal(mine.tokens, whole.tokens) and torch.equal(mine.written, whole.written)
        assert len(set(alone.batch.lengths.tolist())) > 1
        assert alone.batch.advantage.ne(0).any()


def check_weights_of_tokens_by_the_ranks_own_counts_are_wrong():
    """Each rank's mean over its own tokens, and the mean of those."""
    alone, over = learner(Reinforcer, GRPO), learner(Reinforcer, GRPO, team_of())

    def own_means(lengths, normalise, longest, kept):
        share, weights = over.team.share, torch.zeros(len(lengths))
        share(weights)[:] = token_weights(share(lengths), normalise, longest, share(kept)) / 2
        return weights

    alone.step = over.step = 1
    wanted = alone.accumulate()[0]
    grpo.token_weights = own_means
    try:
        mine = over.accumulate()[0]
    finally:
        grpo.token_weights = token_weights
    assert mine["reward"] == wanted["reward"]
    found = dict(over.model.named_parameters())
    assert largest(max(difference(found[name].grad, p.grad)
                       for name, p in alone.model.named_parameters() if p.grad is not None)) > 1e-3

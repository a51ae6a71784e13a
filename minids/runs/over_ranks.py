"""A run over many ranks: what differs from one process, and nothing else.

`over_ranks(Trainer, ..)` is a Trainer whose model lies on the ranks of a team. Whatever decides
how the run goes on is decided on numbers that all ranks have: reduced losses and norms, a signal
that any of them got. Rank 0 writes the folder; all write checkpoints.
"""

import contextlib
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from minids.base.fields import demand, require
from minids.config import ModelArgs
from minids.infer.validation import Evaluation
from minids.model.transformer import Transformer
from minids.parallel import gradients
from minids.parallel.model import SECOND_EMBEDDING, ParallelModel
from minids.parallel.parts import Part, Parts
from minids.parallel.pipeline import Weights
from minids.parallel.sharding import empty_model, load_parts
from minids.parallel.shards import local
from minids.parallel.team import Team
from minids.parallel.validation import evaluate
from minids.runs import checkpoints, optimizers, sharded
from minids.runs.folders import locked
from minids.runs.learner import Learner
from minids.runs.metrics import settle, summary
from minids.runs.open import open_model
from minids.text.loaders import Data

NOT_WRITTEN = 1000  # among signals: a checkpoint could not be written


def over_ranks(kind: type[Learner], otherwise: type, team: Team) -> type[Learner]:
    """Return the Learner `kind` over the ranks of a team; otherwise: `OverRanks`, or more."""
    return type(f"{kind.__name__}OverRanks", (otherwise, kind), {"team": team})


@contextlib.contextmanager
def locked_for_all(team: Team, folders: Iterable[Path]) -> Iterator[Path]:
    """Hold the lock of the first free folder in rank 0; yield that folder to all ranks."""
    with contextlib.ExitStack() as held:
        run = None
        with team.together():
            if team.first:
                run = str(held.enter_context(locked(folders)))
        yield Path(team.told(run))


class OverRanks:
    """The methods of a Learner that many ranks do otherwise."""

    team: Team

    def __init__(self, args, model_args: ModelArgs, run: Path, tokenizer):
        require(args, "dtype", args.dtype != "fp16", "bf16 or fp32 over several ranks")
        super().__init__(args, model_args, run, tokenizer)
        self.saves_beside = True  # on a CPU too

    def build(self, model_args: ModelArgs) -> ParallelModel:
        """Return the model, whose blocks' matrices travel in the precision of their products.

        FP8 rounds FP32 weights, and indexers, where they learn, compute in FP32.
        """
        as_they_are = getattr(self.args, "fp8", False) or getattr(self.args, "dsa", "")
        products = self.dtype if self.dtype == torch.bfloat16 and not as_they_are else None
        return ParallelModel(model_args, self.team.ranks, prepare=self.prepare, products=products)

    @contextlib.contextmanager
    def whole_model(self) -> Iterator[Transformer]:
        """Yield the model gathered on each rank, where it stays no longer than needed."""
        yield self.model.whole()

    def speed_up(self, model: Transformer, compile: str, sequences: int, fp8: bool = False,
                 plain: bool = False) -> None:
        layout = self.team.ranks.layout
        if layout.splits_backward:
            require(self.args, "compile", compile != "true", f"auto or false with "
                    f"{layout.schedule}, which takes compiled backward passes apart")
            compile = "false"
        rows = sequences // (layout.data_ranks * layout.micro_batches)
        super().speed_up(model, compile, rows, fp8, plain)

    def accumulate(self) -> tuple[dict, Tensor | None]:
        found = super().accumulate()
        self.model.join_gradients()
        return found

    def gradient_norms(self) -> dict[str, Tensor]:
        return {name: self.model.norm(parameters)
                for name, parameters in optimizers.clipped_parts(self.model).items()}

    def scale_gradients(self, norms: dict[str, float]) -> None:
        for name, parameters in optimizers.clipped_parts(self.model).items():
            gradients.scale(parameters, self.args.clip, norms[name])

    def asked_to_stop(self) -> int:
        """Return a signal that any rank got: all end after the same step, as after an error of
        writing, which the rank that had it raises."""
        asked = self.team.agree(NOT_WRITTEN if self.writer.error else self.stop_signal)
        if asked == NOT_WRITTEN:
            self.writer.wait()
        return asked

    def take(self, weights: dict[str, Tensor]) -> None:
        load_parts(self.model.parts, weights)

    def load_into(self, model: ParallelModel, weights: Parts | dict[str, Tensor]) -> None:
        for part in model.parts:
            sharded.load_weights(part, weights)

    def more_tensors(self) -> dict[str, dict[str, Tensor | Part]]:
        """Return by kind and name what else a checkpoint has to hold in parts."""
        return {}

    def load(self, checkpoint: Path) -> dict:
        """Load this rank's parts of weights and optimizer states, from any layout's checkpoint."""
        state, many = checkpoints.load_state(checkpoint), checkpoints.is_sharded(checkpoint)
        if many:
            weights, states = checkpoints.open_parts(checkpoint, "model"), state["optimizers"]
        else:
            weights = Parts.of(checkpoints.load_weights(checkpoint))
            whole = empty_model(self.model.args)
            own = optimizers.build_optimizers(whole, self.args, self.dtype)
            states = Parts.of(sharded.states_by_name(state["optimizers"], whole, own))
        self.load_into(self.model, weights)
        sharded.load_states(self.model, self.optimizers, states.found, states.read,
                            lambda name: name.replace(SECOND_EMBEDDING, "embed.weight"))
        return state

    def save(self, metric: float | None = None, beside: bool = False) -> Path | None:
        """Write a checkpoint by all ranks; refuse to save NaN or Inf weights on any."""
        weights = self.model.state_dict()
        states = {name: tensor for name, tensor
                  in sharded.named_states(self.model, self.optimizers)
                  if not name.startswith(SECOND_EMBEDDING)}
        finite = all(local(tensor).isfinite().all() for tensor in weights.values())
        if not self.team.agree(int(finite), torch.distributed.ReduceOp.MIN):
            raise self.diverged("a weight is no longer a finite number")
        plain = {name: getattr(self, name) for name in self.numbers}
        rng = checkpoints.rng_state()  # of which training needs the CPU's, as JSON can hold them
        plain |= dict(rng=dict(python=rng["python"], numpy=rng["numpy"],
                               torch=rng["torch"].tolist()), **self.more_state())
        if self.team.first:
            settle(self.run)
        record = None
        if self.team.first:
            record = dict(config=self.config(), metrics=summary(self.metrics))
        held = sharded.held_parts(self.team, dict(model=weights, optimizer=states,
                                                **self.more_tensors()))
        return self.writer.run(lambda step=self.step: sharded.save(
            self.team.writers, self.run, step, held, plain, self.args.keep_last, metric, record),
            beside)


class TrainerOverRanks(OverRanks):
    """The same of a Trainer: batches dealt to data ranks, micro-batches, pipelines, validation."""

    def __init__(self, args, model_args: ModelArgs, run: Path, tokenizer):
        layout = self.team.ranks.layout
        self.micro_batches = args.grad_accum * layout.micro_batches  # of each rank
        self.pieces = self.micro_batches * layout.data_ranks
        require(args, "recompute", args.recompute != "selective",  # it counts FSDP's own operations
                "none or blocks over several ranks, so far")
        require(args, "balance_loss", args.balance_loss == "sequence",
                "sequence over several ranks: V2's is no sum over them")
        require(args, "batch_size", args.batch_size % self.pieces == 0,
                f"a multiple of {self.pieces}: {layout.data_ranks} ranks x {self.micro_batches} "
                "micro-batches")
        if layout.pipeline > 1:
            require(args, "grad_accum", args.grad_accum == 1,
                    "1 with a pipeline; --micro-batches splits a step there")
            demand("pipeline", layout.pipeline, not args.dsa, "1 with --dsa, so far")
        super().__init__(args, model_args, run, tokenizer)

    def open_data(self) -> Data:
        """Let one process per machine fill the cache of tokens; each data rank then has its own
        batches, of a stream too, which all ranks tokenise together."""
        ranks, take = self.team.ranks, super().open_data
        return self.team.in_turn(lambda: take(
            rank=ranks.data_rank, world=ranks.layout.data_ranks, deal=self.team.deal))

    def accumulate(self) -> tuple[dict, Tensor]:
        """Add up a batch's gradients over all ranks; return the parts of the loss and the loads."""
        args, layout = self.args, self.team.ranks.layout
        size = optimizers.batch_size_at(self.step, args, self.pieces)
        rows = size // (layout.data_ranks * args.grad_accum)
        batches = [tuple(map(self.send, self.data.loader.next_batch(rows)))
                   for _ in range(args.grad_accum)]
        weights = Weights(optimizers.mtp_weight_at(self.step, args), args.balance_weight,
                          args.balance_loss, args.dsa, args.indexer_weight)
        with self.autocast():
            losses = self.model.step(batches, weights, args.separate, self.tokenizer.bos_id)
        self.tokens += size * args.seq_len
        names = ("loss", "main", "mtp", "balance", "indexer")
        parts = zip(names if args.dsa else names[:-1], losses, strict=False)
        return dict(parts), losses.loads

    def validate(self, max_tokens: int | None) -> Evaluation:
        args = self.args
        return evaluate(self.model, self.data.valid, self.tokenizer.n_bytes, args.seq_len,
                        args.batch_size // self.pieces, max_tokens,
                        self.tokenizer.bos_id if args.separate else None)

    def sample(self, max_new_tokens: int, count: int = 1) -> list[str]:
        """Generate texts from the whole model, which only `finish` has; until then, none."""
        spread = isinstance(self.model, ParallelModel)
        return [] if spread else super().sample(max_new_tokens, count)

    def finish(self) -> None:
        """Let rank 0 end the run as one process does, with the last checkpoint's whole model."""
        if self.team.first:
            self.model = open_model(self.run, self.device).model
            super().finish()

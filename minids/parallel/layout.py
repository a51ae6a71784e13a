"""The layout of a run over ranks: processes with one GPU each, or processes on a CPU.

    pipeline          ranks that share the layers
    replicate         groups that hold the same parameters and see different tokens
    fsdp              ranks that share each parameter and see different tokens
    expert_parallel   those among them that share a layer's experts, and send each other tokens

DeepSeek-V3 trains on 2,048 GPUs with 16 pipeline ranks and experts over 64 (arXiv 2412.19437,
section 3.2). Nothing here imports torch.distributed: programs read the flags at every start.
"""

import dataclasses
from dataclasses import dataclass

import torch

from minids.base.fields import Settings, demand, option, require
from minids.config import ModelArgs

SCHEDULES = ("1F1B", "GPipe", "Interleaved1F1B", "ZBVZeroBubble", "DualPipeV")
V_SHAPED = ("ZBVZeroBubble", "DualPipeV")  # a rank holds two stages, one from either end


@dataclass(frozen=True)
class DataLayout(Settings):
    """The layout of a run whose ranks all hold all layers: replicate x fsdp is their number."""

    fsdp: int = option(0, "ranks that share each parameter; 0: all that the others leave", low=0)
    replicate: int = option(1, "groups of ranks that hold the same parameters", low=1)
    expert_parallel: int = option(1, "ranks that share the routed experts and send each other "
                                     "tokens; a divisor of fsdp", low=1)


@dataclass(frozen=True)
class Layout(DataLayout):
    """The layout of a run over the ranks that torchrun starts.

    pipeline x replicate x fsdp is the number of ranks.
    """

    pipeline: int = option(1, "ranks that share the layers", low=1)
    schedule: str = option("1F1B", "order of a pipeline's micro-batches", SCHEDULES)
    micro_batches: int = option(0, "micro-batches of a step of the pipeline; 0: two per stage",
                                low=0)

    def fitted(self, world: int) -> "Layout":
        """Return this layout with its open numbers chosen for `world` ranks.

        Raises ValueError, naming the field, for ranks that it does not fit.
        """
        others = self.pipeline * self.replicate
        name = max(("pipeline", "replicate"), key=lambda field: getattr(self, field))
        require(self, name, world % others == 0,
                f"such that pipeline x replicate = {others} divides the number of ranks, {world}")
        fsdp = self.fsdp or world // others
        require(self, "fsdp", fsdp * others == world,
                f"{world // others}: pipeline x replicate x fsdp is the number of ranks, {world}")
        require(self, "expert_parallel", fsdp % self.expert_parallel == 0,
                f"a divisor of fsdp = {fsdp}")
        require(self, "schedule", self.schedule not in V_SHAPED or torch_version() >= (2, 13),
                f"one of {', '.join(SCHEDULES[:3])}: torch {torch.__version__} loses gradients "
                "with the others")
        least = self.n_stages if self.schedule == "DualPipeV" else self.pipeline
        chosen = self.micro_batches or (2 * self.n_stages if self.pipeline > 1 else 1)
        require(self, "micro_batches", self.pipeline > 1 or chosen == 1,
                "1 without a pipeline; --grad-accum splits a step there")
        require(self, "micro_batches", chosen >= least, f"at least {least} with {self.schedule}")
        require(self, "micro_batches", self.schedule != "Interleaved1F1B"
                or chosen % self.pipeline == 0, f"a multiple of pipeline = {self.pipeline}")
        return dataclasses.replace(self, fsdp=fsdp, micro_batches=chosen)

    def describe(self) -> str:
        """Return the layout in words."""
        text = (f"{self.pipeline * self.data_ranks} = pipeline {self.pipeline} x replicate "
                f"{self.replicate} x fsdp {self.fsdp}, experts over {self.expert_parallel}")
        if self.pipeline > 1:
            text += f"; {self.schedule} with {self.micro_batches} micro-batches"
        return text

    def check(self, args: ModelArgs) -> None:
        """Raise ValueError, naming the field, for a model that cannot be split this way."""
        require(self, "pipeline", self.n_stages <= args.n_layers,
                f"such that its {self.n_stages} stages have a layer each; n_layers = "
                f"{args.n_layers}")
        if not args.has_moe:
            require(self, "expert_parallel", self.expert_parallel == 1,
                    "1: no layer has experts; --pipeline shares layers")
            return
        require(self, "expert_parallel", args.n_routed_experts % self.expert_parallel == 0,
                f"a divisor of n_routed_experts = {args.n_routed_experts}; --pipeline shares "
                "layers")
        for width in (args.moe_inter_dim, args.dim) if self.splits_matrices(args) else ():
            require(self, "fsdp", width % self.expert_fsdp == 0,
                    f"such that fsdp / expert_parallel = {self.expert_fsdp} divides the experts' "
                    f"width {width}")

    @property
    def n_stages(self) -> int:
        """Return the stages of the pipeline: one per rank, or two."""
        each = 1 if self.pipeline == 1 or self.schedule in ("1F1B", "GPipe") else 2
        return each * self.pipeline

    @property
    def data_ranks(self) -> int:
        """Return the number of ranks that see different tokens."""
        return self.replicate * self.fsdp

    @property
    def expert_fsdp(self) -> int:
        """Return the ranks that share each expert's parameters."""
        return self.fsdp // self.expert_parallel

    @property
    def splits_backward(self) -> bool:
        """Return whether gradients of inputs and of weights are computed apart."""
        return self.pipeline > 1 and self.schedule in V_SHAPED

    def splits_matrices(self, args: ModelArgs) -> bool:
        """Return whether ranks outnumber a layer's experts, so that each has rows of a matrix."""
        return self.fsdp > args.n_routed_experts

    def stages_of(self, pipeline_rank: int) -> list[int]:
        """Return the stages that a pipeline rank holds, in order."""
        if self.n_stages == self.pipeline:
            return [pipeline_rank]
        second = (self.n_stages - 1 - pipeline_rank if self.schedule in V_SHAPED
                  else self.pipeline + pipeline_rank)
        return [pipeline_rank, second]

    def layers_of(self, stage: int, args: ModelArgs) -> range:
        """Return the layers of a stage. An MTP module counts as a layer, the head as another.

        Every stage has a layer at least; the last stage has norm, head and MTP modules besides.
        """
        total, stages = args.n_layers + args.n_mtp_layers + 1, self.n_stages
        cuts = [min(max(round(total * s / stages), s), args.n_layers - (stages - s))
                for s in range(stages)] + [args.n_layers]
        return range(cuts[stage], cuts[stage + 1])


@dataclass(frozen=True)
class Spread(Settings):
    """The layout of a model for inference over the ranks that torchrun starts."""

    pipeline: int = option(1, "ranks that share the layers", low=1)
    expert_parallel: int = option(0, "ranks that share the routed experts; 0: all that pipeline "
                                     "leaves", low=0)
    keep_fp8: bool = option(False, "matrices that a Hugging Face folder stores in FP8 stay so in "
                                   "memory; over several ranks they always do")

    def layout(self, world: int) -> Layout:
        """Return it as the layout of `world` ranks; ValueError if it does not fit them."""
        require(self, "pipeline", world % self.pipeline == 0,
                f"a divisor of the number of ranks, {world}")
        shared = self.expert_parallel or world // self.pipeline
        require(self, "expert_parallel", shared * self.pipeline == world,
                f"{world // self.pipeline}: pipeline x expert_parallel is the number of ranks, "
                f"{world}")
        return Layout(fsdp=shared, expert_parallel=shared, pipeline=self.pipeline).fitted(world)


def torch_version() -> tuple[int, int]:
    """Return torch's major and minor version."""
    major, minor = torch.__version__.split(".")[:2]
    return int(major), int(minor)


def check_batch(layout: Layout, rows: int, parts: int, field: str = "batch_size") -> None:
    """Raise ValueError unless `rows` sequences can be dealt to all ranks and micro-batches.

    parts: micro-batches of each rank
    """
    pieces = layout.data_ranks * parts
    demand(field, rows, rows % pieces == 0,
           f"a multiple of {pieces}, for {layout.data_ranks} ranks of {parts} micro-batches")

"""Optimizers and the schedules of a training run.

AdamW with V3's settings (section 4.2), or Muon for the matrices inside the blocks and AdamW for
embedding, head and norms, as later models of the family (DeepSeek-V4, arXiv 2606.19348, section 2).
Muon's step is the momentum with its singular values brought to one, scaled so that its root mean
square is that of an AdamW step (Moonlight, arXiv 2502.16982, section 2.2). `torch.optim.Muon` does
the same for single matrices but does not take stacked experts. A schedule is a function of the step
alone, so a resumed run needs no state for it.
"""

import math

import torch
from torch import Tensor, nn

from minids.kernels import muon
from minids.kernels.precision import in_fp32
from minids.model.sparse_attention import in_indexer
from minids.parallel.matrices import of_whole, sharing_rows
from minids.parallel.shards import local
from minids.runs.settings import LearnArgs, TrainArgs


class Muon(torch.optim.Optimizer):
    """Step by the orthogonalised momentum, for matrices (r, c) and stacks of them (E, r, c).

    lr: size of the step, as AdamW's is counted; dtype: precision of the orthogonalisation
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.1,
                 dtype: torch.dtype = torch.float32):
        super().__init__(params, dict(lr=lr, momentum=momentum, weight_decay=weight_decay))
        self.dtype = dtype

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Move every parameter that has a gradient."""
        for group in self.param_groups:
            by_shape: dict[tuple, list[Tensor]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    by_shape.setdefault((*p.shape[-2:], sharing_rows(p)), []).append(p)
            for params in by_shape.values():
                self._step_together(params, group)

    def _step_together(self, params: list[Tensor], group: dict) -> None:
        """Update parameters whose matrices have one shape, as a single stack.

        A rank has its share of sharded parameters: matrices of a stack, or rows of each matrix.
        """
        grads = [local(p.grad) for p in params]
        sizes = [len(grad) if grad.ndim == 3 else 1 for grad in grads]
        updates = grads[0].new_empty(sum(sizes), *grads[0].shape[-2:], dtype=self.dtype)
        for p, grad, update in zip(params, grads, updates.split(sizes), strict=True):
            state = self.state[p]
            if "momentum" not in state:
                state["momentum"] = torch.zeros_like(p)
            muon.look_ahead(grad, local(state["momentum"]), group["momentum"], update)
        shape, ranks = params[0].shape[-2:], sharing_rows(params[0])
        steps = of_whole(orthogonalise, updates, shape[0], ranks)
        decay = 1 - group["lr"] * group["weight_decay"]
        length = group["lr"] * (0.2 * math.sqrt(max(shape)))
        for p, step in zip(params, steps.split(sizes), strict=True):
            muon.move(local(p), step, decay, length)


class AdamW(torch.optim.AdamW):
    """torch's AdamW; over ranks it works on each one's shares as on whole tensors, in one kernel.

    torch 2.11's own step of sharded tensors leaves some memory behind each time, if fused.
    """

    def _init_group(self, group: dict, *lists: list[Tensor]) -> bool:
        found = super()._init_group(group, *lists)
        for tensors in lists:  # parameters, gradients, moments, counts of steps
            tensors[:] = map(local, tensors)
        return found


class AdamWInBF16(AdamW):
    """AdamW that keeps its moments in BF16 and computes in FP32 (V3 section 3.3.3)."""

    @torch.no_grad()
    def step(self, closure=None) -> None:
        """Move every parameter that has a gradient."""
        learning = [p for group in self.param_groups for p in group["params"]
                    if p.grad is not None]
        if in_fp32(*learning):
            return self.in_one_pass()
        self._moments_to(torch.float32)
        super().step()
        self._moments_to(torch.bfloat16)

    def in_one_pass(self) -> None:
        """Take a step by a kernel that reads and writes each number once."""
        from minids.kernels import triton_adamw
        self._moments_to(torch.bfloat16)  # a loaded state has the parameters' type
        learning = [(p, group) for group in self.param_groups for p in group["params"]
                    if p.grad is not None]
        for p, _ in learning:
            if not (state := self.state[p]):
                state["step"] = torch.zeros((), device=p.device)
                for name in ("exp_avg", "exp_avg_sq"):
                    state[name] = torch.zeros_like(p, dtype=torch.bfloat16)
        if learning:
            torch._foreach_add_([self.state[p]["step"] for p, _ in learning], 1)
        for p, group in learning:
            state = {name: local(value) for name, value in self.state[p].items()}
            triton_adamw.move(local(p), local(p.grad), state, group)

    def _moments_to(self, dtype: torch.dtype) -> None:
        for state in self.state.values():
            for name in state.keys() & {"exp_avg", "exp_avg_sq"}:
                state[name] = state[name].to(dtype)


def orthogonalise(x: Tensor, steps: int = 5) -> Tensor:
    """Return the nearest matrices with all singular values near one, by Newton-Schulz iteration.

    x: (n, r, c) -> (n, r, c); the singular values end between about 0.7 and 1.2
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al., 2024
    tall = x.size(-2) > x.size(-1)
    x = x.mT if tall else x
    x = x / (torch.linalg.matrix_norm(x, keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = muon.gram(x)  # (n, r, r)
        x = muon.times_and_more(x, muon.polynomial(gram, b, c), a)
    return x.mT if tall else x


def is_hidden_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Return whether Muon takes a parameter: matrices in blocks and MTP, except indexers'."""
    return (parameter.ndim >= 2 and not name.startswith(("embed.", "head."))
            and not in_indexer(name))


def build_optimizers(model: nn.Module, args: LearnArgs,
                     dtype: torch.dtype) -> list[torch.optim.Optimizer]:
    """Return the run's optimizers; each trained parameter is in exactly one group.

    dtype: precision of Muon's products
    Norms have no weight decay. Indexers have groups of their own, which come last, and in
    pre-training their own learning rate. Every group stores its peak as `peak_lr`.
    """
    indexer_lr, fp8 = getattr(args, "indexer_lr", args.lr), getattr(args, "fp8", False)
    named = {n: p for n, p in model.named_parameters() if p.requires_grad}
    with_muon = args.optimizer == "muon"
    hidden = {n: p for n, p in named.items() if with_muon and is_hidden_matrix(n, p)}
    others = {n: p for n, p in named.items() if n not in hidden}
    groups = [dict(params=[p for n, p in others.items()
                           if in_indexer(n) == indexer and (p.ndim >= 2) == decays],
                   lr=indexer_lr if indexer else args.lr,
                   weight_decay=args.weight_decay if decays else 0)
              for indexer in (False, True) for decays in (True, False)]
    adamw = (AdamWInBF16 if fp8 else AdamW)([group for group in groups if group["params"]],
                                            betas=(args.beta1, args.beta2), fused=True)
    optimizers = [adamw]
    if hidden:
        # A gradient, which Muon normalises first, may be too small for FP16.
        dtype = torch.float32 if dtype == torch.float16 else dtype
        optimizers += [Muon(hidden.values(), args.muon_lr, weight_decay=args.weight_decay,
                            dtype=dtype)]
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


def restore(optimizers: list[torch.optim.Optimizer], saved: list[dict]) -> None:
    """Load the state_dicts of whole optimizers, under the peak rates that these have now."""
    for optimizer, states in zip(optimizers, saved, strict=True):
        peaks = [group["peak_lr"] for group in optimizer.param_groups]
        optimizer.load_state_dict(states)
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["peak_lr"] = peak


def clipped_parts(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters that are clipped together, by their norm's name in metrics.jsonl.

    The indexers are clipped apart: together, each loss would set the pace of what the other trains.
    """
    named = list(model.named_parameters())
    parts = {"grad_norm": [p for n, p in named if not in_indexer(n)],
             "indexer_grad_norm": [p for n, p in named if in_indexer(n)]}
    return {name: parameters for name, parameters in parts.items() if parameters}


def gradient_norms(model: nn.Module) -> dict[str, Tensor | float]:
    """Return the norms of the gradients, scalars on the device; 0.0 where there are none."""
    grads = {name: [p.grad for p in parameters if p.grad is not None]
             for name, parameters in clipped_parts(model).items()}
    return {name: nn.utils.get_total_norm(some) if some else 0.0 for name, some in grads.items()}


def scale_gradients(model: nn.Module, norms: dict[str, float], longest: float) -> None:
    """Scale gradients longer than `longest` down; norms: of `gradient_norms`, fetched"""
    for name, parameters in clipped_parts(model).items():
        if norms[name] * 1.001 + 1e-5 > longest:  # else the factor below is exactly 1
            norm = parameters[0].new_tensor(norms[name])
            nn.utils.clip_grads_with_norm_(parameters, longest, norm)


def clip_gradients(model: nn.Module, longest: float) -> dict[str, float]:
    """Scale long gradients down; return the norms before."""
    norms = {name: float(norm) for name, norm in gradient_norms(model).items()}
    scale_gradients(model, norms, longest)
    return norms


def set_learning_rate(optimizers: list[torch.optim.Optimizer], factor: float) -> None:
    """Set every group to `factor` times its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


def learning_rate_factor(step: int, args: LearnArgs) -> float:
    """Return a step's share of the peak learning rate: up, constant, a cosine down (V3 4.2).

    args.decay may ask for a straight line or for V2's steps (3.1.2) in place of the cosine.
    """
    if step <= args.warmup_steps:
        return step / args.warmup_steps
    start, end = args.constant_until * args.steps, args.decay_until * args.steps
    progress = min(max((step - start) / max(end - start, 1e-9), 0.0), 1.0)
    if args.decay == "linear":
        return 1 - (1 - args.final_lr) * progress
    if args.decay == "steps":
        return args.final_lr ** (0.5 * (progress > 0) + 0.5 * (progress == 1))
    return args.final_lr + (1 - args.final_lr) * (1 + math.cos(math.pi * progress)) / 2


def batch_size_at(step: int, args: TrainArgs, parts: int = 0) -> int:
    """Return the sequences in a step's batch: a linear ramp up to batch_size (V3 section 4.2).

    parts: micro-batches that the batch is split into, on all ranks; 0: grad_accum
    """
    if not args.batch_start or step >= args.batch_ramp_steps:
        return args.batch_size
    grown = (args.batch_size - args.batch_start) * (step - 1) / args.batch_ramp_steps
    parts = parts or args.grad_accum
    return max(int(args.batch_start + grown) // parts * parts, parts)


def mtp_weight_at(step: int, args: TrainArgs) -> float:
    """Return the weight of the MTP loss: V3 has 0.3 for 10T of 14.8T tokens, then 0.1."""
    return args.mtp_weight if step <= args.mtp_switch * args.steps else args.mtp_weight_late


def bias_speed_at(step: int, args: TrainArgs) -> float:
    """Return the step of the gate biases: V3 has 0.001, and 0 for the last 500B of 14.8T tokens."""
    rest = step > args.bias_until * args.steps or args.dsa == "warmup"  # of the indexers alone
    return 0.0 if rest else args.bias_speed

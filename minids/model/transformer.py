"""The transformer: embedding, blocks of attention and feed-forward, norm, head (V3 section 2).

Pre-norm blocks; the first n_dense_layers have a dense feed-forward layer, the rest experts; the
head is not tied to the embedding. `loss` adds the parts of the training objective up; nothing in a
forward pass changes the model, so recomputing a block counts no token twice and evaluation moves
no bias: the trainer passes the loads it saw to `update_gate_bias`.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minids.config import ModelArgs
from minids.fp8 import fp8_linear
from minids.model.layers import MLP, Linear, RMSNorm, compute_dtype
from minids.model.mla import MLA, Context, LatentCache, causal
from minids.model.moe import BALANCE_LOSSES, Experts, MoE, Routing, grouped_loop, update_bias
from minids.model.mtp import MTPModule
from minids.model.rope import rotations
from minids.model.sparse_attention import Teaching


class Losses(NamedTuple):
    """The parts of the objective, scalars.

    total: main + mtp_weight mtp + balance_weight balance + indexer_weight indexer

    main: mean cross-entropy of the next token, nats
    mtp: the mean over depths of the multi-token prediction losses, nats
    balance: the balance losses of all MoE layers, added up; each is 1 when balanced
    indexer: how far the indexers are from attention, nats a query, added up over the layers and MTP
        modules; 0 where they do not learn
    loads: (n MoE layers, E) int64, tokens sent to each expert; MTP modules come last
    """

    total: Tensor
    main: Tensor
    mtp: Tensor
    balance: Tensor
    indexer: Tensor
    loads: Tensor


class Packed(NamedTuple):
    """Samples side by side in the rows of a batch, which do not see each other (V3 section 5.1).

    samples: (B, S) int64, which sample each token belongs to; those of one stand together
    learnt: (B, S) bool, whether a token's target counts in the loss
    """

    samples: Tensor
    learnt: Tensor


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))."""

    def __init__(self, args: ModelArgs, layer: int):
        super().__init__()
        self.attn_norm = RMSNorm(args.dim, args.norm_eps)
        self.attn = MLA(args, layer)
        self.ffn_norm = RMSNorm(args.dim, args.norm_eps)
        self.is_moe = args.is_moe_layer(layer)
        self.ffn = MoE(args) if self.is_moe else MLP(args.dim, args.inter_dim)

    def forward(self, x: Tensor, context: Context) -> tuple[Tensor, Routing | None]:
        """x: (B, S, D) -> (B, S, D), and the routing of a MoE layer"""
        x = x + self.attn(self.attn_norm(x), context)
        if not self.is_moe:
            return x + self.ffn(self.ffn_norm(x)), None
        kept = context.kept and context.kept[self.attn.layer]
        y, routing = self.ffn(self.ffn_norm(x), kept)
        return x + y, routing


class Transformer(nn.Module):
    """A model of the DeepSeek family.

    >>> model = Transformer(ModelArgs.preset("nano"))
    >>> model(torch.zeros(2, 5, dtype=torch.int64)).shape
    torch.Size([2, 5, 4096])
    """

    def __init__(self, args: ModelArgs):
        super().__init__()
        self.args = args
        self.recompute = False  # activation checkpointing: blocks run again in the backward pass
        self.embed = nn.Embedding(args.vocab_size, args.dim)
        self.layers = nn.ModuleList(Block(args, i) for i in range(args.n_layers))
        self.norm = RMSNorm(args.dim, args.norm_eps)
        self.head = Linear(args.dim, args.vocab_size)
        self.mtp = nn.ModuleList(MTPModule(args, Block(args, args.n_layers + k))
                                 for k in range(args.n_mtp_layers))
        initialise(self)

    def forward(self, tokens: Tensor, cache: LatentCache | None = None,
                absorbed: bool = False) -> Tensor:
        """Logits of the next token.

        tokens: (B, S) int64
        cache: latents of earlier tokens, which S more are added to
        absorbed: the form of attention, see `minids.model.mla`
        Returns (B, S, vocab_size). Raises ValueError for more tokens than fit.
        """
        return self.head(self.hidden(tokens, cache, absorbed)[0])

    def hidden(self, tokens: Tensor, cache: LatentCache | None = None, absorbed: bool = False,
               teaching: Teaching | None = None, samples: Tensor | None = None,
               kept: dict[int, Tensor] | None = None) -> tuple[Tensor, list[Routing]]:
        """The state that the head reads, (B, S, D), and the routing of each MoE layer.

        samples: as in `Packed`; kept: by layer, the experts to take, see `Context`
        """
        context = self.context(tokens, cache, absorbed, samples)
        context = context._replace(teaching=teaching, kept=kept)
        x, routings = self.embed(tokens), []
        for layer in self.layers:
            x, routing = self.run_block(layer, x, context)
            routings += [routing] if routing else []
        if cache is not None:
            cache.length += tokens.size(1)
        return self.norm(x), routings

    def context(self, tokens: Tensor, cache: LatentCache | None = None,
                absorbed: bool = False, samples: Tensor | None = None) -> Context:
        """Positions and visible keys of the tokens, given what the cache holds already."""
        start = cache.length if cache is not None else 0
        end = start + tokens.size(1)
        limit = self.args.max_seq_len
        if end > limit or (cache is not None and tokens.size(1) > cache.room):
            room = limit if cache is None else min(limit, cache.latents.size(2))
            raise ValueError(f"{end} tokens are too many: this model and cache hold {room}")
        if samples is not None:
            return Context(rotations(places(samples), self.args), together(samples))
        if cache is None:
            positions = torch.arange(start, end, device=tokens.device)[None]  # (1, S)
            return Context(rotations(positions, self.args), absorbed=absorbed)
        positions, visible = cache.place(tokens.size(1))
        return Context(rotations(positions, self.args), visible, cache, absorbed)

    def run_block(self, block: nn.Module, x: Tensor, *inputs):
        """Run a block, keeping only its input for the backward pass if `recompute` is set."""
        if self.recompute and torch.is_grad_enabled():
            return checkpoint(block, x, *inputs, use_reentrant=False)
        return block(x, *inputs)

    def loss(self, tokens: Tensor, targets: Tensor, mtp_weight: float = 0.3,
             balance_weight: float = 1e-4, balance_loss: str = "sequence", dsa: str = "",
             indexer_weight: float = 1.0, packed: Packed | None = None) -> Losses:
        """The training objective (V3 sections 2.1.2, 2.2 and 4.2; V3.2 section 2.1.1).

        tokens: (B, S) int64; targets: (B, S) int64, the token after each
        mtp_weight: lambda of V3 equation 25; 0 leaves the MTP modules out
        balance_weight: alpha of V3 equation 17
        balance_loss: "sequence", V3's, or "expert", V2's
        dsa: how the indexers learn: "warmup", with dense attention, "sparse", or "", not at all
        indexer_weight: a factor on their loss
        packed: samples that do not see each other, and what of them counts; None: all is one text
        """
        teaching = Teaching(dsa, {}) if dsa else None
        hidden, routings = self.hidden(tokens, teaching=teaching,
                                       samples=packed and packed.samples)
        main = self.prediction_loss(hidden, targets, packed)
        mtp = main.new_zeros(())
        if mtp_weight > 0 and self.mtp:
            mtp, more = self.mtp_loss(hidden, targets, teaching, packed)
            routings += more
        balance = main.new_zeros(())
        for routing in routings:
            balance = balance + BALANCE_LOSSES[balance_loss](routing, self.args)
        loads = [routing.load() for routing in routings]
        loads = torch.stack(loads) if loads else targets.new_zeros(0, self.args.n_routed_experts)
        indexer = sum(teaching.losses.values()) if dsa else main.new_zeros(())
        total = main + mtp_weight * mtp + balance_weight * balance + indexer_weight * indexer
        return Losses(total, main, mtp, balance, indexer, loads)

    def prediction_loss(self, hidden: Tensor, targets: Tensor, packed: Packed | None,
                        depth: int = 0) -> Tensor:
        """Cross-entropy of the targets `depth` tokens further on, over all targets that count.

        hidden: (B, S - depth, D); targets: (B, S) int64
        """
        rows, wanted, count = hidden, targets[:, depth:], targets.numel()
        if packed is not None:
            same = packed.samples[:, depth:] == packed.samples[:, :targets.size(1) - depth]
            counts = packed.learnt[:, depth:] & same  # (B, S - depth)
            rows, wanted, count = hidden[counts], wanted[counts], max(int(packed.learnt.sum()), 1)
        return linear_cross_entropy(rows, self.head.weight, wanted, count)

    def mtp_loss(self, hidden: Tensor, targets: Tensor, teaching: Teaching | None = None,
                 packed: Packed | None = None) -> tuple[Tensor, list[Routing]]:
        """The mean over depths of V3's equation 24, and the modules' routings.

        Depth k has T - k predictions and divides their sum by T. Position i of `targets` is token
        i+1, so depth k embeds targets[k-1:] and predicts targets[k:]:

            tokens    a b c d    hidden of a, b, c with
            targets   b c d e    embedding of b, c, d at depth 1 predicts c, d, e
        """
        total, routings = hidden.new_zeros((), dtype=torch.float32), []
        for k, module in enumerate(self.mtp, start=1):
            embedding = self.embed(targets[:, k - 1:-1])  # (B, S-k, D)
            samples = packed and packed.samples[:, :-k]
            context = self.context(targets[:, k:], samples=samples)._replace(teaching=teaching)
            hidden, routing = self.run_block(module, hidden[:, :-1], embedding, context)
            total = total + self.prediction_loss(hidden, targets, packed, depth=k)
            routings += [routing] if routing else []
        return total / len(self.mtp), routings

    def use_fp8(self) -> None:
        """From now on, products of the blocks' linear layers and experts in FP8 (V3 section 3.3).

        Embedding, head, gates, norms, the MTP modules' joins, the indexer's weights and attention's
        core stay as they are.
        """
        for block in [*self.layers, *(module.block for module in self.mtp)]:
            for name, module in block.named_modules():
                if isinstance(module, Linear) and not name.endswith("weights_proj"):
                    module.product = fp8_linear
                elif isinstance(module, Experts):
                    module.product = partial(grouped_loop, product=fp8_linear)

    def gate_biases(self) -> list[Tensor]:
        """The selection biases, in the order of `Losses.loads`: layers first, then MTP modules."""
        blocks = [*self.layers, *(module.block for module in self.mtp)]
        return [b.ffn.gate.bias for b in blocks if b.is_moe and b.ffn.gate.bias is not None]

    @torch.no_grad()
    def update_gate_bias(self, loads: Tensor, speed: float) -> None:
        """Move the selection biases against the loads of one optimizer step (V3 section 2.1.2).

        loads: (n MoE layers, E), summed over the step's micro-batches and ranks
        """
        for bias, load in zip(self.gate_biases(), loads, strict=False):
            update_bias(bias, load, speed)


def places(samples: Tensor) -> Tensor:
    """Each token's position in its own sample: [[7, 7, 7, 8, 8]] gives [[0, 1, 2, 0, 1]]."""
    at = torch.arange(samples.size(1), device=samples.device).expand_as(samples)
    begins = F.pad(samples[:, 1:] != samples[:, :-1], (1, 0), value=True)  # (B, S)
    return at - torch.where(begins, at, 0).cummax(dim=1).values


def together(samples: Tensor) -> Tensor:
    """(B, S, S) bool: a query sees the keys of its own sample up to itself."""
    same = samples[:, :, None] == samples[:, None, :]
    return same & causal(samples.size(1), samples.size(1), samples.device)


def initialise(model: Transformer) -> None:
    """Every matrix normal with init_std, every norm one, every bias zero (V3 section 4.2)."""
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            nn.init.ones_(parameter)
        elif name.endswith("bias"):  # of the indexer's LayerNorm
            nn.init.zeros_(parameter)
        else:
            nn.init.normal_(parameter, std=model.args.init_std)


class LinearCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer's output that never holds all logits at once.

    The gradient with respect to the logits is softmax minus one-hot: it is known as soon as they
    are. So each chunk of rows goes through forward and backward at once, for the same number of
    products as the plain form.
    """

    LOGITS = {"cpu": 2 ** 21, "cuda": 2 ** 27}  # at a time: what a cache, or a GPU, has room for

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
        dtype = compute_dtype(x)
        w, total = weight.to(dtype), 0.0
        dx, dw = torch.empty_like(x), torch.zeros_like(weight)
        chunk = max(LinearCrossEntropy.LOGITS.get(x.device.type, 2 ** 21) // len(weight), 1)
        for start in range(0, len(x), chunk):
            rows = slice(start, start + chunk)
            x_rows, target = x[rows].to(dtype), targets[rows].unsqueeze(1)
            logits = (x_rows @ w.T).to(torch.promote_types(dtype, torch.float32))
            log_probs = logits.log_softmax(-1)  # (rows, vocab_size)
            total = total - log_probs.gather(1, target).sum()
            grad = log_probs.exp_().scatter_add_(1, target, -torch.ones_like(log_probs[:, :1]))
            grad = grad.to(dtype)
            dx[rows] = grad @ w
            dw += grad.T @ x_rows
        ctx.save_for_backward(dx, dw)
        ctx.count = count
        return total / count

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor, None, None]:
        dx, dw = ctx.saved_tensors
        scale = grad / ctx.count
        return dx * scale, dw * scale, None, None


def linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, count: int) -> Tensor:
    """Sum over positions of -log softmax(x W^T)[target], divided by `count`, in FP32 or wider.

    x: (.., D); weight: (vocab_size, D); targets: (..) int64
    """
    return LinearCrossEntropy.apply(x.flatten(0, -2), weight, targets.flatten(), count)

"""The same weights in minids and in transformers: the largest difference seen, as a table.

    python tests/parity_hf.py
    python tests/parity_hf.py --seeds 10

transformers' models are a real implementation which nobody here wrote. For each architecture small
configurations are drawn by seed; a model with every part awake is saved by `minids.hf.save_hf`,
and `transformers.AutoModelForCausalLM.from_pretrained` reads the folder. Compared are the logits,
the gradients of a loss on every parameter, and 64 greedily generated tokens with a cache on both
sides.

Set in transformers from outside, none of which changes what it computes:
    precision   its norms, gates, softmax and rotations are written in FP32 whatever the model's
                precision. For FP64, `torch.float32` in its modules is made to mean FP64, and
                `.float()` to leave an FP64 tensor alone. The same in our file of rotations: V2's
                and V3's classes and DeepSeek's own code round frequencies and sines differently.
    kernels     attention and experts run in their plain form ("eager").
"""

import argparse
import contextlib
import random
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, modeling_rope_utils
from transformers.cache_utils import MtpCache
from transformers.modeling_layers import MtpModel
from transformers.models.deepseek_v2 import modeling_deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3
from transformers.models.deepseek_v32 import modeling_deepseek_v32
from transformers.utils import logging

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from small_models import gap, random_tokens, scrambled  # noqa: E402

from minids import ModelArgs, Transformer  # noqa: E402
from minids.base.tables import format_table  # noqa: E402
from minids.generate import generate  # noqa: E402
from minids.hf import save_hf, to_hf  # noqa: E402
from minids.model import rope  # noqa: E402

MODULES = (modeling_deepseek_v2, modeling_deepseek_v3, modeling_deepseek_v32, modeling_rope_utils,
           rope)
LENGTH, NEW = 21, 64


def drawn(seed: int) -> ModelArgs:
    """A small V3 configuration: groups or none, query latent or none, YaRN or not.

    At least two experts a token: a single one weighs 1 after renormalising, and its gate has no
    gradient to compare.
    """
    rng = random.Random(seed)
    groups = rng.choice([2, 4]) if seed % 3 else 1
    experts = groups * rng.choice([3, 4]) if groups > 1 else rng.choice([4, 8])
    limited = rng.randint(1, groups)
    heads = rng.choice([2, 3, 4])
    return ModelArgs(
        vocab_size=rng.choice([64, 96]), max_seq_len=128, dim=heads * rng.choice([8, 12]),
        inter_dim=rng.choice([40, 48]), moe_inter_dim=rng.choice([16, 20]), n_layers=3,
        n_dense_layers=rng.choice([0, 1]), n_heads=heads, n_routed_experts=experts,
        n_shared_experts=rng.choice([1, 2]),
        n_activated_experts=rng.randint(2, experts // groups * limited),
        n_expert_groups=groups, n_limited_groups=limited, route_scale=rng.choice([1.0, 2.5]),
        q_lora_rank=0 if seed % 2 else rng.choice([12, 20]), kv_lora_rank=rng.choice([16, 28]),
        qk_nope_head_dim=rng.choice([8, 12]), qk_rope_head_dim=rng.choice([4, 8]),
        v_head_dim=rng.choice([8, 14, 24]), rope_theta=rng.choice([10000.0, 500.0]),
        original_seq_len=rng.choice([8, 16]) if seed % 4 > 1 else 128,
        rope_factor=rng.choice([4.0, 40.0]), n_mtp_layers=0)


def v2(seed: int) -> ModelArgs:
    """Softmax gate, group maximum, no renormalisation, no bias; YaRN with mscale 0.707."""
    args = replace(drawn(seed), score_func="softmax", gate_bias=False, mscale=0.707)
    return replace(args, original_seq_len=16, rope_factor=40.0)


def v2_lite(seed: int) -> ModelArgs:
    """V2 without groups and without a query latent."""
    args = replace(v2(seed), q_lora_rank=0, route_scale=1.0, n_activated_experts=2)
    return replace(args, n_expert_groups=1, n_limited_groups=1)


def moonlight(seed: int) -> ModelArgs:
    """V3's class without groups, query latent and YaRN; two shared experts; another epsilon."""
    args = replace(drawn(seed), q_lora_rank=0, n_shared_experts=2, rope_theta=50000.0,
                   n_activated_experts=2, original_seq_len=128, norm_eps=1e-5, route_scale=2.446)
    return replace(args, n_expert_groups=1, n_limited_groups=1)


def kimi_k2(seed: int) -> ModelArgs:
    """V3's class without groups, with YaRN by 32."""
    args = replace(drawn(seed), q_lora_rank=16, rope_theta=50000.0, rope_factor=32.0,
                   original_seq_len=16, route_scale=2.827, n_activated_experts=2)
    return replace(args, n_expert_groups=1, n_limited_groups=1)


def v32(seed: int) -> ModelArgs:
    """V3 with an indexer that leaves most tokens out; a query latent always.

    Many heads, so that no two tokens score exactly 0, where the choice between them is free.
    """
    rng = random.Random(seed)
    return replace(drawn(seed), q_lora_rank=16, index_n_heads=rng.choice([12, 16]),
                   index_head_dim=rng.choice([16, 24]), index_topk=rng.choice([4, 7]))


FAMILIES = {"V2": v2, "V2-Lite": v2_lite, "V3, R1, V3.1": drawn, "V3.2": v32,
            "Moonlight": moonlight, "Kimi K2": kimi_k2}


class WideTorch:
    """The name `torch` inside a module, with FP64 where it says float32."""

    float32 = float = torch.float64

    def __getattr__(self, name):
        return getattr(torch, name)


@contextlib.contextmanager
def in_fp64() -> Iterator[None]:
    """Let what is written in FP32, whatever the model's precision, work in FP64."""
    narrow = torch.Tensor.float
    try:
        for module in MODULES:
            module.torch = WideTorch()
        torch.Tensor.float = lambda x: x if x.dtype == torch.float64 else narrow(x)
        yield
    finally:
        torch.Tensor.float = narrow
        for module in MODULES:
            module.torch = torch


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without their progress bars and advice."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        logging.enable_progress_bar()


def read_by_transformers(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Their model of a saved folder. Raises AssertionError if a tensor is missing or left over."""
    with quiet():
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", experts_implementation="eager",
            output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return model.to(dtype).eval()


def theirs_of(ours: Transformer) -> PreTrainedModel:
    """The same weights in transformers, by way of a folder."""
    dtype = ours.head.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, Path(folder) / "model", dtype=dtype)
        return read_by_transformers(Path(folder) / "model", dtype)


def one_by_one(tensors: dict) -> dict:
    """Their tensors with the stacked experts apart, under the names of a checkpoint."""
    apart = {}
    for name, tensor in tensors.items():
        if name.endswith("gate_up_proj"):
            for e, (gate, up) in enumerate(t.chunk(2) for t in tensor):
                apart[name.replace("gate_up_proj", f"{e}.gate_proj.weight")] = gate
                apart[name.replace("gate_up_proj", f"{e}.up_proj.weight")] = up
        elif name.endswith("experts.down_proj"):
            for e, down in enumerate(tensor):
                apart[name.replace("down_proj", f"{e}.down_proj.weight")] = down
        else:
            apart[name] = tensor
    return apart


def gradients(model: torch.nn.Module) -> dict:
    """Gradients by parameter; those of the indexer, which has none in either, left out."""
    return {name: p.grad for name, p in model.named_parameters() if ".indexer." not in name}


def differences(ours: Transformer, theirs: PreTrainedModel) -> tuple[float, float]:
    """The relative distance of the logits, and the worst one of a parameter's gradient."""
    tokens = random_tokens(ours.args, 3, LENGTH)
    torch.manual_seed(0)
    logits, expected = ours(tokens), theirs(tokens, use_cache=False).logits
    weigh = torch.randn_like(logits) / logits.numel() ** 0.5  # a loss that every logit is in
    (logits * weigh).sum().backward()
    (expected * weigh).sum().backward()
    mine, exact = dict(to_hf(ours.args, gradients(ours))), one_by_one(gradients(theirs))
    assert mine.keys() == exact.keys()
    return gap(logits, expected), max(gap(mine[name], exact[name]) for name in exact)


def same_tokens(ours: Transformer, theirs: PreTrainedModel, new: int = NEW) -> int:
    """Return how many of the greedily generated tokens are equal, up to the first that is not."""
    prompt = random_tokens(ours.args, 1, 9)
    mine = generate(ours, prompt.tolist(), new).tokens[0]
    theirs.generation_config.eos_token_id = None
    with quiet():
        out = theirs.generate(prompt, max_new_tokens=new, do_sample=False, use_cache=True,
                              attention_mask=torch.ones_like(prompt), pad_token_id=0)
    pairs = zip(mine, out[0, prompt.size(1):].tolist(), strict=True)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), new)


# transformers knows one MTP layer by its number, 61: so the model has 61 layers, little ones.
DEEP = ModelArgs(
    vocab_size=64, max_seq_len=48, dim=16, inter_dim=16, moe_inter_dim=8, n_layers=61,
    n_dense_layers=60, n_heads=2, n_routed_experts=4, n_activated_experts=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8, original_seq_len=16,
    n_mtp_layers=1)


def our_drafts(ours: Transformer, tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the token after next at each position but the last: (B, S - 1, V)"""
    hidden = ours.hidden(tokens)[0][:, :-1]
    out, *_ = ours.mtp[0](hidden, ours.embed(tokens[:, 1:]), ours.context(tokens[:, 1:]))
    return ours.head(out)


def their_drafts(folder: Path, tokens: torch.Tensor, dtype: torch.dtype,
                 first: int) -> torch.Tensor:
    """The same by transformers' MTP layer, which reads the model's last hidden state.

    first: position that the layer counts from; transformers itself takes 1
    """
    theirs = read_by_transformers(folder, dtype)
    hidden = theirs.model(tokens, use_cache=False).last_hidden_state[:, :-1]
    with quiet():
        drafter = MtpModel.from_pretrained(theirs).to(dtype).eval()
    positions = torch.arange(first, first + hidden.size(1))[None]
    out = drafter.forward_layer(0, hidden, positions, MtpCache(config=drafter.config),
                                input_ids=tokens[:, 1:])
    return theirs.lm_head(out)


@torch.no_grad()
def draft_gap(ours: Transformer, first: int = 0) -> float:
    """The relative distance of the MTP module's logits."""
    tokens, dtype = random_tokens(ours.args, 1, LENGTH), ours.head.weight.dtype
    with tempfile.TemporaryDirectory() as folder:
        save_hf(ours, Path(folder) / "model", dtype=dtype)
        theirs = their_drafts(Path(folder) / "model", tokens, dtype, first)
    return gap(our_drafts(ours, tokens), theirs)


@dataclass(frozen=True)
class Parity:
    """The largest differences of one architecture over its seeds, and the fewest equal tokens."""

    logits64: float
    gradients64: float
    logits32: float
    gradients32: float
    tokens: int


def compare(family: str, seed: int) -> Parity:
    """One configuration, in both precisions."""
    args = FAMILIES[family](seed)
    with in_fp64():
        wide = scrambled(args, seed)
        exact = differences(wide, theirs_of(wide))
    narrow = scrambled(args, seed, torch.float32)
    theirs = theirs_of(narrow)
    return Parity(*exact, *differences(narrow, theirs), same_tokens(narrow, theirs))


def worst(results: list[Parity]) -> Parity:
    """The worst of each column."""
    columns = zip(*(vars(result).values() for result in results), strict=True)
    *gaps, tokens = columns
    return Parity(*map(max, gaps), min(tokens))


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=4, help="configurations of each architecture")
    seeds = range(parser.parse_args().seeds)
    torch.set_num_threads(1)
    rows = [("", "logits FP64", "gradients FP64", "logits FP32", "gradients FP32",
             f"equal of {NEW} tokens")]
    for family in FAMILIES:
        result = worst([compare(family, seed) for seed in seeds])
        *gaps, tokens = vars(result).values()
        rows.append((family, *(f"{gap:.1e}" for gap in gaps), str(tokens)))
    with in_fp64():
        wide = draft_gap(scrambled(DEEP))
    narrow = draft_gap(scrambled(DEEP, dtype=torch.float32))
    rows.append(("MTP module of V3", f"{wide:.1e}", "", f"{narrow:.1e}", "", ""))
    print(format_table(rows))


if __name__ == "__main__":
    main()

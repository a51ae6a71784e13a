"""A model that ranks use together, beside one process that has it whole."""

from dataclasses import replace
from functools import cache
from pathlib import Path

import torch
from safetensors import safe_open
from small_models import LITTLE, gap, random_tokens, scrambled
from torch import distributed as dist

from minids import Transformer, hf
from minids.generate import generate
from minids.hf import reading
from minids.hf.names import skeleton
from minids.infer.decoding import new_cache
from minids.infer.validation import evaluate as one_process
from minids.parallel.layout import Spread
from minids.parallel.ranks import Ranks
from minids.parallel.serving import SpreadModel, evaluate, part_of

# V3's architecture, with every kind of layer; matrices of one block and of several, some ragged.
ARGS = replace(LITTLE, dim=136, n_layers=4, n_dense_layers=1, n_mtp_layers=1)
PROMPTS = [[5, 9, 2, 33, 7], [8], [1, 2, 3]]
# FP64: sums in another order differ by some 1e-15 of the largest; a wrong one by 1e-3 and more.
CLOSE = 1e-12


@cache
def folder() -> Path:
    """A Hugging Face folder in FP8, which rank 0 writes."""
    if dist.get_rank() == 0:
        hf.save_hf(scrambled(ARGS, dtype=torch.float32), Path("fp8"), quantize="fp8")
    dist.barrier()
    return Path("fp8")


@cache
def whole() -> Transformer:
    """The model of one process."""
    return hf.load_hf(folder(), torch.float64)


@cache
def ranks_of(**fields) -> Ranks:
    """The ranks of this process group, which share a model."""
    return Ranks.of(Spread(**fields).layout(dist.get_world_size()), torch.device("cpu"))


class Counted:
    """safe_open, which notes the tensors that are read."""

    names: set[str] = set()

    def __init__(self, *how):
        self.file = safe_open(*how)

    def __enter__(self) -> "Counted":
        self.stream = self.file.__enter__()
        return self

    def __exit__(self, *error) -> None:
        self.file.__exit__(*error)

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def get_tensor(self, name: str) -> torch.Tensor:
        self.names.add(name)
        return self.stream.get_tensor(name)


def spread(ranks: Ranks, keep_fp8: bool = True) -> SpreadModel:
    """This rank's part of the model, read from the folder."""
    model = skeleton(ARGS)
    first = part_of(model, ranks)
    return hf.read_model(hf.inspect(folder()), torch.float64, "cpu", model, first, keep_fp8)


@torch.no_grad()
def distance(model: Transformer) -> float:
    """How far its logits are from those of one process."""
    tokens = random_tokens(ARGS, 2, 21)
    return gap(model(tokens), whole()(tokens))


def equal_one_process(model: SpreadModel) -> bool:
    """Whether it has the logits of one process, and writes its tokens: most likely ones and drawn
    ones, without drafts and with, for prompts of unequal length and of equal."""
    assert distance(model) < CLOSE, distance(model)
    for prompts, how in ((PROMPTS, dict()), (PROMPTS[:1], dict()), (PROMPTS, dict(speculative=1)),
                         (PROMPTS[:1], dict(temperature=1.0, seed=3)),
                         (PROMPTS, dict(speculative=2, temperature=1.0, top_p=0.9))):
        texts = [generate(m, prompts, 6, **how).tokens for m in (model, whole())]
        assert texts[0] == texts[1], (how, texts)
    return True


def evaluated_alike(model: SpreadModel) -> bool:
    """Whether the ranks' counts add up to one process's, whatever is left for the last windows."""
    text = random_tokens(ARGS, 1, 200).flatten()
    n_bytes = torch.arange(ARGS.vocab_size)
    for how in ((12, 3), (20, 16, 100, 7)):
        mine, wanted = evaluate(model, text, n_bytes, *how), one_process(whole(), text, n_bytes,
                                                                          *how)
        assert abs(mine.bits_per_byte / wanted.bits_per_byte - 1) < 1e-6, how  # logits are FP32
        assert torch.equal(mine.loads, wanted.loads), how
    return True


def own_layers_only(model: SpreadModel, ranks: Ranks) -> bool:
    """Whether the rank's cache has rows for the layers that it holds, and for no others."""
    layers = ranks.layout.layers_of(ranks.pipeline_rank, ARGS)
    last = ranks.pipeline_rank == ranks.layout.pipeline - 1
    held = new_cache(model, 1, 4), new_cache(model, 1, 4, mtp=True)
    return [len(c.latents) for c in held] == [len(layers), ARGS.n_mtp_layers * last]


def wanted_names(ranks: Ranks) -> set[str]:
    """The released names of the tensors that a rank has to read, by its layers and experts."""
    layers = list(ranks.layout.layers_of(ranks.pipeline_rank, ARGS))
    if ranks.pipeline_rank == ranks.layout.pipeline - 1:
        layers += range(ARGS.n_layers, ARGS.n_layers + ARGS.n_mtp_layers)
    share = ARGS.n_routed_experts // ranks.layout.expert_parallel
    first = share * ranks.sparse.get_local_rank("expert")
    names = set()
    for name in hf.inspect(folder()).headers:
        words = name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        expert = int(words[5]) if "experts" in words else None
        copied = layer == ARGS.n_layers and words[3] in ("embed_tokens", "shared_head") \
            and words[4] != "norm"  # of embedding and head
        if (layer is None or layer in layers) and not copied and (
                expert is None or first <= expert < first + share):
            names.add(name)
    return names


def read_names(ranks: Ranks) -> set[str]:
    """The names of the tensors that a rank does read."""
    Counted.names, reading.safe_open = set(), Counted
    spread(ranks)
    reading.safe_open = safe_open
    return Counted.names

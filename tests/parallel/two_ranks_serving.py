"""What two ranks that share a model go through; started by test_serving.py."""

import torch
from launching import run_checks
from serving import (
    ARGS,
    CLOSE,
    PROMPTS,
    distance,
    equal_one_process,
    evaluated_alike,
    folder,
    own_layers_only,
    ranks_of,
    read_names,
    spread,
    wanted_names,
    whole,
)
from torch import distributed as dist

from minids import hf
from minids.generate import generate
from minids.hf.names import skeleton
from minids.infer.sampling import Sampler
from minids.parallel.serving import SpreadModel, part_of
from minids.runs.open import own_part


def check_experts_on_two_ranks():
    ranks = ranks_of()
    model = spread(ranks)
    assert model.layers[1].ffn.held == 4
    assert equal_one_process(model) and own_layers_only(model, ranks)


def check_layers_on_two_ranks():
    ranks = ranks_of(pipeline=2)
    model = spread(ranks)
    assert equal_one_process(model) and own_layers_only(model, ranks)


def check_weights_in_other_precisions():
    for fields in (dict(), dict(pipeline=2)):
        assert distance(spread(ranks_of(**fields), keep_fp8=False)) < CLOSE


def check_weights_of_a_run():
    """A checkpoint's weights are read whole, and a rank keeps its own."""
    for fields in (dict(), dict(pipeline=2)):
        model = skeleton(ARGS)
        first = part_of(model, ranks_of(**fields))
        model.load_state_dict(own_part(whole().state_dict(), model, first), assign=True)
        assert distance(model) < CLOSE


def check_weights_stay_in_fp8():
    """A matrix in the blocks takes one byte per number, and its scales little."""
    model = spread(ranks_of())
    kinds = {tensor.dtype for name, tensor in model.state_dict().items()
             if tensor.dim() > 1 and not name.endswith("_scale_inv")
             and not any(wide in name for wide in ("embed", "head", "gate", "eh_proj"))}
    assert kinds == {torch.float8_e4m3fn}


def check_a_rank_reads_its_own_tensors_only():
    every = hf.inspect(folder()).headers
    for fields in (dict(), dict(pipeline=2)):
        ranks = ranks_of(**fields)
        names = read_names(ranks)
        assert names == wanted_names(ranks) and len(names) < len(every)
        sizes = [None, None]
        dist.all_gather_object(sizes, {name: every[name].shape for name in names})
        twice = sizes[0].keys() & sizes[1].keys()
        assert not any(".experts." in name for name in twice)
        assert not fields or len(twice) == 3  # embedding, norm and head
        experts = [name for name in every if ".experts." in name]
        assert all(name in sizes[0] or name in sizes[1] for name in experts)


def check_evaluation():
    for fields in (dict(), dict(pipeline=2)):
        assert evaluated_alike(spread(ranks_of(**fields)))


def check_one_ranks_experts_alone_are_wrong():
    model, sum_up = spread(ranks_of()), dist.all_reduce
    dist.all_reduce = lambda *inputs, **named: None
    assert distance(model) > 1e-3
    dist.all_reduce = sum_up


def check_all_ranks_draw_what_rank_0_draws():
    """Also with a seed of its own, which stands for what a GPU's sums round otherwise."""
    model, found = spread(ranks_of()), []
    for model.sampler in (SpreadModel.sampler, Sampler):
        texts = [None, None]
        own = generate(model, PROMPTS, 8, temperature=1.0, seed=dist.get_rank()).tokens
        dist.all_gather_object(texts, own)
        found.append(texts)
    assert found[0] == 2 * [generate(whole(), PROMPTS, 8, temperature=1.0, seed=0).tokens]
    assert found[1][0] != found[1][1]


if __name__ == "__main__":
    run_checks(dict(globals()))

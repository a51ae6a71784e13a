"""A rank's part of a parameter, of a gradient and of validation text, without ranks."""

from dataclasses import replace
from itertools import product
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE
from torch import nn

from minids.parallel import serving, sharding, validation
from minids.parallel.gradients import norm, scale
from minids.parallel.model import ParallelModel
from minids.parallel.ranks import Ranks
from minids.parallel.sharding import expect
from minids.parallel.shards import own_part
from minids.rl.over_ranks import ReinforcerOverRanks
from minids.runs.optimizers import build_optimizers
from minids.runs.settings import TrainArgs
from minids.runs.sharded import fill, load_states, named_states

GRID = torch.arange(7 * 5).view(7, 5)


def part_of(cuts: list[int | None], sizes: tuple[int, ...], at: tuple[int, ...]) -> torch.Tensor:
    """Return what rank `at` holds of GRID; cuts: the dimension that each of the mesh's cuts."""
    mesh = SimpleNamespace(size=lambda dim: sizes[dim], get_local_rank=lambda dim: at[dim])
    placements = [SimpleNamespace(dim=cut) if cut is not None else object() for cut in cuts]
    return GRID[own_part(SimpleNamespace(shape=GRID.shape, placements=placements,
                                         device_mesh=mesh))]


@pytest.mark.parametrize("cuts", [[0, 0], [1, 0], [None, 0], [None, 1], [0, None]])
@pytest.mark.parametrize("sizes", [(2, 2), (3, 2), (1, 4), (4, 3)])
def test_ranks_hold_what_chunks_of_chunks_hold(cuts, sizes):
    """The mesh's last dimension cuts first, into parts of one size but for the last."""
    for at in product(*map(range, sizes)):
        wanted = GRID
        for cut, size, rank in reversed([*zip(cuts, sizes, at, strict=True)]):
            if cut is not None:
                parts = wanted.split(-(-wanted.size(cut) // size), cut) if wanted.numel() else []
                wanted = parts[rank] if rank < len(parts) else wanted.narrow(cut, 0, 0)
        found = part_of(cuts, sizes, at)
        assert found.numel() == wanted.numel() and torch.equal(found.flatten(), wanted.flatten())
    assert own_part(GRID) == (slice(0, 7), slice(0, 5))


@pytest.mark.parametrize("longest", [1e-7, 1e-6, 0.5, 4.999999, 5.0, 5.000002, 7.0])
def test_a_gradient_is_scaled_as_torch_clips_it(longest):
    mine, torchs = ([nn.Parameter(torch.zeros(2, dtype=torch.float64)) for _ in range(3)]
                    for _ in range(2))
    for p, other, values in zip(mine, torchs, ([3.0, 0.0], [0.0, 4.0]), strict=False):
        p.grad, other.grad = (torch.tensor(values, dtype=torch.float64) for _ in range(2))
    nn.utils.clip_grad_norm_(torchs, longest)
    scale(mine, longest, 5.0)
    for p, other in zip(mine, torchs, strict=True):
        assert other.grad is None or torch.equal(p.grad, other.grad)


def test_the_norm_is_the_root_of_all_squares_but_those_counted_elsewhere(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    ranks = SimpleNamespace(device=torch.device("cpu"), dense=SimpleNamespace(get_group=str))
    own = [nn.Parameter(torch.zeros(2)) for _ in range(4)]
    for p, values in zip(own, ([3.0, 0.0], [0.0, 4.0], [7.0, 7.0]), strict=False):
        p.grad = torch.tensor(values)
    assert norm(own, ranks, own[2:3]).item() == 5 and norm([], ranks).item() == 0


def test_a_part_is_copied_where_it_fits():
    fill(own := torch.zeros(2, 3), torch.ones(2, 3))
    fill(nothing := torch.zeros(0, 3), torch.ones(2, 3))  # of a rank that holds nothing of it
    assert own.eq(1).all() and not nothing.numel()


@pytest.mark.parametrize("module", [validation, serving])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count, size", [(1, 1), (4, 2), (7, 2), (7, 3), (9, 2)])
def test_every_window_is_counted_once_in_batches_of_one_shape(module, ranks, count, size,
                                                              monkeypatch):
    """All ranks go through equally many, and no more than are needed."""
    monkeypatch.setattr(module, "counted", lambda args, batches, *_: list(batches))
    text, dealt = torch.arange(count * 4 + 1), []
    for rank in range(ranks):
        layout = SimpleNamespace(data_ranks=ranks, expert_parallel=ranks, pipeline=1)
        place = SimpleNamespace(get_local_rank=lambda name, rank=rank: rank)
        here = SimpleNamespace(layout=layout, data_rank=rank, pipeline_rank=0, sparse=place,
                               device=torch.device("cpu"))
        model = SimpleNamespace(args=SimpleNamespace(n_dense_layers=0), ranks=here, parts=[],
                                layers=[], head=nn.Linear(1, 1))
        dealt.append(module.evaluate(model, text, None, 4, size))
    assert {len(batches) for batches in dealt} == {-(-count // (ranks * size))}
    for batches in zip(*dealt, strict=True):
        assert all(0 < len(batch) <= size and held <= len(batch) for batch, held in batches)
        assert len({batch.shape for batch, _ in batches}) == 1
    begun = [int(row[0]) for batches in dealt for batch, held in batches for row in batch[:held]]
    assert sorted(begun) == list(range(0, count * 4, 4))


class Next(nn.Module):
    """A stage of a model that adds 1."""

    layers, head = [], nn.Identity()

    def forward(self, x, samples):
        return x + 1, [], None


@pytest.mark.parametrize("rank, came, went", [(0, [1], [(1, 1)]), (1, [0], [(0, 7)])])
def test_a_stage_takes_what_the_one_before_it_gave_also_on_its_own_rank(rank, came, went,
                                                                       monkeypatch):
    """Of four stages in V's shape; what comes from another rank is 5."""
    received, sent = [], []
    monkeypatch.setattr(torch.distributed, "recv", lambda x, group, group_src: (
        received.append(group_src), x.fill_(5)))
    monkeypatch.setattr(torch.distributed, "send", lambda x, group, group_dst: sent.append(
        (group_dst, x.max().item())))
    layout = SimpleNamespace(pipeline=2, stages_of=lambda rank: ([0, 3], [1, 2])[rank])
    ranks = SimpleNamespace(layout=layout, pipeline_rank=rank, dense=SimpleNamespace(get_group=str))
    parts = [Next(), Next()]
    if rank == 0:
        parts[1].head = "the model's"
    model = SimpleNamespace(ranks=ranks, parts=parts, dtype=torch.float32,
                            args=SimpleNamespace(dim=3, n_dense_layers=0))
    head, states, _ = validation.forward(model, torch.zeros(2, 4, dtype=torch.int64), None)
    assert (received, sent) == (came, went) and states.max() == (6 if rank == 0 else 7)
    assert head == ("the model's" if rank == 0 else None)


@pytest.mark.parametrize("rank, of, came, went, told, states", [
    (0, 1, [], [], [], 2), (0, 3, [], [(1, 2)], [2], 2), (1, 3, [0], [(2, 7)], [2], 7),
    (2, 3, [1], [], [2], 7)])
def test_states_go_from_each_rank_to_the_next_and_from_the_last_to_all(
        rank, of, came, went, told, states, monkeypatch):
    """Each rank has two layers that add 1; what comes from another rank is 5."""
    received, sent, asked = [], [], []
    monkeypatch.setattr(torch.distributed, "recv", lambda x, group, group_src: (
        received.append(group_src), x.fill_(5)))
    monkeypatch.setattr(torch.distributed, "send", lambda x, group, group_dst: sent.append(
        (group_dst, x.max().item())))
    monkeypatch.setattr(serving, "from_rank", lambda x, last, group: (asked.append(last), x)[1])
    model = SimpleNamespace(
        context=lambda *_: None, embed=lambda tokens: torch.zeros(*tokens.shape, 3), pipe="pipe",
        layers=[lambda x, context: (x + 1, None, None)] * 2, norm=lambda x: x,
        ranks=SimpleNamespace(pipeline_rank=rank, layout=SimpleNamespace(pipeline=of)))
    found = serving.SpreadModel.hidden(model, torch.zeros(2, 4, dtype=torch.int64)).states
    assert (received, sent, asked, found.max().item()) == (came, went, told, states)


@pytest.mark.parametrize("in_use", [False, True])
def test_a_checkpoint_of_grpo_over_ranks_holds_its_reference_and_a_rollout_in_use(in_use):
    rollout = SimpleNamespace(parts=lambda updates, team: (updates, team))
    made = SimpleNamespace(reference=nn.Linear(1, 1), in_use=lambda: in_use, team="team",
                           args=SimpleNamespace(updates=4), batch=SimpleNamespace(rollout=rollout))
    kinds = ReinforcerOverRanks.more_tensors(made)
    assert kinds.pop("reference").keys() == {"weight", "bias"}
    assert kinds == (dict(rollout=(4, "team")) if in_use else {})


def test_a_ranks_memory_is_its_whole_gpu_s(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3, 7))
    memory = [Ranks(None, torch.device(kind), None, None).memory for kind in ("cuda", "cpu")]
    assert memory == [7, 0]


def test_optimizers_take_over_what_was_saved_by_name():
    model = nn.ModuleDict(dict(layers=nn.Linear(4, 3), norm=nn.LayerNorm(4)))
    first, second = (build_optimizers(model, TrainArgs(optimizer="muon"), torch.float32)
                     for _ in range(2))
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    for optimizer in first:
        optimizer.step()
    saved = {f"old.{name}": state for name, state in named_states(model, first)}
    lost = [name for name in saved if "norm.bias" in name]  # it had learnt nothing yet
    load_states(model, second, saved.keys() - {*lost},
                lambda name, region: saved[name][region] if region else saved[name],
                lambda name: f"old.{name}")
    found = {f"old.{name}": state for name, state in named_states(model, second)}
    assert lost and found.keys() == saved.keys() - {*lost}
    assert {name.rpartition("/")[2] for name in found} == {
        "step", "exp_avg", "exp_avg_sq", "momentum"}
    for name, state in found.items():
        assert torch.equal(state, saved[name]) and state.dtype == saved[name].dtype


def test_data_ranks_are_numbered_replica_by_replica():
    ranks = [Ranks(SimpleNamespace(fsdp=3), None, SimpleNamespace(
        get_local_rank=dict(replicate=replica, fsdp=place, pipeline=7).__getitem__), None)
        for replica in range(2) for place in range(3)]
    assert [each.data_rank for each in ranks] == [0, 1, 2, 3, 4, 5]
    assert {each.pipeline_rank for each in ranks} == {7}


@pytest.mark.parametrize("replicate, found", [(1, ""), (2, "replicate ")])
def test_replicas_are_a_dimension_of_the_mesh_where_there_are_several(replicate, found):
    dense, sparse = ({name: name, ("replicate", name): f"replicate {name}"}
                     for name in ("fsdp", "expert_fsdp"))
    ranks = Ranks(SimpleNamespace(replicate=replicate), None, dense, sparse)
    assert ranks.shards() == f"{found}fsdp" and ranks.shards(experts=True) == f"{found}expert_fsdp"


@pytest.mark.parametrize("last", [False, True])
def test_gradients_travel_in_a_step_s_last_backward_pass(last, monkeypatch):
    class Unit(nn.Module):
        def __init__(self):
            super().__init__()
            self.told = []

        def __getattr__(self, name):
            if name.startswith("set_"):
                return lambda value, recurse=None: self.told.append((name, value, recurse))
            return super().__getattr__(name)

    monkeypatch.setattr(sharding, "FSDPModule", Unit)
    model = nn.Sequential(Unit(), nn.Sequential(Unit()))
    expect(model, last)
    for unit in (model[0], model[1][0]):
        assert unit.told == [
            ("set_is_last_backward", last, None), ("set_requires_gradient_sync", last, False),
            ("set_reshard_after_backward", last, False)]


@pytest.mark.parametrize("biases", [True, False])
def test_gate_biases_of_all_layers_stand_in_order(biases, monkeypatch):
    """Of five layers, the first is dense; this rank has the first, the third and the last."""
    summed = []
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda x, group: summed.append(group))
    args = replace(LITTLE, n_layers=4, n_dense_layers=1, n_mtp_layers=1, gate_bias=biases)
    own = {n: torch.full((args.n_routed_experts,), float(n)) if biases else None for n in (2, 4)}
    blocks = [SimpleNamespace(is_moe=False)] + [
        SimpleNamespace(is_moe=True, layer=layer, ffn=SimpleNamespace(gate=SimpleNamespace(
            bias=bias))) for layer, bias in own.items()]
    ranks = SimpleNamespace(device=torch.device("cpu"), dense=SimpleNamespace(get_group=str))
    made = SimpleNamespace(args=args, ranks=ranks, parts=[
        SimpleNamespace(blocks=lambda: blocks[:2]), SimpleNamespace(blocks=lambda: blocks[2:])])
    found = ParallelModel.gate_biases(made)
    assert [row.unique().tolist() for row in found] == ([[0], [2], [0], [4]] if biases else [])
    assert summed == ["pipeline"]

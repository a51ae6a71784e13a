"""The learner's parts: collected from notebooks, tried, and as a model equal to the package's."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from nbformat import write
from nbformat.v4 import new_code_cell, new_notebook

from minids import ModelArgs, Transformer
from minids.kernels.registry import using
from minids.lab import checker, mine
from minids.lab.mine import Part, collect, tagged
from minids.runs.optimizers import learning_rate_factor
from minids.runs.settings import TrainArgs
from minids.text.loaders import open_data
from minids.tokenizer import Tokenizer

NINE = mine.ROOT / "notebooks" / "09_all_together.ipynb"
ARGS = ModelArgs(**{**vars(mine.SMALL), "vocab_size": 4096, "init_std": 0.1, "n_layers": 2})
RECIPE = TrainArgs.for_preset("nano", steps=20, batch_size=2, seq_len=24, bias_speed=0.01,
                              dtype="fp32", device="cpu")


@pytest.fixture
def patient(monkeypatch):
    """Let every part take its time: a busy machine must not count as an endless loop."""
    monkeypatch.setattr(checker, "PATIENCE", 300.0)


@pytest.fixture(scope="module")
def parts():
    """The parts that the committed notebooks define."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checker, "PATIENCE", 300.0)
        return collect(NINE.parent)


def test_the_committed_notebooks_define_every_part(parts):
    assert [(name, remark) for name, _, remark in parts.rows] == [
        (f"`{part.name}`", "yours") for part in mine.PARTS]


def trained(kind: str, parts, steps: int) -> dict[str, torch.Tensor]:
    """Return the weights of notebook 09's model, or of the package's, after steps in FP64."""
    tokenizer = Tokenizer.load(mine.ROOT / "data" / "tokenizer")
    space = dict(torch=torch, mine=parts, schedule=learning_rate_factor, open_data=open_data,
                 tokenizer=tokenizer)
    for number, source in tagged(NINE):
        mine.run_source(source, f"09, cell {number}", space)
    recipe = TrainArgs(**{**vars(RECIPE), "steps": steps})
    with using("off"):
        *_, (model, _) = space["train"](space.get(kind, Transformer), ARGS, recipe, torch.float64)
    return model.state_dict()


@pytest.fixture(scope="module")
def package(parts):
    """The package's weights after some steps, trained once."""
    return cache(lambda steps: trained("Transformer", parts, steps))


def apart(parts, package, steps: int) -> float:
    """Return the largest difference between the weights of both models."""
    own, package = trained("Model", parts, steps), package(steps)
    assert own.keys() == package.keys()
    return max((own[name] - package[name]).abs().max().item() for name in package)


@pytest.mark.slow  # notebook 09 does the same
def test_twenty_steps_of_the_assembled_model_are_the_packages(parts, package):
    # FP64 has 16 digits; Muon and AdamW divide by small numbers.
    assert apart(parts, package, 20) < 1e-10


def half_split(x, positions, freqs):
    """Rotate channels 0 and 4 as a pair instead of 0 and 1."""
    angles = positions[:, None] * freqs
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angles.cos() - b * angles.sin(), a * angles.sin() + b * angles.cos()], -1)


def bias_in_weights(u, weight, bias, args):
    """Weigh by score plus bias."""
    chosen, _ = mine.gate(u, weight, bias, args)
    picked = ((u @ weight.T).sigmoid() + bias).gather(-1, chosen)
    return chosen, picked / picked.sum(-1, keepdim=True) * args.route_scale


def moe_by(gate):
    """Return `moe` with another gate."""
    def moe(u, layer, args):
        chosen, weights = gate(u, layer.gate.weight, layer.gate.bias, args)
        y, e = layer.shared_experts(u), layer.experts
        for i in range(args.n_routed_experts):
            token, place = (chosen == i).nonzero(as_tuple=True)
            out = F.linear(F.silu(u[token] @ e.w1[i].T) * (u[token] @ e.w3[i].T), e.w2[i])
            y = y.index_add(0, token, out * weights[token, place, None])
        return y
    return moe


def eps_in_gate(u, weight, bias, args):
    """Divide by the sum plus a millionth."""
    chosen, weights = mine.gate(u, weight, bias, args)
    total = (u @ weight.T).sigmoid().gather(-1, chosen).sum(-1, keepdim=True)
    return chosen, weights * total / (total + 1e-6)


def naive_scaled(h, w, args, rotate):
    """Scale the scores by the width without position."""
    wrong = (args.qk_head_dim / args.qk_nope_head_dim) ** 0.5
    return mine.naive(h, {**w, "wq": w["wq"] * wrong}, args, rotate)


def in_proportion(bias, load, speed):
    """Move a bias by how far its load is from the mean."""
    mean = load.double().mean()
    return bias + speed * (mean - load) / mean


def without_sum(scores, k):
    """Leave the scores of a token as they are."""
    return mine.sequence_loss(scores, k) * scores.sum(-1).mean()


def other_way_round(part, h, following, context):
    """Join state and embedding, as the paper writes it."""
    joined = torch.cat([part.hnorm(h), part.enorm(following)], dim=-1)
    return part.norm(part.block(part.eh_proj(joined), context)[0])


WRONG = dict(rope=half_split, naive=naive_scaled, move=in_proportion, sequence_loss=without_sum,
             module=other_way_round)


@pytest.mark.parametrize("name, wrong", [*WRONG.items(), ("moe", moe_by(bias_in_weights)),
                                         ("moe", moe_by(eps_in_gate))])
def test_a_part_that_is_subtly_wrong_is_noticed(name, wrong, parts, package):
    assert apart(mine.Mine(**{**vars(parts), name: wrong}), package, 3) > 1e-10


def test_the_right_experts_written_otherwise_are_right(parts, package):
    assert apart(mine.Mine(**{**vars(parts), "moe": moe_by(mine.gate)}), package, 3) < 1e-10


def double(x):
    """Return twice the number: the reference of these tests."""
    return 2 * x


DOUBLE = [Part("77_test", double, lambda: (torch.ones(2).double(),))]


def found(folder, *sources: str, tags=("mine",)):
    """Return what is collected from a notebook with these cells: the answer for 3, the remark."""
    cells = [new_code_cell(source, metadata={"tags": [*tags]}) for source in sources]
    write(new_notebook(cells=cells), folder / "77_test.ipynb")
    parts = collect(folder, DOUBLE)
    return parts.double(3), parts.rows[0][2]


def test_a_learners_own_part_is_used(tmp_path, patient, capsys):
    assert found(tmp_path, "import math\nprint('busy')", "def double(x):\n    return x + x") == (
        6, "yours")
    answer, remark = found(tmp_path, "def double(x):\n    return 2.5 * x")
    assert answer == 7.5 and "but wrong" in remark and "0.5" in remark
    line = "import linecache; assert 'getline' in linecache.getline('77_test.ipynb, cell 0', 1)"
    assert found(tmp_path, f"{line}\ndef double(x):\n    return 2 * x") == (6, "yours")
    _, remark = found(tmp_path, "def double(x):\n    return torch.ones(1)")
    assert "shape (1,) instead of shape (2,)" in remark
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("source, said", [
    ("def double(x):\n    raise NotImplementedError()", "double is not written yet"),
    ("def double(x):\n    return y", "NameError"), ("def double(x:", "SyntaxError"),
    ("import sys\nsys.exit()\ndef double(x): ...", "cell 0 stops with SystemExit"),
    ("import os\nos._exit(0)", "cell 0 ends Python itself"), ("%time 1", "SyntaxError"),
    ("x = 1", "it is not defined"), ("double = 2", "it is not defined")])
def test_a_part_that_does_not_run_is_replaced_and_named(source, said, tmp_path, patient):
    answer, remark = found(tmp_path, source)
    assert answer == 6 and remark.startswith("the package's: ") and said in remark


def test_an_endless_loop_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(checker, "PATIENCE", 1.0)
    answer, remark = found(tmp_path, "while True: pass")
    assert answer == 6 and "does one of its loops never end" in remark


def test_notebooks_that_cannot_be_read_are_named(tmp_path, patient):
    assert "no cell is tagged" in found(tmp_path, "def double(x): ...", tags=())[1]
    (tmp_path / "77_test.ipynb").write_text("{", encoding="utf-8")
    assert "cannot be read" in collect(tmp_path, DOUBLE).rows[0][2]
    (tmp_path / "77_test.ipynb").unlink()  # nor is there one in the clone
    assert "cannot be read" in collect(tmp_path, DOUBLE).rows[0][2]


def test_nothing_is_left_behind(tmp_path, patient):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    found(tmp_path, "torch.set_default_dtype(torch.float64)\ntorch.manual_seed(1)")
    assert torch.get_default_dtype() == torch.float32
    assert torch.equal(torch.get_rng_state(), before)

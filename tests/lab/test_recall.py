"""The long-range task: what is asked was told once, far back, and only there.

The experiment itself trains for minutes and is a program; here it runs for a few steps.
"""

import re
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from minids.base.command_line import run_program
from minids.lab import recall
from minids.lab.recall import (
    FILLERS,
    VALUES,
    Lesson,
    RecallArgs,
    ask,
    draw,
    pairs_in,
    with_indexers,
)
from minids.model.sparse_attention import freeze_all_but_indexers, in_indexer
from minids.model.transformer import Transformer

SHORT = RecallArgs(seq_len=64, tokens=128, test_sequences=4, dtype="fp32", device="cpu", threads=1)
LENGTHS = (32, 64, 512, 2048)


def some(args: RecallArgs, length: int, batch: int = 5, seed: int = 0) -> torch.Tensor:
    return draw(args, batch, length, torch.Generator().manual_seed(seed))


def kinds(row: list[int], args: RecallArgs) -> str:
    """A letter for each token: key, value or filler."""
    return "".join("k" if t < args.keys else "v" if t < args.keys + VALUES else "." for t in row)


@pytest.mark.parametrize("length", LENGTHS)
def test_every_answer_was_told_once_and_far_back(length):
    args = RecallArgs(seq_len=2048)
    pairs = pairs_in(length)
    for row in some(args, length).tolist():
        assert re.fullmatch(rf"\.*(kv){{{pairs}}}\.*(kv){{{pairs}}}", kinds(row, args))
        keys = [i for i, t in enumerate(row) if t < args.keys]
        first, last = keys[:pairs], keys[pairs:]
        told = {row[i]: row[i + 1] for i in first}
        assert len(told) == pairs and sorted(told) == sorted(row[i] for i in last)
        assert all(told[row[i]] == row[i + 1] for i in last)
        assert [row[i] for i in first] != [row[i] for i in last]  # in another order
        if length > 32:
            # No window of k holds a pair and a question, and no pair lies so early that all
            # queries there see everything, whatever is selected.
            k = length // 8
            assert last[0] - (first[-1] + 1) > k and first[0] >= k


def test_a_sixteenth_of_the_tokens_are_keys_and_never_fewer_than_eight():
    assert [pairs_in(length) for length in (32, 128, 160, *LENGTHS[2:])] == [8, 8, 10, 32, 128]


def test_words_of_one_kind_are_drawn_alike():
    tokens = some(SHORT, 64, batch=4000).flatten()
    counts = tokens.bincount(minlength=SHORT.keys + VALUES + FILLERS).float()
    for part in counts.split([SHORT.keys, VALUES, FILLERS]):
        assert (part / part.mean() - 1).abs().max() < 6 * part.mean() ** -0.5  # six deviations


def test_the_seed_decides_the_sequences():
    assert torch.equal(some(SHORT, 64), some(SHORT, 64))
    assert not torch.equal(some(SHORT, 64), some(SHORT, 64, seed=1))


def knows(tokens: torch.Tensor, shift: int = 0) -> SimpleNamespace:
    """A model that says what comes `shift` places after the next token."""
    table = torch.nn.functional.one_hot(tokens.roll(-1 - shift, 1)).float()
    return SimpleNamespace(hidden=lambda given, indexer_stage: (table[:, :given.size(1)], [], []),
                           head=lambda hidden: hidden)


@pytest.mark.parametrize("length", [32, 64])
def test_it_asks_for_the_values_and_for_nothing_else(length):
    tokens = some(SHORT, length)
    asked = ask(knows(tokens), tokens)
    assert asked.accuracy == 1.0
    values = asked.logits.argmax(-1)  # what was asked for, since every answer is right
    assert values.shape == (5, pairs_in(length))
    assert (values >= SHORT.keys).all() and (values < SHORT.keys + VALUES).all()
    assert ask(knows(tokens, shift=1), tokens).accuracy == 0.0


def test_the_answer_is_not_among_what_the_model_reads():
    model = Transformer(SHORT.model())
    tokens = some(SHORT, 64)
    other = tokens.clone()
    other[:, -1] = SHORT.keys
    with torch.no_grad():
        assert torch.equal(ask(model, tokens).logits, ask(model, other).logits)
        other[:, -2] = (other[:, -2] + 1) % SHORT.keys
        assert not torch.equal(ask(model, tokens).logits, ask(model, other).logits)


@pytest.mark.slow
def test_a_lesson_learns_and_its_stages_train_what_they_should():
    torch.manual_seed(0)
    model = Transformer(SHORT.model())
    lesson = Lesson(SHORT, model)
    losses = [lesson.step(32).loss.item() for _ in range(120)]
    assert sum(losses[-20:]) / 20 < losses[0] - 0.8  # a choice among the values that were told
    sparse = with_indexers(model, SHORT)
    before = {name: p.clone() for name, p in sparse.named_parameters()}
    freeze_all_but_indexers(sparse)
    warmup = Lesson(SHORT, sparse, "warmup")
    first, last = [warmup.step(64).indexer.item() for _ in range(20)][::19]
    assert 0 < last < first
    for name, p in sparse.named_parameters():
        assert torch.equal(p, before[name]) != in_indexer(name), name
    sparse.requires_grad_(True)
    before = {name: p.clone() for name, p in sparse.named_parameters()}
    Lesson(SHORT, sparse, "sparse").step(64)
    assert not any(torch.equal(p, before[name]) for name, p in sparse.named_parameters())


def test_later_stages_learn_slower_and_indexers_at_their_own_rate():
    args = replace(SHORT, lr=0.5, muon_lr=0.25, indexer_lr=0.125, sparse_lr=0.0625)
    model = with_indexers(Transformer(args.model()), args)
    for stage, share in (("", 1.0), ("warmup", 0.0625), ("sparse", 0.0625)):
        adamw, muon = Lesson(args, model, stage).optimizers
        rates = [group["peak_lr"] for group in (*adamw.param_groups, *muon.param_groups)]
        assert rates == [0.5 * share, 0.5 * share, 0.125, 0.125, 0.25 * share]


def test_training_goes_on_to_longer_sequences_when_shorter_ones_are_solved(monkeypatch):
    args = replace(SHORT, seq_len=128, steps=1000)
    monkeypatch.setattr(Lesson, "step", lambda self, length: SimpleNamespace(
        accuracy=float(setattr(self, "steps", self.steps + 1) or True)))
    model = Transformer(args.model())
    # 1 - 0.9^n is above 0.99 at n = 44.
    assert list(recall.train_dense(args, model)) == [(32, 44), (64, 88), (128, 132)]
    args = replace(args, steps=100)
    assert list(recall.train_dense(args, model)) == [(32, 44), (64, 88)]


def run(*flags: str, monkeypatch) -> int:
    monkeypatch.setattr(sys, "argv", ["minids.lab.recall", *flags])
    with pytest.raises(SystemExit) as end:
        run_program("minids.lab.recall", recall.main)
    return end.value.code or 0


def test_the_program_prints_its_tables(monkeypatch, capsys):
    status = run("--seq-len=64", "--tokens=128", "--steps=2", "--warmup-steps=2",
                 "--sparse-steps=1", "--test-sequences=2", "--device=cpu", "--threads=1",
                 monkeypatch=monkeypatch)
    out = capsys.readouterr().out
    assert status == 0 and out.count("attention to 8 tokens  accuracy") == 2
    for name in ("dense", "indexer", "attention", "window", "random"):
        assert sum(line.startswith(f"{name} ") for line in out.splitlines()) >= 2


def test_kept_models_are_read_again(monkeypatch, tmp_path, capsys):
    run("--seq-len=64", "--tokens=128", "--steps=2", "--warmup-steps=2", "--sparse-steps=1",
        "--test-sequences=2", "--device=cpu", "--threads=1", f"--out={tmp_path}/kept",
        monkeypatch=monkeypatch)
    (args, warm), (_, sparse) = (recall.load_stage(tmp_path / "kept", stage)
                                 for stage in ("warmup", "sparse"))
    assert (args.seq_len, args.warmup_steps) == (64, 2)
    moved = {name for (name, a), b in zip(warm.named_parameters(), sparse.parameters(), strict=True)
             if not torch.equal(a, b)}
    assert "layers.0.attn.wo.weight" in moved
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("dense"))
    assert recall.accuracies(args, warm)[0][1] == pytest.approx(float(row.split()[1][:-1]) / 100,
                                                                abs=1e-4)


def test_the_committed_model_finds_what_a_window_does_not():
    args, model = recall.load_stage(Path(__file__).parents[2] / "data" / "recall", "warmup")
    found = {name: share for name, share, _ in
             recall.accuracies(replace(args, test_sequences=2, device="cpu"), model)}
    assert found["indexer"] > found["dense"] - 0.02 > 0.95
    assert max(found["window"], found["random"]) < 0.2


@pytest.mark.parametrize("flag, named", [
    ("--seq-len=100", "seq_len = 100"), ("--seq-len=48", "seq_len = 48"),
    ("--index-topk=2048", "index_topk = 2048"), ("--tokens=0", "tokens = 0"),
    ("--index-head-dim=8", "index_head_dim = 8"), ("--device=gpu", "device = 'gpu'")])
def test_mistakes_are_one_line(flag, named, monkeypatch, capsys):
    assert run(flag, monkeypatch=monkeypatch) == 2
    err = capsys.readouterr().err
    assert named in err and err.count("\n") == 1

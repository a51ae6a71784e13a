"""Fine-tuning: the loss mask, packed samples, and runs that end with equal bytes."""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from kill_and_resume import differences
from small_models import LITTLE, gap, random_tokens, scrambled
from training_runs import no_picture, short_sample

from minids import sft as sft_module
from minids.base.command_line import run_program
from minids.hf import save_hf
from minids.model.objective import Packed
from minids.model.transformer import positions_in, same_sample
from minids.rl import examination
from minids.rl.examination import Asking, Marks
from minids.runs.checkpoints import load_weights, resolve
from minids.runs.device import fetched
from minids.runs.open import open_model, open_source
from minids.runs.settings import TrainArgs
from minids.sft import PRESETS, FineTuner, Rows, SftArgs, conversation, open_conversations
from minids.text import corpora
from minids.text.chat import Chat
from minids.text.tasks import open_task
from minids.tokenizer import Tokenizer
from minids.train import train

SMALL = dict(steps=6, examples=64, seq_len=128, batch_size=4, eval_every=3, eval_problems=4,
             max_new_tokens=8, save_every=1, keep_last=0, threads=1)


@pytest.fixture(scope="module")
def chat() -> Chat:
    return Chat(Tokenizer.open("bytes"))


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("sft") / "base"
    with contextlib.redirect_stdout(io.StringIO()), pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpora, "EXAMPLES", 2000)
        patch.setattr("minids.train.loss_curve", no_picture)
        patch.setattr("minids.train.Trainer.sample", short_sample)
        train(TrainArgs.for_preset("micro", out=str(run), steps=2, eval_every=0, threads=1))
    return run


def some(count: int = 12) -> list[list[dict]]:
    return [conversation(p, think=i % 2 == 0)
            for i, p in enumerate(open_task("calculator").some(count, "train", 0))]


def test_positions_and_sight_of_packed_samples():
    samples = torch.tensor([[7, 7, 7, 8, 8], [1, 2, 2, 2, 2]])
    assert positions_in(samples).tolist() == [[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]]
    assert same_sample(samples)[0].int().tolist() == [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0],
                                                   [1, 1, 1, 0, 0], [0, 0, 0, 1, 0],
                                                   [0, 0, 0, 1, 1]]


def pieces(lengths: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    tokens = random_tokens(LITTLE, 1, sum(lengths))
    samples = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))[None]
    return tokens, samples


def test_packed_samples_are_as_if_alone():
    model, lengths = scrambled(LITTLE), [5, 1, 11, 7]
    tokens, samples = pieces(lengths)
    hidden = model.hidden(tokens, samples=samples)[0]
    alone = torch.cat([model.hidden(part)[0] for part in tokens.split(lengths, dim=1)], dim=1)
    assert gap(hidden, alone) < 1e-12
    assert gap(model.hidden(tokens)[0], alone) > 0.1  # wrong variant: all is one text


def test_the_loss_of_packed_samples_is_the_mean_of_those_alone():
    """Main and MTP loss: over the loss mask, each sample with its own past only."""
    model, lengths = scrambled(LITTLE), [6, 9, 5]
    tokens, samples = pieces(lengths)
    targets = tokens.roll(-1, dims=1)
    learnt = torch.ones_like(tokens, dtype=torch.bool)
    learnt[0, torch.tensor(lengths).cumsum(0) - 1] = False  # the last target is another sample's
    together = model.loss(tokens, targets, packed=Packed(samples, learnt))
    main = mtp = 0.0
    for part in tokens.split(lengths, dim=1):
        loss = model.loss(part[:, :-1], part[:, 1:])
        count = part.size(1) - 1
        main, mtp = main + loss.main * count, mtp + loss.mtp * count
    assert gap(together.main, main / (sum(lengths) - 3)) < 1e-12
    assert gap(together.mtp, mtp / (sum(lengths) - 3)) < 1e-12
    assert gap(model.loss(tokens, targets).main, together.main) > 1e-3


def test_rows_hold_every_conversation_once_and_learn_replies_only(chat):
    conversations = some()
    rows = Rows(chat, conversations, seq_len=96)
    for number, messages in enumerate(conversations):
        mine = rows.samples == number
        assert mine.any(1).sum() == 1  # in one row
        ids, learnt = chat.sample(messages)
        # The row's last token may be a target only.
        seen = rows.tokens[mine].tolist()
        assert seen == ids[:len(seen)] and len(seen) >= len(ids) - 1
        assert rows.targets[mine & rows.loss_mask].tolist() == [
            t for t, learn in zip(ids, learnt, strict=True) if learn]
    assert rows.tokens.shape[1] == 96


def test_every_row_once_an_epoch(chat):
    rows = Rows(chat, some(40), seq_len=64)
    count = len(rows.tokens)
    at = {tuple(row): i for i, row in enumerate(rows.tokens.tolist())}
    order = [at[tuple(rows.batch(step, 1, seed=0)[0][0].tolist())]
             for step in range(1, 2 * count + 1)]
    assert sorted(order[:count]) == sorted(order[count:]) == list(range(count))
    assert order[:count] != order[count:]


def test_a_conversation_that_does_not_fit(chat):
    with pytest.raises(ValueError, match="seq_len = 20 is not valid: conversation 1 has"):
        Rows(chat, some(), seq_len=20)
    longest = max(len(chat.sample(messages)[0]) for messages in some())
    assert Rows(chat, some(), seq_len=longest).tokens.shape[1] == longest
    with pytest.raises(ValueError, match=f"has {longest} tokens"):
        Rows(chat, some(), seq_len=longest - 1)


def run_sft(*flags: str) -> tuple[int, str, str]:
    """`python -m minids.sft` with these flags, in this process: status, stdout, stderr."""
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), \
            contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        patch.setattr(sys, "argv", ["minids.sft", *flags])
        run_program("minids.sft", sft_module.main)
    return end.value.code, out.getvalue(), err.getvalue()


def as_flags(options: dict) -> list[str]:
    return [word for name, value in options.items()
            for word in ("--" + name.replace("_", "-"), str(value))]


def tuner(base: Path, out: Path, **changed) -> FineTuner:
    args = SftArgs.for_preset(**SMALL | dict(from_run=str(base), out=str(out)) | changed)
    source = open_source(base)
    made = FineTuner(args, source.args, out, source.tokenizer)
    made.begin_from(source)
    return made


def test_a_step_learns_each_token_of_the_reply_from_those_before_it(base, tmp_path):
    """The loss, from the logits of one conversation alone."""
    [messages] = some(1)
    (tmp_path / "one.jsonl").write_text(json.dumps(dict(messages=messages)))
    made = tuner(base, tmp_path / "run", data=f"jsonl:{tmp_path}/one.jsonl", batch_size=1)
    made.step = 1
    metrics = fetched(made.accumulate()[0])
    ids, learnt = Chat(made.tokenizer).sample(messages)
    row, learnt = torch.tensor(ids), torch.tensor(learnt)

    def nats(seen: torch.Tensor, wanted: torch.Tensor, counted: torch.Tensor) -> float:
        logits = made.model(seen[None])[0].float()
        return torch.nn.functional.cross_entropy(logits[counted], wanted[counted]).item()

    expected = nats(row[:-1], row[1:], learnt[1:])
    assert metrics["main"] == pytest.approx(expected, abs=1e-5)  # FP32
    assert metrics["learnt"] == sum(learnt) and metrics["loss"] > metrics["main"]
    # Wrong variants: the token before is learnt; the whole conversation is.
    assert abs(nats(row[1:], row[:-1], learnt[1:]) - expected) > 1e-3
    assert abs(nats(row[:-1], row[1:], torch.ones(len(ids) - 1).bool()) - expected) > 1e-3
    assert any(p.grad is not None and p.grad.any() for p in made.model.parameters())


@pytest.mark.parametrize("think", [0.0, 0.4, 1.0])
def test_a_share_of_the_answers_has_a_thought(think):
    found = open_conversations(SftArgs(examples=1000, think=think))
    share = sum("thought" in messages[-1] for messages in found) / len(found)
    assert abs(share - think) < 0.05  # three standard deviations
    assert share in (0, 1) or 0 < think < 1
    other = open_conversations(SftArgs(examples=1000, think=think, seed=1))
    assert [m[0] for m in other] != [m[0] for m in found]


def test_marks_are_taken_now_and_then_and_the_best_has_the_least_error(base, tmp_path,
                                                                       monkeypatch):
    right, asked = {"think": 0.75, "direct": 0.25, "free": 1.0}, []
    monkeypatch.setattr(examination, "examine", lambda model, tokenizer, task, count, how, team: (
        asked.append((count, how)), Marks(right[how.mode], 1.0, 0.5, 9.0))[1])
    made = tuner(base, tmp_path / "run", eval_every=3)
    found = []
    for made.step in range(1, 7):
        found.append(made.measure({}, last=False))
    assert found == [None, None, 0.5, None, None, 0.5]
    assert asked[:3] == [(4, Asking(mode, max_new_tokens=8)) for mode in right]
    made.step, record = 7, {}
    assert made.measure(record, last=True) == 0.5 and record["free"]["accuracy"] == 1.0
    rarely = tuner(base, tmp_path / "rarely", eval_every=0)
    rarely.step = 6
    assert rarely.measure({}, last=False) is None and rarely.measure({}, last=True) == 0.5
    untold = tuner(base, tmp_path / "untold", data=conversations_file(tmp_path))
    assert untold.measure({}, last=True) is None  # no task to measure


def conversations_file(folder: Path) -> str:
    path = folder / "talk.jsonl"
    path.write_text("".join(json.dumps(dict(messages=m)) + "\n" for m in some()))
    return f"jsonl:{path}"


@pytest.fixture(scope="module")
def unbroken(base) -> Path:
    """A finished run, which no test changes."""
    run = base.with_name("unbroken")
    status, out, err = run_sft("--from", str(base), "--out", str(run), *as_flags(SMALL))
    assert (status, err) == (0, "") and "step 6/6: loss" in out
    (run / "sample.txt").write_text("")  # only pre-training writes one
    return run


@pytest.mark.parametrize("step", [0, 3])
def test_a_resumed_run_ends_with_the_same_bytes(unbroken, tmp_path, step):
    again = shutil.copytree(unbroken, tmp_path / "again")
    for path in (again / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)
    assert run_sft("--resume", "--out", str(again))[0] == 0
    assert differences(unbroken, again) == []


def test_a_run_learns_and_is_examined_now_and_then(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert {"think", "direct", "free"} <= lines[2].keys() and "think" not in lines[3]


def test_conversations_that_were_changed_since_are_refused(base, tmp_path):
    """Not learnt from for the rest of the run."""
    data, run = conversations_file(tmp_path), tmp_path / "run"
    words = ["--from", str(base), "--out", str(run), *as_flags(SMALL), "--data", data]
    assert run_sft(*words)[0] == 0
    again = ["--resume", "--out", str(run), "--steps", "7"]
    (tmp_path / "talk.jsonl").write_text((tmp_path / "talk.jsonl").read_text().replace("1", "2"))
    status, _, err = run_sft(*again)
    assert status == 2 and f"the data of the run in {run} was changed since it began" in err
    conversations_file(tmp_path)
    assert run_sft(*again)[0] == 0


def test_the_length_of_a_reply_is_checked_first_and_may_change(base, tmp_path):
    run = tmp_path / "run"
    words = ["--from", str(base), "--out", str(run), *as_flags(SMALL)]
    status, _, err = run_sft(*words, "--max-new-tokens", "250")
    assert status == 2 and err.count("\n") == 1 and not run.exists()
    assert "max_new_tokens = 250 is not valid: it must be at most 2" in err
    assert run_sft(*words)[0] == 0
    again = ["--resume", "--out", str(run), "--steps", "7", "--max-new-tokens", "9",
             "--eval-problems", "3", "--eval-every", "1"]
    assert run_sft(*again)[0] == 0
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert "think" in lines[-1]


def test_gate_biases_rest(base, tmp_path):
    run = tmp_path / "run"
    assert run_sft("--from", str(base), "--out", str(run), *as_flags(SMALL))[0] == 0
    before, after = load_weights(resolve(base)), load_weights(resolve(run))
    biases = [n for n in before if n.endswith("gate.bias")]
    assert biases and all(torch.equal(before[n], after[n]) for n in biases)
    assert not torch.equal(before["head.weight"], after["head.weight"])


def test_conversations_from_a_file(base, tmp_path):
    path = tmp_path / "talk.jsonl"
    messages = [dict(role="system", content="Be brief."), dict(role="user", content="2+3"),
                dict(role="assistant", content="5", thought="2+3=5"),
                dict(role="user", content="and 4?"), dict(role="assistant", content="9")]
    path.write_text(json.dumps(dict(messages=messages)) + "\n")
    status, out, err = run_sft("--from", str(base), "--data", f"jsonl:{path}", "--out",
                               str(tmp_path / "run"), *as_flags(SMALL))
    assert (status, err) == (0, "") and "1 rows" in out


def test_from_a_hugging_face_folder(base, tmp_path):
    run = open_model(base)
    save_hf(run.model, tmp_path / "hf")
    run.tokenizer.save_hf(tmp_path / "hf")
    status, _, err = run_sft("--from", str(tmp_path / "hf"), "--out", str(tmp_path / "run"),
                             *as_flags(SMALL))
    assert (status, err) == (0, "")
    first = load_weights(tmp_path / "run/checkpoints/step_000000")
    assert all(torch.equal(first[n], w) for n, w in load_weights(resolve(base)).items())


@pytest.mark.parametrize("flags, named", [
    (["--data", "pystdlib"], "data = 'pystdlib' is not valid: valid are task:NAME and jsonl:PATH"),
    (["--data", "jsonl:nowhere"], "there is no such file"),
    (["--data", "task:sudoku"], "task = 'sudoku' is not valid"),
    (["--seq-len", "1000"], "seq_len = 1000 is not valid: it must be at most max_seq_len = 256"),
    (["--seq-len", "16"], "seq_len = 16 is not valid: conversation"),
    (["--think", "1.5"], "think = 1.5 is not valid"),
    (["--lr", "0"], "lr = 0.0 is not valid"),
    (["--preset", "huge"], "preset"), (["--thinks", "1"], "did you mean '--think'?")])
def test_mistakes_are_one_line_and_leave_nothing(base, tmp_path, flags, named):
    status, _, err = run_sft("--from", str(base), "--out", str(tmp_path / "run"),
                             *as_flags(SMALL), *flags)
    assert status == 2 and err.count("\n") == 1 and named in err
    assert not (tmp_path / "run").exists()


def test_a_wrong_line_is_named(base, tmp_path):
    path = tmp_path / "talk.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", '
                    '"content": "b"}]}\n{"messages": 3}\n')
    status, _, err = run_sft("--from", str(base), "--data", f"jsonl:{path}")
    assert status == 2 and "line 2 must be an object with a list" in err


def test_presets():
    assert SftArgs.for_preset("r1").lr == 5e-5 and SftArgs.for_preset("r1", lr=1e-3).lr == 1e-3
    assert all(SftArgs.for_preset(name).preset == name for name in PRESETS)

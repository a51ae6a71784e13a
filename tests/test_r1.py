"""The R1 pipeline as one command: stages in order, each once, killed and restarted at will.

A pipeline of a few steps; whether it learns is what `python -m minids.r1` prints.
"""

import contextlib
import io
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from run_damage import accepted_flips, some_bits
from training_runs import no_picture, short_sample

from minids import distill as distill_module
from minids import r1 as r1_module
from minids.base.command_line import Stopped, run_program
from minids.base.files import write_json
from minids.config import ModelArgs
from minids.distill import CorpusArgs, sift, verdict
from minids.grpo import GrpoArgs, Reinforcer, grpo
from minids.r1 import ALL, CONTROLS, PRESETS, Pipeline, R1Args, r1, table
from minids.rl.examination import Asking, examine
from minids.runs.checkpoints import load_weights, resolve
from minids.runs.folders import LOCK
from minids.runs.learner import Learner
from minids.runs.open import open_model
from minids.sft import SftArgs, open_conversations
from minids.text import corpora
from minids.text.chat import Chat, Reply
from minids.text.tasks import Problem, open_task

MODELS = Path(__file__).parent.parent / "data/r1"
SHIPPED = {name: preset["corpus"] for name, preset in PRESETS.items()}
RUN = dict(save_every=2, eval_every=0, eval_problems=2)
SFT = RUN | dict(steps=2, max_new_tokens=8)
RL = RUN | dict(steps=2, questions=2, group=2, max_new_tokens=8)
BRIEF = dict(
    task="calculator", model="micro", curve="free", smaller=dict(dim=48, n_heads=3),
    base=dict(steps=2, eval_every=0), sft=SFT | dict(examples=32), rl=RL, rejected=SFT, final=RL,
    student=dict(steps=2, eval_every=0), distilled=SFT, alone=RL,
    corpus=dict(problems=4, longest=8))


def shorten(patch: pytest.MonkeyPatch) -> None:
    """Make the pipeline a few steps long, with teachers that are always right."""
    patch.setitem(PRESETS, "tiny", BRIEF)
    patch.setattr(corpora, "EXAMPLES", 2000)
    patch.setattr("minids.train.Trainer.sample", short_sample)
    patch.setattr(distill_module, "verdict", lambda *_: "kept")
    patch.setattr(distill_module, "ask", lambda model, tokenizer, questions, *_, **__: [
        Reply("1+1=2", "2", True, 9) for _ in questions])
    for name, changed in (("early", dict(steps=2)), ("early-sft", dict(steps=2)),
                          ("direct", dict(think=0.0, examples=64))):
        patch.setitem(ALL, name, CONTROLS[name]._replace(changed=changed))


@pytest.fixture
def brief(monkeypatch):
    """A short pipeline in place of the preset's, without the figures of its runs."""
    shorten(monkeypatch)
    monkeypatch.setattr("minids.train.loss_curve", no_picture)
    monkeypatch.setattr(r1_module, "grpo_figure", no_picture)


def quiet(args: R1Args) -> tuple[dict, str]:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        return r1(args), out.getvalue()


def args_for(run: Path, **more) -> R1Args:
    return R1Args(out=str(run), problems=4, threads=1, **more)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, dict]:
    """A whole run with controls, run once for all tests that only look at it, and its table."""
    run = tmp_path_factory.mktemp("pipeline") / "r1"
    with pytest.MonkeyPatch.context() as patch:
        shorten(patch)
        patch.setattr("minids.train.loss_curve", no_picture)
        return run, quiet(args_for(run, controls=True))[0]


def test_all_stages_then_none(brief, finished):
    run, marks = finished
    assert list(marks) == list(ALL) and (run / "table.txt").exists() and (run / "r1.png").exists()
    made = {path.name for path in run.iterdir() if path.is_dir()}
    assert made == set(ALL)
    stamps = {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}
    again, said = quiet(args_for(run, controls=True))
    assert again == marks and "step" not in said  # nothing was run again
    assert stamps == {p: p.stat().st_mtime_ns for p in run.rglob("*.safetensors")}


def test_a_stage_begins_where_the_one_before_ended(finished):
    run, _ = finished
    before = {"sft": "base", "rl": "sft", "rejected": "base", "final": "rejected",
              "distilled": "student", "alone": "student", "zero": "base", "shuffled": "sft",
              "direct": "base", "early-sft": "early", "early-rl": "early-sft"}
    for stage, source in before.items():
        first = load_weights(run / stage / "checkpoints/step_000000")
        last = load_weights(resolve(run / source))
        assert all(torch.equal(first[n], last[n]) for n in last)
    student = json.loads((run / "student/config.json").read_text())["model"]
    assert (student["dim"], student["n_heads"]) == (48, 3)
    messages = open_conversations(SftArgs(data=f"jsonl:{run}/rl.jsonl"))
    assert {m[-1].get("thought") is None for m in messages} == {True, False}  # both modes


def test_a_flipped_bit_in_the_files_of_the_pipeline_is_named(brief, finished):
    """Its marks, times and corpora; the stages are runs like others."""
    run, _ = finished

    def read(run: Path) -> None:
        pipeline = Pipeline(args_for(run))
        for name in ("times.json", "marks.json"):
            pipeline.stored(name)
        for teacher in ("rl", "final"):
            pipeline.answers(teacher)

    read(run)
    for name in ("r1.json", "times.json", "marks.json", "rl.jsonl", "rl.jsonl.json"):
        assert accepted_flips(run, run / name, some_bits(run / name, 40), read) == [], name


def test_files_of_an_earlier_version_have_no_seal(brief, finished, tmp_path):
    run = shutil.copytree(finished[0], tmp_path / "r1")
    for name in ("r1.json", "times.json", "marks.json", "rl.jsonl.json"):
        found = json.loads((run / name).read_text())
        write_json(run / name, {k: v for k, v in found.items() if k not in ("seal", "sha256")})
    assert quiet(args_for(run))[0].keys() <= finished[1].keys()


def test_a_pipeline_that_cannot_begin_leaves_nothing(brief, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="device = 'cuda' is not valid"):
        r1(R1Args(out=str(tmp_path / "runs/r1"), device="cuda"))
    assert not (tmp_path / "runs").exists()


def test_a_stage_that_was_killed_at_its_end_ends_again(brief, finished, tmp_path):
    """After its last checkpoint, before its samples: the lock is left."""
    run = shutil.copytree(finished[0], tmp_path / "r1")
    (run / "base/sample.txt").unlink()
    (run / "rl" / LOCK).write_text("")
    (run / "rl/checkpoints/.tmp_removed_step_000001").mkdir()
    _, said = quiet(args_for(run))
    assert said.count("resumed at step 2 of 2") == 2
    assert (run / "base/sample.txt").exists() and not (run / "rl" / LOCK).exists()
    assert not list((run / "rl/checkpoints").glob(".tmp*"))


def test_an_interrupt_between_two_stages_says_how_to_go_on(brief, finished, monkeypatch, capsys):
    def interrupt(pipeline):
        raise KeyboardInterrupt

    monkeypatch.setattr(Pipeline, "marks", interrupt)
    monkeypatch.setattr(sys, "argv", ["minids.r1", "--out", str(finished[0])])
    with pytest.raises(SystemExit) as end:
        run_program("minids.r1", r1_module.main)
    assert end.value.code == 130
    assert f"continue with: python -m minids.r1 --out {finished[0]}" in capsys.readouterr().out


@pytest.mark.slow
def test_a_pipeline_that_was_stopped_ends_with_the_same_bytes(brief, finished, tmp_path,
                                                              monkeypatch):
    whole, broken = finished[0], tmp_path / "broken"
    step = Learner.write_record

    def stop_after_one(learner, record):
        if learner.run.name in ("sft", "final") and learner.step == 1:
            learner.stop_signal = 15
        step(learner, record)

    monkeypatch.setattr(Learner, "write_record", stop_after_one)
    stops = 0
    while True:
        try:
            quiet(args_for(broken))
            break
        except Stopped:
            stops += 1
            assert stops < 5
    assert stops == 2
    for stage in ("sft", "final", "distilled"):
        a, b = (load_weights(resolve(run / stage)) for run in (whole, broken))
        assert all(torch.equal(a[n], b[n]) for n in a)


def stop_final(patch: pytest.MonkeyPatch, run: Path, mode: str) -> None:
    """Stop the pipeline after the first step of its last RL, whose prompts are of this mode."""
    step = Learner.write_record

    def stop_after_one(learner, record):
        if learner.run.name == "final":
            learner.stop_signal = 15
        step(learner, record)

    with patch.context() as context:
        context.setattr(Learner, "write_record", stop_after_one)
        context.setitem(PRESETS["tiny"], "final", RL | dict(mode=mode))
        with pytest.raises(Stopped):
            quiet(args_for(run))


def test_a_stage_that_an_older_recipe_began_is_refused(brief, finished, tmp_path, monkeypatch):
    """R1's last stage had the mode "both" once; half of it in each mode would be neither recipe."""
    run = shutil.copytree(finished[0], tmp_path / "r1")  # a moved run: its paths are others
    shutil.rmtree(run / "final")
    stop_final(monkeypatch, run, "both")
    monkeypatch.setitem(PRESETS["tiny"], "final", RL | dict(mode="all", lr=5e-5))
    monkeypatch.setattr(sys, "argv", ["minids.r1", "--out", str(run), "--problems", "4"])
    err = io.StringIO()
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_program("minids.r1", r1_module.main)
    assert end.value.code == 2 and err.getvalue().count("\n") == 1
    assert f"mode = 'all' is not valid: the run in {run}/final has 'both'" in err.getvalue()
    shutil.rmtree(run / "final")
    stop_final(monkeypatch, run, "all")
    assert "resumed at step 1 of 2" in quiet(args_for(run))[1]


def test_pass_at_k_is_measured_at_temperature_1(tmp_path, monkeypatch):
    """Of the cold start and of reasoning RL, on a quarter of the problems; the marks are greedy."""
    asked, greedy = [], []
    monkeypatch.setattr(r1_module, "open_model", lambda path: SimpleNamespace(
        model=path.name, tokenizer=None))
    monkeypatch.setattr(r1_module, "examine_modes", lambda *given: greedy.append(given[-1]) or {})
    monkeypatch.setattr(r1_module, "pass_curve", lambda *given: asked.append(given) or {1: 0.5})
    pipeline = Pipeline(R1Args(out=str(tmp_path), problems=400))
    for stage in ("base", "sft", "rl", "final"):
        (tmp_path / stage).mkdir()
    marks = pipeline.marks()
    how = Asking("free", "chat", GrpoArgs.max_new_tokens, temperature=1.0)
    assert asked == [(stage, None, pipeline.task, 100, 32, how) for stage in ("sft", "rl")]
    assert marks["rl"] == {"pass": {"1": 0.5}} and marks["final"] == {}
    assert [asking.temperature for asking in greedy] == [0.0] * 4


def test_the_table_has_every_stage():
    marks = {stage: {mode: dict(accuracy=0.5, form=1.0, thinking=0.25, tokens=12.0)
                     for mode in ("think", "direct", "free")} for stage in ALL}
    text = table(marks)
    assert all(stage.label in text for stage in ALL.values()) and "0.500" in text


def test_a_run_keeps_its_preset_and_seed(brief, finished, monkeypatch):
    for flags, named in ((["--seed", "1"], "seed = 1 is not valid: the run in"),
                         (["--preset", "countdown"], "preset = 'countdown' is not valid: the run"),
                         (["--problems", "0"], "problems = 0 is not valid")):
        monkeypatch.setattr(sys, "argv", ["minids.r1", "--out", str(finished[0]), *flags])
        err = io.StringIO()
        with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
            run_program("minids.r1", r1_module.main)
        assert end.value.code == 2 and named in err.getvalue() and err.getvalue().count("\n") == 1


def test_verdicts():
    task, problem = open_task("calculator"), Problem("1+1", "1+1=2", "2")
    cases = {"kept": Reply("1+1=2", "2", True, 9), "wrong": Reply("1+1=3", "3", True, 9),
             "malformed": Reply("1+1=2", None, False, 9),
             "other_language": Reply("一加一 = 2", "2", True, 9)}
    for name, reply in cases.items():
        assert verdict(task, problem, reply) == name
    assert verdict(task, problem, Reply(None, "2", True, 3)) == "malformed"  # without a thought


def test_only_the_first_good_reply_of_a_problem_is_kept(tmp_path, brief, finished, monkeypatch):
    """Two of three replies are wrong: with enough tries every problem is answered."""
    turn = iter(range(10 ** 6))
    monkeypatch.setattr(distill_module, "verdict",
                        lambda *_: "kept" if next(turn) % 3 == 0 else "wrong")
    args = CorpusArgs(teacher=str(finished[0] / "rl"), corpus=str(tmp_path / "c.jsonl"), problems=9,
                      tries=20, direct=0.0)
    conversations, counts = sift(args)
    questions = [m[0]["content"] for m in conversations]
    assert len(questions) == len(set(questions)) == counts["kept"] == 9
    assert counts["wrong"] >= 9


def test_a_corpus_is_a_file_in_a_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    for corpus, wanted in (("", "a file to write"), (tmp_path, "a file, and it is a folder"),
                           (tmp_path / "file" / "c.jsonl", "in a folder, and it is below a file")):
        with pytest.raises(ValueError, match=f"corpus = .* is not valid: it must be {wanted}"):
            CorpusArgs(teacher="run", corpus=str(corpus))
    with pytest.raises(ValueError, match="must be 1 at temperature 0"):
        CorpusArgs(teacher="run", corpus="c.jsonl", tries=2, temperature=0.0)


def test_no_two_attempts_of_a_corpus_draw_alike(tmp_path, finished, monkeypatch):
    seeds = []
    monkeypatch.setattr(distill_module, "BATCH", 2)
    monkeypatch.setattr(distill_module, "verdict", lambda *_: "wrong")
    monkeypatch.setattr(distill_module, "ask", lambda _, __, questions, how: seeds.append(how.seed)
                        or [Reply(None, None, False, 1)] * len(questions))
    for draws in (0, 1):
        sift(CorpusArgs(teacher=str(finished[0] / "rl"), corpus=str(tmp_path / "c.jsonl"),
                        problems=6, tries=3, draws=draws))
    assert len(seeds) == len(set(seeds)) == 18


def test_a_corpus_without_any_thought_is_refused(tmp_path):
    with pytest.raises(ValueError, match="direct = 1.0 is not valid: it must be 0 or more"):
        CorpusArgs(teacher="t", corpus=str(tmp_path / "c.jsonl"), direct=1.0)


def test_a_teacher_without_a_right_answer(tmp_path, finished, monkeypatch):
    flags = ["--teacher", str(finished[0] / "rl"), "--corpus", str(tmp_path / "c.jsonl"),
             "--problems", "3", "--longest", "4"]
    err = io.StringIO()
    monkeypatch.setattr(sys, "argv", ["minids.distill", *flags])
    with contextlib.redirect_stderr(err), pytest.raises(SystemExit) as end:
        run_program("minids.distill", distill_module.main)
    assert end.value.code == 2 and "none of 3 replies was kept" in err.getvalue()
    assert not (tmp_path / "c.jsonl").exists()


def test_the_default_settings_are_the_papers_order():
    """All modes in the last stage, the model's own choice before; a student that is smaller."""
    tiny = PRESETS["tiny"]
    assert tiny["final"]["mode"] == "all" and "mode" not in tiny["rl"]
    assert tiny["smaller"]["dim"] < ModelArgs.preset(tiny["model"]).dim
    assert Reinforcer.program == "grpo"


def share_that_thinks(run: Path) -> float:
    """Return the mean probability that a reply begins a thought where the model may choose."""
    found = open_model(run)
    asked = open_task("calculator").some(64, "held-out", seed=0)
    prompts = [Chat(found.tokenizer).prompt(p.question, "free") for p in asked]
    with torch.no_grad():
        logits = found.model(torch.tensor(prompts))[:, -1]  # (B, V)
    return logits.softmax(-1)[:, found.tokenizer.think_id].mean().item()


def test_the_last_stage_decides_whether_a_free_model_thinks(tmp_path):
    """Where the prompt always says whether to think, the choice is never trained."""
    start, rise = MODELS / "sft", {}
    modes = {preset["final"]["mode"] for preset in PRESETS.values()}
    for mode in (*modes, "both"):
        args = GrpoArgs.for_preset(from_run=str(start), out=str(tmp_path / mode), mode=mode,
                                   questions=6, group=8, steps=4, lr=1e-3, max_new_tokens=32,
                                   eval_every=0, eval_problems=1, threads=1)
        with contextlib.redirect_stdout(io.StringIO()):
            rise[mode] = share_that_thinks(grpo(args)) - share_that_thinks(start)
    assert abs(rise.pop("both")) < 0.03 and rise and all(more > 0.1 for more in rise.values())


@pytest.mark.parametrize("preset", [*PRESETS])
def test_most_of_a_corpus_thinks(preset, brief, finished, tmp_path):
    """With a half of it, the greedy choice of a free model would be a coin toss."""
    shares = []
    for changed in ({}, dict(direct=0.5)):
        args = CorpusArgs(teacher=str(finished[0] / "rl"), corpus=str(tmp_path / "c.jsonl"),
                          **SHIPPED[preset] | dict(problems=30) | changed)
        talks, _ = sift(args)
        shares.append(sum(m[-1].get("thought") is not None for m in talks) / len(talks))
    assert shares == [0.75, 0.5]


@pytest.mark.slow
def test_the_models_that_come_with_minids_are_what_the_notebooks_say():
    """Four stages of `python -m minids.r1`, on forty held-out problems each."""
    task, found = open_task("calculator"), {}
    for stage, template in (("base", "plain"), ("sft", "chat"), ("rl", "chat"),
                            ("student", "plain")):
        run = open_model(MODELS / stage)
        found[stage] = [examine(run.model, run.tokenizer, task, 40, Asking(mode, template)
                                ).accuracy for mode in ("think", "direct", "free")]
    assert all(found[stage][0] > 0.9 for stage in ("base", "sft", "rl")) > found["student"][0]
    assert all(direct < 0.35 for _, direct, _ in found.values())  # a guess: 0.16, +- 0.06
    assert found["sft"][2] < 0.35 and found["rl"][2] > 0.9

"""What fits nowhere is refused in one line that names it: mistakes that need no run to be seen.

Each program's own mistakes stand in its tests; here are those that only ranks, a GPU's benchmark, a
grader or a server could make, with stand-ins for these.
"""

import asyncio
import contextlib
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from small_models import LITTLE
from starlette.requests import ClientDisconnect

from minids import distill, evaluate, generate
from minids.evaluate import EvaluateArgs
from minids.lab import bench_decoding, grading
from minids.lab.bench_setup import Bench, BenchArgs
from minids.parallel.layout import Layout
from minids.runs import metrics
from minids.runs.over_ranks import OverRanks, TrainerOverRanks
from minids.runs.settings import LearnArgs, TrainArgs
from minids.runs.sharded import fill
from minids.serve.app import Limits, Refused, read_body
from minids.sft import SftArgs, open_conversations
from minids.text import corpora


def over(layout: Layout, kind: type = TrainerOverRanks, **given):
    """Begin a learner on ranks, whose settings are checked first."""
    ranks = type("Ranks", (kind,), dict(team=SimpleNamespace(ranks=SimpleNamespace(layout=layout))))
    args = LearnArgs(**given) if kind is OverRanks else TrainArgs(**dict(from_run="x") | given)
    return lambda tmp_path, patch: ranks(args, None, None, None)


TWO, PIPELINE = Layout().fitted(2), Layout(pipeline=2, micro_batches=2).fitted(2)


def speed_up(tmp_path, patch):
    layout = SimpleNamespace(splits_backward=True, schedule="ZBV")
    made = SimpleNamespace(args=SimpleNamespace(compile="true"),
                           team=SimpleNamespace(ranks=SimpleNamespace(layout=layout)))
    OverRanks.speed_up(made, None, "true", 8)


def chat_over_ranks(tmp_path, patch):
    patch.setattr(sys, "argv", ["generate", "--chat"])
    patch.setattr(generate, "opened", lambda *_: contextlib.nullcontext((None, "a team")))
    generate.main()


def drafts_without_modules(tmp_path, patch):
    data = SimpleNamespace(valid=[], name="n")
    patch.setattr(evaluate, "open_data", lambda *_: data)
    run = SimpleNamespace(config={}, path="r", tokenizer=SimpleNamespace(n_bytes=0),
                          model=SimpleNamespace(args=LITTLE, mtp=[]))
    evaluate.report(run, EvaluateArgs(run="r", drafts=True), None)


def corpus(*words: str, taken: bool = False):
    def call(tmp_path, patch):
        patch.chdir(tmp_path)
        if taken:
            (tmp_path / "c").write_text("")
        patch.setattr(sys, "argv", ["distill", "--teacher", "t", "--corpus", "c", *words])
        distill.main()
    return call


def conversations(text: str):
    def call(tmp_path, patch):
        (tmp_path / "c.jsonl").write_text(text)
        open_conversations(SftArgs(data=f"jsonl:{tmp_path / 'c.jsonl'}"))
    return call


def graded(*folders: str):
    def call(tmp_path, patch):
        for folder in folders:
            (tmp_path / "submitted" / folder).mkdir(parents=True)
        (tmp_path / "submitted").mkdir(exist_ok=True)
        patch.setattr(sys, "argv", ["grading", "--submitted", str(tmp_path / "submitted"), "--out",
                                    str(tmp_path / "out")])
        patch.setenv("CUDA_VISIBLE_DEVICES", "")
        grading.main()
    return call


def bench(**changed):
    """A benchmark of a little model, on 100 tokens of text."""
    def call(tmp_path, patch):
        model = changed.get("model", LITTLE)
        text = SimpleNamespace(loader=None, valid=torch.arange(100))
        patch.setattr("minids.lab.bench_setup.open_data", lambda *_, **__: text)
        settings = dict(seq_len=32, prompt=8, new_tokens=4, decode_batch=3)
        Bench(BenchArgs(**settings | {k: v for k, v in changed.items() if k != "model"}), model)
    return call


def changed_metrics(tmp_path, patch):
    (tmp_path / metrics.METRICS).write_text('{"step": 1}\n')
    known = dict(bytes=5, sha256="0" * 64, crc32="")
    patch.setattr(metrics, "recorded", lambda *_: known)
    metrics.read_metrics(tmp_path)


def no_library(tmp_path, patch):
    patch.setattr(corpora, "library_files", lambda root: [])
    corpora.open_pystdlib()


def body(error: type[Exception] | None):
    async def stream():
        yield b"a"
        if error:
            raise error
        await asyncio.sleep(10)
    return lambda tmp_path, patch: asyncio.run(read_body(
        SimpleNamespace(stream=stream), replace(Limits(), slow=0.01)))


REFUSED = {
    "FP16 over ranks": (over(TWO, OverRanks, dtype="fp16"), "dtype = .* bf16 or fp32 over"),
    "selective over ranks": (over(TWO, recompute="selective"), "recompute = .* none or blocks"),
    "V2's balance over ranks": (over(TWO, balance_loss="expert"), "balance_loss = .* sequence"),
    "an odd batch": (over(TWO, batch_size=9), "batch_size = 9 .* multiple of 2: 2 ranks x 1"),
    "parts of parts": (over(PIPELINE, grad_accum=2), "grad_accum = 2 .* 1 with a pipeline"),
    "indexers in a pipeline": (over(PIPELINE, dsa="warmup"), "pipeline = 2 .* 1 with --dsa"),
    "compiled halves": (speed_up, "compile = 'true' .* auto or false with ZBV"),
    "talk over ranks": (chat_over_ranks, "chat = True .* false over several processes"),
    "no module to draft": (drafts_without_modules, "drafts = True .* r has no MTP module"),
    "data of a corpus": (corpus("--data", "task:x"), "data = 'task:x' .* the corpus is --corpus"),
    "a corpus there": (corpus(taken=True), "corpus = 'c' .* the file exists already"),
    "no conversation": (conversations(""), "data = .* it is empty"),
    "half a conversation": (conversations('{"messages": [{"role": "user", "content": "a"}]}\n'),
                            "data = .* line 1: "),
    "nobody's answers": (graded(), "submitted = .* a folder that has one for each student"),
    "no notebooks": (graded("anna"), "submitted = .* notebooks of the course"),
    "no such table": (bench(what="decod"), "what = 'decod' .* all, or one or several of"),
    "a profile of nothing": (bench(what="profile"), "label = '' .* a name for the measurement"),
    "a dense model": (bench(model=replace(LITTLE, n_routed_experts=0)), "n_routed_experts = 0"),
    "a long window": (bench(seq_len=49), "seq_len = 49 .* at most max_seq_len = 48"),
    "a long text": (bench(new_tokens=41), "new_tokens = 41 .* at most 40, so that"),
    "many prompts": (bench(decode_batch=13), "decode_batch = 13 .* at most 12: the validation"),
    "other texts": (lambda *_: bench_decoding.require_same_text([[1]] * 15, [[2]] * 2 + [[1]] * 13),
                    "2 of 15 texts differ"),
    "changed metrics": (changed_metrics, "line 1 or a later one was changed"),
    "another shape": (lambda *_: fill(torch.zeros(2, 3), torch.zeros(3, 2)),
                      r"shape \(3, 2\) in the checkpoint, and \(2, 3\) in this model"),
    "no library": (no_library, "holds no Python library; use text:PATH"),
    "a slow body": (body(None), "the body took longer than 0.01 s"),
    "half a body": (body(ClientDisconnect), "the client has left"),
}


@pytest.mark.parametrize("mistake, told", REFUSED.values(), ids=REFUSED)
def test_a_mistake_is_named_in_one_line(mistake, told, tmp_path, monkeypatch):
    with pytest.raises((ValueError, Refused), match=told) as caught:
        mistake(tmp_path, monkeypatch)
    assert "\n" not in str(caught.value)


def test_what_just_fits_is_taken(tmp_path, monkeypatch):
    for fits in (bench(), bench(seq_len=48), bench(new_tokens=40), bench(decode_batch=12)):
        fits(tmp_path, monkeypatch)
    bench_decoding.require_same_text([[1]] * 16, [[2]] * 2 + [[1]] * 14)
    fill(own := torch.zeros(2, 3), torch.ones(2, 3))
    assert own.eq(1).all()

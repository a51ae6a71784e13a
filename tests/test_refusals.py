"""Mistakes that need no run to be seen: each is refused in one line that names it.

Each program's own mistakes stand in its tests; here are those that only ranks, a GPU's benchmark, a
grader or a server could make, with stand-ins for these.
"""

import asyncio
import contextlib
import importlib
import sys
from dataclasses import fields, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from small_models import LITTLE
from starlette.requests import ClientDisconnect

from minids import Transformer, distill, evaluate, generate
from minids.costs import count_parameters
from minids.costs.bill import Prices, api_price
from minids.costs.decoding import cache_bytes_per_token
from minids.costs.memory import Sharding
from minids.evaluate import EvaluateArgs
from minids.infer.generation import check_arguments
from minids.infer.sampling import COLDEST
from minids.infer.validation import attention_recall, windows
from minids.lab import bench_decoding, grading
from minids.lab.bench_setup import Bench, BenchArgs
from minids.parallel.layout import Layout
from minids.rl.examination import check_room
from minids.rl.objectives import ObjectiveArgs
from minids.runs import metrics
from minids.runs.device import check_memory
from minids.runs.over_ranks import OverRanks, TrainerOverRanks
from minids.runs.settings import LearnArgs, TrainArgs
from minids.runs.sharded import fill
from minids.runs.stages import fit_model, stretched
from minids.serve.app import Limits, Refused, read_body
from minids.sft import SftArgs, open_conversations
from minids.solve import SolveArgs
from minids.text import corpora
from minids.text.bpe import SPECIAL
from minids.text.loaders import PackedLoader
from minids.text.tokenizer import Tokenizer


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


def drafts_without_modules(tmp_path, patch, seq_len: int = 0):
    data = SimpleNamespace(valid=[], name="n")
    patch.setattr(evaluate, "open_data", lambda *_: data)
    run = SimpleNamespace(config={}, path="r", tokenizer=SimpleNamespace(n_bytes=0),
                          model=SimpleNamespace(args=LITTLE, mtp=[]))
    evaluate.report(run, EvaluateArgs(run="r", drafts=True, seq_len=seq_len), None)


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
    """A benchmark of a little model, on 96 tokens of text."""
    def call(tmp_path, patch):
        model = changed.get("model", LITTLE)
        text = SimpleNamespace(loader=None, valid=torch.arange(96))
        patch.setattr("minids.lab.bench_setup.open_data", lambda *_, **__: text)
        settings = dict(seq_len=32, prompt=8, new_tokens=4, decode_batch=3)
        Bench(BenchArgs(**settings | {k: v for k, v in changed.items() if k != "model"}), model)
    return call


def on_bench(**changed) -> None:
    with pytest.MonkeyPatch.context() as patch:
        bench(**changed)(None, patch)


def recall_of(k: int) -> None:
    """Select k of 8 tokens; one step further, and the model is missing."""
    with contextlib.suppress(AttributeError):
        attention_recall(None, torch.zeros(1, 8), k)


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


def fitting(**given) -> None:
    """Fit a model of up to 8 tokens, with an MTP module, to a tokenizer of 280."""
    args = TrainArgs(preset="nano", seq_len=given.pop("seq_len", 8))
    fit_model(args, dict(max_seq_len=8, n_mtp_layers=1) | given, SimpleNamespace(vocab_size=280))


def longer(context: int) -> None:
    """Extend the context of a model that has learnt 48 tokens, by a factor of 4 at most."""
    source = SimpleNamespace(args=LITTLE, config={"train": {"seq_len": 48}}, folder="f")
    stretched(SimpleNamespace(context=context), {"rope_factor": 4.0}, source)


def writing(max_new_tokens: int) -> None:
    """Ask for replies to a question of 5 tokens, in 20."""
    task = SimpleNamespace(some=lambda *_, **__: [SimpleNamespace(question="q")])
    form = SimpleNamespace(prompt=lambda question, mode: [0] * 5)
    check_room(SimpleNamespace(max_new_tokens=max_new_tokens, eval_problems=1), 20, form, task)


def on_a_gpu_of(memory: int) -> None:
    """Ask whether a model can be trained on a GPU that has this many bytes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "mem_get_info", lambda device: (0, memory))
        check_memory(LITTLE, torch.device("cuda"))


def unpacked(size: int) -> None:
    """Unpack a file of 4 MiB, of which as many bytes may be a text as a hundred such files have."""
    corpora.check_unpacked(SimpleNamespace(stat=lambda: SimpleNamespace(st_size=2 ** 22)), size)


def unpacked_little(size: int) -> None:
    """Unpack a file of a byte: what is small is never too large."""
    corpora.check_unpacked(SimpleNamespace(stat=lambda: SimpleNamespace(st_size=1)), size)


def numbered(last: int) -> None:
    """Number the tokens of a byte tokenizer with 9 special tokens, the last by a far id."""
    special = {text: i for i, text in enumerate(SPECIAL[:9])}
    ranks = {bytes([b]): 9 + b for b in range(255)} | {bytes([255]): last}
    Tokenizer.__new__(Tokenizer)._number(ranks, special)


def evaluated(seq_len: int) -> None:
    """Evaluate a model of 48 tokens; it would go on, and has no module to draft with."""
    with pytest.MonkeyPatch.context() as patch:
        try:
            drafts_without_modules(None, patch, seq_len)
        except ValueError as error:
            if "no MTP module" not in str(error):
                raise


def sized(limit: int) -> None:
    """Read a body of 5 bytes."""
    async def stream():
        yield b"12345"
    kind = {"content-type": "application/json"}
    asyncio.run(read_body(SimpleNamespace(stream=stream, headers=kind),
                          replace(Limits(), body=limit)))


def asked(**changed) -> None:
    """Ask a model of 64 tokens and 48 positions, with a module that drafts, to go on behind two."""
    usual = dict(prompts=[[1, 2], [3]], max_new_tokens=4, temperature=0.0, top_k=0, top_p=1.0,
                 speculative=0)
    check_arguments(replace(LITTLE, n_mtp_layers=2), **usual | changed)


COUNT = count_parameters(LITTLE)
NEEDED = 16 * (COUNT.total + COUNT.mtp)
# A call, the last number that it takes, the next one that it does not take, and what it then says
EDGES = {
    "evaluate": (evaluated, 48, 49, "seq_len = 49"),
    "batch_start": (lambda n: TrainArgs(batch_start=n), 8, 9, "batch_start = 9"),
    "decay_until": (lambda n: TrainArgs(constant_until=0.5, decay_until=n), 0.5, 0.499, "decay_un"),
    "direct": (lambda n: distill.CorpusArgs(teacher="t", corpus="c", direct=n), 0.999, 1.0,
               "direct"),
    "tries": (lambda n: distill.CorpusArgs(teacher="t", corpus="c", tries=2, temperature=n),
              COLDEST, COLDEST / 2, "tries = 2"),
    "samples": (lambda n: SolveArgs(samples=2, temperature=n), COLDEST, COLDEST / 2, "samples = 2"),
    "clip_both": (lambda n: ObjectiveArgs(clip_both=n), 1.001, 1.0, "clip_both = 1"),
    "cached tokens": (lambda n: api_price(5, n, 0, Prices()), 5, 6, "cached_tokens = 6"),
    "no cached token": (lambda n: api_price(5, n, 0, Prices()), 0, -1, "cached_tokens = -1"),
    "output": (lambda n: api_price(5, 0, n, Prices()), 0, -1, "output_tokens = -1"),
    "groups": (lambda n: cache_bytes_per_token(LITTLE, n_groups=n), 1, 0, "n_groups = 0"),
    "pieces": (lambda n: Sharding(gpus=n, pipeline=n, expert_parallel=1, dualpipe=False).check(
        LITTLE), 5, 6, "pipeline = 6"),
    "stages": (lambda n: Layout(pipeline=n).check(LITTLE), 2, 3, "pipeline = 3"),
    "vocabulary": (lambda n: fitting(vocab_size=n), 280, 279, "vocab_size = 279"),
    "seq_len": (lambda n: fitting(seq_len=n), 8, 9, "seq_len = 9"),
    "modules": (lambda n: fitting(seq_len=n), 2, 1, "seq_len = 1"),
    "context": (longer, 49, 48, "context = 48"),
    "factor": (longer, 192, 193, "context = 193"),
    "room": (writing, 15, 16, "max_new_tokens = 16"),
    "unpacked": (unpacked, 100 * 2 ** 22, 100 * 2 ** 22 + 1, "more than 100 times its size"),
    "unpacked little": (unpacked_little, 2 ** 28, 2 ** 28 + 1, "more than 100 times its size"),
    "id": (numbered, 2 * 265 + 2 ** 16 - 1, 2 * 265 + 2 ** 16, "below 66066 for 265 tokens"),
    "memory": (on_a_gpu_of, NEEDED, NEEDED - 1, "does not fit"),
    "body": (sized, 5, 4, "the body is too large"),
    "validation": (lambda n: windows(torch.arange(9), n), 8, 9, "seq_len = 9"),
    "training": (lambda n: PackedLoader(np.arange(9), n), 8, 9, "seq_len = 9"),
    "selection": (lambda n: recall_of(n), 7, 8, "index_topk = 8"),
    "bench, seq_len": (lambda n: on_bench(seq_len=n), 48, 49, "seq_len = 49"),
    "bench, new_tokens": (lambda n: on_bench(new_tokens=n), 40, 41, "new_tokens = 41"),
    "bench, decode_batch": (lambda n: on_bench(decode_batch=n), 12, 13, "decode_batch = 13"),
    "other texts": (lambda n: bench_decoding.require_same_text([1] * 16, [2] * n + [1] * (16 - n)),
                    2, 3, "3 of 16 texts differ"),
    "new tokens": (lambda n: asked(max_new_tokens=n), 1, 0, "max_new_tokens = 0"),
    "temperature": (lambda n: asked(temperature=n), 0.0, -1e-9, "temperature = -1e-09"),
    "hottest": (lambda n: asked(temperature=n), 1e300, float("inf"), "temperature = inf"),
    "top_k": (lambda n: asked(top_k=n), 0, -1, "top_k = -1"),
    "top_p": (lambda n: asked(top_p=n), 1e-300, 0.0, "top_p = 0.0"),
    "whole top_p": (lambda n: asked(top_p=n), 1.0, 1.001, "top_p = 1.001"),
    "drafts": (lambda n: asked(speculative=n), 0, -1, "speculative = -1"),
    "first token": (lambda n: asked(prompts=[[1], [n]]), 0, -1, "token -1 .* 0 to 63"),
    "last token": (lambda n: asked(prompts=[[n], [1]]), 63, 64, "token 64 .* 0 to 63"),
    "positions": (lambda n: asked(max_new_tokens=n), 46, 47, "2 tokens and max_new_tok"),
    "positions of drafts": (lambda n: asked(max_new_tokens=n, speculative=3), 42, 43,
                            "max_new_tokens = 43 and 4 of drafts are"),
    "cache": (lambda n: Transformer(LITTLE).context(torch.zeros(1, n, dtype=torch.int64)), 48, 49,
              "49 tokens are too many"),
}


@pytest.mark.parametrize("call, last, beyond, told", EDGES.values(), ids=EDGES)
def test_the_last_number_is_taken_and_the_next_is_not(call, last, beyond, told):
    call(last)
    with pytest.raises((ValueError, Refused), match=told):
        call(beyond)


# Settings that name a folder to write: a file there is refused before the work
FOLDERS = {
    "hf.__main__.HfArgs": "out", "lab.claims.ClaimArgs": "out", "lab.grading.GradingArgs": "out",
    "lab.opening.OpeningArgs": "folder", "lab.recall.RecallArgs": "out", "lab.site.SiteArgs": "out",
    "plots.__main__.DrawingArgs": "out", "r1.R1Args": "out", "runs.settings.LearnArgs": "out",
    "runs.settings.TrainArgs": "out", "tokenizer.TokenizerArgs": "out"}


@pytest.mark.parametrize("name, folders", FOLDERS.items())
def test_a_folder_to_write_is_known_as_one(name, folders):
    module, _, kind = name.rpartition(".")
    found = fields(getattr(importlib.import_module(f"minids.{module}"), kind))
    assert {f.name for f in found if f.metadata.get("folder")} == set(folders.split())

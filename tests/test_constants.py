"""Numbers at the top of a module that no result shows to be wrong: a change is made here, too."""

import importlib
from datetime import timedelta

import pytest

# What the measurements of figures/README.md were made with.
MEASURED = {
    "apply.graphs": dict(SMALLEST=256, ALMOST=1.5),
    "dryrun": dict(HOST=8, HELD_BY=(1, 2, 4, 8, 16, 32)),
    "infer.batch": dict(CHUNK=256, CHUNK_GPU=8192),
    "infer.decoding": dict(PIECE=2 ** 15, SHORTEST=256),
    "infer.slots": dict(WORTH=8, WIDTHS=(16, 64, 256)),
    "kernels.attention": dict(SHORT=512, FEW=8, MANY=16),
    "kernels.cross_entropy": dict(LOGITS={"cpu": 2 ** 21, "cuda": 2 ** 27}),
    "kernels.few_tokens": dict(ROWS=512, FEW_ROWS=32, SMALL=2 ** 19, FEW=4, PADDING=2),
    "kernels.indexer": dict(SCORES=2 ** 24, PIECE=2 ** 27, WIDEST=128),
    "kernels.norm": dict(FEW=2 ** 15),
    "lab.bench_alone": dict(SHORTEST=2048),
    "lab.bench_decoding": dict(SHORTEST=1024, PIECE=256, DECODE_STEPS=16, PROMPTS=16,
                               DEPTHS=(2, 4, 8, 16, 32, 64)),
    "lab.bench_fp8": dict(COPIES=4),
    "lab.bench_serving": dict(CLIENTS=(1, 8, 64), EACH=3, ROUNDS=6, PROMPT=(8, 64), REPLY=(16, 512),
                              MOST=128, PAUSE=0.2, TRIALS=4, PAGE=32),
    "lab.bench_setup": dict(WARM_UP=2, LEARNING_RATE=1e-3),
    "lab.bench_sparse": dict(SHORTEST=8192, STEP=4, BATCH=8, STEPS=16, LONGEST_TRAINED=32_768),
    "lab.bench_transformers": dict(TRIAL_ROUNDS={"cpu": (1, 3), "cuda": (0, 1)}, MEMORY_STEPS=5,
                                   TIE={"fp32": 1e-4, "bf16": 0.25}, RECOMPILE_LIMIT=64),
    "lab.profiling": dict(PROFILED={"training": 3, "decoding": 16}),
    "lab.recall": dict(VALUES=64, FILLERS=64, SHORTEST=32, FEWEST=8, SOLVED=0.99, RISE=50,
                       INIT_STD=0.02),
    "lab.roofline": dict(SIDE={"cuda": 8192, "cpu": 1024}, ROUNDS={"cuda": 15, "cpu": 3},
                         COPIED={"cuda": 2 ** 30, "cpu": 2 ** 26}, MOST_COPIES=32, CLOCK=2e9,
                         CACHES={"cuda": 2 ** 28, "cpu": 2 ** 26}),
    "model.moe": dict(ALIGN=32),
    "parallel.measuring": dict(SETTLED=0.01, FEW=2), "parallel.sharding": dict(KEPT=1 / 8),
    "r1": dict(SAMPLES=32), "rl.examination": dict(BATCH=512)}
# What keeps a machine, a page or a terminal from too much; seconds, bytes, characters, counts.
LIMITS = {
    "base.fields": dict(MOST=10 ** 6), "grpo": dict(QUIET=50), "infer.batch": dict(LOGGED=4096),
    "lab.checker": dict(PATIENCE=4.0, WAITING=20.0, MEMORY=2 * 2 ** 30, PRINTED=2000),
    "lab.compare": dict(ROOM=76), "lab.grading": dict(LONGEST=20.0), "lab.lesson": dict(MOST=6),
    "lab.variants": dict(CASE=90, DRAWS=60),
    "parallel.team": dict(MEETING=timedelta(minutes=5), WAITING=timedelta(minutes=15),
                          SILENCE=timedelta(seconds=5), PATIENCE=60),
    "serve.__main__": dict(GRACE=5),
    "serve.app": dict(DRAINED=2 ** 28), "serve.served": dict(QUESTIONS=4),
    "serve.asked": dict(STOPS=16, LONGEST_STOP=256, MESSAGES=1000, TOP_LOGPROBS=20),
    "text.answers": dict(LONGEST_TEXT=20_000, MOST_MARKS=20),
    "text.corpora": dict(UNPACKED=100, BATCH_BYTES=2 ** 24),
    "text.expressions": dict(LONGEST_ANSWER=200, LONGEST_NUMBER=9, DEEPEST=30),
    "text.hub": dict(PATIENCE=1.5, LOOKS=30), "text.loaders": dict(MAX_VALID_TOKENS=2 ** 24),
    "text.packing": dict(PIECE_CHARACTERS=2 ** 17),
    "text.token_cache": dict(BATCH_CHARACTERS=2 ** 22),
    "text.tokenizer": dict(LARGEST=2 ** 20, SPARE=2 ** 16)}
# What runs, caches and data sets of earlier versions rest on, and how a busy machine is told.
KEPT = {
    "base.openmp": dict(SOFT=1), "costs.cards": dict(TOKENS_PER_PARAMETER=20, ROOM=0.9),
    "infer.sampling": dict(COLDEST=1e-5, HOTTEST=1e30, SMALLEST=1e-30),
    "kernels.fp8": dict(OLDEST=(8, 9)), "kernels.precision": dict(HOPPER=(9, 0)),
    "kernels.fp8_layout": dict(BLOCK=128, HOPPER=(9, 0), LEAST=1e-4, LEAST_GRADIENT=1e-20),
    "model.initial": dict(LARGE=2 ** 31, ROWS=64), "model.mla": dict(LATENT_EPS=1e-6),
    "lab.mine": dict(CLOSE=1e-10),
    "lab.compare": dict(DIGITS=1e-6, DOUBLE=1e-10),
    "runs.checkpoints": dict(FORMAT=1, SHARDED=2), "runs.over_ranks": dict(NOT_WRITTEN=1000),
    "runs.threads": dict(BUSY=0.25, QUIET=0.08, STEPS=8, TRIAL=3, REST=12),
    "runs.waiting": dict(EVERY=0.5, BUSY=0.15, QUIET=0.04, CALM=4, SHARED=2 ** 17),
    "text.corpora": dict(HOLD_OUT=20, EXAMPLES=60_000), "text.tasks": dict(HELD_OUT=10),
    "text.hub": dict(HUB_VALID_DOCUMENTS=1000), "text.token_cache": dict(CACHE_FORMAT=2),
    "text.loaders": dict(SHUFFLE_BLOCK=2048, STREAM_DOCUMENTS=32),
    "text.tokenizer": dict(ROW_MULTIPLE=64)}


@pytest.mark.parametrize("numbers", [MEASURED, LIMITS, KEPT], ids=["measured", "limits", "kept"])
def test_numbers_are_what_pages_limits_and_files_rest_on(numbers):
    for name, meant in numbers.items():
        module = importlib.import_module(f"minids.{name}")
        assert {constant: getattr(module, constant) for constant in meant} == meant, name

"""Cached decoding against no cache at all, sampling against its distribution, and the program."""

import contextlib
import io
import json
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from small_models import LITTLE, gap, random_tokens, scrambled

from minids import ModelArgs, Transformer
from minids.apply.folded import fold
from minids.base.command_line import run_program
from minids.generate import generate, main, show
from minids.infer.decoding import right_pad
from minids.kernels.registry import recorded
from minids.model.cache import LatentCache
from minids.model.mla import MLA
from minids.runs import together
from minids.runs.checkpoints import save_checkpoint
from minids.runs.open import open_model
from minids.text.replies import ReplyText
from minids.tokenizer import Tokenizer

ROOT = Path(__file__).resolve().parent.parent
EXACT = 1e-12  # FP64 rounds at 1e-16; a step adds up some thousand numbers
NARROW = replace(LITTLE, n_heads=2)  # latents narrow enough to fold the expansions
SHAPES = {
    "query latent": NARROW,
    "no query latent": replace(NARROW, q_lora_rank=0),
    "values wider than latents": replace(NARROW, v_head_dim=26),
    "softmax gate without bias": replace(NARROW, score_func="softmax", gate_bias=False),
    "no shared experts": replace(NARROW, n_shared_experts=0),
    "dense": replace(NARROW, n_routed_experts=0),
    "experts in every layer": replace(NARROW, n_dense_layers=0),
}
MODELS = {"folded": NARROW, "not folded": LITTLE}
PROMPTS = [[5, 9, 2, 33, 7], [8], [1, 2, 3], [4, 60, 50, 40, 30]]


def uncached(model: Transformer, prompt: list[int], count: int) -> list[int]:
    """Greedy decoding that starts from the first token each time."""
    tokens = list(prompt)
    for _ in range(count):
        with torch.no_grad():
            tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
    return tokens[len(prompt):]


def equals_uncached(model: Transformer, prompts: list[list[int]], count: int = 12) -> bool:
    """Return whether a batch gives each prompt what it gets alone and without a cache."""
    expected = [uncached(model, prompt, count) for prompt in prompts]
    return generate(model, prompts, count).tokens == expected


@pytest.mark.parametrize("name", MODELS)
def test_cached_greedy_equals_uncached_token_by_token(name, monkeypatch):
    model = scrambled(MODELS[name])
    with recorded() as record:
        assert equals_uncached(model, [PROMPTS[0]])
    assert (("transformer.Block.forward", "folded_block") in record) == (name == "folded")
    assert equals_uncached(model, PROMPTS[::3])  # a batch of equal lengths
    # wrong: the cache forgets the newest token
    append = LatentCache.append
    monkeypatch.setattr(LatentCache, "append", lambda *inputs: 0 * append(*inputs))
    assert not equals_uncached(model, [PROMPTS[0]])


@pytest.mark.parametrize("name", MODELS)
def test_a_batch_of_unequal_prompts_equals_each_alone(name, monkeypatch):
    model = scrambled(MODELS[name])
    assert equals_uncached(model, PROMPTS)
    # wrong: the padding counts as text
    monkeypatch.setattr("minids.infer.generation.right_pad", lambda *inputs: (
        right_pad(*inputs)[0], right_pad(*inputs)[1] * 0 + 5))
    assert equals_uncached(model, PROMPTS[::3])
    assert not equals_uncached(model, PROMPTS)


def folded_gap(args: ModelArgs, batch: int, uneven: bool) -> float:
    """Return how far decoding with folded weights is from the absorbed form, cache included."""
    model, tokens = scrambled(args), random_tokens(args, batch, 12)
    caches = [LatentCache(args, batch, 12, dtype=torch.float64) for _ in range(2)]
    with torch.inference_mode():
        for cache in caches:
            model(tokens[:, :6], cache)
            if uneven:
                cache.truncate(6 - torch.arange(batch) % 4)
        fold(model, caches[0])
        assert caches[0].folded is not None
        gaps = [gap(model(tokens[:, i:i + 1], caches[0], True),
                    model(tokens[:, i:i + 1], caches[1], True)) for i in range(6, 12)]
    assert caches[0].length == caches[1].length == 12
    return max(*gaps, gap(caches[0].latents, caches[1].latents))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("batch", [1, 2, 6])
def test_folded_weights_give_the_absorbed_form(shape, batch):
    for uneven in (False, True):
        assert folded_gap(SHAPES[shape], batch, uneven) < EXACT


def folds(model: Transformer) -> bool:
    cache = LatentCache(model.args, 1, 1, device=model.head.weight.device)
    fold(model, cache)
    return cache.folded is not None


def test_weights_are_folded_for_small_known_models_in_their_own_precision():
    model = scrambled(NARROW)
    assert folds(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert not folds(model.float())
    assert not folds(scrambled(LITTLE))  # latents too wide

    class OtherAttention(MLA):
        """Attention that folding has never heard of."""

    model.layers[1].attn.__class__ = OtherAttention
    assert not folds(model)
    model = scrambled(NARROW)
    model.layers[0].attn.wo.product = torch.nn.functional.linear  # replaced from outside
    assert not folds(model)


@pytest.mark.parametrize("preset, pays", [("tiny", True), ("nano", True), ("small", False)])
def test_which_presets_fold_their_weights(preset, pays, monkeypatch):
    monkeypatch.setattr("minids.apply.folded.folded", lambda attn: attn.layer)
    with torch.device("meta"):
        model = Transformer(ModelArgs.preset(preset))
    model.head.weight = torch.nn.Parameter(torch.empty(1))  # the one that tells the device
    assert folds(model) == pays


@pytest.mark.parametrize("name", MODELS)
def test_bf16_weights_decode_like_fp32_ones(name):
    logits = []
    for dtype in (torch.float32, torch.bfloat16):
        model, tokens = scrambled(replace(MODELS[name], n_routed_experts=0)).to(dtype), PROMPTS[0]
        cache = LatentCache(model.args, 1, 9, dtype=dtype)
        with torch.inference_mode():
            model(torch.tensor([tokens]), cache)
            fold(model, cache)
            logits.append(model(torch.tensor([[7]]), cache, absorbed=True))
    assert gap(logits[1], logits[0]) < 0.05  # BF16 rounds at 0.004, some ten times in a row
    assert logits[1].dtype == torch.bfloat16


def test_the_seed_decides():
    model = scrambled(NARROW)
    first, again, other = (generate(model, PROMPTS, 10, temperature=1.0, seed=seed).tokens
                           for seed in (3, 3, 4))
    assert first == again != other
    state = torch.get_rng_state()
    generate(model, PROMPTS, 3, temperature=1.0)
    assert torch.equal(torch.get_rng_state(), state)  # training goes on as if nothing happened


def test_eos_ends_a_sequence_and_the_last_one_ends_the_loop():
    model = scrambled(NARROW)
    free = generate(model, PROMPTS, 10)
    assert free.steps == 10 and [len(row) for row in free.tokens] == [10] * 4
    eos = free.tokens[0][4]
    stopped = generate(model, PROMPTS, 10, eos_id=eos)
    expected = [row[:row.index(eos) + 1] if eos in row else row for row in free.tokens]
    assert stopped.tokens == expected != free.tokens
    alone = generate(model, PROMPTS[:1], 10, eos_id=eos)
    assert alone.steps == len(alone.tokens[0]) == free.tokens[0].index(eos) + 1
    assert alone.prompt_tokens == 5 and free.prompt_tokens == 14
    assert stopped.tokens_per_second == sum(map(len, expected)) / stopped.seconds


@pytest.mark.parametrize("speculative", [0, 1])
@pytest.mark.parametrize("places", [[3], [6, 2], [7, 8, 4]])
def test_any_of_several_eos_ends_a_sequence(places, speculative):
    model = scrambled(NARROW)
    free = generate(model, PROMPTS, 10).tokens
    ends = [free[0][place] for place in places]
    expected = [next((row[:i + 1] for i, t in enumerate(row) if t in ends), row) for row in free]
    for kind in (list, tuple, set):
        done = generate(model, PROMPTS, 10, eos_id=kind(ends), speculative=speculative)
        assert done.tokens == expected != free


def test_each_token_is_handed_over_once_and_in_order():
    model, seen = scrambled(NARROW), [[] for _ in PROMPTS]
    eos = generate(model, PROMPTS, 10).tokens[0][4]
    done = generate(model, PROMPTS, 10, eos_id=eos,
                    on_token=lambda row, token: seen[row].append(token))
    assert seen == done.tokens


def test_top_1_is_greedy_at_any_temperature():
    model = scrambled(NARROW)
    greedy = generate(model, PROMPTS, 8).tokens
    assert generate(model, PROMPTS, 8, temperature=3.0, top_k=1).tokens == greedy


TEXT = "naïve 漢字 🙂 def f():\n    return 'é'"


def streamed(tokenizer: Tokenizer, tokens: list[int]) -> list[str]:
    """Return what a sample prints for each token, and at the end."""
    text, parts = ReplyText(tokenizer), []
    for act, *given in [*([text.add, token] for token in tokens), [text.flush]]:
        with contextlib.redirect_stdout(io.StringIO()) as out:
            show(act(*given))
        parts.append(out.getvalue())
    return parts


def test_streaming_prints_the_text_in_whole_characters():
    tokenizer = Tokenizer.load()
    tokens = tokenizer.encode(TEXT)
    parts = streamed(tokenizer, [*tokens, tokenizer.eos_id])
    assert "".join(parts) == TEXT and "" in parts  # a character of several tokens waits
    assert "\ufffd" in "".join(tokenizer.decode([token]) for token in tokens)  # the wrong way
    cut = tokenizer.encode("🙂")[:-1]
    assert "".join(streamed(tokenizer, cut)) == tokenizer.decode(cut)


@pytest.mark.parametrize("change, words", [
    (dict(prompts=[]), "prompts"), (dict(prompts=[[1], []]), "prompts"),
    (dict(prompts=[[64]]), "token 64"), (dict(prompts=[[-1]]), "token -1"),
    (dict(prompts=[[1] * 45]), "max_seq_len is 48"),
    (dict(max_new_tokens=0), "max_new_tokens = 0"), (dict(temperature=-0.1), "temperature = -0.1"),
    (dict(temperature=float("nan")), "temperature = nan"), (dict(top_k=-1), "top_k = -1"),
    (dict(temperature=float("inf")), "temperature = inf"), (dict(top_p=-0.5), "top_p = -0.5"),
    (dict(top_p=0.0), "top_p = 0.0"), (dict(top_p=1.5), "top_p = 1.5"),
    (dict(top_p=float("nan")), "top_p = nan"),
    (dict(speculative=-1), "speculative = -1"),
    (dict(prompts=[[1] * 42], speculative=3), "max_new_tokens = 4 and 3 of drafts"),
    (dict(model=scrambled(replace(NARROW, n_mtp_layers=0)), speculative=1), "no MTP module")])
def test_bad_arguments_are_named(change, words):
    with pytest.raises(ValueError, match=words):
        generate(**dict(model=scrambled(NARROW), prompts=[[1, 2]], max_new_tokens=4) | change)


HOW = [dict(), dict(temperature=1e-39), dict(temperature=0.8), dict(temperature=1.0, top_p=0.9),
       dict(temperature=1.0, top_k=5)]


@pytest.mark.parametrize("drafts", [0, 1, 3])
@pytest.mark.parametrize("how", HOW, ids=str)
def test_logits_that_are_no_numbers_are_an_error(drafts, how):
    for weight in ("head.weight", "layers.0.ffn.w1.weight", "norm.weight"):
        for value in (float("nan"), float("inf")):
            model = scrambled(NARROW)
            with torch.no_grad():
                model.get_parameter(weight)[3] = value
            with pytest.raises(ValueError, match="^prompt 1, new token 1: .* are NaN or infinite;"):
                generate(model, PROMPTS, 4, speculative=drafts, **how)


@pytest.mark.parametrize("drafts", [0, 2])
def test_the_token_that_cannot_be_drawn_is_named(drafts):
    """The model breaks when it reads the third token that it wrote to the second prompt."""
    model = scrambled(NARROW)
    for start in range(64):  # until that token stands nowhere before
        prompts = [[5, 9, 2, 33, 7], [start]]
        first, second = generate(model, prompts, 8).tokens
        broken = second[2]
        if broken not in [*prompts[0], start, *first, *second[:2]]:
            break
    with torch.no_grad():
        model.embed.weight[broken] = float("nan")
    with pytest.raises(ValueError, match="^prompt 2, new token 4: no token can be drawn"):
        generate(model, prompts, 8, speculative=drafts)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_drafts_that_are_no_numbers_are_an_error(how):
    model = scrambled(NARROW)
    with torch.no_grad():
        model.mtp[0].eh_proj.weight[0] = float("nan")
    with pytest.raises(ValueError, match="^prompt 1, new token 2: .* are NaN or infinite"):
        generate(model, PROMPTS, 4, speculative=2, **how)
    assert generate(model, PROMPTS, 4, **how)


@pytest.mark.parametrize("drafts", [0, 2])
def test_a_temperature_near_zero_writes_what_zero_writes(drafts):
    model = scrambled(NARROW)
    expected = generate(model, PROMPTS, 12).tokens
    for temperature in (1e-45, 1e-39, 1e-6):
        for cut in (dict(), dict(top_p=1e-45), dict(top_k=2)):
            assert generate(model, PROMPTS, 12, temperature, speculative=drafts, **cut
                            ).tokens == expected
    assert generate(model, PROMPTS, 12, 1.0, 0, 1e-45, speculative=drafts).tokens == expected
    hot = generate(model, PROMPTS, 12, 1e30, speculative=drafts).tokens
    assert {t for row in hot for t in row} <= set(range(64)) and hot != expected


def test_the_longest_sequence_fits():
    done = generate(scrambled(NARROW), [[1] * 40], 8)
    assert len(done.tokens[0]) == 8


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run folder whose model has learnt nothing."""
    folder = tmp_path_factory.mktemp("runs") / "nano"
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    torch.manual_seed(0)
    save_checkpoint(folder, 7, Transformer(args).state_dict(), {"step": 7})
    tokenizer.save(folder / "tokenizer")
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def call(capsys, monkeypatch, *words) -> tuple[int, str, str]:
    """Exit status, stdout and stderr of the program, run in this process."""
    monkeypatch.setattr(sys, "argv", ["minids.generate", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        run_program("minids.generate", main)
    said = capsys.readouterr()
    return end.value.code or 0, said.out, said.err


def test_the_program_prints_the_text_and_a_line_of_statistics(run, capsys, monkeypatch):
    words = ["--run", run, "--prompt", "def read_", "--max-new-tokens", 20, "--seed", 5]
    status, out, err = call(capsys, monkeypatch, *words)
    loaded = open_model(run)
    prompt = [loaded.tokenizer.bos_id, *loaded.tokenizer.encode("def read_")]
    done = generate(loaded.model, [prompt], 20, 0.8, 0, 0.95, 5, loaded.tokenizer.eos_id)
    text = loaded.tokenizer.decode(t for t in done.tokens[0] if t != loaded.tokenizer.eos_id)
    assert (status, out) == (0, f"def read_{text}\n")
    assert "tokens/s" in err and err.count("\n") == 1
    assert call(capsys, monkeypatch, *words)[1] == out
    assert call(capsys, monkeypatch, *words[:-1], 6)[1] != out
    cold = [call(capsys, monkeypatch, *words, "--temperature", t)[:2] for t in ("0", "1e-39")]
    assert cold[0] == cold[1] and cold[0][0] == 0
    words += ["--samples", 2, "--run", run / "checkpoints/step_000007"]
    both = call(capsys, monkeypatch, *words)
    assert both[1].startswith(out) and both[1].count("def read_") == 2


@pytest.mark.parametrize("words, named", [
    (["--run", "nowhere"], "nowhere"), (["--device", "tpu"], "valid are auto, cpu, cuda and mps"),
    (["--device", "cuda"], "use --device cpu"), (["--samples", "0"], "samples = 0"),
    (["--top-p", "2"], "top_p = 2.0"), (["--temprature", "1"], "--temperature"),
    (["--max-new-tokens", "300"], "max_seq_len is 256"),
    (["--speculative", "99"], "99 of drafts")])
def test_a_mistake_is_one_line_and_status_2(words, named, run, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    given = words if "--run" in words else ["--run", run, *words]
    status, out, err = call(capsys, monkeypatch, *given)
    assert status == 2 and named in err and err.count("\n") == 1 and out == ""


def test_a_model_that_diverged_is_one_line_and_status_2(run, capsys, monkeypatch):
    loaded = open_model(run)
    loaded.model.head.weight.data.fill_(float("nan"))
    monkeypatch.setattr(together, "open_model", lambda *given, **named: loaded)
    status, _, err = call(capsys, monkeypatch, "--run", run)
    assert status == 2 and err.count("\n") == 1
    assert "prompt 1, new token 1: no token can be drawn, because the model's logits are NaN" in err


def test_another_tokenizer_is_refused(run, tmp_path, capsys, monkeypatch):
    copy = tmp_path / "copy"
    copy.mkdir()
    for part in ("checkpoints", "tokenizer"):
        (copy / part).symlink_to(run / part)
    config = json.loads((run / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"tokenizer": "0" * 16}))
    status, _, err = call(capsys, monkeypatch, "--run", copy)
    assert status == 2 and "fingerprint" in err and err.count("\n") == 1


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(run):
    words = ["--run", run, "--prompt", "x = ", "--max-new-tokens", "3"]
    done = subprocess.run([sys.executable, "-m", "minids.generate", *words], capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith("x = ") and "tokens/s" in done.stderr


def test_a_conversation_in_the_terminal(capsys, monkeypatch):
    lines = ["3*7+5-2*4+1*3", "/direct", "/new", "3*7+5-2*4+1*3", "", "x" * 300]
    monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
    status, out, err = call(capsys, monkeypatch, "--run", ROOT / "data/r1/rl", "--chat", "--mode",
                            "think", "--temperature", 0)
    first, *_, second, blank, long, end = out.split("> ")[1:]
    assert (status, err) == (0, "") and first.startswith("[3*7=1+5=6-2=4")
    assert first.rstrip().partition("] ")[2].isdigit() and second.strip().isdigit()
    assert blank == "" and "too long" in long and end == "\n"


def test_a_model_that_does_not_talk_is_refused(capsys, monkeypatch):
    status, out, err = call(capsys, monkeypatch, "--run", ROOT / "data/r1/base", "--chat")
    assert (status, out) == (2, "") and "chat = True" in err and err.count("\n") == 1

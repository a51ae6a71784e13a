"""Pre-training: one bias update per step, stages, what a run leaves, and mistakes in one line."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import training_runs
from kill_and_resume import (
    ROOT,
    differences,
    kill_and_resume,
    newest_step,
)
from training_runs import (
    STEPS,
    VOCABULARY,
    Said,
    cut_back,
    everything,
    make_trainer,
    read_records,
    run_train,
    settings,
    whole_state,
)

from minids import ModelArgs, train
from minids.costs import flops_per_token
from minids.model.moe import Gate, Routing
from minids.runs.checkpoints import load_weights, newest_checkpoint
from minids.runs.settings import TrainArgs
from minids.tokenizer import Tokenizer
from minids.train import Trainer

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


# One optimizer step.

def gradients(trainer: Trainer) -> tuple[dict, torch.Tensor, dict[str, torch.Tensor]]:
    """Loss parts, loads and gradients of the first batch, in FP64."""
    trainer.model.double()
    trainer.step = 1
    parts, loads = trainer.accumulate()
    return parts, loads, {n: p.grad for n, p in trainer.model.named_parameters()}


def apart(a: tuple, b: tuple) -> float:
    """The largest relative difference between two batches' gradients and loss parts."""
    gaps = [(a[2][name] - grad).norm() / grad.norm() for name, grad in b[2].items()]
    return max(*map(float, gaps), *(abs(a[0][k] / v - 1) for k, v in b[0].items()))


def forgets_to_average(trainer: Trainer) -> Trainer:
    """The wrong variant: micro-batches are added up and not divided by their number."""
    whole = trainer.loss

    def loss(*inputs):
        losses = whole(*inputs)
        return losses._replace(total=losses.total * trainer.args.grad_accum)

    trainer.loss = loss
    return trainer


def test_micro_batches_equal_one_batch(tmp_path, home):
    whole = gradients(make_trainer(home, tmp_path, dtype="fp32"))
    parts = make_trainer(home, tmp_path, dtype="fp32", grad_accum=2)
    halves = gradients(parts)
    # All in FP64: what is left is another order of adding up.
    assert apart(halves, whole) < 1e-10
    assert torch.equal(halves[1], whole[1])
    wrong = make_trainer(home, tmp_path, dtype="fp32", grad_accum=2)
    assert apart(gradients(forgets_to_average(wrong)), whole) > 0.5


def bias_moves_by_the_whole_batch(trainer: Trainer) -> bool:
    """After one step each bias has moved by the speed, against the loads of the whole batch."""
    args, total = trainer.args, 0
    step, seen = trainer.loss, []

    def loss(*inputs):
        seen.append(step(*inputs))
        return seen[-1]

    trainer.loss = loss
    trainer.train_step()
    total = sum(losses.loads for losses in seen)
    assert len(seen) == args.grad_accum
    tokens = args.batch_size * (args.seq_len + args.seq_len - 1)  # the MTP module has one fewer
    assert total.sum() == tokens * trainer.model.args.n_activated_experts
    expected = args.bias_speed * (total.float().mean(1, keepdim=True) - total).sign()
    return all(torch.equal(bias, e)
               for bias, e in zip(trainer.model.gate_biases(), expected, strict=True))


def moves_bias_per_micro_batch(trainer: Trainer) -> Trainer:
    """The wrong variant: the biases move after each micro-batch, then not after the step."""
    whole, update = trainer.loss, trainer.model.update_gate_bias

    def loss(*inputs):
        losses = whole(*inputs)
        update(losses.loads, trainer.args.bias_speed)
        return losses

    trainer.loss = loss
    trainer.model.update_gate_bias = lambda loads, speed: None
    return trainer


def test_bias_moves_once_a_step(tmp_path, home):
    options = dict(grad_accum=4, bias_speed=0.25)  # exact in FP32
    assert bias_moves_by_the_whole_batch(make_trainer(home, tmp_path, **options))
    wrong = moves_bias_per_micro_batch(make_trainer(home, tmp_path, **options))
    assert not bias_moves_by_the_whole_batch(wrong)


def loads_counted_in_forward(trainer: Trainer) -> torch.Tensor:
    """The wrong variant: what a gate that counts in its forward pass would pass on."""
    counted = {}

    def count(gate: Gate, inputs, output: tuple[torch.Tensor, Routing]) -> None:
        counted[gate] = counted.get(gate, 0) + output[1].load()

    for module in trainer.model.modules():
        if isinstance(module, Gate):
            module.register_forward_hook(count)
    trainer.step = 1
    trainer.accumulate()
    return torch.stack(list(counted.values()))


def test_recomputing_changes_nothing(tmp_path, home):
    """The same products in the same order: equal bits, and no token counted twice."""
    plain, recomputing = (make_trainer(home, tmp_path, recompute=r) for r in (False, True))
    for _ in range(3):
        a, b = plain.train_step(), recomputing.train_step()
        for measured in ("tokens_per_s", "seconds", "memory_mib"):
            del a[measured], b[measured]
        assert a == b
    for (name, p), q in zip(plain.model.state_dict().items(),
                            recomputing.model.state_dict().values(), strict=True):
        assert torch.equal(p, q), name
    recomputing.step = plain.step = 1
    loads = recomputing.accumulate()[1]
    assert torch.equal(loads, plain.accumulate()[1])
    wrong = loads_counted_in_forward(make_trainer(home, tmp_path, recompute=True))
    assert wrong.sum() == 2 * loads.sum()


def moves_something(trainer: Trainer) -> list[str]:
    """What a validation and a sample change."""
    before = whole_state(trainer)
    trainer.measure({}, last=True)
    trainer.sample(8)
    after = whole_state(trainer)
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def test_evaluation_moves_nothing(tmp_path, home):
    trainer = make_trainer(home, tmp_path)
    trainer.train_step()
    assert moves_something(trainer) == []

    def move_bias(*call):
        trainer.model.gate_biases()[0].add_(0.01)

    trainer.model.norm.register_forward_hook(move_bias)
    assert moves_something(trainer) == [".weights.layers.1.ffn.gate.bias"]


def test_validation_and_samples_leave_the_weights_alone(tmp_path, unbroken, flags):
    run = tmp_path / "run"
    run_train(*flags, "--out", str(run), "--eval-every", "1", "--sample-every", "3",
              "--save-every", str(STEPS))
    name = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (run / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.slow  # compiling takes more than a minute
def test_compiled_run_has_nearly_the_same_loss(tmp_path, flags):
    records = []
    for option in ([], ["--compile"]):
        run = tmp_path / f"run{len(option)}"
        said = run_train(*flags, "--out", str(run), "--steps", "3", *option)
        assert said.status == 0
        records.append([json.loads(s) for s in (run / "metrics.jsonl").read_text().splitlines()])
    for plain, compiled in zip(*records, strict=True):
        # Fused kernels round in other places; BF16 keeps 8 bits, averaged over 128 positions.
        assert compiled["loss"] == pytest.approx(plain["loss"], rel=1e-3)
    assert records[0][-1]["loss"] < records[0][0]["loss"] - 0.1  # more than 1e-3, so it trained


# What a run leaves behind.

LISTED = {"step", "loss", "main", "mtp", "balance", "lr", "grad_norm", "tokens_per_s", "max_vio",
          "memory_mib", "seconds", "tokens"}


def test_metrics_have_one_whole_line_a_step(unbroken):
    lines = [json.loads(line) for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    for line in lines:
        extra = {"valid_bpb", "valid_max_vio", "valid_loads", "loads", "biases", "mfu"}
        assert line.keys() - extra == LISTED
        parts = line["main"] + 0.3 * line["mtp"] + 1e-4 * line["balance"]
        late = line["main"] + 0.1 * line["mtp"] + 1e-4 * line["balance"]
        assert min(abs(line["loss"] - parts), abs(line["loss"] - late)) < 1e-5
        assert len(line["max_vio"]) == 2 and line["memory_mib"] > 50
    assert [line["step"] for line in lines if "valid_bpb" in line] == [8, 16, 24]
    assert [line["step"] for line in lines if "loads" in line] == [10, 20]
    assert [line["step"] for line in lines if "valid_loads" in line] == [8, 16, 24]
    for line in lines:
        for load, vio in zip(line.get("loads", []), line["max_vio"], strict="loads" in line):
            assert max(load) / (sum(load) / len(load)) - 1 == pytest.approx(vio, abs=1e-4)
        assert all(map(any, line.get("biases", [])))  # they have moved
    assert lines[-1]["main"] < lines[0]["main"] - 0.5  # it learns


def test_model_flops_utilisation_needs_a_known_peak(tmp_path, home, unbroken, monkeypatch):
    assert "mfu" not in (unbroken / "metrics.jsonl").read_text()  # no one peak for a CPU
    trainer = make_trainer(home, tmp_path)
    trainer.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    rate = 989e12 / flops_per_token(trainer.model.args, trainer.args.seq_len)
    assert trainer.model_flops_utilisation(rate / 4) == 0.25
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unheard Of 9000")
    assert trainer.model_flops_utilisation(rate) is None


def test_run_folder_describes_itself(home, unbroken):
    config = json.loads((unbroken / "config.json").read_text())
    model, args = ModelArgs(**config["model"]), TrainArgs(**config["train"])
    expected = settings(home) | {"out": str(unbroken)}
    assert args == TrainArgs.for_preset("nano", **expected)
    assert asdict(model) == asdict(replace(ModelArgs.preset("nano"), vocab_size=VOCABULARY))
    tokenizer = Tokenizer.load(unbroken / "tokenizer")
    assert config["tokenizer"] == tokenizer.fingerprint
    assert config["versions"].keys() >= {"minids", "torch", "python"}
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (unbroken / "sample.txt").read_text().startswith("def")


def test_dense_model_trains(tmp_path, flags):
    """Without experts there is no load and no balance to tell."""
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "2",
                     "--n-routed-experts", "0")
    assert said.status == 0 and "MaxVio" not in said.out
    lines = (tmp_path / "run/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["max_vio"] for line in lines] == [[], []]


def test_end_says_what_was_reached_and_what_to_do_next(tmp_path, flags):
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "2")
    assert "bits per byte" in said.out and "MaxVio of each layer" in said.out
    assert f"python -m minids.generate --run {tmp_path / 'run'} --prompt" in said.out


def test_runs_without_a_name_lie_side_by_side(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_train(*flags, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nano", "nano-2"]
    assert "run     runs/nano-2" in run_train("--preset", "nano", "--resume").out


# A run that begins with another's weights; the stages of sparse attention.

DSA_STEPS = 9


@pytest.fixture(scope="module")
def warm(home, unbroken) -> Path:
    """The warm-up of the finished run's indexers."""
    run = home / "warm"
    said = run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", str(DSA_STEPS),
                     "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert f"minids.train --from {run} --dsa sparse" in said.out
    return run


@pytest.fixture(scope="module")
def sparse(home, warm) -> Path:
    """The stage after it."""
    run = home / "sparse"
    said = run_train("--from", str(warm), "--dsa", "sparse", "--steps", str(DSA_STEPS),
                     "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert f"minids.evaluate --run {run} --selections" in said.out
    return run


def weights_of(run: Path, step: int | None = None) -> dict[str, torch.Tensor]:
    step = newest_step(run) if step is None else step
    return load_weights(run / f"checkpoints/step_{step:06d}")


def moved(before: dict, after: dict) -> set[str]:
    """The names of what is not the same, bit for bit, in both."""
    return {name for name in after if name not in before
            or not torch.equal(before[name], after[name])}


def test_the_warmup_moves_nothing_but_the_indexers(unbroken, warm):
    dense, begun, ended = weights_of(unbroken), weights_of(warm, 0), weights_of(warm)
    indexers = {name for name in begun if ".indexer." in name}
    assert len(indexers) == 3 * 5  # of two layers and the MTP module
    assert moved(dense, begun) == indexers == moved(begun, ended)
    lines = read_records(warm)
    assert lines[-1]["indexer"] < lines[0]["indexer"]
    assert all(line["grad_norm"] == 0 < line["indexer_grad_norm"] for line in lines)
    assert all(line["lr"] == 3e-3 for line in lines)  # the indexers'


def test_the_sparse_stage_moves_everything(warm, sparse):
    assert weights_of(sparse, 0).keys() == weights_of(warm).keys()
    assert moved(weights_of(warm), weights_of(sparse, 0)) == set()
    rest = weights_of(warm).keys() - moved(weights_of(warm), weights_of(sparse))
    assert all(name.endswith("gate.bias") for name in rest)  # these go up and down by equal steps
    for line in read_records(sparse):
        parts = (line["main"] + 0.1 * line["mtp"] + 1e-4 * line["balance"] + line["indexer"])
        assert line["loss"] == pytest.approx(parts, rel=1e-5)


def test_the_check_of_the_warmup_notices(home, unbroken, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "freeze_all_but_indexers", lambda model: None)
    run = tmp_path / "run"
    run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run))
    assert "layers.0.attn.wo.weight" in moved(weights_of(unbroken), weights_of(run))


@pytest.mark.parametrize("stage", ["warm", "sparse"])
def test_a_stage_has_the_same_bytes_twice(stage, tmp_path, request, unbroken, warm):
    """From the command line, and by the settings that its folder states."""
    first = request.getfixturevalue(stage)
    config = json.loads((first / "config.json").read_text())
    args = TrainArgs(**config["train"] | {"out": str(tmp_path / "again")})
    with contextlib.redirect_stdout(io.StringIO()):
        again = train.train(args)
    assert differences(first, again) == []
    other = replace(args, indexer_lr=2e-3, out=str(tmp_path / "other"))
    with contextlib.redirect_stdout(io.StringIO()):
        assert differences(first, train.train(other)) != []


@pytest.mark.parametrize("step", [0, 6])
@pytest.mark.parametrize("stage", ["warm", "sparse"])
def test_a_resumed_stage_equals_an_unbroken_one(stage, step, tmp_path, request, home, monkeypatch):
    """From its folder alone, also when it was killed before its first step was saved."""
    first = request.getfixturevalue(stage)
    run = cut_back(first, tmp_path / "run", step)
    config = json.loads((run / "config.json").read_text())
    config["train"]["from_run"] = str(tmp_path / "is gone")
    (run / "config.json").write_text(json.dumps(config))
    said = run_train("--resume", "--out", str(run))
    assert said.status == 0 and f"resumed at step {step} of {DSA_STEPS}" in said.out
    assert differences(first, run) == []
    assert json.loads((run / "config.json").read_text())["source"] == config["source"]


def test_killed_and_resumed_stage_equals_an_unbroken_one(home, warm, sparse):
    seconds = read_records(sparse)[-1]["seconds"]
    flags = ["--from", str(warm), "--dsa", "sparse", "--steps", str(DSA_STEPS)]
    kill_and_resume(flags, sparse, seconds + 1, home / "killed-sparse", kills=1)


def test_a_stages_folder_says_what_it_began_with(home, unbroken, warm):
    config = json.loads((warm / "config.json").read_text())
    checkpoint = newest_checkpoint(unbroken)
    assert config["source"] == {
        "checkpoint": str(checkpoint),
        "sha256": hashlib.sha256((checkpoint / "model.safetensors").read_bytes()).hexdigest()}
    before = json.loads((unbroken / "config.json").read_text())
    assert "source" not in before
    differing = {k for k, v in config["train"].items() if before["train"][k] != v}
    assert differing == {"out", "from_run", "dsa", "steps", "warmup_steps", "constant_until",
                         "mtp_weight", "indexer_lr"}
    model = ModelArgs(**config["model"])
    assert (model.index_n_heads, model.index_head_dim, model.index_topk) == (4, 16, 4)
    assert replace(model, index_n_heads=0, index_head_dim=32, index_topk=128) == ModelArgs(
        **before["model"])
    assert config["tokenizer"] == before["tokenizer"]


def test_a_longer_context_and_another_indexer_can_be_asked_for(tmp_path, unbroken):
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--dsa", "warmup", "--steps", "1", "--out", str(run),
                     "--seq-len", "300", "--max-seq-len", "300", "--batch-size", "1",
                     "--index-n-heads", "2", "--index-topk", "7", "--index-fp8")
    assert said.status == 0, said.err
    model = json.loads((run / "config.json").read_text())["model"]
    assert [model[f"index_{n}"] for n in ("n_heads", "head_dim", "topk", "fp8")] == [2, 16, 7, True]
    assert model["max_seq_len"] == 300


def test_the_default_indexer_at_v3s_size_is_v32s():
    v3, v32 = (asdict(ModelArgs.preset(name)) for name in ("v3", "v3.2"))
    args = TrainArgs.for_preset("v3", from_run="x", dsa="warmup")
    assert v3 | train.default_indexer(v3, args.seq_len) == v32


def test_a_dense_model_goes_on(tmp_path, unbroken, sparse):
    """The control: equal steps, batches and learning rates as in the sparse stage."""
    run = tmp_path / "run"
    said = run_train("--from", str(unbroken), "--steps", str(DSA_STEPS), "--out", str(run))
    assert said.status == 0 and "generate" in said.out
    assert moved(weights_of(unbroken), weights_of(run, 0)) == set()
    dense, other = (json.loads((r / "config.json").read_text())["train"] for r in (run, sparse))
    assert {k for k in dense if dense[k] != other[k]} == {"out", "from_run", "dsa"}
    assert "indexer" not in read_records(run)[0]


def test_runs_after_others_are_named_after_them(tmp_path, unbroken, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(unbroken, tmp_path / "runs/x")
    for words in (["--from", "runs/x", "--dsa", "warmup"], ["--from", "runs/x", "--dsa", "warmup"],
                  ["--from", "runs/x-warm", "--dsa", "sparse"],
                  ["--from", f"runs/x/checkpoints/step_{STEPS:06d}"]):
        assert run_train(*words, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == [
        "x", "x-more", "x-sparse", "x-warm", "x-warm-2"]


# Mistakes: one line on stderr, exit status 2, nothing written and nothing lost.

def assert_refused(said: Said, *words: str) -> None:
    lines = said.err.splitlines()
    assert said.status == 2 and len(lines) == 1, said
    assert lines[0].startswith("python -m minids.train: ")
    for word in words:
        assert word in lines[0], f"{word!r} is not in {lines[0]!r}"


BAD = {
    "unknown preset": (["--preset", "tinny"], "preset 'tinny'", "did you mean 'tiny'?"),
    "unknown flag": (["--warm-up-steps", "3"], "--warm-up-steps", "'--warmup-steps'"),
    "not a number": (["--steps", "many"], "--steps", "'many'"),
    "no heads": (["--n-heads", "0"], "n_heads = 0", "at least 1"),
    "odd rotary width": (["--qk-rope-head-dim", "7"], "qk_rope_head_dim = 7", "even"),
    "longer than the model": (["--seq-len", "300"], "seq_len = 300", "max_seq_len = 256"),
    "longer than the text": (["--data", "text:{home}/short.txt", "--seq-len", "200"],
                             "seq_len = 200 is longer than the text", "at most"),
    "longer than the held-out text": (["--data", "text:{home}/short.txt", "--seq-len", "20"],
                                      "seq_len = 20 is longer than the validation text"),
    "too short to predict two tokens": (["--seq-len", "1"], "seq_len = 1", "n_mtp_layers = 1"),
    "prompt longer than the model": (["--prompt", "x " * 300], "prompt = 'x x ", "max_seq_len"),
    "unknown device": (["--device", "gpu"], "device = 'gpu'", "cuda"),
    "empty file": (["--data", "text:{home}/empty.txt"], "empty.txt is empty"),
    "binary file": (["--data", "text:{home}/binary.txt"], "binary.txt is binary"),
    "folder without text": (["--data", "text:{home}/pictures"], "pictures", "no text"),
    "no such folder": (["--data", "text:{home}/textes"], "textes", "did you mean 'texts'?"),
    "unknown corpus": (["--data", "pystdlip"], "data = 'pystdlip'", "did you mean 'pystdlib'?"),
    "no such tokenizer": (["--tokenizer", "{home}/texts"], "no whole tokenizer in", "texts"),
    "vocabulary too small": (["--vocab-size", "64"], "vocab_size = 64", f"at least {VOCABULARY}"),
    "does not divide": (["--grad-accum", "3"], "grad_accum = 3", "batch_size = 4"),
    "resume of nothing": (["--preset", "small", "--resume"], "no run of minids.train with preset",
                          "'small'"),
}


@pytest.fixture(scope="module")
def bad_files(home) -> None:
    (home / "short.txt").write_text("def f(x):\n    return x\n" * 4)
    (home / "empty.txt").write_text("")
    (home / "binary.txt").write_bytes(bytes(range(256)))
    (home / "pictures").mkdir()
    (home / "pictures/a.png").write_bytes(b"\x89PNG")


@pytest.mark.parametrize("name", BAD)
def test_mistake_is_one_line_and_writes_nothing(name, tmp_path, home, flags, bad_files,
                                                monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD[name]
    bad = [word.format(home=home) for word in bad]
    assert_refused(run_train(*flags, *bad), *words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_gpu_where_there_is_none(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_refused(run_train(*flags, "--device", "cuda"), "device = 'cuda'", "cpu")
    assert list(tmp_path.iterdir()) == []


BAD_STAGES = {
    "stage without a model": (["--dsa", "warmup"], "dsa = 'warmup'", "--from"),
    "unknown stage": (["--from", "{warm}", "--dsa", "warm"], "--dsa", "'warm'"),
    "no such run": (["--from", "{home}/warmer"], "warmer", "did you mean 'warm'?"),
    "no run": (["--from", "{home}/texts"], "texts holds no checkpoint"),
    "other preset": (["--from", "{warm}", "--dsa", "sparse", "--preset", "tiny"],
                     "preset = 'tiny'", "has 'nano'"),
    "other tokenizer": (["--from", "{warm}", "--dsa", "sparse", "--tokenizer", "{home}/tokenizer"],
                        "tokenizer = ", "knows the one in"),
    "other width": (["--from", "{warm}", "--dsa", "sparse", "--dim", "128"], "dim = 128",
                    "have 64"),
    "other indexer": (["--from", "{warm}", "--dsa", "sparse", "--index-n-heads", "2"],
                      "index_n_heads = 2", "have 4"),
    "indexer too narrow": (["--from", "{unbroken}", "--dsa", "warmup", "--index-head-dim", "4"],
                           "index_head_dim = 4", "8 or more"),
    "indexer that does not learn": (["--from", "{warm}"], "index_n_heads = 4", "--dsa"),
    "indexer from the start": (["--preset", "nano", "--index-n-heads", "4"], "index_n_heads = 4",
                               "--from RUN --dsa warmup"),
    "too long": (["--from", "{unbroken}", "--dsa", "warmup", "--seq-len", "300"], "seq_len = 300",
                 "max_seq_len = 256"),
}


@pytest.mark.parametrize("name", BAD_STAGES)
def test_mistake_in_a_stage_is_one_line_and_writes_nothing(name, tmp_path, home, unbroken, warm,
                                                           monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad, *words = BAD_STAGES[name]
    before = everything(warm)
    bad = [word.format(home=home, unbroken=unbroken, warm=warm) for word in bad]
    assert_refused(run_train(*bad, "--out", str(tmp_path / "run")), *words)
    assert list(tmp_path.iterdir()) == [] and everything(warm) == before


OTHER = {
    "other stage": (["--resume", "--dsa", "sparse"], "dsa = 'sparse'", "has ''"),
    "other seed": (["--resume", "--seed", "1"], "seed = 1", "has 0"),
    "other width": (["--resume", "--dim", "128"], "dim = 128", "has 64"),
    "other text": (["--resume", "--data", "pystdlib"], "data = 'pystdlib'", "has 'text:"),
    "other tokenizer": (["--resume", "--tokenizer", "x"], "tokenizer = 'x'", "has '"),
    "without --resume": (["--steps", "99"], "holds a run already", "--resume"),
}


@pytest.mark.parametrize("name", OTHER)
def test_run_of_another_configuration_is_left_alone(name, unbroken):
    bad, *words = OTHER[name]
    before = everything(unbroken)
    assert_refused(run_train("--preset", "nano", "--out", str(unbroken), *bad), *words)
    assert everything(unbroken) == before


def test_tokenizer_of_another_run_is_refused(tmp_path, home, unbroken):
    """The run folder's own tokenizer was exchanged."""
    run = cut_back(unbroken, tmp_path / "run", 9)
    texts = (path.read_text() for path in sorted((home / "texts").iterdir()))
    Tokenizer.train(texts, VOCABULARY - 10).save(run / "tokenizer")
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), "tokenizer in", "is not the run's")
    assert everything(run) == before


def test_run_without_a_whole_checkpoint_is_left_alone(tmp_path, unbroken):
    """To begin again at step 1 would write over what may still be saved."""
    run = cut_back(unbroken, tmp_path / "run", 6)
    for file in run.glob("checkpoints/*/state.pt"):
        file.write_bytes(b"cut short")
    before = everything(run)
    said = run_train("--resume", "--out", str(run))
    *refusals, last = said.err.splitlines()
    assert said.status == 2 and len(refusals) == 2 and "state.pt has 9 bytes" in refusals[0]
    assert "holds no whole checkpoint: all 2 of them were refused" in last
    assert everything(run) == before


@pytest.mark.parametrize("text", ["{}", '{"model": {"later": 1}, "train": {}}', '{"mod'])
def test_config_of_another_version_is_refused(text, tmp_path, unbroken):
    run = cut_back(unbroken, tmp_path / "run", 6)
    (run / "config.json").write_text(text)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), f"{run / 'config.json'} is damaged")
    assert everything(run) == before


def test_changed_text_is_refused(tmp_path, home, flags):
    shutil.copytree(home / "texts", tmp_path / "texts")
    run = tmp_path / "run"
    raised = run_train(*flags, "--data", f"text:{tmp_path / 'texts'}", "--out", str(run))
    assert raised.status == 0
    (tmp_path / "texts/00.py").write_text("x = 1\n" * 99)
    before = everything(run)
    assert_refused(run_train("--resume", "--out", str(run)), "data = ")
    assert everything(run) == before


def in_process(*flags: str, cwd: Path, **environment: str) -> Said:
    """`python -m minids.train` in a process of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run([sys.executable, "-m", "minids.train", *flags], cwd=cwd, text=True,
                          capture_output=True, env=os.environ | {"PYTHONPATH": path} | environment)
    return Said(done.returncode, done.stdout, done.stderr)


def test_mistake_in_a_process_of_its_own(tmp_path, flags):
    """No library writes a line of its own to stderr, and no half-made folder is left."""
    said = in_process(*flags, "--seq-len", "300", cwd=tmp_path)
    assert_refused(said, "seq_len = 300")
    said = in_process(*flags, "--data", "hf:roneneldan/TinyStories", cwd=tmp_path,
                      HF_ENDPOINT="http://127.0.0.1:9")
    assert_refused(said, "no network")
    assert list(tmp_path.iterdir()) == []


def test_no_network_is_said_within_two_seconds(tmp_path, flags, monkeypatch):
    """Nobody listens on port 9. Two seconds besides the import of torch, which is done here."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    begin = time.monotonic()
    said = run_train(*flags, "--data", "hf:roneneldan/TinyStories", "--out", str(tmp_path / "run"))
    assert time.monotonic() - begin < 2
    assert_refused(said, "no network", "127.0.0.1:9", "pystdlib")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB: room for two checkpoints."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(disk)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("mounting a small file system needs root")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_full_disk_leaves_the_last_checkpoint(small_disk, tmp_path, flags, unbroken):
    run = small_disk / "run"
    said = run_train(*flags, "--out", str(run))
    good = newest_checkpoint(run)
    assert_refused(said, "could not be written", "No space left on device", str(good))
    shutil.move(run, tmp_path / "larger")  # to a disk with room
    said = run_train("--resume", "--out", str(tmp_path / "larger"))
    assert said.status == 0 and differences(unbroken, tmp_path / "larger") == []


def test_fp8_rounds_the_products(home, flags, unbroken):
    """The first loss, before any update, moves a little: a run with --fp8 does not train wide."""
    run = home / "fp8"
    said = run_train(*flags, "--fp8", "--steps", "1", "--out", str(run))
    assert (said.status, said.err) == (0, "")
    wide, rounded = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["main"]
                     for folder in (unbroken, run))
    assert wide != rounded and abs(rounded / wide - 1) < 0.01

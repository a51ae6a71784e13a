"""Pre-training: one optimizer step, and what a run leaves behind."""

import json
import re
from dataclasses import asdict, replace

import pytest
import torch
import training_runs
from training_runs import (
    SAMPLED,
    STEPS,
    VOCABULARY,
    make_trainer,
    run_train,
    settings,
    whole_state,
)

from minids import ModelArgs
from minids.costs.flops import flops_per_token
from minids.model.moe import Gate, Routing
from minids.runs.device import fetched
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
    return fetched(parts), loads, {n: p.grad for n, p in trainer.model.named_parameters()}


def apart(a: tuple, b: tuple) -> float:
    """The largest relative difference between two batches' gradients and loss parts."""
    gaps = [(a[2][name] - grad).norm() / grad.norm() for name, grad in b[2].items()]
    return max(*map(float, gaps), *(abs(a[0][k] / v - 1) for k, v in b[0].items()))


def forgets_to_average(trainer: Trainer) -> Trainer:
    """The wrong variant: micro-batches are added up and not divided by their number."""
    whole = trainer.model.loss

    def loss(*inputs):
        losses = whole(*inputs)
        return losses._replace(total=losses.total * trainer.args.grad_accum)

    trainer.model.loss = loss
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
    step, seen = trainer.model.loss, []

    def loss(*inputs):
        seen.append(step(*inputs))
        return seen[-1]

    trainer.model.loss = loss
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
    whole, update = trainer.model.loss, trainer.model.update_gate_bias

    def loss(*inputs):
        losses = whole(*inputs)
        update(losses.loads, trainer.args.bias_speed)
        return losses

    trainer.model.loss = loss
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
    said = run_train(*flags, "--out", str(run), "--eval-every", "1", "--sample-every", "3",
                     "--save-every", str(STEPS))
    sampled = {int(step) for step in re.findall(r"^step (\d+): ", said.out, re.MULTILINE)}
    assert sampled == {*range(3, STEPS, 3)}
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    *some, everything = [sum(record["valid_loads"][0]) for record in records]
    assert {*some} == {some[0]} and everything > some[0]  # the last step's is of the whole text
    name = f"checkpoints/step_{STEPS:06d}/model.safetensors"
    assert (run / name).read_bytes() == (unbroken / name).read_bytes()


@pytest.mark.slow  # compiling takes more than a minute
def test_compiled_run_has_nearly_the_same_loss(tmp_path, flags):
    """A dense block and one with experts; an MTP module's, compiled apart, is one of those."""
    records = []
    for option in ([], ["--compile"]):
        run = tmp_path / f"run{len(option)}"
        said = run_train(*flags, "--out", str(run), "--steps", "3", "--n-mtp-layers", "0", *option)
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
    assert [line["step"] for line in lines if "valid_bpb" in line] == [9, STEPS]
    assert [line["step"] for line in lines if "loads" in line] == [10]
    assert [line["step"] for line in lines if "valid_loads" in line] == [9, STEPS]
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
    assert asdict(model) == asdict(replace(
        ModelArgs.preset("nano"), vocab_size=VOCABULARY, max_seq_len=SAMPLED))
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


def test_a_model_with_more_rows_than_its_tokenizer_samples_text(tmp_path, flags):
    """Three of four sampled ids are beyond the tokenizer: they have no text."""
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "1", "--init-std", "0.3",
                     "--vocab-size", str(4 * VOCABULARY))
    assert (said.status, said.err) == (0, "")
    assert (tmp_path / "run/sample.txt").read_text().startswith("def")


def test_end_says_what_was_reached_and_what_to_do_next(tmp_path, flags):
    said = run_train(*flags, "--out", str(tmp_path / "run"), "--steps", "3", "--eval-every", "2")
    steps = [line.split(":")[0] for line in said.out.splitlines() if line.startswith("step ")]
    assert steps == ["step 2/3", "step 3/3"]  # without a terminal: where it validates, at the end
    assert "bits per byte" in said.out and "MaxVio of each layer" in said.out
    assert f"python -m minids.generate --run {tmp_path / 'run'} --prompt" in said.out


def test_runs_without_a_name_lie_side_by_side(tmp_path, flags, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert run_train(*flags, "--steps", "1").status == 0
    assert sorted(p.name for p in (tmp_path / "runs").iterdir()) == ["nano", "nano-2"]
    assert "run     runs/nano-2" in run_train("--preset", "nano", "--resume").out


def test_fp8_rounds_the_products(home, flags, unbroken):
    """The first loss, before any update, moves a little: a run with --fp8 does not train wide."""
    run = home / "fp8"
    said = run_train(*flags, "--fp8", "--steps", "1", "--out", str(run))
    assert (said.status, said.err) == (0, "")
    assert not any(line.startswith("fp8: ") for line in said.out.splitlines())  # no GPU is missed
    wide, rounded = (json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])["main"]
                     for folder in (unbroken, run))
    assert wide != rounded and abs(rounded / wide - 1) < 0.01

"""Each table of the benchmark is printed, and settings that are not valid are named."""

import json
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
from training_runs import no_picture, run_main, short_sample

from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.lab import bench, bench_decoding, bench_setup
from minids.lab.bench import equal_active_dense, quality_cells
from minids.lab.bench_setup import BenchArgs
from minids.model.transformer import Transformer
from minids.runs.checkpoints import save_checkpoint
from minids.text.tokenizer import Tokenizer

NANO = replace(ModelArgs.preset("nano"), n_mtp_layers=0)


def active_gap(args: ModelArgs, dense: ModelArgs) -> float:
    active = count_parameters(args).active
    return abs(count_parameters(dense).active - active) / active


@pytest.mark.parametrize("preset", ["nano", "tiny", "small", "v3"])
def test_dense_model_has_equal_active_parameters(preset):
    args = ModelArgs.preset(preset)
    dense = equal_active_dense(args)
    assert not dense.has_moe and active_gap(args, dense) < 0.01
    assert active_gap(args, replace(dense, inter_dim=dense.inter_dim * 5 // 4)) > 0.01


def run(settings: BenchArgs, what: str, capsys, *more: str) -> list[list[str]]:
    """The cells of the table that the program prints."""
    names = "preset data pairs batch_size seq_len decode_batch prompt new_tokens dtype threads " \
            "seeds steps steps_per_timing"
    flags = [f"--{n.replace('_', '-')}={getattr(settings, n)}" for n in names.split()]
    bench.main([f"--what={what}", *flags, *more])
    table = capsys.readouterr().out.split("\n\n")[1]
    return [[cell for cell in line.split("  ") if cell] for line in table.splitlines()]


@pytest.mark.parametrize("what,rows", [("train", 1), ("decode", 2), ("dense", 1)])
def test_program_prints_its_table(settings, what, rows, capsys):
    head, *body = run(settings, what, capsys)
    assert len(body) == rows and all(len(row) == len(head) for row in body)
    assert all(float(row[3]) > 0 for row in body)  # the ratio


def test_both_sides_train_on_the_same_batches(settings):
    seen = {"ours": [], "theirs": []}
    sides = [SimpleNamespace(run=lambda batches, name=name: seen[name].append(batches))
             for name in seen]
    bench_setup.Bench(replace(settings, pairs=3), NANO).time_steps(*sides)
    (_, *ours), (_, *theirs) = seen.values()  # the first one warms up
    assert len(ours) == 3 and all(a is b for a, b in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0][0][0], ours[1][0][0])


def test_the_bodies_that_ran_are_named(settings, capsys):
    bench.main(["--what=decode", "--preset=nano", f"--data={settings.data}", "--pairs=1",
                "--prompt=8", "--new-tokens=4", "--decode-batch=3", "--dtype=fp32", "--threads=1"])
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("bodies: ") and len(last.split(", ")) > 1


def test_losses_in_the_table_agree(settings, capsys):
    head, row = run(settings, "train", capsys)
    assert head[-2:] == ["minids first loss", "transformers first loss"]
    assert float(row[-2].strip()) == pytest.approx(float(row[-1]), abs=1e-4)


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no GPU here"))]


@pytest.mark.parametrize("device", DEVICES)
def test_quality_table(settings, capsys, tmp_path, monkeypatch, device):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("minids.train.loss_curve", no_picture)
    monkeypatch.setattr("minids.train.Trainer.sample", short_sample)
    _, seed, mean = run(settings, "moe-vs-dense", capsys, f"--device={device}")
    assert [cell.strip() for cell in seed[1:6]] == [cell.strip() for cell in mean[1:6]]
    assert 1 < float(seed[1]) < 8 and seed[6].split()[:3] == ["2", "/", "2"]


def test_sparse_table(settings, capsys, monkeypatch):
    monkeypatch.setattr(bench_decoding, "SHORTEST", 32)
    flags = ["--context=96", "--index-n-heads=2", "--index-head-dim=16", "--index-topk=16"]
    head, *rows = run(settings, "sparse", capsys, *flags)
    assert [row[0].strip() for row in rows] == [f"{work}, {n} tokens" for work in
                                                ("prefill", "decode") for n in (32, 64, 96)]
    assert head[-1].strip() == "outside indexer MFLOP"
    assert len({row[-1] for row in rows[3:]}) == 1 and len({row[-2] for row in rows[3:]}) == 3


def a_run(tmp_path, **changes) -> str:
    """A run folder of a model that has learnt nothing."""
    tokenizer, folder = Tokenizer.load(), tmp_path / "run"
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size, **changes)
    torch.manual_seed(0)
    save_checkpoint(folder, 1, Transformer(args).state_dict(), {"step": 1})
    tokenizer.save(folder / "tokenizer")
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint}
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


@pytest.mark.parametrize("device", DEVICES)
def test_speculative_table(settings, capsys, tmp_path, monkeypatch, device):
    monkeypatch.setattr(bench_decoding, "PROMPTS", 2)
    head, *rows = run(settings, "speculative", capsys, f"--run={a_run(tmp_path)}",
                      f"--device={device}")
    assert len(head) == 5
    assert [row[0].strip() for row in rows[:6]] == [
        f"{drafts} drafted, batch {batch}" for drafts in (1, 2, 3) for batch in (1, 2)]
    assert len(rows) == 6 + len(bench_decoding.DEPTHS)
    assert all(1 <= float(row[2]) <= 4 and float(row[3]) > 0 for row in rows[:6])
    predicted = [float(row[-1]) for row in rows[6:]]
    assert predicted == sorted(predicted)  # the deeper, the more a draft saves


def test_drafts_need_a_module(settings, capsys, tmp_path):
    with pytest.raises(ValueError, match="must have an MTP module"):
        run(settings, "speculative", capsys, f"--run={a_run(tmp_path, n_mtp_layers=0)}")


def test_texts_that_differ_stop_the_benchmark():
    same = [[1, 2]] * 16
    bench_decoding.require_same_text(same, [[1, 3], [1, 3], *same[2:]])  # ties
    with pytest.raises(ValueError, match="3 of 16"):
        bench_decoding.require_same_text(same, [*[[1, 3]] * 3, *same[3:]])


def test_lower_bits_per_byte_win():
    assert quality_cells([1.6, 1.7, 1.5]) == ["1.6000", "1.7000", "experts", "1.5000",
                                                    "dense"]


@pytest.mark.parametrize("flags,named", [
    (["--score-func", "softmax"], "gate_bias"),
    (["--n-routed-experts", "1", "--n-activated-experts", "1"], "n_routed_experts"),
    (["--index-n-heads", "2"], "q_lora_rank"),
    (["--seq-len", "300"], "seq_len"),
    (["--new-tokens", "250"], "new_tokens"),
    (["--pairs", "0"], "pairs"),
    (["--decode-batch", "99999"], "decode_batch"),
    (["--what", "train,trian"], "what"), (["--what", "profile"], "label"),
    (["--preset", "nanoo"], "did you mean 'nano'"), (["--preset", "v3"], "does not fit"),
])
def test_bad_settings_are_named(settings, flags, named, monkeypatch):
    # refused for what it is, before anything is built
    monkeypatch.setattr(bench_setup, "Transformer", None)
    with pytest.raises(ValueError, match=named):
        bench.main(["--what=train", "--preset=nano", f"--data={settings.data}", *flags])


def test_bad_flag_is_one_line():
    done = run_main(bench, "--what", "trian")
    assert done.status == 2 and done.out == "" and len(done.err.splitlines()) == 1
    assert "trian" in done.err and "moe-vs-dense" in done.err


def test_rollout_table(settings, capsys):
    head, row = run(settings, "rollout", capsys, "--dtype=fp32")
    assert len(head) == len(row) == 6 and "fp32, batch" in row[0]
    assert float(row[3]) > 0 and float(row[4]) <= float(row[3]) <= float(row[5])


def test_several_tables_in_one_process(settings, capsys, monkeypatch):
    monkeypatch.setattr("minids.lab.roofline.SIDE", {"cpu": 64})  # of the products that are timed
    flags = ["--preset=nano", f"--data={settings.data}", "--pairs=1", "--prompt=8", "--threads=1",
             "--new-tokens=8", "--decode-batch=3", "--dtype=fp32", "--context=40"]
    bench.main(["--what=step,prompt", *flags])
    out = capsys.readouterr().out
    assert out.index("decoding step") < out.index("prompt  ") and out.count("bodies: ") == 2


def test_precisions_by_device(settings):
    gpu = replace(settings, dtype="both", device="cuda")
    assert gpu.dtypes == ["bf16-weights", "bf16"] and gpu.decode_dtypes == ["bf16"]
    cpu = replace(settings, dtype="both")
    assert cpu.dtypes == cpu.decode_dtypes == ["bf16", "fp32"]


def test_a_model_may_have_more_tokens_than_the_text(settings):
    wide = bench_setup.Bench(settings, replace(NANO, vocab_size=5000))
    few = bench_setup.Bench(settings, replace(NANO, vocab_size=100))
    assert wide.args.vocab_size == 5000 and few.args.vocab_size == Tokenizer.load().vocab_size


def test_a_decoder_is_made_in_its_precision(settings):
    made = bench_setup.Bench(replace(settings, dtype="bf16"), NANO).decoder(n_layers=1)
    assert {p.dtype for p in made.parameters()} == {torch.bfloat16} and len(made.layers) == 1
    assert torch.get_default_dtype() == torch.float32 and not made.training

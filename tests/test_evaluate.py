"""The program: bits per byte, --selections, --drafts, and one line for each mistake."""

import json
import math
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from types import SimpleNamespace

import pytest
import torch
import training_runs
from small_models import LITTLE, scrambled
from training_runs import read_records, run_train

from minids import ModelArgs, Transformer
from minids import evaluate as module
from minids.base.command_line import run_program
from minids.evaluate import main
from minids.infer.validation import evaluate
from minids.runs import together
from minids.runs.checkpoints import save_checkpoint
from minids.tokenizer import Tokenizer

home = training_runs.home


def test_the_program(tmp_path, capsys, monkeypatch):
    tokenizer = Tokenizer.load()
    args = replace(ModelArgs.preset("nano"), vocab_size=tokenizer.vocab_size)
    model = Transformer(args)
    torch.nn.init.zeros_(model.head.weight)
    save_checkpoint(tmp_path / "run", 3, model.state_dict(), {"step": 3})
    tokenizer.save(tmp_path / "run/tokenizer")
    texts = tmp_path / "texts"
    texts.mkdir()
    for i in range(300):
        (texts / f"{i}.txt").write_text(f"This is text number {i}, and it is not long.\n" * 4)
    config = {"model": asdict(args), "tokenizer": tokenizer.fingerprint,
              "train": {"data": f"text:{texts}", "seq_len": 32, "seed": 0, "fim_rate": 0.0}}
    (tmp_path / "run/config.json").write_text(json.dumps(config))

    def call(*words) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["minids.evaluate", *map(str, words)])
        with pytest.raises(SystemExit) as end:
            run_program("minids.evaluate", main)
        said = capsys.readouterr()
        return end.value.code or 0, said.out, said.err

    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu")
    assert status == 0 and "bits per byte" in out and "step_000003" in out
    found = float(out.split("bits per byte")[1].split()[0])
    assert 1 < found < math.log2(args.vocab_size)  # a token has 12 bits and more than a byte
    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu", "--selections",
                          "--index-topk", 8, "--max-tokens", 1024)
    names = [line.split()[0] for line in out.splitlines()[-4:]]
    assert status == 0 and names == ["dense", "attention", "window", "random"]
    assert "attention to 8 tokens" in out
    status, out, _ = call("--run", tmp_path / "run", "--device", "cpu", "--drafts")
    assert status == 0 and out.splitlines()[-2].startswith("all")
    last = out.splitlines()[-1]
    assert last.startswith("on its own text")
    drafted = int(last.removeprefix("on its own text").split()[0].replace(",", ""))
    assert drafted == 16 * (32 // 2 - 2)  # 16 prompts; each fits a window with output and drafts
    for words, named in ((["--run", "nowhere"], "nowhere"), (["--batch-size", 0], "batch_size = 0"),
                         (["--run", tmp_path / "run", "--seq-len", 10**6],
                          "seq_len = 1000000 is not valid: it must be at most 256")):
        status, _, err = call("--device", "cpu", *words)
        assert status == 2 and named in err and err.count("\n") == 1, err

    # A model that is sure of something: FP8 and separate documents each change the result.
    weights = scrambled(args, dtype=torch.float32).state_dict()
    save_checkpoint(tmp_path / "run", 4, weights, {"step": 4})
    words = ["--run", tmp_path / "run", "--device", "cpu", "--seq-len", 128]
    results = [call(*words), call(*words, "--fp8")]
    config["train"]["separate"] = True
    (tmp_path / "run/config.json").write_text(json.dumps(config))
    results.append(call(*words))
    assert [status for status, *_ in results] == [0, 0, 0]
    assert len({out for _, out, _ in results}) == 3


def evaluate_here(monkeypatch, *words) -> None:
    """The program, in this process."""
    monkeypatch.setattr(sys, "argv", ["minids.evaluate", *map(str, words), "--threads", "1"])
    main()


@pytest.mark.parametrize("separate", [False, True])
def test_documents_are_as_separate_as_in_training(home, tmp_path, monkeypatch, separate):
    """The program measures what the run itself recorded at its end."""
    (tmp_path / "texts").mkdir()
    for i in range(200):
        (tmp_path / f"texts/{i}.txt").write_text(f"item {i} is one of a row of short items.\n")
    run = tmp_path / "run"
    said = run_train("--preset", "nano", "--tokenizer", str(home / "tokenizer"), "--data",
                     f"text:{tmp_path / 'texts'}", "--separate", str(separate), "--steps", "2",
                     "--seq-len", "32", "--batch-size", "4", "--lr", "0.01", "--warmup-steps", "1",
                     "--threads", "1", "--dtype", "fp32", "--device", "cpu", "--out", str(run))
    assert said.status == 0, said.err
    found = []
    monkeypatch.setattr(module, "evaluate", lambda *inputs: found.append(inputs) or evaluate(
        *inputs))
    evaluate_here(monkeypatch, "--run", run, "--device", "cpu", "--batch-size", 4)
    recorded = read_records(run)[-1]["valid_bpb"]
    [inputs] = found
    assert evaluate(*inputs).bits_per_byte == pytest.approx(recorded, rel=1e-6)
    other = None if separate else Tokenizer.load(home / "tokenizer").bos_id
    wrong = evaluate(*inputs[:-1], other).bits_per_byte
    assert wrong != pytest.approx(recorded, rel=1e-5)


@pytest.mark.parametrize("index_n_heads, flags, k", [
    (0, [], 8), (0, ["--seq-len", 7], 1), (0, ["--index-topk", 3], 3),
    (6, [], 5), (6, ["--index-topk", 3], 3)], ids=str)
def test_k_is_the_flags_the_models_or_an_eighth_of_a_window(monkeypatch, index_n_heads, flags, k):
    tokenizer, found = Tokenizer.load(), []
    args = replace(LITTLE, index_n_heads=index_n_heads, index_head_dim=16, index_topk=5)
    run = SimpleNamespace(model=SimpleNamespace(args=args), tokenizer=tokenizer, path="run",
                          config={"train": {"data": "no matter", "seq_len": 64}})
    monkeypatch.setattr(together, "open_model", lambda *_, **__: run)
    monkeypatch.setattr(module, "open_data", lambda *_: SimpleNamespace(
        valid=torch.zeros(9), name="text"))
    monkeypatch.setattr(module, "compare_selections", lambda *inputs: found.append(inputs[-2]))
    monkeypatch.setattr(module, "selection_table", lambda rows, told: found.append(told))
    evaluate_here(monkeypatch, "--device", "cpu", "--selections", *flags)
    assert found == [k, k]


@pytest.mark.parametrize("longest, seq_len", [(4096, 1024), (48, 48)])
def test_a_released_model_is_evaluated_on_at_most_1024_tokens(monkeypatch, longest, seq_len):
    found = []
    run = SimpleNamespace(model=SimpleNamespace(args=replace(LITTLE, max_seq_len=longest)),
                          tokenizer=Tokenizer.load(), path="run", config={})
    monkeypatch.setattr(together, "open_model", lambda *_, **__: run)
    monkeypatch.setattr(module, "open_data", lambda *given: found.append(given) or SimpleNamespace(
        valid=torch.zeros(9), name="text"))
    monkeypatch.setattr(module, "evaluate", lambda *_: SimpleNamespace(bits_per_byte=2.0,
                                                                       max_vio=[]))
    evaluate_here(monkeypatch, "--device", "cpu")
    assert found == [("pystdlib", run.tokenizer, seq_len)]


@pytest.mark.parametrize("words, team, refused", [
    (["--fp8", "--keep-fp8"], None, "fp8"), (["--fp8"], "ranks", "fp8"), (["--fp8"], None, ""),
    (["--keep-fp8"], "ranks", ""), (["--selections", "--pipeline", 2], "ranks", "selections"),
    (["--pipeline", 2], "ranks", ""), (["--selections"], "ranks", "")])
def test_what_does_not_go_together_is_refused(monkeypatch, words, team, refused):
    reported = []
    monkeypatch.setattr(module, "opened", lambda *_: nullcontext((None, team)))
    monkeypatch.setattr(module, "report", lambda run, args, team: reported.append(team))
    with pytest.raises(ValueError, match=f"{refused} = True .* false") if refused else (
            nullcontext()):
        evaluate_here(monkeypatch, *words)
    assert reported == ([] if refused else [team])

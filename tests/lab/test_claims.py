"""The experiments: what they make of runs, and that they run, go on, and name what failed."""

import json
import statistics
from types import SimpleNamespace

import pytest
from training_runs import write_texts

from minids.base.command_line import parse
from minids.lab import claims
from minids.lab.claims import ClaimArgs, Trained, dead_experts, interval, mean_vio
from minids.runs.settings import TrainArgs


def a_run(**last) -> Trained:
    lines = [dict(step=n + 1, max_vio=[n / 10, n / 10]) for n in range(40)]
    lines[-1] |= last
    return Trained(None, lines)


def test_what_is_read_from_a_run():
    run = a_run(valid_bpb=1.5, valid_loads=[[100, 100, 0, 0], [50, 50, 99, 1]])
    assert run.bits_per_byte == 1.5
    assert dead_experts(run) == 2  # one visit in a hundred of an even share is not dead
    assert mean_vio(run, 0.5) == pytest.approx(1.9)  # steps 18 to 22


def test_the_interval_is_students():
    gaps = [0.1, 0.3, 0.2, 0.4, 0.5]
    mean, half = interval(gaps)
    assert mean == pytest.approx(0.3)
    assert half == pytest.approx(2.776 * statistics.stdev(gaps) / 5 ** 0.5)
    assert interval(gaps[:2])[1] > interval(gaps)[1]


SHORT = dict(preset="nano", seeds=2, steps=4, threads=1, jobs=2)


@pytest.mark.slow
def test_fp8_trains_beside_full_precision_and_goes_on(tmp_path, capsys, monkeypatch):
    write_texts(tmp_path / "texts", documents=12)  # little is held out
    small = ["--data", f"text:{tmp_path}/texts", "--batch-size", "2", "--seq-len", "64"]
    monkeypatch.setitem(claims.REGIMES, "fp8", {"without": small, "with": [*small, "--fp8"]})
    flags = [f"--{k}={v}" for k, v in SHORT.items()] + ["--what=fp8", f"--out={tmp_path}"]
    claims.main(flags)
    first = capsys.readouterr().out
    assert [line.split()[0] for line in first.splitlines()] == ["bits", "seed", "seed", "mean,",
                                                                "spread"]
    folder = tmp_path / "fp8" / "with-seed-0"
    config = json.loads((folder / "config.json").read_text())
    assert config["train"]["fp8"] and config["train"]["steps"] == 4
    before = (folder / "metrics.jsonl").stat().st_mtime_ns
    claims.main(flags)  # nothing is trained again
    assert capsys.readouterr().out == first
    assert (folder / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.parametrize("found, words", [
    ([], ["--preset", "nano", "--seed", "1"]), ([dict(step=2)], ["--resume"]),
    ([dict(step=2, valid_bpb=1.5)], ["--resume"]), ([dict(step=4, valid_bpb=1.5)], [])])
def test_each_run_is_trained_to_its_end_by_a_command(tmp_path, monkeypatch, found, words):
    commands = []
    monkeypatch.setattr(claims, "read_metrics", lambda folder: list(found))
    monkeypatch.setattr(claims, "read_config", lambda folder: dict(train=dict(steps=4)))
    monkeypatch.setattr(claims, "is_run", lambda folder: bool(found))
    monkeypatch.setattr(claims.subprocess, "run", lambda command, **_: commands.append(
        command[1:]) or SimpleNamespace(returncode=0))
    runs = claims.train_all(ClaimArgs(what="fp8", out=str(tmp_path), **SHORT))
    folders = {regime: [tmp_path / f"fp8/{regime}-seed-{seed}" for seed in range(2)]
               for regime in claims.REGIMES["fp8"]}
    assert {regime: [run.folder for run in own] for regime, own in runs.items()} == folders
    regime, last = list(folders)[-1], ["--steps", "4"] * (not found)
    wanted = ["-m", "minids.train", *words, *(claims.REGIMES["fp8"][regime] if not found else []),
              *last, "--out", str(folders[regime][1]), "--device", "cpu", "--threads", "1"]
    assert (wanted in commands) == bool(words) and len(commands) == 2 * len(folders) * bool(words)


@pytest.mark.parametrize("flags, told", [
    (["--preset=nope"], "preset 'nope' is unknown"), (["--device=cuda"], "torch sees no GPU here"),
    (["--preset=Tiny"], "did you mean 'tiny'"), (["--out=FILE"], "it must be a folder")])
def test_a_mistake_is_told_before_the_first_run(flags, told, tmp_path, monkeypatch):
    (tmp_path / "FILE").write_text("x", "utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(claims, "train_all", lambda args: pytest.fail("a run has begun"))
    with pytest.raises(ValueError, match=told):
        claims.main(flags)


def test_every_regime_is_a_valid_command():
    of = {}
    for regime, words in claims.REGIMES["balance"].items():
        [given] = parse("minids.train", "", TrainArgs, argv=words)
        s = TrainArgs(**given)
        of[regime] = (s.bias_speed > 0, s.balance_weight > 0, s.balance_loss)
    assert of == {"none": (False, False, "sequence"), "auxiliary loss": (False, True, "expert"),
                  "bias": (True, False, "sequence"),
                  "bias and sequence loss": (True, True, "sequence")}


def test_the_balance_table_has_a_row_a_regime():
    end = dict(valid_bpb=1.5, valid_max_vio=[0.5, 0.7], valid_loads=[[1, 1], [2, 0]])
    runs = {regime: [a_run(**end), a_run(**end | dict(valid_bpb=1.7))]
            for regime in claims.REGIMES["balance"]}
    header, *rows = claims.balance_table(ClaimArgs(), runs)
    assert [row[0] for row in rows] == list(runs) and {len(row) for row in rows} == {len(header)}
    assert rows[0][5:8] == ("0.60", "1.0", "1.6000")


@pytest.mark.slow
def test_a_run_that_fails_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(claims.REGIMES, "fp8", dict.fromkeys(("without", "with"), ["--lr", "-1"]))
    with pytest.raises(ChildProcessError, match="without-seed-0.*lr = -1.0 is not valid"):
        claims.train_all(ClaimArgs(what="fp8", out=str(tmp_path), **SHORT))


def test_one_seed_has_no_interval():
    with pytest.raises(ValueError, match="seeds = 1 is not valid"):
        ClaimArgs(seeds=1)

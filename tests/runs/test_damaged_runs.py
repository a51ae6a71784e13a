"""A run folder that was damaged or edited: every reader refuses it and names the file.

Bits are flipped in every file that something reads: drawn ones here, each of them by
`python tests/run_damage.py RUN`.
"""

import json
import shutil
from pathlib import Path

import pytest
import training_runs
from run_damage import accepted_flips, read_all, read_files, some_bits
from training_runs import STEPS, assert_refused, cut_back, read_records, run_train

from minids.base.files import sealed, write_json
from minids.runs import checkpoints
from minids.runs.metrics import read_metrics
from minids.runs.open import open_model, read_config
from minids.runs.settings import TrainArgs
from minids.sft import SftArgs, sft

home, flags, unbroken = training_runs.home, training_runs.flags, training_runs.unbroken


@pytest.fixture(scope="module")
def one(home, unbroken) -> Path:
    """The finished run with its last checkpoint alone: no other one takes the place of a damaged
    one."""
    run = shutil.copytree(unbroken, home / "one")
    for path in checkpoints.all_checkpoints(run)[1:]:
        shutil.rmtree(path)
    return run


def test_a_flipped_bit_in_any_file_is_named(one):
    files = read_files(one)
    assert {"config.json", "metrics.jsonl", "meta.json", "ranks.tiktoken", "state.pt",
            "model.safetensors", "manifest.json"} == {file.name for file in files}
    read_all(one)
    for file in files:
        assert accepted_flips(one, file, some_bits(file, 20), read_all) == [], file


def test_the_check_of_flips_notices_a_reader_that_believes(one):
    """Wrong variants: a settings file that parses, and metrics that parse."""
    for name, read in (("config.json", json.loads), ("metrics.jsonl", lambda data: [
            json.loads(line) for line in data.splitlines()])):
        file = one / name
        def believe(run: Path, file=file, read=read) -> None:
            read(file.read_bytes())
        assert accepted_flips(one, file, some_bits(file, 200), believe)


def edited(run: Path, to: Path, change) -> Path:
    """Return a copy of a run whose config.json was changed by hand."""
    shutil.copytree(run, to)
    config = json.loads((to / "config.json").read_text())
    change(config)
    (to / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return to


EDITS = {
    "a rate": (lambda c: c["train"].update(lr=0.5), "train.lr is 0.5 and was ", "--lr"),
    "a theta": (lambda c: c["model"].update(rope_theta=14000.0),
                "model.rope_theta is 14000.0 and was 10000.0", "--rope-theta"),
    "more heads": (lambda c: c["model"].update(n_heads=3), "model.n_heads is 3", "--n-heads"),
    "a wrong type": (lambda c: c["train"].update(seed="7"), "train.seed is '7' and was 0",
                     "--seed"),
    "a key less": (lambda c: c["model"].pop("dim"), "model.dim is None and was", "--dim"),
    "a key more": (lambda c: c["train"].update(learning_rate=1.0),
                   "train.learning_rate is 1.0 and was None", "put it back"),
    "another tokenizer": (lambda c: c.update(tokenizer="0" * 16), "tokenizer is '0000", "put it"),
    "no seal": (lambda c: (c.pop("seal"), c["train"].update(clip=9.0)), "train.clip is 9.0",
                "--clip"),
}


@pytest.mark.parametrize("name", EDITS)
def test_a_config_edited_by_hand_is_refused_with_the_flag(one, tmp_path, name):
    change, *named = EDITS[name]
    run = edited(one, tmp_path / "run", change)
    for read in (open_model, lambda run: read_config(run, "train", TrainArgs),
                 lambda run: sft(SftArgs(from_run=str(run), out=str(tmp_path / "sft")))):
        with pytest.raises(ValueError) as caught:
            read(run)
        for words in (str(run / "config.json"), *named):
            assert words in str(caught.value)
        assert "\n" not in str(caught.value) and not (tmp_path / "sft").exists()


def test_the_config_of_another_run_is_refused(one, flags, home, tmp_path):
    """Whole and sealed, but not this run's."""
    other = home / "other-config"
    run_train(*flags, "--out", str(other), "--steps", "1", "--seed", "1")
    run = shutil.copytree(one, tmp_path / "run")
    shutil.copy(other / "config.json", run)
    assert_refused(run_train("--resume", "--out", str(run)), "config.json", "train.seed is 1")
    config = read_config(other)
    config["model"]["rope_theta"] = 7.0
    del config["seal"]
    (run / "config.json").write_bytes(sealed(config))
    with pytest.raises(ValueError, match="model.rope_theta is 7.0 and was"):
        open_model(run)


OLD = {"empty": (b"", "is not JSON"), "a list": (b"[]", "holds list"),
       "no model": (b'{"tokenizer": "x"}', "'model'"),
       "a model that is text": (b'{"model": "tiny"}', "'model' is not valid there"),
       "an unknown key": (b'{"modal": {}}', "did you mean 'model'"),
       "an unknown field": (b'{"model": {"dims": 3}}', "dims"),
       "a field of another type": (b'{"model": {"dim": "3"}}', "dim = '3' is not valid")}


@pytest.fixture(scope="module")
def old(home, one) -> Path:
    """The run as an earlier version wrote it: without seal and without what manifests now hold."""
    run = shutil.copytree(one, home / "old")
    config = read_config(run)
    for key in ("seal", "files"):
        del config[key]
    write_json(run / "config.json", config)
    manifest = next(run.glob("checkpoints/*/manifest.json"))
    body = json.loads(manifest.read_bytes())
    manifest.write_bytes(sealed({k: v for k, v in body.items()
                                 if k not in ("seal", "config", "metrics")}))
    return run


def test_a_run_of_an_earlier_version_opens_and_goes_on(old, tmp_path):
    assert open_model(old).config["train"]["steps"] == STEPS
    run = shutil.copytree(old, tmp_path / "run")
    said = run_train("--resume", "--out", str(run), "--steps", str(STEPS + 1))
    assert (said.status, said.err) == (0, "") and "seal" in read_config(run)
    assert checkpoints.recorded(run, "metrics")["bytes"] == (run / "metrics.jsonl").stat().st_size


@pytest.mark.parametrize("name", OLD)
def test_a_config_without_a_seal_is_checked_for_keys_and_types(old, tmp_path, name):
    data, named = OLD[name]
    run = shutil.copytree(old, tmp_path / "run")
    (run / "config.json").write_bytes(data)
    with pytest.raises(ValueError) as caught:
        open_model(run)
    assert str(run / "config.json") in str(caught.value) and named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_other_sizes_without_a_seal_are_one_line(old, tmp_path):
    run = edited(old, tmp_path / "run", lambda config: config["model"].update(n_heads=3))
    with pytest.raises(ValueError, match="step_.* do not fit the model of config.json: size mism"):
        open_model(run)


# Metrics.

def damage(line: int, change) -> callable:
    """Return what changes one line, from 1, of a list of lines."""
    def apply(lines: list[str]) -> None:
        lines[line - 1] = change(lines[line - 1])
    return apply


DAMAGES = {
    "not JSON": (damage(3, lambda text: text.replace("{", "<", 1)), 3),
    "another key": (damage(5, lambda text: text.replace("main", "mean")), 5),
    "another type": (damage(4, lambda text: text.replace('"step": 4', '"step": "4"')), 4),
    "a list": (damage(2, lambda text: "[1]\n"), 2),
    "a digit": (damage(7, lambda text: text.replace('"lr": 0.', '"lr": 1.')), 7),
    "a blank line": (damage(6, lambda text: "\n" + text), 6),
    "missing in the middle": (lambda lines: lines.pop(3), 4),
    "missing at the end": (lambda lines: lines.pop(), STEPS),
    "twice": (lambda lines: lines.insert(5, lines[4]), 6),
    "all": (lambda lines: lines.clear(), 1),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_metrics_name_file_and_line(one, tmp_path, name):
    run = shutil.copytree(one, tmp_path / "run")
    change, line = DAMAGES[name]
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    change(lines)
    (run / "metrics.jsonl").write_text("".join(lines))
    damaged = (run / "metrics.jsonl").read_bytes()
    said = run_train("--resume", "--out", str(run))
    assert_refused(said, f"{run / 'metrics.jsonl'} line {line} ")
    assert (run / "metrics.jsonl").read_bytes() == damaged  # nothing was deleted


@pytest.mark.parametrize("name", ["not JSON", "another type", "missing in the middle", "twice"])
def test_what_follows_the_checkpoint_is_read_too(unbroken, tmp_path, name):
    run = cut_back(unbroken, tmp_path / "run", 0)
    records = (unbroken / "metrics.jsonl").read_text().splitlines(keepends=True)
    change, line = DAMAGES[name]
    change(records)
    (run / "metrics.jsonl").write_text("".join(records))
    assert_refused(run_train("--resume", "--out", str(run)), f"metrics.jsonl line {line} ")


def test_only_a_torn_last_line_is_dropped(unbroken, tmp_path):
    run = cut_back(unbroken, tmp_path / "run", 9)
    lines = (run / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    assert not lines[-1].endswith(b"\n")
    assert read_metrics(run) == read_records(unbroken)[:len(lines) - 1]

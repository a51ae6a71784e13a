"""With the bodies switched off, by one setting, a model still trains, samples and resumes."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.torch import load_file
from training_runs import no_picture

from minids.generate import generate
from minids.kernels.registry import recorded, use
from minids.runs.open import open_model
from minids.runs.settings import TrainArgs
from minids.train import train


@pytest.fixture(autouse=True)
def bodies_on_again():
    yield
    use("auto")


def weights(run: Path, step: int) -> dict:
    return load_file(run / "checkpoints" / f"step_{step:06d}" / "model.safetensors")


def test_plain_definitions_train_resume_and_sample(tmp_path, monkeypatch):
    monkeypatch.setattr("minids.train.loss_curve", no_picture)
    text = tmp_path / "text"
    text.mkdir()
    for n in range(4):
        (text / f"{n}.py").write_text("\n".join(f"def f{i}(x): return x + {n}" for i in range(300)))
    args = TrainArgs.for_preset("nano", data=f"text:{text}", steps=4, batch_size=2, seq_len=16,
                                save_every=2, eval_every=0, eval_tokens=64, threads=1,
                                dtype="fp32", out=str(tmp_path / "off"), bodies="off")
    small = dict(max_seq_len=24, dim=16, inter_dim=16)
    with recorded() as record:
        run = train(args, small)
    assert {chosen for _, chosen in record} == {"plain"}
    again = tmp_path / "again"
    shutil.copytree(run, again)
    shutil.rmtree(again / "checkpoints" / "step_000004")  # as if killed after step 2
    with recorded() as record:
        train(replace(args, out=str(again), resume=True))
    assert {chosen for _, chosen in record} == {"plain"}
    assert all((w == weights(run, 4)[n]).all() for n, w in weights(again, 4).items())
    assert not all((w == weights(run, 2)[n]).all() for n, w in weights(again, 4).items())

    opened = open_model(str(run))
    with recorded() as record:
        done = generate(opened.model, [[1, 2, 3], [4]], 8)
    assert {chosen for _, chosen in record} == {"plain"}
    use("auto")
    assert generate(opened.model, [[1, 2, 3], [4]], 8).tokens == done.tokens

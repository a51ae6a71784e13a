"""Exports in other tools: lm-evaluation-harness scores one, TRL trains one, llama.cpp's names fit.

The packages are optional (`pip install lm_eval trl gguf`), and nothing is asked of a hub.
"""

import json
from pathlib import Path

import pytest
import torch

from minids.hf import save_hf, to_hf
from minids.rl.examination import Asking, ask
from minids.runs.open import open_model
from minids.text.chat import Chat
from minids.text.tasks import open_task
from minids.tokenizer import Tokenizer

pytestmark = pytest.mark.slow
TRAINED = Path(__file__).parents[2] / "data/r1/sft"
QUESTIONS = [(p.question, p.answer) for p in open_task("calculator").some(40, "held-out", seed=0)]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """The model of the R1 course that has learnt both modes, as a run of `minids.sft` exports."""
    folder = tmp_path_factory.mktemp("exported") / "sft"
    save_hf(open_model(TRAINED).model, folder, tokenizer=Tokenizer.open("bytes"), chat=True)
    return folder


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


def task(folder: Path, name: str, rows: list[dict], **settings) -> None:
    """Write a task of lm-evaluation-harness; YAML takes JSON."""
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), "utf-8")
    found = {"task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": {
        "test": str(data)}}, "test_split": "test", "doc_to_text": "{{question}}", **settings}
    (folder / f"{name}.yaml").write_text(json.dumps(found), "utf-8")


@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("thinking", [True, False])
def test_lm_evaluation_harness_scores_an_export_as_solve_does(thinking, exported, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task(tmp_path, "calculator", [{"question": q, "answer": a} for q, a in QUESTIONS],
         output_type="generate_until", doc_to_target="{{answer}}",
         generation_kwargs={"until": ["\n\n"], "max_gen_toks": 64, "do_sample": False},
         filter_list=[{"name": "answer", "filter": [
             {"function": "regex", "regex_pattern": "([^>]*)$"}, {"function": "take_first"}]}],
         metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}])
    model = HFLM(str(exported), device="cpu", dtype="float32", batch_size=8,
                 chat_template_args={"thinking": thinking})
    told = simple_evaluate(model, tasks=["calculator"], apply_chat_template=True,
                           task_manager=TaskManager(include_path=str(tmp_path)))
    ours = open_model(exported)
    replies = ask(ours.model, ours.tokenizer, [q for q, _ in QUESTIONS],
                  Asking("think" if thinking else "direct", max_new_tokens=64))
    right = [reply.answer == a for reply, (_, a) in zip(replies, QUESTIONS, strict=True)]
    assert told["results"]["calculator"]["exact_match,answer"] == sum(right) / len(right)
    assert 0 < sum(right)


@pytest.mark.usefixtures("offline")
def test_lm_evaluation_harness_has_our_log_likelihoods(exported, tmp_path):
    pytest.importorskip("lm_eval", reason="pip install lm_eval")
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    choices = [str(n) for n in range(10)]
    task(tmp_path, "digits", [{"question": q, "label": 3} for q, _ in QUESTIONS[:4]],
         output_type="multiple_choice", doc_to_target="label", doc_to_choice=choices,
         target_delimiter=" = ", metric_list=[{"metric": "acc"}])
    model = HFLM(str(exported), device="cpu", dtype="float32", batch_size=1, add_bos_token=True)
    scored = simple_evaluate(model, tasks=["digits"], log_samples=True,
                             task_manager=TaskManager(include_path=str(tmp_path)))
    ours = open_model(exported)
    for sample in scored["samples"]["digits"]:
        for (prompt, choice), told in zip(sample["arguments"], sample["resps"], strict=True):
            t = ours.tokenizer
            ids, own = [t.bos_id, *t.encode(prompt)], t.encode(choice)
            with torch.no_grad():
                scores = ours.model(torch.tensor([ids + own]))[0, len(ids) - 1:-1].log_softmax(-1)
            expected = scores.gather(1, torch.tensor(own)[:, None]).sum().item()
            assert float(told[0][0]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.usefixtures("offline")
def test_trl_takes_a_grpo_step_from_an_export(exported, tmp_path):
    pytest.importorskip("trl", reason="pip install trl")
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    seen = []

    def reward(prompts, completions, answer, **_) -> list[float]:
        seen.extend(zip(prompts, completions, strict=True))
        return [float(talk[0]["content"].rpartition("</think>")[2] == right) + 0.01 * number
                for number, (talk, right) in enumerate(zip(completions, answer, strict=True))]

    data = Dataset.from_list([{"prompt": [{"role": "user", "content": q}], "answer": a}
                              for q, a in QUESTIONS])
    trainer = GRPOTrainer(str(exported), reward, GRPOConfig(
        str(tmp_path / "trl"), max_steps=1, per_device_train_batch_size=8, num_generations=4,
        max_completion_length=48, learning_rate=1e-3, use_cpu=True, bf16=False, report_to=[],
        gradient_checkpointing=False, save_strategy="no", disable_tqdm=True,
        chat_template_kwargs={"thinking": True}), train_dataset=data)
    trainer.train()
    assert len(seen) == 8 and any("</think>" in talk[0]["content"] for _, talk in seen)
    trainer.save_model(str(tmp_path / "out"))
    trainer.processing_class.save_pretrained(tmp_path / "out")
    before, after = open_model(exported), open_model(tmp_path / "out")
    moved = (after.model.head.weight - before.model.head.weight).abs().max()
    assert after.model.args == before.model.args and 0 < moved < 0.1
    prompt = Chat(before.tokenizer).prompt(QUESTIONS[0][0])
    assert Chat(after.tokenizer).prompt(QUESTIONS[0][0]) == prompt


def test_llama_cpp_knows_every_tensor_and_the_vocabulary(exported):
    gguf = pytest.importorskip("gguf", reason="pip install gguf")
    args = open_model(exported).model.args
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.DEEPSEEK2, args.n_layers)
    known = set(gguf.MODEL_TENSORS[gguf.MODEL_ARCH.DEEPSEEK2])
    for name in dict(to_hf(args, open_model(exported).model.state_dict())):
        one = name.replace(".e_score_correction_bias", ".e_score_correction.bias")
        stacked = one.split(".experts.")[0] + ".experts." + one.split(".")[-2] + ".weight" \
            if ".experts." in one else one
        found = names.get_type_and_name(stacked, try_suffixes=(".weight", ".bias"))
        assert found is not None and found[0] in known, name
    vocab = gguf.SpecialVocab(exported, load_merges=True)
    assert vocab.special_token_ids["eos"] == 1 and vocab.special_token_ids["bos"] == 0
    assert vocab.chat_template

"""The served model: its engine, and the metadata that clients see."""

import contextlib
import hashlib
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from minids.base.files import read_json
from minids.hf import is_hf_folder
from minids.infer.engine import Engine
from minids.runs.open import Source, talks
from minids.text.bpe import CONFIG
from minids.text.chat import Chat
from minids.text.tasks import open_task
from minids.text.tokenizer import SMALLEST, Tokenizer

QUESTIONS = 4  # that the page suggests


@dataclass(frozen=True)
class Served:
    """A model with its engine.

    chat: the template of its conversations; None for a base model
    fills_in: whether it was trained to fill in the middle
    defaults: of the sampling, from a folder's generation_config.json
    questions: that the page suggests; queue: requests that may wait
    """

    name: str
    engine: Engine
    tokenizer: Tokenizer
    chat: Chat | None
    fills_in: bool
    defaults: dict
    questions: list[str]
    fingerprint: str
    queue: int
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def rows(self) -> int:
        """Return how many sequences are continued together."""
        return len(self.engine.batch.jobs)

    @property
    def max_len(self) -> int:
        """Return the tokens of a sequence, prompt and reply, at most."""
        return self.engine.max_len

    def describe(self) -> dict:
        """Return the model's entry in /v1/models; what OpenAI's has not, the page reads."""
        return dict(id=self.name, object="model", created=self.created, owned_by="minids",
                    max_model_len=self.max_len, chat=self.chat is not None,
                    fill_in=self.fills_in, defaults=self.defaults, questions=self.questions,
                    n_experts=self.engine.args.n_routed_experts)


def name_of(folder: Path) -> str:
    """Return a model's name: its folder's, after that of a run of several stages.

    >>> name_of(Path("runs/r1/final")), name_of(Path("runs/tiny"))
    ('r1-final', 'tiny')
    """
    return "-".join(part for part in folder.parts[-2:] if part not in ("runs", "data", "/"))


def fills_in(source: Source) -> bool:
    """Return whether a model was trained to fill in the middle: a run with a share of it, or a
    released model with the tags."""
    t = source.tokenizer
    if None in (t.fim_begin_id, t.fim_hole_id, t.fim_end_id):
        return False
    if is_hf_folder(source.path):
        return "minids" not in read_json(source.folder / CONFIG)
    return source.config.get("train", {}).get("fim_rate", 0) > 0


def questions_for(source: Source, task: str) -> list[str]:
    """Return some held-out questions of a task; "" takes the task of the run.

    A folder without a run, over bytes and with a template of conversations, is taken for one of
    `minids.r1`, whose task is the calculator.
    """
    if not task:
        found = source.config.get("grpo", {}).get("task", "")
        found = found or source.config.get("sft", {}).get("data", "task:").partition("task:")[2]
        if not found and talks(source) and source.tokenizer.n_tokens == SMALLEST:
            found = "calculator"
        task = found if found.startswith(("calculator", "countdown")) else ""
    if not task:
        return []
    return [problem.question for problem in open_task(task).some(QUESTIONS, "held-out", seed=0)]


def serve_model(source: Source, name: str, defaults: dict, task: str, queue: int, **engine
                ) -> Served:
    """Return an opened model with its engine; engine: settings of `Engine`.

    The weights are copied: a file that is mapped into memory may change on the disk.
    """
    with torch.no_grad():
        for tensor in [*source.model.parameters(), *source.model.buffers()]:
            tensor.data = tensor.data.clone()
    questions = questions_for(source, task)
    head = source.model.head.weight[:8].detach().float().cpu().contiguous()
    chat = None
    if talks(source):
        with contextlib.suppress(ValueError):  # a released model with tags of its own
            chat = Chat(source.tokenizer)
    return Served(name or name_of(source.folder), Engine(source.model, queue=queue, **engine),
                  source.tokenizer, chat, fills_in(source), defaults,
                  questions, "fp_" + hashlib.sha256(head.numpy().tobytes()).hexdigest()[:12], queue)

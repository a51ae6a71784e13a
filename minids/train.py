"""Pre-train a model of the DeepSeek family on text, into a run folder that needs nothing else.

    python -m minids.train                                  the small DeepSeek-V3, minutes on a CPU
    python -m minids.train --data text:my/folder            your own text
    python -m minids.train --resume                         go on with the newest run
    python -m minids.train --preset small --data hf:HuggingFaceFW/fineweb-edu:sample-10BT
    python -m minids.train --from runs/tiny --dsa warmup        V3.2's sparse attention: indexers,
    python -m minids.train --from runs/tiny-warm --dsa sparse   then all of the model

The recipe is V3's (arXiv 2412.19437, section 4): next-token loss plus multi-token prediction plus
the sequence-wise balance loss; the gate biases move once an optimizer step, against the loads of
the whole batch; the learning rate rises, stays and falls.

--from begins with another run's weights, settings and tokenizer. With --dsa it goes through the two
stages of V3.2 (arXiv 2512.02556, section 2.1.1): indexers are added and learn from a frozen model's
attention; then the model learns under their selection, from the language-model loss, and they go on
learning from its attention. Without --dsa the model goes on as it is.

A run folder holds config.json (every setting), tokenizer/, metrics.jsonl (one object a step),
checkpoints/step_NNNNNN/, loss.png and sample.txt. On one machine a run that was stopped at any
moment and resumed ends with the same bytes as one that was not; Ctrl-C finishes the step and saves.

Simplified: one process. The sequence length is fixed, and there is no context extension.
"""

import dataclasses
import json
import math
import shlex
import time
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minids import plots
from minids.apply.fp8 import use_fp8
from minids.apply.recompute import recompute_blocks
from minids.base.command_line import parse, run_program
from minids.config import ModelArgs
from minids.costs import count_parameters, flops_per_token
from minids.generate import generate
from minids.infer.validation import Evaluation, evaluate, parse_share, windows
from minids.model.moe import max_violation
from minids.model.objective import Packed
from minids.model.sparse_attention import freeze_all_but_indexers
from minids.runs.checkpoints import resolve
from minids.runs.learner import (
    Learner,
    Stopped,
    free_folder,
    memory_mib,
    refuse_changes,
    run_learner,
    run_of,
    stored_tokenizer,
    tune_allocator,
)
from minids.runs.optimizers import (
    batch_size_at,
    bias_speed_at,
    build_optimizers,
    clip_gradients,
    learning_rate_factor,
    mtp_weight_at,
    set_learning_rate,
)
from minids.runs.settings import TrainArgs
from minids.text.loaders import open_data
from minids.text.tokenizer import Tokenizer

# Settings of the model that leave the weights of the run before as they are.
MAY_VARY = {"max_seq_len", "original_seq_len", "rope_factor", "beta_fast", "beta_slow", "mscale",
            "index_n_heads", "index_head_dim", "index_topk", "index_hadamard", "index_fp8"}

# Dense BF16 rates from the vendors' data sheets, FLOP/s; the first name that fits counts.
PEAK_FLOPS = {"H100 PCIe": 756e12, "H100 NVL": 835e12, "H100": 989e12, "H200": 989e12,
              "H800": 989e12, "A100": 312e12, "L40S": 362e12,
              "RTX 4090": 165e12}

SAMPLES, SAMPLE_TOKENS, SAMPLE_TEMPERATURE = 16, 200, 0.7


class Trainer(Learner):
    """One run of pre-training: the model, its optimizers and its data, and where it stands."""

    program = "train"
    numbers = "step", "tokens", "seconds", "recent_loss", "valid_bpb"

    def __init__(self, args: TrainArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        super().__init__(args, model_args, run, tokenizer)
        if args.recompute:
            recompute_blocks(self.model)
        if args.dsa == "warmup":
            freeze_all_but_indexers(self.model)
        if args.fp8:
            use_fp8(self.model)
        self.loss = torch.compile(self.model.loss) if args.compile else self.model.loss
        self.optimizers = build_optimizers(self.model, args, self.dtype)
        self.data = open_data(args.data, tokenizer, args.seq_len, args.seed, args.fim_rate,
                              workers=args.threads)
        self.tokens = 0
        self.recent_loss = math.nan  # a moving mean, to tell a spike by
        self.valid_bpb = math.nan  # of the last validation
        self.check_texts()

    def more_state(self) -> dict:
        """Where the data stands."""
        return dict(loader=self.data.loader.state_dict())

    def restore_more(self, state: dict) -> None:
        """Go on where the data stood."""
        self.data.loader.load_state_dict(state["loader"])

    def more_config(self) -> dict:
        """What the run reads."""
        return dict(data=self.data.fingerprint)

    def check_texts(self) -> None:
        """Refuse at the start what validation and samples would refuse at the end."""
        windows(self.data.valid, self.args.seq_len, max_tokens=1)
        prompt, limit = self.prompt(), self.model.args.max_seq_len
        if len(prompt) >= limit:
            raise ValueError(f"prompt = {self.args.prompt!r} is not valid: its {len(prompt)} "
                             f"tokens must be fewer than max_seq_len = {limit}")

    def measure(self, record: dict, last: bool) -> float | None:
        """Validation and a sample, on the steps that have them; the validation's bits per byte."""
        args, metric = self.args, None
        if last or (args.eval_every and self.step % args.eval_every == 0):
            result = self.validate(None if last else args.eval_tokens)
            metric = record["valid_bpb"] = result.bits_per_byte
            record["valid_max_vio"] = [round(v, 4) for v in result.max_vio]
            record["valid_loads"] = result.loads.tolist()
        if args.sample_every and self.step % args.sample_every == 0 and not last:
            tqdm.write(f"step {self.step}: {self.sample(64)[0]!r}")
        return metric

    def brief(self, record: dict) -> str:
        """What the progress bar says beside the count."""
        return f"loss {record['loss']:.3f}, validation {self.valid_bpb:.3f} bits/byte"

    def line(self, record: dict) -> str:
        """What a log file shows in place of a progress bar."""
        return (f"step {record['step']}/{self.args.steps}: loss {record['loss']:.3f}, "
                f"validation {record['valid_bpb']:.4f} bits per byte, "
                f"{record['tokens_per_s']:.0f} tokens/s")

    def train_step(self) -> dict:
        """One optimizer step; returns its line of metrics."""
        start = time.perf_counter()
        self.step += 1
        set_learning_rate(self.optimizers, learning_rate_factor(self.step, self.args))
        parts, loads, n_tokens = self.accumulate()
        norms = clip_gradients(self.model, self.args.clip)
        self.check_finite(parts["loss"], sum(norms.values()))
        skipped = self.is_spike(parts["loss"])
        if not skipped:
            for optimizer in self.optimizers:
                optimizer.step()
            self.model.update_gate_bias(loads, bias_speed_at(self.step, self.args))
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        elapsed = time.perf_counter() - start
        self.tokens += n_tokens
        self.seconds += elapsed
        record = dict(step=self.step, tokens=self.tokens, **parts, **norms,
                      lr=self.optimizers[0].param_groups[0]["lr"],
                      max_vio=[round(max_violation(load).item(), 4) for load in loads],
                      tokens_per_s=round(n_tokens / elapsed, 1), seconds=round(self.seconds, 3),
                      memory_mib=memory_mib(self.device))
        if mfu := self.model_flops_utilisation(n_tokens / elapsed):
            record["mfu"] = mfu
        if self.args.log_experts_every and self.step % self.args.log_experts_every == 0:
            record["loads"] = loads.tolist()
            record["biases"] = [[round(b, 6) for b in bias.tolist()]
                                for bias in self.model.gate_biases()]
        return record | ({"skipped": True} if skipped else {})

    def accumulate(self) -> tuple[dict, Tensor, int]:
        """Gradients of one batch, in micro-batches: loss parts, loads summed over them, tokens."""
        args, loads, parts = self.args, 0, {}
        batch = batch_size_at(self.step, args)
        for _ in range(args.grad_accum):
            tokens, targets = self.data.loader.next_batch(batch // args.grad_accum)
            tokens, targets = tokens.to(self.device), targets.to(self.device)
            with self.autocast():
                losses = self.loss(tokens, targets, mtp_weight_at(self.step, args),
                                   args.balance_weight, args.balance_loss, args.dsa,
                                   args.indexer_weight, self.packed(tokens))
            (losses.total / args.grad_accum).backward()
            loads = loads + losses.loads
            names = ("loss", "main", "mtp", "balance", "indexer")
            for name, value in zip(names if args.dsa else names[:-1], losses, strict=False):
                parts[name] = parts.get(name, 0.0) + value.item() / args.grad_accum
        return parts, loads, batch * args.seq_len

    def packed(self, tokens: Tensor) -> Packed | None:
        """The documents of each window, where they are not to see each other."""
        if not self.args.separate:
            return None
        begins = tokens == self.tokenizer.bos_id
        return Packed(begins.cumsum(1), torch.ones_like(begins))

    def is_spike(self, loss: float) -> bool:
        """Whether the loss is far above its recent mean; if not, the mean takes it in."""
        factor = self.args.spike_factor
        if factor and loss > factor * self.recent_loss:
            tqdm.write(f"step {self.step}: loss {loss:.3f} is more than {factor:g} times its "
                       f"recent mean {self.recent_loss:.3f}: the step is skipped")
            return True
        known = math.isfinite(self.recent_loss)
        self.recent_loss = 0.95 * self.recent_loss + 0.05 * loss if known else loss
        return False

    def model_flops_utilisation(self, tokens_per_second: float) -> float | None:
        """MFU: share of the device's peak that goes into the model's own products, if known."""
        if self.device.type != "cuda":
            return None
        name = torch.cuda.get_device_name(self.device)
        peak = next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)
        work = flops_per_token(self.model.args, self.args.seq_len)
        return peak and round(work * tokens_per_second / peak, 4)

    def validate(self, max_tokens: int | None = None) -> Evaluation:
        """How the model does on the validation text, or on a fixed part of it."""
        batch_size = max(self.args.batch_size // self.args.grad_accum, 1)
        with self.autocast():
            result = evaluate(self.model, self.data.valid, self.tokenizer.n_bytes,
                              self.args.seq_len, batch_size, max_tokens,
                              self.tokenizer.bos_id if self.args.separate else None)
        self.valid_bpb = result.bits_per_byte
        return result

    def prompt(self) -> list[int]:
        """The tokens that a sample goes on from."""
        return [self.tokenizer.bos_id, *self.tokenizer.encode(self.args.prompt)]

    def sample(self, max_new_tokens: int, count: int = 1) -> list[str]:
        """Texts that the model writes after the prompt, without the token that ends them."""
        prompt, end = self.prompt(), self.tokenizer.eos_id
        room = self.model.args.max_seq_len - len(prompt)
        result = generate(self.model, [prompt] * count, min(max_new_tokens, room),
                          temperature=SAMPLE_TEMPERATURE, top_p=0.95, seed=self.args.seed,
                          eos_id=end)
        return [self.args.prompt + self.tokenizer.decode([t for t in row if t != end])
                for row in result.tokens]

    def finish(self) -> None:
        """Figure, sample, and what the user would like to know and do next."""
        plots.loss_curve(self.metrics, self.run / "loss.png")
        texts = self.sample(SAMPLE_TOKENS, SAMPLES)
        (self.run / "sample.txt").write_text("\n\n".join(texts))
        shares = [parse_share(text) for text in texts]
        parsed, total = (sum(column) for column in zip(*shares, strict=True))
        balance = self.metrics[-1]["valid_max_vio"]
        print(f"\n{max(texts, key=len)}\n")
        print(f"validation   {self.valid_bpb:.4f} bits per byte after {self.tokens:,} tokens, "
              f"{self.seconds:.0f} s of training")
        if balance:
            print("balance      MaxVio of each layer over the validation text: "
                  + " ".join(f"{v:.2f}" for v in balance))
        if self.args.dsa:
            loss = self.metrics[-1]["indexer"]
            print(f"indexers     {loss:.4f} nats a query from attention, all layers together")
        if total and not self.args.data.startswith("task:"):
            print(f"sample       {parsed} of {total} generated top-level blocks parse as Python "
                  f"({SAMPLES} texts)")
        print(f"run folder   {self.run}: loss.png, sample.txt, metrics.jsonl, checkpoints")
        print(f"next         python -m minids.{next_command(self.args, self.run)}")


def next_command(args: TrainArgs, run: Path) -> str:
    """What to do with a finished run: program and flags."""
    if args.data.startswith("task:"):
        return f"solve --run {run} --task {args.data.removeprefix('task:')} --template plain"
    if args.dsa == "warmup":
        return f"train --from {run} --dsa sparse"
    if args.dsa:
        return f"evaluate --run {run} --selections"
    return f'generate --run {run} --prompt "def read_"'


def free_run_folder(preset: str) -> Path:
    """runs/PRESET, or runs/PRESET-2, .. where that is taken."""
    return free_folder(Path("runs") / preset)


def newest_run(preset: str) -> Path:
    """The run of a preset that was written to last."""
    runs = [c.parent for c in Path("runs").glob(f"{preset}*/config.json")
            if c.parent.name.removeprefix(preset).lstrip("-").isdigit() or c.parent.name == preset]
    if not runs:
        raise ValueError(f"resume: there is no run of preset {preset!r} in runs/; name its folder "
                         "with --out")
    return max(runs, key=lambda run: (run / "config.json").stat().st_mtime)


def settings(given: dict, given_model: dict) -> tuple[TrainArgs, dict]:
    """The settings of a run from the flags that were given, and from its folder when resumed.

    Returns the run's settings, and those of the model's that differ from the preset's.
    Raises `ValueError` for a run folder that is taken, or of another configuration.
    """
    preset = given.get("preset", "tiny")
    ModelArgs.preset(preset)  # refuses an unknown name before anything else
    resume, before = given.get("resume", False), given.get("from_run", "")
    if given.get("out"):
        run = Path(given["out"])
    elif before and not resume:
        run = folder_after(run_of(resolve(before)), given.get("dsa", ""))
    else:
        run = newest_run(preset) if resume else free_run_folder(preset)
    stored = read_config(run)
    if stored and not resume:
        raise ValueError(f"out = {str(run)!r} holds a run already: go on with it by --resume, or "
                         "name another folder")
    if not stored:
        given = given | {"out": str(run)}
        args = settings_after(given) if before else TrainArgs.for_preset(preset, **given)
        return args, given_model
    refuse_changes(run, dataclasses.asdict(TrainArgs(**stored["train"])),
                   {k: v for k, v in given.items() if k not in TrainArgs.may_change})
    refuse_changes(run, stored["model"], given_model)
    changed = {k: v for k, v in given.items() if k in TrainArgs.may_change} | {"out": str(run)}
    return TrainArgs(**stored["train"] | changed), stored["model"]


def folder_after(run: Path, dsa: str) -> Path:
    """Beside a run: x-warm for the warm-up of x, x-sparse for the stage after it, else x-more."""
    suffix = {"warmup": "-warm", "sparse": "-sparse", "": "-more"}[dsa]
    return free_folder(run.with_name(run.name.removesuffix("-warm") + suffix))


def settings_after(given: dict) -> TrainArgs:
    """The settings of a run that begins with another's: those of that one, of the stage, and given.

    Raises `ValueError` for a preset or a tokenizer that is not the other run's.
    """
    run = run_of(resolve(given["from_run"]))
    before = dataclasses.asdict(TrainArgs(**read_config(run)["train"]))
    if given.get("preset", before["preset"]) != before["preset"]:
        raise ValueError(f"preset = {given['preset']!r} is not valid: the run in {run} has "
                         f"{before['preset']!r}, and this one begins with its weights")
    if given.get("tokenizer"):
        raise ValueError(f"tokenizer = {given['tokenizer']!r} is not valid with --from: the model "
                         f"knows the one in {run}")
    kept = {k: v for k, v in before.items() if k not in ("out", "resume", "from_run", "dsa")}
    return TrainArgs.for_preset(before["preset"], kept, **given)


def model_after(args: TrainArgs, given: dict, run: Path) -> dict:
    """All fields of the model that begins with the weights of `run`, an indexer added if need be.

    given: fields that are to differ; ValueError for one that would not fit the weights
    """
    before = read_config(run)["model"]
    fixed = {k for k in given if k not in MAY_VARY}
    if before["index_n_heads"]:
        fixed |= given.keys() & {"index_n_heads", "index_head_dim"}
    for name in sorted(fixed):
        if given[name] != before[name]:
            raise ValueError(f"{name} = {given[name]!r} is not valid: the weights in {run} have "
                             f"{before[name]!r}")
    if args.dsa and not before["index_n_heads"]:
        given = default_indexer(before, args.seq_len) | given
    return before | given


def default_indexer(model: dict, seq_len: int) -> dict:
    """An indexer in V3.2's proportions to attention; it selects an eighth of the context.

    For "v3" and the paper's 131,072 tokens that is V3.2's: 64 heads of width 128, 2,048 tokens.
    """
    return dict(index_n_heads=max(model["n_heads"] // 2, 4),
                index_head_dim=2 * model["qk_rope_head_dim"],
                index_topk=min(max(seq_len // 8, 1), 2048))


def read_config(run: Path) -> dict | None:
    """A run's config.json, None where there is none; `ValueError` where it is not understood."""
    path = run / "config.json"
    if not path.exists():
        return None
    try:
        config = json.loads(path.read_text())
        TrainArgs(**config["train"]), ModelArgs(**config["model"])
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged or of another version of minids: {error}") from error
    return config


def fit_model(args: TrainArgs, given: dict, tokenizer: Tokenizer) -> ModelArgs:
    """The preset's model, varied by what is given, with the tokenizer's vocabulary."""
    preset = ModelArgs.preset(args.preset)
    model_args = dataclasses.replace(preset, **{"vocab_size": tokenizer.vocab_size} | given)
    if model_args.vocab_size < tokenizer.vocab_size:
        raise ValueError(f"vocab_size = {model_args.vocab_size} is not valid: it must be at least "
                         f"{tokenizer.vocab_size}, the tokenizer's")
    if model_args.has_indexer and not args.dsa:
        raise ValueError(f"index_n_heads = {model_args.index_n_heads} is not valid without --dsa: "
                         "an indexer learns from a trained model; train with index_n_heads = 0, "
                         "then go on with --from RUN --dsa warmup")
    if args.seq_len > model_args.max_seq_len:
        raise ValueError(f"seq_len = {args.seq_len} is not valid: it must be at most max_seq_len "
                         f"= {model_args.max_seq_len}")
    if args.seq_len <= model_args.n_mtp_layers:
        raise ValueError(f"seq_len = {args.seq_len} is not valid: it must be above n_mtp_layers "
                         f"= {model_args.n_mtp_layers}")
    return model_args


def train(args: TrainArgs, model: dict | None = None) -> Path:
    """Train a model, or go on with a run when `args.resume` is set.

    model: fields of `ModelArgs` that differ from the preset's
    Returns the run's folder. Raises `ValueError` for settings that do not fit, before anything is
    written, and for a loss that is no number; `Stopped` after a signal, with the state saved.
    """
    tune_allocator()
    if args.threads:
        torch.set_num_threads(args.threads)
    run = Path(args.out) if args.out else free_run_folder(args.preset)
    resumed = args.resume and (run / "config.json").exists()
    begin = resolve(args.from_run) if args.from_run and not resumed else None
    if resumed:
        tokenizer = stored_tokenizer(run)
    elif begin:
        tokenizer = stored_tokenizer(run_of(begin))
        model = model_after(args, model or {}, run_of(begin))
    else:
        tokenizer = Tokenizer.open(args.tokenizer)
    trainer = Trainer(args, fit_model(args, model or {}, tokenizer), run, tokenizer)
    print(describe(trainer), flush=True)
    run_learner(trainer, resumed, begin)
    trainer.finish()
    return run


def describe(trainer: Trainer) -> str:
    """What is about to run, in three lines."""
    count = count_parameters(trainer.model.args)
    threads = f", {torch.get_num_threads()} threads" if trainer.device.type == "cpu" else ""
    return (f"model   {trainer.args.preset}: {count.total:,} parameters, {count.active:,} active, "
            f"and {count.mtp:,} for multi-token prediction\n"
            f"data    {trainer.data.describe()}\n"
            f"run     {trainer.run}, on {trainer.device}, "
            f"{str(trainer.dtype).removeprefix('torch.')}{threads}")


def main() -> int:
    """The command line."""
    given, given_model = parse("minids.train", __doc__, TrainArgs, ModelArgs)
    args, model = settings(given, given_model)
    try:
        train(args, model)
    except Stopped as stopped:
        print(f"stopped; go on with: python -m minids.train --resume --out "
              f"{shlex.quote(args.out)}")
        return 128 + int(stopped.args[0])
    return 0


if __name__ == "__main__":
    run_program("minids.train", main)

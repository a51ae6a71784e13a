"""Pre-train a model of the DeepSeek family on text, into a run folder that needs nothing else.

    python -m minids.train                                  the small DeepSeek-V3, minutes on a CPU
    python -m minids.train --data text:my/folder            your own text
    python -m minids.train --resume                         continue the newest run
    python -m minids.train --preset small --data hf:HuggingFaceFW/fineweb-edu:sample-10BT
    python -m minids.train --from runs/tiny --dsa warmup        V3.2's sparse attention: indexers,
    python -m minids.train --from runs/tiny-warm --dsa sparse   then all of the model
    python -m minids.train --from runs/tiny --context 2048      longer sequences, with YaRN

The recipe is V3's (arXiv 2412.19437, section 4): next-token loss plus multi-token prediction plus
the sequence-wise balance loss; the gate biases move once per optimizer step, against the loads of
the whole batch; the learning rate rises, stays and falls.

--from begins with another run's weights, settings and tokenizer. --dsa then takes it through the
two stages of V3.2 (arXiv 2512.02556, section 2.1.1). In the first, indexers are added and learn
from a frozen model's attention. In the second, the model learns under their selection from the
language-model loss, while they keep learning from its attention. --context extends the context with
YaRN, as V3 did twice (section 4.3). Without either it trains on as is.

A run folder holds config.json (every setting), tokenizer/, metrics.jsonl (one object per step),
checkpoints/step_NNNNNN/, loss.png and sample.txt. On one machine a run that is stopped at any
moment and resumed ends with the same bytes as an unbroken one; Ctrl-C finishes the step and saves.

torchrun starts one process per GPU, or several on a CPU, and the same command trains over all of
them with the numbers of one process; --fsdp, --replicate, --expert-parallel and --pipeline lay them
out. Their checkpoints continue on any other number of processes.

    torchrun --nproc-per-node 2 -m minids.train --preset nano --device cpu
    python -m minids.train --resume --merge         their newest checkpoint as one process's
"""

import dataclasses
import importlib
import math
import shlex
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from minids.apply.fp8 import use_fp8
from minids.apply.recompute import recompute_blocks
from minids.base.command_line import parse, run_program
from minids.base.fields import demand, require
from minids.base.files import write_whole
from minids.config import ModelArgs
from minids.costs import count_parameters
from minids.costs.cards import PEAK_FLOPS
from minids.costs.flops import flops_per_token
from minids.infer.generation import generate
from minids.infer.validation import Evaluation, evaluate, parse_share, windows
from minids.kernels import fp8 as fp8_kernels
from minids.kernels import selected
from minids.model.moe import max_violation
from minids.model.objective import Packed
from minids.model.sparse_attention import freeze_all_but_indexers
from minids.model.transformer import Transformer
from minids.parallel.layout import Layout
from minids.parallel.team import speaking_first, world_size
from minids.plots.runs import loss_curve
from minids.runs import open as runs
from minids.runs.device import memory_mib
from minids.runs.learner import Learner
from minids.runs.optimizers import batch_size_at, bias_speed_at, mtp_weight_at
from minids.runs.settings import TrainArgs
from minids.runs.sharded import merge
from minids.runs.stages import default_folder, fit_model, model_after, settings_after
from minids.runs.starting import in_folder, run_learner
from minids.text.loaders import Data, open_data
from minids.text.tokenizer import Tokenizer


class Trainer(Learner):
    """One run of pre-training: the model, its optimizers, its data, and how far it has come."""

    program, over_ranks = "train", "minids.runs.over_ranks:TrainerOverRanks"
    numbers = "step", "tokens", "seconds", "recent_loss", "valid_bpb"

    def __init__(self, args: TrainArgs, model_args: ModelArgs, run: Path, tokenizer: Tokenizer):
        super().__init__(args, model_args, run, tokenizer)
        self.prompt = [tokenizer.bos_id, *tokenizer.encode(args.prompt)]  # samples continue it
        if len(self.prompt) >= model_args.max_seq_len:
            raise ValueError(f"prompt = {args.prompt!r} is not valid: its {len(self.prompt)} "
                             f"tokens must be fewer than max_seq_len = {model_args.max_seq_len}")
        importlib.import_module("matplotlib")  # the figure at the end needs it
        self.data = self.open_data()
        self.more_config = dict(data=self.data.fingerprint)
        self.tokens = 0
        self.recent_loss = math.nan  # moving mean, the yardstick for spikes
        self.valid_bpb = math.nan  # of the last validation
        windows(self.data.valid, args.seq_len, max_tokens=1)  # refuses now what would fail later

    def describe(self) -> str:
        """Return what is trained, on what and where."""
        count = count_parameters(self.model.args)
        threads = f", {torch.get_num_threads()} threads" if self.device.type == "cpu" else ""
        return (f"model   {self.args.preset}: {count.total:,} parameters, {count.active:,} active, "
                f"and {count.mtp:,} for multi-token prediction\n"
                f"data    {self.data.describe()}\nrun     {self.run}, on {self.device}, "
                f"{str(self.dtype).removeprefix('torch.')}{threads}")

    def prepare(self, model: Transformer) -> None:
        """Set up recomputation and FP8, and freeze what a warm-up of indexers leaves alone."""
        args = self.args
        recompute_blocks(model, args.recompute)
        if args.dsa == "warmup":
            freeze_all_but_indexers(model)
        if lacking := args.dsa and selected.missing(model.args, self.device):
            tqdm.write(f"dsa: {lacking}; it runs in PyTorch operations, slower than dense")
        if args.fp8:
            require(args, "fp8", self.dtype != torch.float16,
                    "false where products are in FP16, or with --dtype fp32")
            use_fp8(model)
            lacking = fp8_kernels.missing(self.device)
            if lacking and self.device.type == "cuda":
                tqdm.write(f"fp8: {lacking}; products are simulated, far slower than in BF16")
        self.speed_up(model, args.compile, args.batch_size // args.grad_accum,
                      args.fp8, bool(args.dsa))

    def open_data(self, **shared) -> Data:
        """Return training batches and validation text; shared: how ranks share, of `open_data`"""
        args = self.args
        return open_data(args.data, self.tokenizer, args.seq_len, args.seed, args.fim_rate,
                         workers=args.threads, **shared)

    def more_state(self) -> dict:
        return dict(loader=self.data.loader.state_dict())

    def restore_more(self, state: dict) -> None:
        self.data.loader.load_state_dict(state["loader"])

    def measure(self, record: dict, last: bool) -> float | None:
        """Validate and sample on the steps that do; returns the validation's bits per byte."""
        args, metric = self.args, None
        if last or (args.eval_every and self.step % args.eval_every == 0):
            with self.autocast():
                found = self.validate(None if last else args.eval_tokens)
            metric = self.valid_bpb = record["valid_bpb"] = found.bits_per_byte
            record["valid_max_vio"] = [round(v, 4) for v in found.max_vio]
            record["valid_loads"] = found.loads.tolist()
        if args.sample_every and self.step % args.sample_every == 0 and not last:
            for text in self.sample(64):
                tqdm.write(f"step {self.step}: {text!r}")
        return metric

    def validate(self, max_tokens: int | None) -> Evaluation:
        """Evaluate the model on at most `max_tokens` of the validation text; None: on all of it."""
        args = self.args
        return evaluate(self.model, self.data.valid, self.tokenizer.n_bytes, args.seq_len,
                        args.batch_size // args.grad_accum, max_tokens,
                        self.tokenizer.bos_id if args.separate else None)

    def line(self, record: dict) -> str:
        return (f"loss {record['loss']:.3f}, validation {self.valid_bpb:.4f} bits per byte, "
                f"{record['tokens_per_s']:.0f} tokens/s")

    def accumulate(self) -> tuple[dict, Tensor]:
        """Add up a batch's gradients; return the parts of each loss, and the loads, sums."""
        args, loads, parts = self.args, 0, {}
        size = batch_size_at(self.step, args) // args.grad_accum
        for _ in range(args.grad_accum):
            tokens, targets = map(self.send, self.data.loader.next_batch(size))
            begins = tokens == self.tokenizer.bos_id  # documents that do not see each other
            packed = Packed(begins.cumsum(1), torch.ones_like(begins)) if args.separate else None
            with self.autocast():
                losses = self.model.loss(tokens, targets, mtp_weight_at(self.step, args),
                                         args.balance_weight, args.balance_loss, args.dsa,
                                         args.indexer_weight, packed)
            self.scaler.scale(losses.total / args.grad_accum).backward()
            loads = loads + losses.loads
            names = ("loss", "main", "mtp", "balance", "indexer")
            for name, value in zip(names if args.dsa else names[:-1], losses, strict=False):
                parts.setdefault(name, []).append(value.detach())
        self.tokens += size * args.grad_accum * args.seq_len
        return parts, loads

    def after_update(self, loads: Tensor) -> None:
        """Move the gate biases against the loads of the whole batch."""
        self.model.update_gate_bias(loads, bias_speed_at(self.step, self.args))

    def lighter(self) -> list[str]:
        """Return the next larger number of micro-batches, and recomputation, where they are left.
        """
        size, parts = self.args.batch_size, self.args.grad_accum
        more = next((n for n in range(parts + 1, size + 1) if size % n == 0), None)
        return ([f"--grad-accum={more}"] if more else []) + (
            ["--recompute"] if self.args.recompute == "none" else [])

    def more_metrics(self, loads: Tensor, elapsed: float) -> dict:
        """Return tokens, speed, memory and the experts' balance."""
        speed = batch_size_at(self.step, self.args) * self.args.seq_len / elapsed
        record = dict(tokens=self.tokens, tokens_per_s=round(speed, 1),
                      memory_mib=memory_mib(self.device),
                      max_vio=[round(v, 4) for v in max_violation(loads).tolist()] if len(loads)
                      else [])
        if mfu := self.model_flops_utilisation(speed):
            record["mfu"] = mfu
        if self.args.log_experts_every and self.step % self.args.log_experts_every == 0:
            record["loads"] = loads.tolist()
            record["biases"] = [[round(b, 6) for b in bias.tolist()]
                                for bias in self.model.gate_biases()]
        return record

    def is_spike(self, loss: float) -> bool:
        """Return whether the loss is far above its recent mean; if not, update the mean."""
        factor = self.args.spike_factor
        if factor and loss > factor * self.recent_loss:
            tqdm.write(f"step {self.step}: loss {loss:.3f} is more than {factor:g} times its "
                       f"recent mean {self.recent_loss:.3f}: the step is skipped")
            return True
        known = math.isfinite(self.recent_loss)
        self.recent_loss = 0.95 * self.recent_loss + 0.05 * loss if known else loss
        return False

    def model_flops_utilisation(self, tokens_per_second: float) -> float | None:
        """Return the MFU: the model's FLOP/s as a share of the devices' peak, if that is known."""
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else ""
        peak = next((rate for key, rate in PEAK_FLOPS.items() if key in name), None)
        return peak and round(flops_per_token(self.model.args, self.args.seq_len)
                              * tokens_per_second / peak / self.team.world, 4)

    def sample(self, max_new_tokens: int, count: int = 1) -> list[str]:
        """Generate `count` texts that continue the prompt, without the token that ends them."""
        room, end = self.model.args.max_seq_len - len(self.prompt), self.tokenizer.eos_ids
        result = generate(self.model, [self.prompt] * count, min(max_new_tokens, room),
                          temperature=0.7, top_p=0.95, seed=self.args.seed, eos_id=end)
        return [self.args.prompt + self.tokenizer.decode([t for t in row if t not in end])
                for row in result.tokens]

    def finish(self) -> None:
        """Write figure and samples; print the results and what to do next."""
        loss_curve(self.metrics, self.run / "loss.png")
        texts = self.sample(200, count=16)
        write_whole(self.run / "sample.txt", "\n\n".join(texts))
        parsed, total = map(sum, zip(*map(parse_share, texts), strict=True))
        print(f"\n{max(texts, key=len)}\n")
        print(f"validation   {self.valid_bpb:.4f} bits per byte after {self.tokens:,} tokens, "
              f"{self.seconds:.0f} s of training")
        if balance := self.metrics[-1]["valid_max_vio"]:
            print("balance      MaxVio of each layer over the validation text: "
                  + " ".join(f"{v:.2f}" for v in balance))
        if self.args.dsa:
            print(f"indexers     {self.metrics[-1]['indexer']:.4f} nats per query from attention, "
                  "summed over layers")
        if total and not self.args.data.startswith("task:"):
            print(f"sample       {parsed} of {total} generated top-level blocks parse as Python "
                  f"({len(texts)} texts)")
        print(f"run folder   {self.run}: loss.png, sample.txt, metrics.jsonl, checkpoints")
        print(f"next         python -m minids.{shlex.join(next_command(self.args, self.run))}")


def next_command(args: TrainArgs, run: Path) -> list[str]:
    """Return the program and the flags to use a finished run with."""
    if args.data.startswith("task:"):
        task = args.data.removeprefix("task:")
        return ["solve", "--run", str(run), "--task", task, "--template", "plain"]
    if args.dsa == "warmup":
        return ["train", "--from", str(run), "--dsa", "sparse"]
    if args.dsa:
        return ["evaluate", "--run", str(run), "--selections"]
    return ["generate", "--run", str(run), "--prompt", "def read_"]


def settings(given: dict, given_model: dict) -> tuple[TrainArgs, dict]:
    """Return the settings of a run, and the fields of its model that differ from the preset's.

    given, given_model: the flags; a resumed run takes the rest from its folder
    """
    preset = given.get("preset", "tiny")
    ModelArgs.preset(preset)  # refuses an unknown name before anything else
    if stored := runs.stored_run("train", TrainArgs, given):
        args, config = stored
        runs.refuse_changes(Path(args.out), config["model"], given_model)
        return args, config["model"]
    if given.get("from_run"):
        return settings_after(given), given_model
    return TrainArgs.for_preset(preset, **given), given_model


def train(args: TrainArgs, model: dict | None = None, layout: Layout | None = None) -> Path:
    """Train a model, or continue a run if `args.resume` is set; returns the run's folder.

    model: fields of `ModelArgs` that differ from the preset's
    layout: as of `minids.runs.starting.in_folder`
    Raises `ValueError` for settings that do not fit, before anything is written, and for a NaN or
    Inf loss; `Stopped` after a signal, with the state saved.
    """
    return in_folder(args, lambda: default_folder(args), Trainer, layout,
                     lambda run, kind: train_in(run, args, model or {}, kind))


def train_in(run: Path, args: TrainArgs, model: dict, kind: type[Trainer]) -> None:
    """Train in a folder that no other run has; model: fields that differ from the preset's"""
    merges, args = args.merge, dataclasses.replace(args, out=str(run), merge=False)
    demand("merge", merges, not merges or runs.resumes(args) and kind is Trainer,
           "with --resume, the --out of a run, and one process")
    source = runs.source_of(args)
    if runs.resumes(args):
        model = dataclasses.asdict(source.args)
    elif source:
        model = model_after(args, model, source)
    tokenizer = source.tokenizer if source else Tokenizer.open(args.tokenizer)
    trainer = kind(args, fit_model(args, model, tokenizer), run, tokenizer)
    if merges:
        print(f"merged  {merge(trainer)}")
        return
    print(trainer.describe(), flush=True)
    run_learner(trainer, source)


def main() -> None:
    with speaking_first():
        given, given_model, layout = parse("minids.train", __doc__, TrainArgs, ModelArgs, Layout)
        args, layout = settings(given, given_model), Layout(**layout).fitted(world_size())
    train(*args, layout)


if __name__ == "__main__":
    run_program("minids.train", main, lasting=True)

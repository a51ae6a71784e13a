"""Sixteen billion parameters on the GPUs of one host: speed, memory, a killed rank, an export.

    python tests/parallel/eight_gpus.py                         8 GPUs, all of it
    python tests/parallel/eight_gpus.py --gpus 4 --what layouts,killed
    python tests/parallel/eight_gpus.py --gpus 2 --layers 6 --what layouts,export
    python tests/parallel/eight_gpus.py --gpus 1 --what untrained
    python tests/parallel/eight_gpus.py --device cpu --shape "--dim 64 .."     the same, on gloo

scaling: `small` on 1, 2, 4, .. GPUs. layouts: Moonlight's dimensions, random weights and real text,
sharded with experts over all GPUs, and in a pipeline of two; each beside its dry run. killed: the
same with eight layers; a rank is killed, torchrun starts all again, and a checkpoint goes on on all
GPUs and on half of them. export: all layers trained, saved once and written as a Hugging Face
folder, from which transformers continues a prompt as minids does. untrained: such a folder of
random weights, in one process; one GPU has room for it.

Every command is printed before it runs, and what it showed with the seconds since the start. A part
ends where a program fails, and the next one begins. All layers need 192 GB of GPU memory together,
and 170 GB of disk and 64 GB of the host's memory to be exported, or untrained 64 GB of GPU memory
and 32 GB of disk; the kill with eight layers needs 140 GB of disk. Exit status 1: something did not
hold, and is named.
"""

import argparse
import contextlib
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent), str(HERE.parent.parent)]

from launching import ROOT, begin_ranks, ranks_below, torchrun, wait_for_steps  # noqa: E402
from small_models import gap, scramble  # noqa: E402

from minids import ModelArgs  # noqa: E402
from minids.base.command_line import parse  # noqa: E402
from minids.base.tables import format_table  # noqa: E402
from minids.costs import count_parameters  # noqa: E402
from minids.dryrun import DryRunArgs, dry_run  # noqa: E402
from minids.hf.names import skeleton  # noqa: E402
from minids.hf.writing import save_hf  # noqa: E402
from minids.infer.generation import generate  # noqa: E402
from minids.parallel.layout import Layout  # noqa: E402
from minids.runs.metrics import read_metrics  # noqa: E402
from minids.runs.open import open_model  # noqa: E402
from minids.runs.settings import TrainArgs  # noqa: E402
from minids.text.tokenizer import Tokenizer  # noqa: E402

PARTS = "scaling", "layouts", "killed", "export", "untrained"
SMALL = "--preset small --batch-size {} --grad-accum 2 --batch-start 0 --recompute none"
MOONLIGHT = ("--preset moonlight --vocab-size 163840 --batch-size {} --batch-start 0 --seq-len 4096"
             " --warmup-steps 5")
USD = 2.0  # a GPU and hour, assumed
PROMPT, TOKENS = "def read_", 12
SAME = 1e-7  # of a loss of the same weights, laid out alike: rounding of a printed number
# On another number of GPUs, where a gate near a tie may choose otherwise: 1.4e-7 was seen on four
# and two GPUs, 1.2e-5 where a batch has 256 tokens. A step's own fall is 1e-2.
NEAR = 1e-4
CLOSE = 1e-5  # of FP32 logits: 3.7e-6 was seen of 27 layers


class Failed(Exception):
    """A program did not end well."""


class Host:
    """The GPUs, the flags of all models, and what did not hold.

    folder: for the runs of one part
    """

    folder: Path

    def __init__(self, args: argparse.Namespace):
        self.gpus, self.device, self.shape = args.gpus, args.device, args.shape
        self.layers, self.killed_layers = args.layers, args.killed_layers
        self.each, self.faults, self.begun = args.sequences, [], time.monotonic()

    def tell(self, what: str) -> None:
        """Print something, and when."""
        print(f"{time.monotonic() - self.begun:.0f} s: {what}", flush=True)

    def hold(self, holds: bool, what: str, why: str = "") -> None:
        """Note whether something holds, and what a program said where it does not: its own lines,
        or the last of the others."""
        self.tell(f"{what}: {'holds' if holds else 'DOES NOT HOLD'}")
        if not holds:
            own = dict.fromkeys(re.findall(r"^python -m minids.*", why, re.M))
            print("\n".join(own) or why[-3000:], flush=True)
            self.faults.append(what)

    def ended(self, well: bool, program: str, why: str) -> None:
        """Note whether a program ended well; raise `Failed` if not."""
        self.hold(well, f"{program} ends well", why)
        if not well:
            raise Failed

    def moonlight(self, layers: int, layout: str) -> str:
        """Return flags of training with so many layers."""
        return (f"{MOONLIGHT.format(self.each * self.gpus)} --n-layers {layers} {layout} "
                f"{self.shape}").strip()

    def ranks(self, flags: str, program: str, world: int) -> str:
        """Run a program on some of the GPUs; return what it wrote."""
        say(f"torchrun --nproc-per-node {world} -m {program} {flags}")
        said = torchrun(*shlex.split(flags), program=program, world=world, limit=3600)
        self.ended(said.status == 0, f"{program} on {world}", said.err)
        return said.out + said.err

    def measure(self, commands: list[str], world: int, steps: int) -> list[list[str]]:
        """Return the rows of `minids.lab.bench --what program` for several commands."""
        several = shlex.quote("; ".join(commands))
        said = self.ranks(f"--device {self.device} --threads 1 --what program --pairs 1 "
                          f"--steps-per-timing {steps} --command {several}", "minids.lab.bench",
                          world)
        print(*re.findall(r"^(?:cpu|NVIDIA|bodies).*", said, re.M), sep="\n")
        rows = [line.split("  ") for line in said.splitlines() if line.startswith("--preset")]
        return list({row[0]: row for row in rows if len(row) == 10}.values())


def say(line: str) -> None:
    """Print a command."""
    print(f"\n$ {line}", flush=True)


def show(titles: str, rows: list[list[str]]) -> None:
    """Print a table."""
    print(f"\n{format_table([titles.split(', '), *rows])}\n", flush=True)


def scaling(host: Host) -> None:
    """Train `small` on 1, 2, 4, .. GPUs, 2 x 16 sequences on each."""
    rows, alone = [], None
    counts = [n for n in (1, 2, 4, 8, 16) if n <= host.gpus]
    for n in counts:
        for _, _, _, speed, mfu, memory, *_, loss in host.measure(
                [f"{SMALL.format(32 * n)} {host.shape}".strip()], n, 12):
            value = float(speed.replace(",", ""))
            alone = alone or value
            rows.append([str(n), speed, f"{value / alone:.2f}", mfu, memory, price(value, n), loss])
    host.hold(len(rows) == len(counts), "`small` ran on every number of GPUs")
    show("GPUs, tokens/s, beside one, MFU, GiB a GPU, USD for 10^9 tokens, last loss", rows)


def price(speed: float, gpus: int) -> str:
    """Return what a billion tokens cost at so many a second."""
    return f"{1e9 / speed / 3600 * gpus * USD:.2f}"


def layouts(host: Host) -> None:
    """Train the large model in two layouts, and compare losses and memory."""
    n = host.gpus
    commands = [host.moonlight(host.layers, layout) for layout in (
        f"--grad-accum 2 --expert-parallel {n}",
        f"--grad-accum 1 --pipeline 2 --expert-parallel {n // 2} --micro-batches 8")]
    rows = []
    for command, _, count, speed, mfu, memory, *_, first, last in host.measure(commands, n, 18):
        layout, dry = dry_run_of(host, command)
        rows.append([layout, count, speed, mfu, f"{float(memory) * 2 ** 30 / 1e9:.1f}",
                     f"{dry / 1e9:.1f}", price(float(speed.replace(",", "")), n), first, last])
    host.hold(len(rows) == 2, "both layouts ran")
    show("layout, parameters, tokens/s, MFU, GB a GPU, dry run GB, USD for 10^9 tokens, "
         "first loss, last loss", rows)
    if len(rows) == 2:
        (first, last), (other, end) = [[float(x) for x in row[-2:]] for row in rows]
        host.hold(abs(first / other - 1) < 1e-3, "both layouts have the same first loss")
        host.hold(first > last and abs((first - last) / (other - end) - 1) < 0.02,
                  f"both fall alike: by {first - last:.3f} and {other - end:.3f}")


def settings_of(command: str) -> tuple[dict, ModelArgs, dict]:
    """Return what flags of training say: its settings, the model, the layout."""
    given, changes, layout = parse("minids.train", "", TrainArgs, ModelArgs, Layout,
                                   argv=shlex.split(command))
    return given, replace(ModelArgs.preset(given["preset"]), **changes), layout


def dry_run_of(host: Host, command: str) -> tuple[str, int]:
    """Return a command's layout, and the bytes of its fullest rank by the dry run."""
    given, args, layout = settings_of(command)
    parts = given["grad_accum"] * layout.pop("micro_batches", 1)
    rows = host.each * layout.get("pipeline", 1) // parts
    run = DryRunArgs(gpus=host.gpus, micro_batch=rows, seq_len=given["seq_len"],
                     batch_size=given["batch_size"], optimizer="muon")
    card = torch.cuda.mem_get_info()[1] if host.device == "cuda" else 80e9
    dry = dry_run(args, run, Layout(**layout), memory=card)
    return " ".join(f"{name} {value}" for name, value in layout.items()), dry.fullest.total


def killed(host: Host) -> None:
    """Kill a rank, let torchrun start all again; go on on all GPUs, and on half of them."""
    n, run = host.gpus, host.folder / "killed"
    flags = host.moonlight(host.killed_layers, f"--grad-accum 2 --expert-parallel {n} --steps 16 "
                           f"--save-every 5 --keep-last 1 --eval-every 0 --device {host.device} "
                           f"--out {run} --resume")
    say(f"torchrun --nproc-per-node {n} --max-restarts 1 -m minids.train {flags}")
    ranks = begin_ranks(*shlex.split(flags), program="minids.train", world=n, restarts=1)
    try:
        wait_for_steps(run, 13, ranks)
    except AssertionError as ended:
        host.ended(False, "the run, before its thirteenth step,", "\n".join(*ended.args))
    unbroken = losses(run)
    os.kill(victim := ranks_below(ranks.pid)[-1], signal.SIGKILL)
    print(f"killed process {victim} after step {len(unbroken)}", flush=True)
    out, err = ranks.communicate(timeout=3600)
    host.ended(ranks.returncode == 0, "the run, started again,", err)
    again, starts = losses(run), [int(step) for step in re.findall(r"resumed at step (\d+)", out)]
    host.hold(len(starts) == 1 and 5 <= starts[0] < len(unbroken) and len(again) == 16,
              f"it went on from a whole checkpoint: {starts} of {len(unbroken)}")
    if starts:
        compare(host, again[starts[0]], unbroken[starts[0]], f"step {starts[0] + 1} again", SAME)
    copy = fork(run, host.folder / "half")
    ends = [go_on(host, folder, world) for folder, world in ((run, n), (copy, n // 2))]
    compare(host, *ends, f"step {len(again) + 1} on {n} and on {n // 2} GPUs", NEAR)


def compare(host: Host, one: float, other: float, what: str, close: float) -> None:
    """Hold that two losses are the same."""
    host.hold(abs(one / other - 1) < close, f"{what}: loss {one:.7f} and {other:.7f}")


def losses(run: Path) -> list[float]:
    """Return the loss of every step."""
    return [record["main"] for record in read_metrics(run)]


def fork(run: Path, copy: Path) -> Path:
    """Copy a run; what is large and never changes is linked."""
    def link(source: str, target: str) -> None:
        (os.link if source.endswith(".safetensors") else shutil.copy2)(source, target)

    shutil.copytree(run, copy, copy_function=link)
    return copy


def go_on(host: Host, run: Path, world: int) -> float:
    """Take a run one step further on so many GPUs; return that step's loss."""
    before = len(losses(run))
    host.ranks(f"--resume --out {run} --steps {before + 1} --device {host.device} "
               f"--expert-parallel {world}", "minids.train", world)
    return losses(run)[before]


def export(host: Host) -> None:
    """Train all layers, write a Hugging Face folder, and read it by transformers."""
    run, folder = host.folder / "run", host.folder / "exported"
    host.ranks(host.moonlight(host.layers, f"--grad-accum 2 --expert-parallel {host.gpus} "
                              f"--steps 20 --save-every 1000 --eval-every 0 --device {host.device} "
                              f"--out {run}"), "minids.train", host.gpus)
    host.hold(losses(run)[-1] < losses(run)[0], f"the loss falls: {losses(run)[::19]}")
    program(host, f"minids.hf --run {run} --out {folder} --dtype bf16")
    shutil.rmtree(run)
    read_alike(host, folder)


def untrained(host: Host) -> None:
    """Write a Hugging Face folder of random weights, all layers, and read it by transformers."""
    folder, (_, args, _) = host.folder / "exported", settings_of(host.moonlight(host.layers, ""))
    model = skeleton(args)
    torch.manual_seed(0)
    scramble(model.bfloat16().to_empty(device=host.device))
    save_hf(model, folder, tokenizer=Tokenizer.load())
    del model
    size = sum(file.stat().st_size for file in folder.iterdir())
    host.tell(f"{count_parameters(args).total:,} parameters are written, {size / 1e9:.1f} GB")
    read_alike(host, folder)


def read_alike(host: Host, folder: Path) -> None:
    """Compare what minids and transformers make of a folder."""
    mine, logits = by_minids(folder, host.device)
    host.tell("read by minids")
    theirs, others = by_transformers(folder, host.device)
    host.hold(mine == theirs, f"both continue alike in FP32: {mine} and {theirs}")
    host.hold((far := gap(logits, others)) < CLOSE, f"logits differ by {far:.1e} of the largest")


def program(host: Host, command: str) -> None:
    """Run a program in one process."""
    say(f"python -m {command}")
    said = subprocess.run([sys.executable, "-m", *shlex.split(command)], capture_output=True,
                          text=True, env=os.environ | dict(PYTHONPATH=str(ROOT)))
    host.ended(said.returncode == 0, command.split()[0], said.stderr)


@torch.no_grad()
def by_minids(folder: Path, device: str) -> tuple[list[int], torch.Tensor]:
    """Return the tokens that follow the prompt, and its logits (S, V)."""
    made = open_model(folder, device, torch.float32)
    ids = made.tokenizer.encode(PROMPT)
    [found] = generate(made.model, [ids], TOKENS).tokens
    return found, made.model(torch.tensor([ids], device=device))[0].cpu()


@torch.no_grad()
def by_transformers(folder: Path, device: str) -> tuple[list[int], torch.Tensor]:
    """Return the same of transformers' model."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    model.generation_config.eos_token_id = None  # as many tokens in any case
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder).encode(
        PROMPT, add_special_tokens=False)], device=device)
    found = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=TOKENS,
                           do_sample=False)
    return found[0, ids.size(1):].tolist(), model(ids).logits[0].cpu()


def main() -> None:
    reader = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    reader.add_argument("--what", default=",".join(PARTS), help="parts, with commas between")
    reader.add_argument("--gpus", type=int, default=8,
                        help="an even number; for untrained 1 will do [8]")
    reader.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    reader.add_argument("--layers", type=int, default=27, help="of layouts and export [27]")
    reader.add_argument("--killed-layers", type=int, default=8, help="of killed [8]")
    reader.add_argument("--sequences", type=int, default=8,
                        help="a GPU and step, a multiple of 4 [8]")
    reader.add_argument("--shape", default="", help="more flags of minids.train for every model")
    reader.add_argument("--folder", help="an empty folder for runs, on a large disk")
    args = reader.parse_args()
    parts = args.what.split(",")
    if unknown := set(parts) - set(PARTS):
        reader.error(f"what = {unknown.pop()!r} is not valid: {', '.join(PARTS)}")
    if parts != ["untrained"] and (args.gpus < 2 or args.gpus % 2):
        reader.error(f"gpus = {args.gpus} is not valid: it must be even")
    if args.device == "cuda" and args.gpus > torch.cuda.device_count():
        reader.error(f"gpus = {args.gpus} is not valid: here are {torch.cuda.device_count()}")
    if args.sequences < 4 or args.sequences % 4:
        reader.error(f"sequences = {args.sequences} is not valid: it must be a multiple of 4")
    host = Host(args)
    for part in parts:
        print(f"\n== {part}: {globals()[part].__doc__.splitlines()[0]}", flush=True)
        with tempfile.TemporaryDirectory(dir=args.folder) as folder, contextlib.suppress(Failed):
            host.folder = Path(folder)
            globals()[part](host)
    print(f"\n{len(host.faults)} checks do not hold", *host.faults, sep="\n  ")
    sys.exit(bool(host.faults))


if __name__ == "__main__":
    main()

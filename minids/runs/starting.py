"""Start or continue a run: in its folder, alone or with the other ranks that torchrun started."""

import dataclasses
import importlib
from collections.abc import Callable
from pathlib import Path

from minids.base.files import digest
from minids.parallel.layout import Layout
from minids.parallel.team import speaking_first, started, world_size
from minids.runs.device import pick_device, prepare_cpu
from minids.runs.folders import free_folders, locked
from minids.runs.learner import Learner
from minids.runs.open import Source, folder_of, refuse_a_run, resumes, source_of
from minids.runs.settings import LearnArgs
from minids.runs.signals import stopping


def in_folder(args: LearnArgs, default: Callable[[], Path], kind: type[Learner],
              layout: Layout | None, act: Callable[[Path, type[Learner]], None]) -> Path:
    """Hold a run's folder and call `act` with it and the kind of run; return the folder.

    default: makes the name of a folder that `args.out` does not name; taken, it becomes NAME-2, ..
    kind: of one process; over ranks, `act` gets it with what they do otherwise
    layout: of the ranks, if torchrun has started several processes: all of them call this
    """
    prepare_cpu(args.threads, args.bodies)
    layout = (layout or Layout()).fitted(world_size())
    wanted = [Path(args.out)] if args.out else free_folders(default())
    with speaking_first():
        found = pick_device(args.device).type
    with started(layout, found) as team:
        if team is None:
            with locked(wanted) as run:
                act(run, kind)
            return run
        from minids.runs.over_ranks import locked_for_all, over_ranks  # a second of torch's imports
        module, _, name = kind.over_ranks.partition(":")
        otherwise = getattr(importlib.import_module(module), name)
        with team.alike(), locked_for_all(team, wanted) as run:
            print(f"ranks   {layout.describe()}")
            act(run, over_ranks(kind, otherwise, team))
    return run


def run_learner(learner: Learner, source: Source | None) -> None:
    """Start or continue a run, up to its last step or a signal: then raise `Stopped`, all saved.

    source: what its weights come from; None for new weights. Ignored if the run is resumed
    """
    with stopping(learner):
        if resumes(learner.args):
            with learner.team.together():
                learner.restore()
            learner.write_config()
            print(f"resumed at step {learner.step} of {learner.args.steps}", flush=True)
        else:
            if learner.args.resume:
                print(f"{learner.run} holds no run yet: starting from the beginning", flush=True)
            refuse_a_run(learner.run)
            learner.begin(source)
        with learner.mirror.following(learner.config(), learner.metrics):
            learner.train()
        learner.finish()


def content(spec: str) -> dict:
    """Return what config.json says about the file that jsonl:PATH names; nothing for tasks."""
    kind, _, path = spec.partition(":")
    return dict(data=digest(Path(path))) if kind == "jsonl" else {}


def learn(kind: type[Learner], args: LearnArgs, suffix: str, layout: Layout | None = None) -> Path:
    """Train after another run, or continue the run in `args.out` if `args.resume`; returns its
    folder. Raises `ValueError` for settings that do not fit, before anything is written.

    suffix: what a new folder's name adds to the other run's, if `args.out` names none
    layout: as of `in_folder`
    """
    def act(run: Path, kind: type[Learner]) -> None:
        changed = dataclasses.replace(args, out=str(run))
        source = source_of(changed)
        learner = kind(changed, source.args, run, source.tokenizer)
        print(f"{kind.program:<8}{learner.describe()}; run {run}, on {learner.device}", flush=True)
        run_learner(learner, source)

    return in_folder(args, lambda: Path("runs") / (folder_of(args.from_run).name + suffix), kind,
                     layout, act)


def alone(program: str) -> None:
    """Refuse several processes, for a program that knows one; rank 0 says so."""
    with speaking_first():
        if (world := world_size()) > 1:
            raise ValueError(f"{world} processes are not valid: minids.{program} runs in one; "
                             "start it without torchrun")

"""Kill a program before each of its file-system operations, run it again, compare the ends.

    python tests/crash_points.py train          every point of one program, killed, then a full disk
    python tests/crash_points.py r1 --drawn 12  twelve drawn points

A short run is recorded first: whatever makes, writes, renames, flushes or removes a file. It is
then started once per operation, and dies before it; where a file is opened for writing also just
after, with half a line in the file. Started again as a user would, it has to end with the bytes of
the unbroken run, and with no file more or less. With a full disk every operation from there on that
needs room fails; the program says so in one line, and goes on once there is room.

One process imports torch and forks the runs.
"""

import argparse
import contextlib
import errno
import gc
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
R1 = ROOT / "data" / "r1"
NEEDS_ROOM = {"open", "os.mkdir", "os.link", "fsync"}
RENAMES = {"os.rename", "os.remove", "os.rmdir"}
BRIEF = ["--threads", "1", "--save-every", "2", "--keep-last", "1"]
ANSWERS = [*BRIEF, "--steps", "3", "--eval-every", "2", "--eval-problems", "2",
           "--max-new-tokens", "4"]
TRAIN = [*BRIEF, "--preset", "nano", "--data", "text:texts", "--tokenizer", "tok", "--steps", "3",
         "--batch-size", "2", "--seq-len", "32", "--eval-tokens", "64"]
COMMANDS = {
    "train": ["train", "--out", "run", *TRAIN],
    "sft": ["sft", "--out", "run", "--from", str(R1 / "base"), "--examples", "16", *ANSWERS],
    "grpo": ["grpo", "--out", "run", "--from", str(R1 / "sft"), "--questions", "2", "--group", "2",
             "--updates", "2", *ANSWERS],
    "r1": ["r1", "--out", "run", "--threads", "1", "--problems", "4"],
    "tokenizer": ["tokenizer", "--out", "made", "--data", "text:texts", "--vocab-size", "300"],
    "course": ["lab.course", "--out", "course"],
    "hf": ["hf", "--run", "given", "--out", "made"],
    "hf-over": ["hf", "--run", "given", "--out", "there", "--overwrite"],
}
NAMES = "run", "made", "there", "course", "cache"  # one of them has to be named when it is full
AGAIN = {"train": ["--resume"], "sft": ["--resume"], "grpo": ["--resume"], "hf": ["--overwrite"]}


class Point(NamedTuple):
    """Where a run is disturbed: the number of the operation, from 1, and how."""

    number: int
    how: str  # "kill", "torn" (in the middle of a write) or "full"


class Disk:
    """Sees every operation of this process on files below `root`; disturbs one."""

    def __init__(self, root: str, point: Point | None):
        self.root, self.point, self.seen = root, point, []
        sys.addaudithook(self.hook)
        flush = os.fsync

        def fsync(handle):
            self.touch("fsync", None, 0)
            flush(handle)
        os.fsync = fsync

    def hook(self, event: str, args: tuple) -> None:
        if event == "open":
            path, _, flags = args
            writes = flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC)
            if isinstance(path, (str, bytes)) and writes and self.is_inside(path):
                self.touch(event, os.fsdecode(path), flags)
        elif event in RENAMES | NEEDS_ROOM:
            held = isinstance(args[-1], int) and args[-1] != -1  # a name in an open folder
            if held or self.is_inside(args[0]):
                self.touch(event, os.fsdecode(args[0]), 0)

    def is_inside(self, path) -> bool:
        return os.path.abspath(os.fsdecode(path)).startswith(self.root + "/")

    def touch(self, event: str, path: str | None, flags: int) -> None:
        where = os.path.relpath(path, self.root) if path and os.path.isabs(path) else path
        self.seen.append((event, where))
        if self.point is None:
            return
        number, how = self.point
        if how == "full" and len(self.seen) >= number and event in NEEDS_ROOM:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        if len(self.seen) == number and how != "full":
            if how == "torn":
                with contextlib.suppress(OSError):  # opened by its name in an open folder
                    os.write(os.open(path, flags | os.O_CREAT, 0o644), b'{"ste')
            os.kill(os.getpid(), signal.SIGKILL)


def work(job: dict) -> None:
    """Run a program in this process, a fork; its end is the process's."""
    from crash_setup import program
    os.chdir(job["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(job[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    main, run_program = program(job["words"][0], Path(job["folder"]), job["until"], job["wrong"])
    sys.argv = job["words"]
    disk = Disk(job["folder"], job["point"] and Point(*job["point"]))
    status = 1
    try:
        run_program(f"minids.{job['words'][0]}", main, lasting=True)
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
    disk.point = None
    if job["seen"]:
        Path(job["seen"]).write_text(json.dumps(disk.seen))
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


def serve() -> None:
    """Fork the runs of each line of stdin at once; print how they ended."""
    import crash_setup  # noqa: F401  (imports torch, once)
    gc.freeze()  # else each run's collections read, and so copy, all that is imported
    for line in sys.stdin:
        children = []
        for job in json.loads(line):
            if (child := os.fork()) == 0:
                work(job)
            children.append(child)
        print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children],
              flush=True)


class Server:
    """The process that forks the runs; `scratch` holds what they print.

    wrong: whether runs are the wrong variant, whose files the next start takes for somebody else's
    """

    def __init__(self, scratch: Path):
        self.scratch, self.wrong = scratch, False
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        self.process = subprocess.Popen([sys.executable, __file__, "--serve"], env=environment,
                                        text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def run(self, words: list[str], folder: Path, point: Point | None = None, until: str = ""
            ) -> tuple[int, str, list[list]]:
        """Run a program in a folder; its status, its stderr, and its operations if undisturbed.

        until: stage of r1 that is the last
        """
        job = self.job("", words=words, folder=str(folder), point=point, until=until)
        [(status, said)] = self.end([job])
        seen = json.loads(Path(job["seen"]).read_text()) if point is None else []
        return status, said, seen

    def twice(self, words: list[str], folder: Path) -> list[tuple[int, str]]:
        """Start a program twice at the same moment; the status and the stderr of each."""
        return self.end([self.job(name, words=words, folder=str(folder), point=None, until="")
                         for name in "ab"])

    def job(self, name: str, **what) -> dict:
        """Return the job for `work`; the names of its output files begin with `name`."""
        files = {kind: str(self.scratch / f"{name}{kind}") for kind in ("out", "err", "seen")}
        return what | files | {"wrong": self.wrong}

    def end(self, jobs: list[dict]) -> list[tuple[int, str]]:
        """Run these at once; the status and the stderr of each."""
        self.process.stdin.write(json.dumps(jobs) + "\n")
        self.process.stdin.flush()
        ends = map(int, self.process.stdout.readline().split())
        return [(end, Path(job["err"]).read_text()) for end, job in zip(ends, jobs, strict=True)]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=600)
        self.process.stdout.close()


def points(seen: list[list]) -> list[Point]:
    """Return all points of a run with these operations."""
    found = []
    for number, (event, _) in enumerate(seen, start=1):
        found.append(Point(number, "kill"))
        if event == "open":
            found.append(Point(number, "torn"))
        if event in NEEDS_ROOM:
            found.append(Point(number, "full"))
    return found


class Trial:
    """One program: its unbroken run, and what comes of it when it is disturbed.

    start: folder in which it begins; None makes one
    until: stage of r1 that is the last; "": all
    """

    def __init__(self, name: str, scratch: Path, server: Server, start: Path | None = None,
                 until: str = ""):
        from crash_setup import set_up
        self.name, self.scratch, self.server, self.until = name, scratch, server, until
        self.words, self.start = COMMANDS[name], start or scratch / "start"
        if start is None:
            set_up(name, self.start, server)
        self.whole = scratch / f"whole{len(list(scratch.glob('whole*')))}"
        shutil.copytree(self.start, self.whole, symlinks=True)
        status, said, seen = server.run(self.words, self.whole, until=until)
        assert status == 0, said
        self.points, self.seen = points(seen), seen

    def problems(self, point: Point) -> list[str]:
        """Disturb a run there, start it again; return what is wrong then, in words."""
        from crash_setup import differences
        folder = self.scratch / "broken"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.start, folder, symlinks=True)
        status, said, _ = self.server.run(self.words, folder, point, self.until)
        found = []
        if point.how != "full":
            assert status == -signal.SIGKILL, (point, status, said)
        elif status != 0 and (status != 2 or said.count("\n") != 1
                              or not any(name in said for name in NAMES)):
            found.append(f"a full disk: status {status}, {said!r}")
        again = self.words + AGAIN.get(self.name, [])
        status, said, _ = self.server.run(again, folder, until=self.until)
        if status or said:
            found.append(f"again: status {status}, {said.strip()[-300:]!r}")
        later = "run/times.json is missing"  # r1 writes it anew after its next stage
        return found + [text for text in differences(self.whole, folder) if text != later]


def trials(name: str, scratch: Path, server: Server) -> Iterator[Trial]:
    """Yield a program's trial; of r1 one for each of its stages and one for its end, but no stage
    with the same operations on the same files as another one."""
    from crash_setup import differences

    from minids.r1 import STAGES
    whole = Trial(name, scratch, server)
    if name != "r1":
        yield whole
        return
    start, known = whole.start, []
    for until in (*STAGES, ""):
        part = Trial(name, scratch, server, start, until)
        # A folder lists its files in any order.
        files = re.sub(rf"(?<![a-z])({'|'.join(STAGES)})(?=/|\.jsonl|\")", "STAGE",
                       json.dumps([path for _, path in part.seen]))
        seen = [event for event, _ in part.seen], sorted(json.loads(files), key=str)
        if seen not in known:
            yield part
        known.append(seen)
        start = part.whole
    assert differences(whole.whole, start) == []  # so nothing but the folder joins two stages


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("programs", nargs="*", help=", ".join(COMMANDS))
    parser.add_argument("--drawn", type=int, default=0, help="how many points; 0: all [0]")
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.serve:
        return serve()
    bad = 0
    for name in args.programs or COMMANDS:
        with tempfile.TemporaryDirectory() as scratch:
            server = Server(Path(scratch))
            drawn = [Trial(name, Path(scratch), server)] if args.drawn else ()
            for trial in drawn or trials(name, Path(scratch), server):
                some = trial.points
                if args.drawn:
                    some = random.Random(0).sample(some, min(args.drawn, len(some)))
                begin = time.monotonic()
                for point in some:
                    if found := trial.problems(point):
                        bad += 1
                        print(f"{name} {trial.until} {point.how} {point.number}: "
                              f"{'; '.join(found[:4])}", flush=True)
                print(f"{name} {trial.until}: {len(some)} of {len(trial.points)} points in "
                      f"{time.monotonic() - begin:.0f} s", flush=True)
            server.close()
    print(f"{bad} points with problems")
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()

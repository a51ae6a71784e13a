"""Runs of `python -m minids.train` that begin at once: forks of a process that has imported torch.

A short run spends most of its time on imports. A fork has them, and is otherwise a process of its
own: it is killed, gets signals and has pipes as any other.
"""

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class Fork:
    """A run; what tests use of `subprocess.Popen`. Its output must fit into a pipe, 64 KB."""

    def __init__(self, server: "Server", words: list[str]):
        (out, its_out), (err, its_err), (status, its_status) = os.pipe(), os.pipe(), os.pipe()
        socket.send_fds(server.socket, [json.dumps(words).encode()], [its_out, its_err, its_status])
        for end in (its_out, its_err, its_status):
            os.close(end)
        self.stdout, self.stderr, self.status = map(os.fdopen, (out, err, status))
        self.pid, self.returncode = int(self.status.readline()), None

    def wait(self, timeout: float | None = None) -> int:
        """Return the exit status, once it has ended."""
        if self.returncode is None:
            if not select.select([self.status], [], [], timeout)[0]:
                raise subprocess.TimeoutExpired("minids.train", timeout)
            self.returncode = int(self.status.readline())
        return self.returncode

    def poll(self) -> int | None:
        """Return the exit status, None while it works."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.wait(0)

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end; return what it wrote and nobody has read."""
        self.wait(timeout)
        return tuple("" if stream.closed else stream.read()
                     for stream in (self.stdout, self.stderr))


class Server:
    """The process that forks; it ends with this object's socket."""

    def __init__(self):
        self.socket, its_end = socket.socketpair()
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(  # pipes, as the forks have
            [sys.executable, __file__, str(its_end.fileno())], cwd=ROOT, env=environment,
            pass_fds=[its_end.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE)
        its_end.close()

    def start(self, flags: list[str], run: Path, program: str = "train") -> Fork:
        """Begin a run, or go on with it if its folder is complete, as `kill_and_resume.start`."""
        assert program == "train"
        resume = ["--resume"] if (run / "config.json").exists() else flags
        return Fork(self, [*resume, "--out", str(run)])

    def close(self) -> None:
        self.socket.close()
        self.process.communicate(timeout=60)


def serve(connection: socket.socket) -> None:
    """Fork for each message a process that forks the run, and tells its number and its status."""
    import minids.train  # noqa: F401  (and torch, once)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for those in between
    while True:
        message, ends, *_ = socket.recv_fds(connection, 2 ** 16, 3)
        if not message:
            return
        if os.fork() == 0:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            connection.close()
            watch(json.loads(message), *ends)
        for end in ends:
            os.close(end)


def watch(words: list[str], out: int, err: int, status: int) -> None:
    """Run the program in one more fork, and tell how it ends."""
    if (child := os.fork()) == 0:
        os.close(status)
        work(words, out, err)
    os.close(out)
    os.close(err)
    os.write(status, b"%d\n" % child)
    os.write(status, b"%d\n" % os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
    os._exit(0)


def work(words: list[str], out: int, err: int) -> None:
    """Be the program; its end is the process's."""
    from minids import train
    from minids.base.command_line import run_program
    os.dup2(out, 1)
    os.dup2(err, 2)
    os.close(out)
    os.close(err)
    sys.argv = ["train", *words]
    status = 1
    try:
        run_program("minids.train", train.main, lasting=True)
    except SystemExit as end:
        status = end.code
    except BaseException:
        import traceback
        traceback.print_exc()
    with contextlib.suppress(OSError):
        sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))

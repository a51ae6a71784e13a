"""The processes of one run: who speaks, what they agree on, and how all of them end together.

torchrun starts the processes and names each in its environment. Rank 0 chooses the run's folder,
writes and speaks; the others print nothing, unless one of them alone has trouble to tell.
"""

import contextlib
import copy
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta

import numpy as np
import torch
from torch import Tensor
from torch import distributed as dist

from minids.parallel.layout import Layout

MEETING = timedelta(minutes=5)  # for the others to start: torchrun starts all at about one time
# Later, for a rank that compiles, validates or writes meanwhile. A rank that has ended is no reason
# to wait: torchrun ends the others.
WAITING = timedelta(minutes=15)
SILENCE = timedelta(seconds=5)  # for rank 0 to find the error that another rank has found
PATIENCE = 60  # seconds that other ranks give rank 0 to report a mistake before they have met


def world_size() -> int:
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1))


@contextlib.contextmanager
def speaking_first() -> Iterator[None]:
    """Run what all ranks do alike, such as reading flags; only rank 0 tells of a mistake.

    torchrun ends the ranks when one of them has ended, so the others wait for rank 0 to tell it.
    """
    if int(os.environ.get("RANK", 0)) == 0:
        yield
        return
    out, err = sys.stdout, sys.stderr
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        except (ValueError, SystemExit) as error:
            if isinstance(error, SystemExit) and not error.code:  # --help
                raise
            time.sleep(PATIENCE)
            raise SystemExit(2) from None
        finally:
            sys.stdout, sys.stderr = out, err


def last_words() -> None:
    """Let this rank tell why it ends: torchrun sends SIGTERM to all once one of them has ended."""
    if threading.current_thread() is threading.main_thread():  # no other thread may
        signal.signal(signal.SIGTERM, signal.SIG_IGN)


def meeting_address() -> tuple[str, int]:
    """Return the host and the port at which the processes of a run meet, as torchrun names them."""
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def wait_for_answer(host: str, port: int) -> None:
    """Wait until a process listens at an address; torch's own waiting ends with pages of its stack.

    Raises OSError if none does within `MEETING`.
    """
    end = time.monotonic() + MEETING.total_seconds()
    while True:
        try:
            return socket.create_connection((host, port), timeout=5).close()
        except OSError:
            if time.monotonic() > end:
                raise
            time.sleep(0.5)


def meeting_place(rank: int, world: int, here: int) -> dist.Store:
    """Return the store in which processes leave their addresses.

    here: processes on this machine
    When torchrun starts the processes of a machine again, its store still has the addresses of
    those that ended; so each start has names of its own. Machines do not count their starts alike:
    for several, TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 lets torchrun make a new store each time.
    """
    with_torchrun = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    address, listens = meeting_address(), rank == 0 and not with_torchrun
    if not listens:
        wait_for_answer(*address)
    store = dist.TCPStore(*address, world, is_master=listens, timeout=MEETING)
    store.set_timeout(WAITING)
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") if here == world else "0"
    return dist.PrefixStore(f"minids/{start}", store)


def is_lost(error: BaseException | None) -> bool:
    """Return whether an exchange between ranks failed: gloo's errors are told by their text."""
    return error is not None and (isinstance(error, dist.DistError) or "gloo" in str(error)
                                  or is_lost(error.__cause__))


class Alone:
    """One process, which does by itself what a team does together.

    rank, world: its number, and how many there are
    """

    rank, world = 0, 1

    @property
    def first(self) -> bool:
        """Return whether this process chooses, writes and speaks."""
        return self.rank == 0

    def share(self, items):
        """Return the items of this rank: a part of a sequence, or of a tensor's first dimension."""
        return items[len(items) * self.rank // self.world:
                     len(items) * (self.rank + 1) // self.world]

    def together(self) -> contextlib.AbstractContextManager:
        """Run a block in which ranks do not wait for each other; if it fails on one, end all."""
        return contextlib.nullcontext()

    def joined(self, items: list) -> list:
        """Return the items of all ranks, plain data, in order of ranks."""
        return items

    def summed(self, tensor: Tensor) -> Tensor:
        """Return the sum of a tensor over all ranks."""
        return tensor


ALONE = Alone()


class Team(Alone):
    """This process among those of a run, once they have found each other.

    rank, world: its number, and how many there are; ranks: the meshes between them
    """

    group: dist.ProcessGroup | None = None  # torch's default, of all ranks

    def __init__(self, layout: Layout, device: str):
        """Join the process group; layout: fitted; device: cpu or cuda, one GPU per process.

        Raises ValueError where GPUs are missing or the others do not answer.
        """
        local, here = (int(os.environ[name]) for name in ("LOCAL_RANK", "LOCAL_WORLD_SIZE"))
        cuda = device == "cuda"
        if cuda and here > torch.cuda.device_count():
            if local:
                time.sleep(PATIENCE)  # for the first one to tell it
                raise SystemExit(2)
            raise ValueError(f"device = 'cuda' is not valid: {here} processes on this machine need "
                             f"as many GPUs, and it has {torch.cuda.device_count()}; start fewer "
                             "(--nproc-per-node), or use --device cpu")
        self.device = torch.device("cuda", local) if cuda else torch.device("cpu")
        if cuda:
            torch.cuda.set_device(self.device)
        self.rank, self.world, self.local_rank = int(os.environ["RANK"]), world_size(), local
        try:
            self.store = meeting_place(self.rank, self.world, here)
            self.have_one_device(device)
            dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=WAITING,
                                    store=self.store, rank=self.rank, world_size=self.world,
                                    device_id=self.device if cuda else None)
        except (RuntimeError, OSError) as error:
            host, port = meeting_address()
            raise ValueError(f"the {self.world} processes of this run did not meet at {host}:{port}"
                             f" within {MEETING.seconds} seconds: {error}") from error
        from minids.parallel.ranks import Ranks  # which waits a second for torch's own imports
        self.ranks = Ranks.of(layout, self.device)
        self.writers = copy.copy(self)  # the same ranks, for messages beside those of training
        self.writers.group = dist.new_group(backend="gloo", timeout=WAITING)

    def have_one_device(self, device: str) -> None:
        """Raise ValueError where this rank has no GPU and rank 0 has, or the other way round."""
        if self.first:
            self.store.set("device", device)
        elif (theirs := self.store.get("device").decode()) != device:
            raise ValueError(f"device = {device!r} is not valid on rank {self.rank}, which is on "
                             f"{socket.gethostname()}: rank 0 has {theirs!r}; give every machine "
                             "GPUs, or all of them --device cpu")

    @contextlib.contextmanager
    def together(self) -> Iterator[None]:
        """Run a block in which ranks do not wait for each other; if it fails on one, end all.

        The first rank that failed raises its error, and the others end without a word.
        """
        error = None
        try:
            yield
        except Exception as caught:
            error = caught
            last_words()  # the others end as soon as they know
        failed = self.agree(self.rank if error else self.world, dist.ReduceOp.MIN)
        if failed == self.rank:
            error.for_all = True
            raise error
        if failed < self.world:
            raise SystemExit(2)

    @contextlib.contextmanager
    def alike(self, after_loss: str = "with --resume the run goes on from its last whole checkpoint"
              ) -> Iterator[None]:
        """Run a block in which a mistake or a divergence is found by all ranks; rank 0 tells of it.

        A rank that fails alone, as its GPU may, says so.
        after_loss: what to do when a rank was lost
        """
        try:
            yield
        except Exception as error:
            last_words()
            if not self.tells(error):
                raise SystemExit(2) from None
            if is_lost(error):
                raise ValueError("another process of this run was lost, or does not answer; "
                                 f"{after_loss} ({error})") from error
            raise

    def tells(self, error: Exception) -> bool:
        """Return whether this rank tells of an error: of those that have one, exactly one does.

        It is rank 0, unless that has none `SILENCE` after another rank has.
        """
        agreed = getattr(error, "for_all", False)
        try:
            if not (self.first or agreed):
                with contextlib.suppress(dist.DistStoreError):  # rank 0 has found none so far
                    self.store.wait(["told"], SILENCE)
            return self.store.add("told", 1) == 1 or agreed
        except RuntimeError:  # the store has ended with rank 0, which has told what all found
            return agreed or is_lost(error)

    def in_turn(self, act: Callable):
        """Return act(), which one process per machine runs first, so that the rest find its files.
        """
        for turn in (True, False):
            with self.together():
                if turn == (self.local_rank == 0):
                    result = act()
        return result

    def deal(self, read: Callable[[], tuple[list, int]], work: Callable) -> np.ndarray:
        """Return what work(items, first=number) makes of the items that `read` returns in rank 0,
        in order: each rank does its share of the work. read also returns the first item's number.
        """
        items, first, own = [], 0, np.empty(0, np.int64)
        with self.together():
            if self.first:
                items, first = read()
        items, first = self.told((items, first))
        with self.together():
            if mine := self.share(range(len(items))):
                own = work(items[mine.start:mine.stop], first=first + mine.start)
        return np.concatenate(self.gathered(own))

    def agree(self, number: int, how=dist.ReduceOp.MAX) -> int:
        """Return the largest of all ranks' numbers, or what else `how` makes of them."""
        found = torch.tensor(number)
        dist.all_reduce(found, how, self.group)
        return int(found)

    def told(self, value):
        """Return what rank 0 has as `value`: text or plain data."""
        box = [value]
        dist.broadcast_object_list(box, 0, self.group)
        return box[0]

    def gathered(self, value) -> list:
        """Return every rank's value, plain data, in order of ranks."""
        values = [None] * self.world
        dist.all_gather_object(values, value, self.group)
        return values

    def joined(self, items: list) -> list:
        return [item for own in self.gathered(items) for item in own]

    def summed(self, tensor: Tensor) -> Tensor:
        dist.all_reduce(total := tensor.clone())
        return total


@contextlib.contextmanager
def started(layout: Layout, device: str) -> Iterator[Team | None]:
    """Yield the team of a run over several processes, and part at the end; None for one process.

    device: cpu or cuda
    """
    if world_size() == 1:
        yield None
        return
    team = Team(layout, device)
    with contextlib.ExitStack() as stack:
        if not team.first:
            stack.enter_context(contextlib.redirect_stdout(
                stack.enter_context(open(os.devnull, "w", encoding="utf-8"))))
        yield team
    dist.destroy_process_group()


def one_first(team: Team | None, act: Callable):
    """Return act(), as `Team.in_turn` does, or in the one process that there is."""
    return act() if team is None else team.in_turn(act)

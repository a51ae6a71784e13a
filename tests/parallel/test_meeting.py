"""How the processes of a run find each other, and what each says when they do not."""

from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace

import pytest
import torch
from kept_port import kept_port
from torch import distributed as dist

from minids.parallel import team
from minids.parallel.layout import Layout
from minids.parallel.ranks import Ranks
from minids.parallel.team import Team


@pytest.fixture
def port() -> Iterator[int]:
    """A port at which nobody listens."""
    with kept_port() as port:
        yield port


@pytest.fixture
def second_of_two(port, monkeypatch) -> None:
    """This process is rank 1, alone on its machine; ranks wait for each other for a second."""
    named = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port, RANK=1, WORLD_SIZE=2, LOCAL_RANK=0,
                 LOCAL_WORLD_SIZE=1)
    for name, value in named.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    monkeypatch.setattr(team, "MEETING", timedelta(seconds=1))


def meet() -> str:
    """The error of a team that does not meet."""
    with pytest.raises(ValueError) as caught:
        Team(Layout().fitted(2), "cpu")
    assert not dist.is_initialized()
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_address_that_does_not_answer_is_told(second_of_two, port, capfd):
    message = meet()
    assert f"did not meet at 127.0.0.1:{port} within 1 seconds" in message
    assert "refused" in message
    assert capfd.readouterr().err == ""  # torch's own waiting ends with pages of its stack


def test_a_name_that_nobody_has_is_told(second_of_two, port, monkeypatch, capfd):
    monkeypatch.setenv("MASTER_ADDR", "no-such-host.invalid")
    assert f"did not meet at no-such-host.invalid:{port} within 1 seconds" in meet()
    assert capfd.readouterr().err == ""


def test_others_that_do_not_come_are_told(second_of_two, port, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    message = meet()
    assert f"did not meet at 127.0.0.1:{port} within 1 seconds" in message
    assert "1/2 clients joined" in message


def test_a_rank_without_a_gpu_is_told_by_that_rank(second_of_two, port):
    store = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    dist.PrefixStore("minids/0", store).set("device", "cuda")
    message = meet()
    assert message.startswith("device = 'cpu' is not valid on rank 1") and "'cuda'" in message


@pytest.mark.parametrize("local", [0, 7])
def test_a_card_missing_from_the_host_is_told_by_its_first_process(second_of_two, local,
                                                                   monkeypatch):
    """Before any process waits for another one, and by one line for all of the machine."""
    slept = []
    monkeypatch.setattr(team.time, "sleep", slept.append)
    monkeypatch.setenv("LOCAL_RANK", str(local))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    monkeypatch.setattr(team.torch.cuda, "device_count", lambda: 7)
    with pytest.raises((ValueError, SystemExit)) as caught:
        Team(Layout().fitted(2), "cuda")
    assert not dist.is_initialized()
    if local == 0:
        assert not slept
        assert "8 processes on this machine need as many GPUs, and it has 7" in str(caught.value)
    else:
        assert slept == [team.PATIENCE] and caught.value.code == 2


@pytest.mark.parametrize("kind, device, backend", [
    ("cuda", torch.device("cuda", 1), "cpu:gloo,cuda:nccl"), ("cpu", torch.device("cpu"), "gloo")])
def test_a_rank_computes_on_its_own_card_or_on_the_cpu(second_of_two, monkeypatch, kind, device,
                                                      backend):
    begun, cards = [], []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setattr(team, "meeting_place", lambda *_: None)
    monkeypatch.setattr(Team, "have_one_device", lambda *_: None)
    monkeypatch.setattr(dist, "init_process_group", lambda kinds, **how: begun.append(
        (kinds, how["device_id"], how["rank"], how["world_size"])))
    monkeypatch.setattr(dist, "new_group", lambda backend, **_: backend)
    monkeypatch.setattr(Ranks, "of", lambda layout, device: device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", cards.append)
    made = Team(Layout().fitted(2), kind)
    assert made.device == made.ranks == device and made.writers.group == "gloo"
    assert begun == [(backend, device if kind == "cuda" else None, 1, 2)]
    assert cards == [device] * (kind == "cuda") and (made.rank, made.world) == (1, 2)


@pytest.mark.parametrize("error, waits", [
    (ValueError("heat"), True), (SystemExit(2), True), (SystemExit(0), False)])
def test_other_ranks_leave_the_word_to_rank_0(error, waits, monkeypatch):
    """torchrun ends rank 0 as soon as another one has ended with a status."""
    slept = []
    monkeypatch.setattr(team.time, "sleep", slept.append)
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit) as ended, team.speaking_first():
        raise error
    assert ended.value.code == (2 if waits else 0) and bool(slept) == waits


def one_of_two(rank: int, store) -> Team:
    """A rank of two that have met."""
    made = Team.__new__(Team)
    made.rank, made.world, made.store = rank, 2, store
    return made


@pytest.fixture
def undisturbed(monkeypatch) -> list:
    """Note that ranks stay when torchrun ends them, which this process must not."""
    noted = []
    monkeypatch.setattr(team.signal, "signal", lambda *how: noted.append(how))
    return noted


def gone(*args):
    """Answer as the store of a rank 0 that has ended."""
    raise dist.DistNetworkError("failed to recv, got 0 bytes")


@pytest.mark.parametrize("found, told", [
    (ValueError("steps = 0 is not valid"), False), (dist.DistError("connection reset"), True)])
def test_a_rank_whose_store_has_ended_tells_what_rank_0_cannot_have_told(found, told, undisturbed):
    """All find a mistake; that rank 0 was lost, the others alone."""
    second = one_of_two(1, SimpleNamespace(wait=gone, add=gone))
    with pytest.raises(ValueError if told else SystemExit) as caught, second.alike():
        raise found
    assert not told or "another process of this run was lost" in str(caught.value)


def agreed() -> ValueError:
    """An error that a rank raises after all have agreed that it does."""
    error = ValueError("heat")
    error.for_all = True
    return error


@pytest.mark.parametrize("first, then", [
    (0, ValueError("heat")), (1, ValueError("heat")), (0, dist.DistError("connection reset")),
    (1, dist.DistError("connection reset")), (0, agreed()), (1, agreed())])
def test_of_all_that_find_an_error_one_tells(first, then, monkeypatch, undisturbed):
    """Also where rank 0 finds it long after another rank, or is lost by it."""
    monkeypatch.setattr(team, "SILENCE", timedelta(seconds=0.01))
    store, ends = dist.HashStore(), []
    for rank, error in ((first, then), (1 - first, dist.DistError("connection closed"))):
        with pytest.raises((ValueError, SystemExit)) as end, one_of_two(rank, store).alike():
            raise error
        ends.append(end.type)
    assert ends == [ValueError, SystemExit]
    assert undisturbed == [(team.signal.SIGTERM, team.signal.SIG_IGN)] * 2


@pytest.mark.parametrize("rank, here, agent, listens, start", [
    (0, 2, False, True, 3), (1, 2, False, False, 3), (0, 2, True, False, 3),
    (0, 1, False, True, 0)])
def test_rank_0_listens_unless_torchrun_does(rank, here, agent, listens, start, monkeypatch):
    """Each start on one machine has names of its own; several machines do not count alike."""
    asked, set_to = [], []
    monkeypatch.setattr(team, "meeting_address", lambda: ("host", 7))
    monkeypatch.setattr(team, "wait_for_answer", lambda *address: asked.append(address))
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(agent))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "3")
    monkeypatch.setattr(dist, "TCPStore", lambda *where, **how: SimpleNamespace(
        made=(where, how), set_timeout=set_to.append))
    monkeypatch.setattr(dist, "PrefixStore", lambda prefix, store: (prefix, store.made))
    assert team.meeting_place(rank, 2, here) == (f"minids/{start}", (
        ("host", 7, 2), dict(is_master=listens, timeout=team.MEETING)))
    assert set_to == [team.WAITING] and asked == [("host", 7)] * (not listens)

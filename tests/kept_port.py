"""A port that stays free for a server that a test starts later."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def kept_port() -> Iterator[int]:
    """Yield a port of this machine at which nobody listens, and keep it from all who take any.

    A socket that is bound and does not listen holds it. Servers bind with SO_REUSEADDR, as it does,
    and so may listen there.
    """
    with socket.socket() as held:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(("127.0.0.1", 0))
        yield held.getsockname()[1]

"""Talk to a model: a page in the browser, and a server that speaks OpenAI's API.

    python -m minids.serve                                    # the model of data/r1/rl
    python -m minids.serve --run runs/r1/final --port 8001
    python -m minids.serve --run DeepSeek-V2-Lite --device cuda --rows 32

It reads the model, then listens and prints the address of the page; until then the port refuses
connections, so no client meets a server without a model. Ctrl-C ends it. It listens on this machine
alone; with --host 0.0.0.0, anyone who can reach the machine can use it, so set an --api-key.
Clients of OpenAI's API take http://127.0.0.1:8000/v1 as their base URL. `minids.infer.batch`
describes how replies share a batch. Conversations are neither stored nor printed.
"""

import socket
from dataclasses import dataclass, replace
from pathlib import Path

from minids.apply.folded import cast_products
from minids.base.command_line import parse, run_program
from minids.base.fields import option, require
from minids.generate import own_defaults
from minids.runs.device import Machine, written_in
from minids.runs.open import Source, open_model
from minids.serve.served import Served, serve_model
from minids.text.tasks import TASKS
from minids.text.tokenizer import CLONE

EXAMPLE = str(CLONE / "data" / "r1" / "rl") if CLONE and not Path("data/r1/rl").exists() else (
    "data/r1/rl")
GRACE = 5  # seconds for streams to say how they ended


@dataclass(frozen=True)
class ServeArgs(Machine):
    """Serving"""

    run: str = option("data/r1/rl", "run folder, one of its checkpoints, or a Hugging Face folder")
    host: str = option("127.0.0.1", "address to listen on; 0.0.0.0: all of this machine's")
    port: int = option(8000, "port to listen on; 0: any that is free", low=0, high=65535)
    name: str = option("", "the model's name in the API; none: its folder's")
    rows: int = option(16, "sequences that are written at once, each with its part of the cache",
                       low=1, high=4096)
    context: int = option(0, "tokens of a sequence, prompt and reply; 0: the model's max_seq_len",
                          low=0)
    drafts: int = option(0, "tokens that the model's MTP module drafts before each step: 1 pays "
                         "in a deep model while few rows are in use", low=0, high=1)
    queue: int = option(64, "requests that may wait for a row; more are told to come back", low=0)
    api_key: str = option("", "key that clients must send; none: no key is asked for")
    cors: str = option("", "other pages that may ask: their origins, with commas; none: none may")
    max_body: int = option(2 ** 20, "largest request, bytes", low=1024)
    timeout: float = option(600.0, "longest time that a reply may take, seconds", above=0)
    task: str = option("", f"the page suggests questions of {TASKS}; none: the run's own")
    device: str = option("cpu", "auto, cpu, cuda, or mps: Apple's GPU")
    dtype: str = option("auto", "precision of products; auto: on a CUDA GPU bf16, or what it has, "
                        "else fp32", ("auto", "bf16", "fp16", "fp32"))


def bind(args: ServeArgs) -> socket.socket:
    """Return a socket at the address; raise `ValueError` if it is taken or no address."""
    try:
        family, kind, proto, _, address = socket.getaddrinfo(
            args.host, args.port, type=socket.SOCK_STREAM)[0]
        made = socket.socket(family, kind, proto)
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(address)
    except OSError as error:
        name = "host" if isinstance(error, socket.gaierror) else "port"
        require(args, name, False, f"one that is free to listen on: {error.strerror}; "
                                   "--port 0 takes any")
    return made


def serve_run(source: Source, args: ServeArgs) -> Served:
    """Return the model of an opened run, ready to serve."""
    precision = written_in(args.dtype, source.model.head.weight.device)
    with precision():
        cast_products(source.model)
    return serve_model(source, args.name, own_defaults(source.folder), args.task, args.queue,
                       rows=args.rows, max_len=args.context, drafts=args.drafts,
                       precision=precision)


def listen(served: Served, args: ServeArgs, at: socket.socket) -> None:
    """Answer requests until a signal comes; then streams end with an error event."""
    import uvicorn

    from minids.serve.app import LOCAL, Limits, make_app

    limits = Limits(args.host in LOCAL, args.api_key,
                    tuple(filter(None, map(str.strip, args.cors.split(",")))), args.max_body,
                    args.timeout)

    class Server(uvicorn.Server):
        def handle_exit(self, sig, frame) -> None:
            super().handle_exit(sig, frame)
            served.engine.close()

        async def startup(self, sockets=None) -> None:
            await super().startup(sockets)
            host, port = at.getsockname()[:2]
            host = f"[{host}]" if ":" in host else "127.0.0.1" if host == "0.0.0.0" else host
            print(f"{served.name}: http://{host}:{port}  (Ctrl-C ends it)", flush=True)

    config = uvicorn.Config(make_app(served, limits), log_level="warning", access_log=False,
                            lifespan="off", timeout_graceful_shutdown=GRACE, server_header=False,
                            h11_max_incomplete_event_size=64 * 1024)
    Server(config).run(sockets=[at])


def main() -> None:
    """Open the model, then answer requests."""
    [given] = parse("minids.serve", __doc__, ServeArgs)
    args = ServeArgs(**given)
    args = replace(args, run=given.get("run", EXAMPLE))
    import starlette  # noqa: F401  # before the model is read
    import uvicorn  # noqa: F401
    at = bind(args)
    device = args.prepare()
    served = serve_run(open_model(args.run, device), args)
    try:
        listen(served, args, at)
    finally:
        served.engine.stop()
        at.close()


if __name__ == "__main__":
    run_program("minids.serve", main)

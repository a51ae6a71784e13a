"""Data sets of the Hugging Face hub, streamed."""

import os
import re
import socket
import sys
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from urllib.parse import urlsplit

from minids.base.fields import nearest
from minids.text.documents import text_column

HUB_VALID_DOCUMENTS = 1000


class HubDocuments:
    """Documents of a streamed data set, from the start or from where a state was taken."""

    def __init__(self, dataset, column: str):
        self.dataset, self.column = dataset, column
        self.running = []
        # A stream that is still open when Python takes its modules down complains on stderr.
        weakref.finalize(self, close_all, self.running)

    def __iter__(self) -> Iterator[str]:
        return self.read_from(None)

    def read_from(self, state: dict | None) -> Iterator[str]:
        """Iterate from the document after those read when `state` was taken."""
        self.dataset.load_state_dict(state)
        rows = iter(self.dataset)
        self.running[:] = [rows]
        for row in rows:
            yield row[self.column] or ""

    def state_dict(self) -> dict:
        """The place of the running iteration: as many documents on as it has yielded."""
        return self.dataset.state_dict()


def close_all(iterators: list) -> None:
    """Close generators, so that they let go of their files."""
    for iterator in iterators:
        iterator.close()


def open_hub(rest: str) -> tuple[HubDocuments, HubDocuments, str]:
    """A data set of the hub; validation is its own split, else its first documents.

    Only the first HUB_VALID_DOCUMENTS of validation are read.
    """
    path, config, column = (*rest.split(":", 2), "", "")[:3]
    name, _, revision = path.partition("@")
    check_hub()
    import datasets
    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    try:
        builder = datasets.load_dataset_builder(name, config or None, revision=revision or None)
        splits = builder.as_streaming_dataset()
    except (ValueError, OSError) as error:
        raise ValueError(hub_reason(error, name, config)) from None
    if "train" not in splits:
        raise ValueError(f"the data set has no split train, only {', '.join(splits)}")
    columns = {k: isinstance(v, str) for k, v in next(iter(splits["train"].take(1))).items()}
    try:
        column = text_column(columns, name, column)
    except ValueError as error:
        raise ValueError(f"{error}; choose with hf:NAME:CONFIG:COLUMN") from None
    train = splits["train"]
    own = next((splits[s] for s in ("validation", "test") if s in splits), None)
    if own is None:
        own, train = train, train.skip(HUB_VALID_DOCUMENTS)
    valid = HubDocuments(own.take(HUB_VALID_DOCUMENTS), column)
    fingerprint = f"{name}@{builder.hash}:{builder.config.name}:{column}"
    return HubDocuments(train, column), valid, fingerprint


def hub_reason(error: Exception, name: str, config: str) -> str:
    """What to tell the user about an error of the `datasets` library."""
    from datasets.exceptions import DatasetNotFoundError
    text = " ".join(str(error).split())
    if isinstance(error, DatasetNotFoundError):
        return (f"{text} A data set that works is hf:roneneldan/TinyStories; a private or gated "
                "one needs `hf auth login`")
    if "BuilderConfig" in text or "Config name is missing" in text:
        hint = nearest(config, re.findall(r"'([^']+)'", text.split("Available:")[-1]))
        return f"{text}; {hint}choose with hf:{name}:CONFIG"
    return text


def check_hub() -> None:
    """Fail at once without network: the library itself retries for most of a minute."""
    offline = os.environ.get("HF_HUB_OFFLINE", os.environ.get("HF_DATASETS_OFFLINE", ""))
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    if not reachable(endpoint, seconds=1.5):
        raise ValueError(f"no network: {endpoint} does not answer; use pystdlib or text:PATH, or "
                         "HF_HUB_OFFLINE=1 for a data set that was downloaded before")


def reachable(url: str, seconds: float) -> bool:
    """Whether the host of `url`, or the proxy on the way to it, takes a connection in time."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    answers = []

    def connect():
        try:
            socket.create_connection((parts.hostname, port), timeout=seconds).close()
            answers.append(True)
        except OSError:
            pass

    # A thread, because the look-up of a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)

"""Stream data sets from the Hugging Face hub, and resume exactly where a run stopped.

`hf:NAME[@REVISION][:CONFIG[:COLUMN]]`, for example `hf:HuggingFaceFW/fineweb-edu:sample-10BT`.
"""

import contextlib
import os
import re
import socket
import sys
import threading
import urllib.request
import weakref
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit

from minids.base.fields import nearest

HUB_VALID_DOCUMENTS = 1000  # validation reads this many documents
PATIENCE = 1.5  # seconds that the hub has to accept a connection
LOOKS = 30  # whether it has, in that time


class HubDocuments:
    """The documents of a streamed data set, readable from the start or from a saved state.

    dataset: an iterable data set of the `datasets` library; column: the one that holds the text
    """

    def __init__(self, dataset, column: str):
        self.dataset, self.column, self.running = dataset, column, []
        # A stream that is still open when Python unloads its modules complains on stderr.
        weakref.finalize(self, lambda running: [rows.close() for rows in running], self.running)

    def read_from(self, state: dict | None = None) -> Iterator[str]:
        """Iterate from where `state` was taken; None is the start."""
        self.dataset.load_state_dict(state)
        rows = iter(self.dataset)
        self.running[:] = [rows]
        for row in rows:
            yield row[self.column] or ""

    __iter__ = read_from

    def state_dict(self) -> dict:
        """Return the position of the running iteration, after the last document it yielded."""
        return self.dataset.state_dict()


def open_hub(rest: str) -> tuple[HubDocuments, HubDocuments, str]:
    """Return training documents, validation documents and the fingerprint of a data set.

    rest: NAME[@REVISION][:CONFIG[:COLUMN]]
    Validation is the data set's own split, or else its first documents, which training skips.
    """
    path, config, column = (*rest.split(":", 2), "", "")[:3]
    name, _, revision = path.partition("@")
    check_network()
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
    fingerprint = f"{name}@{builder.hash}:{builder.config.name}:{column}"
    return (HubDocuments(train, column), HubDocuments(own.take(HUB_VALID_DOCUMENTS), column),
            fingerprint)


def text_column(is_text: dict[str, bool], where: Path | str, asked: str = "") -> str:
    """Return the column to read: `asked`, `text`, `content`, or the only one that holds strings.

    is_text: column -> True if it holds strings; where: name of the file or data set, for the error
    """
    strings = [name for name, holds in is_text.items() if holds]
    wanted = [asked] if asked else ["text", "content", *(strings if len(strings) == 1 else [])]
    for name in wanted:
        if name in strings:
            return name
    listed = ", ".join(name if is_text[name] else f"{name} (not text)" for name in is_text)
    need = f"column {asked!r}" if asked else "column text or content, nor a single one of strings"
    raise ValueError(f"{where} has no {need}: {nearest(asked, strings)}its columns are {listed}")


def hub_reason(error: Exception, name: str, config: str) -> str:
    """Return what to tell the user about an error of the `datasets` library."""
    from datasets.exceptions import DatasetNotFoundError
    text = " ".join(str(error).split())
    if isinstance(error, DatasetNotFoundError):
        return (f"{text} A data set that works is hf:roneneldan/TinyStories; a private or gated "
                "one needs `hf auth login`")
    if "BuilderConfig" in text or "Config name is missing" in text:
        hint = nearest(config, re.findall(r"'([^']+)'", text.split("Available:")[-1]))
        return f"{text}; {hint}choose with hf:{name}:CONFIG"
    return text


def check_network() -> None:
    """Raise `ValueError` if neither the hub nor the proxy in front of it accepts a connection.

    `datasets` would retry for a minute. HF_HUB_OFFLINE, for downloaded data, skips the check.
    """
    offline = os.environ.get("HF_HUB_OFFLINE", os.environ.get("HF_DATASETS_OFFLINE", ""))
    if offline.upper() in ("1", "ON", "YES", "TRUE"):
        return
    endpoint = os.environ.get("HF_ENDPOINT") or "https://huggingface.co"
    parts = urlsplit(endpoint)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    address = parts.hostname, parts.port or (443 if parts.scheme == "https" else 80)
    answers = []

    def connect():
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=PATIENCE).close()
            answers.append(True)

    # In a thread, because looking up a name has no timeout of its own.
    thread = threading.Thread(target=connect, daemon=True)
    thread.start()
    for _ in range(LOOKS):  # a process that stood still meanwhile has lost one look, not all
        thread.join(PATIENCE / LOOKS)
    if not answers:
        raise ValueError(f"no network: {endpoint} does not answer; use pystdlib or text:PATH, or "
                         "HF_HUB_OFFLINE=1 for a data set that was downloaded before")

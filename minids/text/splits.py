"""The split between training and held-out text: a hash decides, so that no seed can move it."""

import hashlib


def held_out(key: bytes, one_in: int) -> bool:
    """Return whether the document or question `key` is held out from training.

    key: its path, text or question; the same bytes are on the same side in every run
    one_in: one in this many keys is held out
    """
    return int(hashlib.sha256(key).hexdigest()[:8], 16) % one_in == 0

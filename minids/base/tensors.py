"""Write safetensors files."""

import contextlib
import stat
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from minids.base.files import naming


def save_tensors(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None
                 ) -> None:
    """Write a file that may be read by whom the system lets read any new file.

    The library, from 0.8.0 on, lets only the owner read it. `metadata` is added to the name of the
    format, without which transformers refuses a file.
    """
    with naming(file):
        file.touch()
        mode = stat.S_IMODE(file.stat().st_mode)
        save_file(tensors, file, {"format": "pt"} | (metadata or {}))
        with contextlib.suppress(PermissionError):  # some file systems have no permissions
            file.chmod(mode)

"""minids: the DeepSeek model family, small enough to read and exact enough to trust."""

from minids.config import ModelArgs

__all__ = ["ModelArgs", "Transformer"]
__version__ = "0.1.0"


def __getattr__(name: str):
    """Import torch only when the model is asked for, so that `--help` and the costs stay quick."""
    if name == "Transformer":
        from minids.model.transformer import Transformer
        return Transformer
    raise AttributeError(f"module 'minids' has no attribute {name!r}")

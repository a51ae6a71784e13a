"""Hugging Face checkpoints: read the released models' files, write files that others read."""

from minids.hf.names import to_hf
from minids.hf.reading import inspect, is_hf_folder, load_hf, read_model
from minids.hf.settings import args_from_config, config_from_args
from minids.hf.writing import save_hf

__all__ = ["args_from_config", "config_from_args", "inspect", "is_hf_folder", "load_hf",
           "read_model", "save_hf", "to_hf"]

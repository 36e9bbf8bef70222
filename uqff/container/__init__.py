"""Files and directories: safetensors framing, sets of shards, atomic writing."""

from uqff.container.file import UqffFile, open_uqff
from uqff.container.save import save

__all__ = ["UqffFile", "open_uqff", "save"]

"""What a checkpoint was made with and from, as its `quantization_metadata.json` says.

`common/checkpoint/metadata.py` has the functions, for the modules below this one.
"""

from common.checkpoint.metadata import (
    METADATA_FILE,
    VERSION,
    describe_device,
    peak_memory,
    quantization_facts,
    read,
    versions,
)

__all__ = [
    "METADATA_FILE",
    "VERSION",
    "describe_device",
    "peak_memory",
    "quantization_facts",
    "read",
    "versions",
]

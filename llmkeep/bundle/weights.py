"""Model files written by the builder: tensors as safetensors, and JSON. Needs numpy and safetensors, no torch."""

import json
from pathlib import Path
from typing import Any


def bfloat16(weights: Any) -> Any:
    """The upper 16 bits of a float32, rounded to nearest, ties to even, as torch does it (finite values)."""
    import numpy as np

    bits = np.ascontiguousarray(weights).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")


def write_tensors(arrays: dict[str, Any], path: Path) -> None:
    """Write tensors: uint16 arrays hold bfloat16 bits, float32 arrays are stored as they are.

    The same arrays give the same bytes.
    """
    import safetensors

    dtypes = {"uint16": "bfloat16", "float32": "float32"}
    specs = {  # addresses into `arrays`, which lives until the file is written
        name: safetensors.TensorSpec(
            dtype=dtypes[array.dtype.name],
            shape=array.shape,
            data_ptr=array.ctypes.data,
            data_len=array.nbytes,
        )
        for name, array in sorted(arrays.items())
    }
    safetensors.serialize_file(specs, str(path), {"format": "pt"})


def write_json(path: Path, document: dict[str, Any]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(document, ensure_ascii=False, indent=1) + "\n")

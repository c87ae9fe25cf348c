"""Names of the dtypes that a layout may mention, as closed tables: a name from the network is looked up, never evaluated."""

from __future__ import annotations

import torch

__all__ = ["PARAMETER_DTYPES", "STATIC_DTYPES", "dtype_name"]

PARAMETER_DTYPES: dict[str, torch.dtype] = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
"""What a synchronized tensor may be: every one of them has ordinary arithmetic and converts to float32."""

STATIC_DTYPES: dict[str, torch.dtype] = PARAMETER_DTYPES | {
    "bool": torch.bool,
    "uint8": torch.uint8,
    "int8": torch.int8,
    "int16": torch.int16,
    "int32": torch.int32,
    "int64": torch.int64,
    "complex64": torch.complex64,
    "complex128": torch.complex128,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
"""What static state may be: it is only copied, so anything with a fixed size per element will do."""


def dtype_name(dtype: torch.dtype) -> str:
    """The layout's name of a dtype: torch's, without the module."""
    return str(dtype).removeprefix("torch.")

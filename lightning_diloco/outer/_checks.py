"""Checks on the arguments of the numerics: a wrong tensor here is a bug of this program, never a peer's fault."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_diloco.errors import LocalProtocolError

__all__ = ["require_flat"]


def require_flat(tensor: Tensor, num_elements: int | None, what: str) -> None:
    """Refuse anything but a contiguous one-dimensional float32 tensor.

    Args:
        tensor: the tensor to look at, on any device.
        num_elements: elements that it must have; None accepts any number.
        what: its name in the error's sentence.

    Raises:
        LocalProtocolError: dtype, dimensions, strides or size differ.
    """
    good = tensor.dtype == torch.float32 and tensor.dim() == 1 and tensor.is_contiguous()
    if not good or (num_elements is not None and tensor.numel() != num_elements):
        size = "any number of" if num_elements is None else str(num_elements)
        raise LocalProtocolError(
            f"{what} is a {tensor.dtype} tensor of shape {tuple(tensor.shape)}: it must be flat, contiguous float32 with {size} elements."
        )

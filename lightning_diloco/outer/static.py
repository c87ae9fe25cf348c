"""Static state as one payload: frozen parameters and persistent buffers, in the order of `Layout.static`.

It is sent once, at founding and to joiners, byte for byte: every tensor's row-major elements in its own dtype, little endian, without
gaps. Nothing in it is ever averaged. The bytes of a peer are checked for length; every bit pattern is a valid number of its dtype,
except for bool, where any byte but 0 is read as true.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_diloco.errors import ConfigurationError, RemoteProtocolError
from lightning_diloco.outer._dtypes import STATIC_DTYPES, dtype_name
from lightning_diloco.outer.spec import Layout, TensorSpec

__all__ = ["load_static", "pack_static", "static_bytes", "unpack_static"]


def static_bytes(layout: Layout) -> int:
    """Bytes of the payload."""
    return sum(spec.num_bytes for spec in layout.static)


def pack_static(module: nn.Module, layout: Layout) -> Tensor:
    """Copy a module's static state into one payload.

    Args:
        module: the module from which the layout was planned, or one like it.
        layout: names the tensors and their order.

    Returns:
        uint8 [static_bytes(layout)] in host memory.

    Raises:
        ConfigurationError: the module lacks a tensor or has it with another shape or dtype.
    """
    parts = [tensor.detach().cpu().contiguous().view(-1).view(torch.uint8) for tensor in _tensors(module, layout)]
    return torch.cat([torch.empty(0, dtype=torch.uint8), *parts])


def load_static(module: nn.Module, layout: Layout, payload: Tensor) -> None:
    """Copy a payload into a module's static state, in place; nothing is changed when it is refused.

    Args:
        module: a module with the layout's static tensors.
        layout: names the tensors and their order.
        payload: flat uint8 of exactly `static_bytes(layout)` elements in host memory.

    Raises:
        ConfigurationError: the module lacks a tensor or has it with another shape or dtype.
        RemoteProtocolError: `oversized` for too many bytes, `wrong_layout` for too few or for something that is not flat uint8.
    """
    targets = _tensors(module, layout)
    expected = static_bytes(layout)
    if payload.dtype != torch.uint8 or payload.dim() != 1 or payload.numel() != expected:
        reason = "oversized" if payload.numel() > expected else "wrong_layout"
        found = f"{payload.dtype} of shape {tuple(payload.shape)}"
        raise RemoteProtocolError(reason, f"A static state as {found}: this layout has {expected} bytes, flat uint8.")
    with torch.no_grad():
        for spec, target, raw in zip(layout.static, targets, payload.split_with_sizes([s.num_bytes for s in layout.static]), strict=True):
            target.copy_(_values(spec, raw))


def unpack_static(layout: Layout, payload: Tensor) -> dict[str, Tensor]:
    """The static tensors of a payload by name, with memory of their own.

    Args:
        layout: names the tensors and their order.
        payload: flat uint8 of exactly `static_bytes(layout)` elements.
    """
    parts = payload.split_with_sizes([s.num_bytes for s in layout.static])
    return {spec.name: _values(spec, raw) for spec, raw in zip(layout.static, parts, strict=True)}


def _values(spec: TensorSpec, raw: Tensor) -> Tensor:
    if spec.dtype == "bool":
        return raw.ne(0).view(spec.shape)
    # The copy aligns the memory: a tensor may start at any byte of the payload.
    return raw.clone().view(STATIC_DTYPES[spec.dtype]).view(spec.shape)


def _tensors(module: nn.Module, layout: Layout) -> list[Tensor]:
    present: dict[str, Tensor] = dict(module.named_parameters(remove_duplicate=False))
    present.update(module.named_buffers(remove_duplicate=False))
    tensors: list[Tensor] = []
    for spec in layout.static:
        tensor = present.get(spec.name)
        if tensor is None or tuple(tensor.shape) != spec.shape or dtype_name(tensor.dtype) != spec.dtype:
            found = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ConfigurationError(
                f"Static tensor {spec.name!r}: the job has {spec.dtype} of shape {spec.shape}, this module {found}. Build the same model."
            )
        tensors.append(tensor)
    return tensors

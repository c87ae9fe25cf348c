"""Live views: a fragment of a module as one flat vector, read and written in place at an inner-step boundary.

A view finds each parameter anew through its owner module (a dictionary lookup), so it survives optimizers that write in place as
well as code that replaces ``p.data`` or the parameter itself. It never touches gradients and never blocks.

**Parameters below float32** (bfloat16, float16) cannot hold what the outer optimizer adds: a published difference is mostly smaller than
their spacing and would be rounded away. So each carries a residual r, float32, on its own device:

    snapshot:   theta + r
    adoption:   exact = (theta + r) + delta;   theta = round(exact);   r = exact - theta

r is replaced, never added up, and 0 after an overwrite. The last difference is exact in float32, so theta + r is again `exact`.
float64 parameters are rounded to float32 for the snapshot; differences are added to them in float64.

References:
    Decoupled DiLoCo, arXiv 2604.21428: float32 global parameters. The residual is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_diloco.errors import ConfigurationError, LocalProtocolError
from lightning_diloco.outer._checks import require_flat
from lightning_diloco.outer._dtypes import PARAMETER_DTYPES
from lightning_diloco.outer.spec import Fragment, TensorSlice

__all__ = ["FragmentView"]


@dataclass(slots=True)
class _Live:
    """One slice and the tensor that holds it now."""

    part: TensorSlice
    table: dict[str, Tensor | None]
    leaf: str
    residual: Tensor | None
    tensor: Tensor | None = None
    address: int = 0
    flat: Tensor | None = None

    def resolve(self) -> Tensor:
        """The slice as a flat view of the live tensor."""
        tensor = self.table.get(self.leaf)
        if tensor is None:
            # `torch.nn.utils.prune` keeps the parameter under this name, and computes what has its own from it.
            tensor = self.table.get(f"{self.leaf}_orig")
        if tensor is not None and tensor is self.tensor and self.flat is not None and tensor.data_ptr() == self.address:
            return self.flat
        part = self.part
        if tensor is None or tuple(tensor.shape) != part.global_shape or tensor.dtype != PARAMETER_DTYPES[part.dtype]:
            found = "nothing" if tensor is None else f"{tensor.dtype} of shape {tuple(tensor.shape)}"
            raise ConfigurationError(
                f"{part.name!r}: the layout has {part.dtype} of shape {part.global_shape}, the module {found}. Keep it as it was planned."
            )
        if not tensor.is_contiguous():
            raise ConfigurationError(
                f"{part.name!r} is not contiguous (strides {tensor.stride()}): a fragment is a flat view of its memory. "
                "Assign `p.data = p.data.contiguous()` before training; memory_format=torch.channels_last is not supported."
            )
        self.tensor, self.address = tensor, tensor.data_ptr()
        self.flat = tensor.data.view(-1)[part.offset : part.offset + part.length]
        return self.flat


class FragmentView:
    """The live tensors of one fragment.

    Args:
        module: the module from which the layout was planned, or one like it; on any device.
        fragment: the fragment to view.

    Raises:
        ConfigurationError: a tensor is missing, is not contiguous, or has another shape or dtype; also from every method, when the
            user has replaced a tensor by such a one.
    """

    def __init__(self, module: nn.Module, fragment: Fragment) -> None:
        self.fragment = fragment
        """The fragment that is viewed."""
        self.num_params = fragment.num_params
        """N: elements of the flat fragment."""
        self._lengths = [part.length for part in fragment.slices]
        self._live = [_find(module, fragment, part) for part in fragment.slices]
        for live in self._live:
            live.resolve()

    @property
    def device(self) -> torch.device | None:
        """Where the fragment lives now; None if its tensors are on several devices."""
        devices = {live.resolve().device for live in self._live}
        return devices.pop() if len(devices) == 1 else None

    @property
    def has_residual(self) -> bool:
        """Whether a tensor of the fragment is stored below float32."""
        return any(live.residual is not None for live in self._live)

    def split(self, flat: Tensor) -> list[Tensor]:
        """Views of a flat fragment, one for each slice: what `add_` takes; make them once, off the training thread.

        Args:
            flat: float32 [N].
        """
        require_flat(flat, self.num_params, "flat fragment")
        return list(flat.split_with_sizes(self._lengths))

    def copy_to(self, flat: Tensor) -> None:
        """Snapshot the fragment: theta, plus the residual where there is one.

        Args:
            flat: where to, float32 [N], host memory or the parameters' device.
        """
        with torch.no_grad():
            for live, target in zip(self._live, self.split(flat), strict=True):
                target.copy_(live.resolve())
                if live.residual is not None:
                    target.add_(live.residual.to(target.device))

    def copy_from(self, flat: Tensor) -> None:
        """Overwrite the fragment, rounded to the parameters' dtypes; residuals become 0.

        Args:
            flat: the values, float32 [N], on any device.
        """
        with torch.no_grad():
            for live, source in zip(self._live, self.split(flat), strict=True):
                live.resolve().copy_(source)
                if live.residual is not None:
                    live.residual.zero_()

    def add_(self, delta_views: Sequence[Tensor]) -> None:
        """Add a difference in place; float32 parameters in host memory are updated without any allocation.

        Args:
            delta_views: what `split` made of the flat difference, float32, on any device.

        Raises:
            LocalProtocolError: number or sizes of the views differ from the slices.
        """
        if [view.shape for view in delta_views] != [(length,) for length in self._lengths]:
            raise LocalProtocolError(f"{len(delta_views)} views of a difference do not fit the {len(self._lengths)} slices: use `split`.")
        same_device: list[Tensor] = []
        same_device_deltas: list[Tensor] = []
        with torch.no_grad():
            for live, delta in zip(self._live, delta_views, strict=True):
                theta = live.resolve()
                if live.residual is not None:
                    _add_with_residual(theta, live.residual, delta)
                elif theta.device == delta.device:
                    same_device.append(theta)
                    same_device_deltas.append(delta)
                else:
                    theta.add_(delta.to(theta.device))
            if same_device:
                torch._foreach_add_(same_device, same_device_deltas)

    def move_to(self, published: Tensor, delta_views: Sequence[Tensor]) -> None:
        """Adopt running statistics: add the difference, but never go beyond what is published, so that a variance stays one.

        Args:
            published: the new version, float32 [N].
            delta_views: what `split` made of the difference to it.
        """
        with torch.no_grad():
            for live, target, delta in zip(self._live, self.split(published), delta_views, strict=True):
                theta = live.resolve()
                local, goal = theta.float(), target.to(theta.device)
                moved = torch.clamp(local + delta.to(theta.device), torch.minimum(local, goal), torch.maximum(local, goal))
                theta.copy_(moved)
                if live.residual is not None:
                    live.residual.zero_()

    def residual(self) -> Tensor | None:
        """A copy of the residuals, one after the other, float32 in host memory, for the rejoin checkpoint; None without any."""
        parts = self._residuals()
        return torch.cat([part.cpu() for part in parts]) if parts else None

    def load_residual(self, saved: Tensor | None) -> None:
        """Put back what `residual` returned; None sets residuals to 0.

        Raises:
            LocalProtocolError: the size differs.
        """
        parts = self._residuals()
        if saved is None:
            for part in parts:
                part.zero_()
            return
        lengths = [part.numel() for part in parts]
        require_flat(saved, sum(lengths), "residual")
        for part, value in zip(parts, saved.split_with_sizes(lengths), strict=True):
            part.copy_(value)

    def _residuals(self) -> list[Tensor]:
        return [live.residual for live in self._live if live.residual is not None]


def _find(module: nn.Module, fragment: Fragment, part: TensorSlice) -> _Live:
    prefix, _, leaf = part.name.rpartition(".")
    try:
        owner = module.get_submodule(prefix)
    except AttributeError as error:
        raise ConfigurationError(f"{part.name!r}: this module has no such tensor ({error}). Build the same model.") from None
    table = owner._parameters if fragment.kind == "parameters" else owner._buffers
    is_low = PARAMETER_DTYPES[part.dtype].itemsize < torch.float32.itemsize
    live = _Live(part=part, table=table, leaf=leaf, residual=None)  # type: ignore[arg-type]
    if is_low:
        live.residual = torch.zeros(part.length, dtype=torch.float32, device=live.resolve().device)
    return live


def _add_with_residual(theta: Tensor, residual: Tensor, delta: Tensor) -> None:
    """Steps of the module's docstring, in the residual's own memory."""
    residual.add_(theta.to(residual.device))
    residual.add_(delta.to(residual.device))
    theta.copy_(residual)
    residual.sub_(theta.to(residual.device))

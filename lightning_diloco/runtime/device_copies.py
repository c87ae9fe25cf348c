"""Copies between parameters on a GPU and host memory, for which the training thread never waits.

A copy from a GPU to ordinary host memory, or the other way round, holds the calling thread until all work that the device has been given
is done. So on the way out the training thread only queues: the fragment is copied aside on the device, in order with the training's own
work; a second stream then moves it to page-locked host memory, and the background thread waits for that before it encodes. On the way in
the background thread moves what is to be added to the device and waits until it is there; the training thread finds it on the device.

Parameters in host memory need none of this: copies are made in place, at once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lightning_diloco.outer import FragmentView

__all__ = ["DeviceCopies", "page_locked", "wait_for"]


@dataclass(frozen=True, slots=True)
class DeviceCopies:
    """The copies of one device.

    Args:
        device: of the parameters.
        stream: for copies; None where none is needed.
    """

    device: torch.device
    stream: torch.cuda.Stream | None

    @classmethod
    def of(cls, views: list[FragmentView]) -> DeviceCopies:
        """Those for the device of these fragments; plain ones if they are on several."""
        devices = {view.device for view in views}
        device = devices.pop() if len(devices) == 1 else None
        if device is None or device.type != "cuda":
            return cls(torch.device("cpu"), None)
        return cls(device, torch.cuda.Stream(device))  # type: ignore[no-untyped-call]

    @property
    def is_needed(self) -> bool:
        """Whether host memory has to be page-locked, and its copies waited for."""
        return self.stream is not None

    def take(self, view: FragmentView, host: Tensor) -> Callable[[], None] | None:
        """Training thread: copy a fragment's values of this moment to host memory.

        Args:
            view: whose.
            host: float32 [N], page-locked if `is_needed`.

        Returns:
            What another thread calls to wait until they are there; None: they are.
        """
        if self.stream is None:
            view.copy_to(host)
            return None
        aside = torch.empty(view.num_params, dtype=torch.float32, device=self.device)
        view.copy_to(aside)
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            host.copy_(aside, non_blocking=True)
            aside.record_stream(self.stream)
            event = self.stream.record_event()
        return cast(Callable[[], None], event.synchronize)

    def bring(self, host: Tensor) -> Tensor:
        """Background thread: host values where the parameters are; waits until they are there.

        Args:
            host: float32 [N], page-locked if `is_needed`.

        Returns:
            float32 [N] on the device; `host` itself where none is needed.
        """
        if self.stream is None:
            return host
        with torch.cuda.device(self.device), torch.cuda.stream(self.stream):
            brought = host.to(self.device, non_blocking=True)
            self.stream.record_event().synchronize()
        return brought

    def use(self, brought: Tensor) -> None:
        """Training thread: it reads what `bring` gave from now on; to be said before the first reading."""
        if self.stream is not None and brought.is_cuda:
            brought.record_stream(torch.cuda.current_stream(self.device))


def page_locked(num_bytes: int) -> Tensor:
    """Bytes that a device can reach by itself, not set: uint8 [num_bytes] in host memory."""
    return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)


def wait_for(tensors: list[Tensor]) -> Callable[[], None] | None:
    """What another thread calls to wait for copies of these tensors that were queued just now; None if none is on a GPU."""
    devices = {tensor.device for tensor in tensors if tensor.is_cuda}
    events = [torch.cuda.current_stream(device).record_event() for device in devices]

    def wait() -> None:
        """All of them have been made."""
        for event in events:
            event.synchronize()

    return wait if events else None

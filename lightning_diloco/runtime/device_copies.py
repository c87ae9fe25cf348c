"""Copies between parameters on a GPU and host memory, for which the training thread does not wait.

A copy from a GPU to the host, or the other way round, holds the calling thread until all work before it on its stream is done. So the
training thread only queues work on the device. On the way out it copies the fragment aside there, in order with the training; the
background thread moves that to the host, on a stream of its own. On the way in the background thread moves what is to be added to the
device, and hands it over when it is there. Neither needs page-locked memory, whose allocation holds everybody up.

On the device that takes 4 n bytes for each fragment of n elements that is under way in a direction, and where there is no room for it a
copy is made at once, by a thread that waits. The training thread also waits where it is rare and nothing else would be simpler: the join,
validation, healing, a version that is handed over to replace a fragment, and optimizer state from a peer.

Parameters in host memory need none of this: copies are made in place, at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_diloco.outer import FragmentView

__all__ = ["DeviceCopies", "fetch_later"]


@dataclass(frozen=True, slots=True)
class DeviceCopies:
    """The copies of one device.

    Args:
        device: of the parameters.
        outwards: stream of copies to the host; None where none is needed.
        inwards: stream of copies to the device; None where none is needed.
    """

    device: torch.device
    outwards: torch.cuda.Stream | None = None
    inwards: torch.cuda.Stream | None = None

    @classmethod
    def of(cls, views: list[FragmentView]) -> DeviceCopies:
        """Those for the device of these fragments; plain ones if they are on several."""
        devices = {view.device for view in views}
        device = devices.pop() if len(devices) == 1 else None
        if device is None or device.type != "cuda":
            return cls(torch.device("cpu"))
        return cls(device, *(torch.cuda.Stream(device) for _ in range(2)))  # type: ignore[no-untyped-call]

    def take(self, view: FragmentView, host: Tensor) -> Callable[[], None] | None:
        """Training thread: copy a fragment's values of this moment to host memory.

        Args:
            view: whose.
            host: float32 [N].

        Returns:
            What another thread calls to bring them there; None: they are.
        """
        aside = None if self.outwards is None else _room(view.num_params, self.device)
        if self.outwards is None or aside is None:
            view.copy_to(host)
            return None
        view.copy_to(aside)
        stream, queued = self.outwards, _mark(self.device)

        def bring() -> None:
            """Wait for the copy aside, then for the one to the host."""
            with torch.cuda.stream(stream):
                stream.wait_event(queued)
                host.copy_(aside)

        return bring

    def bring(self, host: Tensor) -> Tensor:
        """Background thread: host values where the parameters are; waits until they are there.

        Args:
            host: float32 [N].

        Returns:
            float32 [N] on the device; `host` itself where that is not needed, or there is no room.
        """
        if self.inwards is None:
            return host
        with torch.cuda.stream(self.inwards):
            brought = _room(host.numel(), self.device)
            return host if brought is None else brought.copy_(host)

    def use(self, brought: Tensor) -> None:
        """Training thread: it reads what `bring` gave from now on; to be said before the first reading."""
        if brought.is_cuda:
            brought.record_stream(torch.cuda.current_stream(self.device))


def fetch_later(tensors: Mapping[str, Tensor]) -> Callable[[], dict[str, Tensor]] | None:
    """Training thread: copy tensors aside where they are.

    Args:
        tensors: by name.

    Returns:
        What another thread calls to get them, in host memory; it waits for them. None if all of them are there, or there is no room aside.
    """
    devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
    if not devices:
        return None
    try:
        asides = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    except torch.OutOfMemoryError:
        return None
    queued = {device: _mark(device) for device in devices}

    def fetch() -> dict[str, Tensor]:
        """Wait for the copies aside, then for those to the host."""
        found = {name: aside for name, aside in asides.items() if not aside.is_cuda}
        for device, mark in queued.items():
            stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            with torch.cuda.stream(stream):
                stream.wait_event(mark)
                found |= {name: aside.cpu() for name, aside in asides.items() if aside.device == device}
        return found

    return fetch


def _room(num_elements: int, device: torch.device) -> Tensor | None:
    try:
        return torch.empty(num_elements, dtype=torch.float32, device=device)
    except torch.OutOfMemoryError:
        return None


def _mark(device: torch.device) -> torch.cuda.Event:
    """All that the calling thread has queued so far."""
    event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))
    return event

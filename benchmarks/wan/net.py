"""A network of namespaces on one machine, with links that the kernel limits.

    learner 0   learner 1   ...   syncer         each in a namespace of its own, with one device `eth0`
         |           |              |            veth pairs
      +---------- hub: a bridge --------+        in a namespace of its own as well: the host gets no device and no route

Each link is limited in both directions by `tbf`: at the node's end what it sends, at the hub's end what it is sent. So a stream between two
learners passes the uplink of one and the downlink of the other, as between two sites. Segmentation offload is off: every packet is at most
1,500 bytes long, is counted as one, and is queued as one.

What passed is read from the counters that the kernel keeps (`/sys/class/net/*/statistics`): bytes of Ethernet frames, with all headers and
acknowledgements.

Needs root with its rights, which a container may lack: `is_possible` makes a small network to find out. Names carry the process id;
everything is removed at the end, and whatever is left over of a killed process is one `ip netns del` per name away.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from typing import Self

__all__ = ["SYNCER", "Net", "is_possible"]

SYNCER = -1
"""The syncer's number among the nodes; learners are numbered from 0."""
QUEUE_S = 0.05
"""A link's queue holds what passes in so long, and at least `QUEUE_BYTES`: on slow links that is more."""
QUEUE_BYTES = 64 * 1024


@functools.cache
def is_possible() -> str | None:
    """None, or why there can be no namespaces here. The first call makes two, links them, limits the link, and removes them: 0.1 s."""
    if os.geteuid() != 0:
        return "this process is not root"
    missing = [name for name in ("ip", "tc") if shutil.which(name) is None]
    if missing:
        return f"{' and '.join(missing)} (iproute2) is not installed"
    try:
        with Net(0) as net:
            net.limit(SYNCER, 1e6)
    except RuntimeError as error:
        return f"a trial failed: {str(error).splitlines()[0]}"
    return None


class Net:
    """Namespaces, from `with` to its end.

    Args:
        num_learners: nodes beside the syncer.
    """

    def __init__(self, num_learners: int) -> None:
        self.nodes = [*range(num_learners), SYNCER]
        self._hub = f"wan{os.getpid()}h"
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._make(self._hub)
            _run("ip", "-n", self._hub, "link", "add", "br0", "type", "bridge")
            _run("ip", "-n", self._hub, "link", "set", "br0", "up")
            for node in self.nodes:
                self._connect(node)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in reversed(self._made):
            subprocess.run(["ip", "netns", "del", name], check=False)
        self._made = []

    def _make(self, name: str) -> None:
        _run("ip", "netns", "add", name)
        self._made.append(name)
        _run("ip", "-n", name, "link", "set", "lo", "up")

    def _connect(self, node: int) -> None:
        name, port = self.name(node), self.port(node)
        self._make(name)
        _run("ip", "-n", self._hub, "link", "add", port, "type", "veth", "peer", "name", "eth0", "netns", name)
        for where, device in ((self._hub, port), (name, "eth0")):
            _run("ip", "-n", where, "link", "set", device, "gso_max_segs", "1", "gso_max_size", "2048")
        _run("ip", "-n", self._hub, "link", "set", port, "master", "br0", "up")
        _run("ip", "-n", name, "addr", "add", f"{self.address(node)}/24", "dev", "eth0")
        _run("ip", "-n", name, "link", "set", "eth0", "up")

    # ---- names --------------------------------------------------------------------------------------------------------------

    def name(self, node: int) -> str:
        """Of its namespace."""
        return f"wan{os.getpid()}{'s' if node == SYNCER else f'l{node}'}"

    def port(self, node: int) -> str:
        """The hub's end of its link."""
        return "vs" if node == SYNCER else f"v{node}"

    def address(self, node: int) -> str:
        """Its IPv4 address."""
        return f"10.77.0.{254 if node == SYNCER else 1 + node}"

    def inside(self, node: int) -> list[str]:
        """What stands before a command that is to run there."""
        return ["ip", "netns", "exec", self.name(node)]

    def inside_hub(self) -> list[str]:
        """The same for the hub, where all counters can be read."""
        return ["ip", "netns", "exec", self._hub]

    # ---- links --------------------------------------------------------------------------------------------------------------

    def limit(self, node: int, bytes_per_s: float | None) -> None:
        """Limit both directions of a link; None: no limit."""
        for where, device in ((self.name(node), "eth0"), (self._hub, self.port(node))):
            if bytes_per_s is None:
                subprocess.run(["tc", "-n", where, "qdisc", "del", "dev", device, "root"], check=False, stderr=subprocess.DEVNULL)
                continue
            queue, burst = max(QUEUE_BYTES, int(bytes_per_s * QUEUE_S)), max(3100, int(bytes_per_s * 0.004))
            rate = ["rate", f"{int(8 * bytes_per_s)}bit", "burst", str(burst), "limit", str(queue)]
            _run("tc", "-n", where, "qdisc", "replace", "dev", device, "root", "tbf", *rate)

    def limit_all(self, bytes_per_s: float | None) -> None:
        """Limit the link of every learner, and the syncer's to as much as all of them together."""
        for node in self.nodes:
            share = len(self.nodes) - 1 if node == SYNCER else 1
            self.limit(node, None if bytes_per_s is None else share * bytes_per_s)

    def set_up(self, node: int, is_up: bool) -> None:
        """Take a link down, or up again."""
        _run("ip", "-n", self._hub, "link", "set", self.port(node), "up" if is_up else "down")


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip()}")

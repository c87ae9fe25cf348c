"""A syncer's transport in a process of its own, for tests: ``python -m tests.runtime.transport_peer echo|stuck``.

``echo`` answers each control message with itself and keeps a 64 MiB payload on its way to whoever spoke, until it hears
``stop``. ``stuck`` polls, one turn at a time, until the first chunks have arrived, then never again.
"""

from __future__ import annotations

import sys
import time

from lightning_diloco.runtime.transport import ControlReceived, PayloadDelivered, SyncerTransport
from tests.runtime.transport_helpers import MIB, accept_all


def echo(syncer: SyncerTransport) -> None:
    payload = bytes(64 * MIB)
    is_sending = False
    while True:
        for event in syncer.poll(1.0):
            if isinstance(event, ControlReceived):
                if event.data == b"stop":
                    return
                syncer.send_control(event.peer, event.data)
            if isinstance(event, PayloadDelivered) or (isinstance(event, ControlReceived) and not is_sending):
                syncer.send_payload(event.peer, b"down", payload)
                is_sending = True


def main(mode: str) -> None:
    syncer = SyncerTransport(accept=accept_all)
    syncer.bind()
    sys.stdout.write(f"{syncer.control_endpoint} {syncer.bulk_endpoint}\n")
    sys.stdout.flush()
    if mode == "echo":
        echo(syncer)
        syncer.close()
        return
    while not syncer.stats.bytes_up:
        syncer.poll(0.0)
    sys.stdout.write("stuck\n")
    sys.stdout.flush()
    time.sleep(60)


if __name__ == "__main__":
    main(sys.argv[1])

"""A learner to be fired at, in a process of its own: ``python -m tests.fuzzing.learner_process ENDPOINT FILE``.

It joins, says so in one line, trains until its standard input ends, writes its parameters to FILE, leaves, and says what it knows.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import msgspec
import torch
from safetensors.torch import save_file

from lightning_diloco.runtime.client import ClientOptions, LearnerClient
from tests.fuzzing.honest import CONFIG, TOKENS, PlainSGD, make_module
from tests.runtime.job_helpers import step


def main() -> None:
    torch.set_num_threads(1)
    module, is_over = make_module(), threading.Event()
    client = LearnerClient(module, ClientOptions(endpoint=sys.argv[1], config=CONFIG, learner_id=0))
    tell(role=client.join().role)
    threading.Thread(target=lambda: (sys.stdin.read(), is_over.set()), daemon=True).start()
    optimizer, inner_step = PlainSGD(module.parameters()), 0
    while not is_over.is_set():
        step(module, optimizer, inner_step)
        inner_step += 1
        client.boundary(tokens=TOKENS)
        time.sleep(0.005)
    state = client._machine.state
    known = {
        "steps": inner_step,
        "tokens": state.tokens + client._uncounted_tokens,
        "envelope": msgspec.to_builtins(state.envelope),
        "learner_id": state.learner_id,
        "stage": state.stage,
        "versions": [msgspec.to_builtins(f.held) for f in state.fragments],
        "bases": [msgspec.to_builtins(f.base) for f in state.fragments],
        "discarded": sum(sum(f.discarded.values()) for f in state.fragments),
        "bulk": client._loop._transport._bulk_endpoint,
        "stop_reason": client.stop_reason,
        "error": repr(client._loop.fatal) if client._loop.fatal is not None else "",
    }
    save_file({name: p.detach().clone() for name, p in module.named_parameters()}, sys.argv[2])
    client.leave("limit")
    client.close()
    tell(**known)


def tell(**known: object) -> None:
    sys.stdout.write(json.dumps(known) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()

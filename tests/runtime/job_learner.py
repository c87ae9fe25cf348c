"""A learner in a process of its own: ``python -m tests.runtime.job_learner JSON``; it prints a line when it has joined."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import torch
from torch import nn

from lightning_diloco.config import SyncConfig
from lightning_diloco.runtime.client import ClientOptions
from lightning_diloco.runtime.keys import SiteKeys
from lightning_diloco.runtime.sharded_client import join_job


def main() -> None:
    torch.set_num_threads(1)
    wish = json.loads(sys.argv[1])
    module = nn.Sequential(*(nn.Linear(wish["width"], wish["width"], bias=False) for _ in range(2)))
    client, info = join_job(
        module,
        ClientOptions(
            endpoint=wish["endpoint"],
            config=SyncConfig.from_options(wish["config"]),
            learner_id=wish["learner_id"],
            token=wish.get("token", ""),
            takeover_token=wish.get("takeover_token", ""),
            keys=SiteKeys.read(Path(wish["keys"])) if "keys" in wish else None,
            counters_path=Path(wish["run_dir"]) / "counters",
        ),
    )
    sys.stdout.write(json.dumps({"learner_id": info.learner_id, "incarnation": info.incarnation, "role": info.role}) + "\n")
    sys.stdout.flush()
    generator = torch.Generator().manual_seed(1)
    progress = torch.randn(wish["width"], wish["width"], generator=generator) * 1e-3
    for _ in range(wish["steps"]):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(progress)
        time.sleep(wish["sleep_s"])
        client.boundary(tokens=16)
        if client.fenced is not None:
            raise client.fenced
        if client.stop_reason is not None:
            break
    client.leave("limit")
    client.close()


if __name__ == "__main__":
    main()

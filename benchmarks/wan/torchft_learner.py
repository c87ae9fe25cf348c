"""A learner of the rows `torchft_diloco` and `torchft_streaming`: torchft's DiLoCo in a plain loop, since it has no Lightning integration.

    python -m benchmarks.wan.torchft_learner TOLD.json

Each learner is a replica group of one process, with a `Manager`, a store and a gloo process group of its own. A lighthouse (`wan/jobs.py`
starts it in the syncer's place) says who is there; pseudo-gradients go from learner to learner by all-reduce, in float32: torchft
quantizes on accelerators only.

| method | fragments | what |
|---|---|---|
| `torchft_diloco` | 1 | every H steps all wait until the whole model is exchanged |
| `torchft_streaming` | P, one per block | every H / P steps the next fragment is exchanged, while H / P - 1 steps are computed |

The longest overlap that torchft accepts is H / P - 1 steps, so more fragments overlap less; with P = H = 24 every step waits. One fragment
per transformer block (P = 4, an overlap of 5 steps) is also what torchft's own streaming example does. Of what a learner has computed since
its fragment went, the merged fragment keeps `ALPHA`.

The same as in the other rows: model, text, `DistributedSampler` (Lightning's of `ddp`, with the same seed), the module's own optimizer and
schedule, clipping. Not the same: no Trainer, so a step has none of its costs. What is validated is the global model; in `torchft_streaming`
that is each fragment as its last exchange left it, up to H steps before the end, since torchft has no exchange at the end.

References:
    Douillard et al., arXiv 2501.18512: streaming DiLoCo, overlap tau, mixing factor alpha.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

from benchmarks.wan.learner import link_bytes, make, wait_for_all
from benchmarks.wan.progress import ProgressFile

__all__ = ["fragments_of", "train"]

PATIENCE = timedelta(seconds=240)
"""For everything that torchft waits for: behind a slow link an exchange takes as long as it takes."""
OUTER: dict[str, Any] = {"lr": 0.7, "momentum": 0.9, "nesterov": True}
ALPHA = 0.5
"""Of the local parameters, in `torchft_streaming`: the paper's. With torchft's default of 0 the loss was higher in a short trial."""


def train(told: dict[str, Any]) -> None:
    """Train `max_steps` inner steps; leave the ends of steps, the figures at two of them, and the global model."""
    import torch
    from lightning.pytorch import seed_everything
    from safetensors.torch import save_file
    from torchft.local_sgd import DiLoCo

    seed_everything(told["seed"], verbose=False)
    module, data = make(told)
    optimizer, schedule = inner(module, told["max_steps"])
    batches = draw(data, told)
    manager, _store = make_manager(told)
    fragments = fragments_of(module.gpt, told["sync"]["num_fragments"])
    outer = [torch.optim.SGD(fragment.parameters(), **OUTER) for fragment in fragments]
    interval = told["sync"]["sync_interval_steps"]
    overlap: dict[str, Any] = {}
    if told["method"] == "torchft_streaming":
        overlap = {"fragment_sync_delay": interval // len(fragments) - 1, "fragment_update_alpha": ALPHA}
    file, marks, folder = ProgressFile(Path(told["steps"])), {}, Path(told["steps"]).parent
    with DiLoCo(manager, fragments, optimizer, outer, sync_every=interval, **overlap) as diloco:
        wait_for_all(folder, told["learner_id"], told["num_learners"])
        start_s = time.monotonic()
        for step in range(1, told["max_steps"] + 1):
            loss, _, _ = module._predict(next(batches))
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()  # and whatever DiLoCo has to do or to wait for
            schedule.step()
            file.note(step)
            if step in told["mark_at"]:
                figures = {"at_s": time.monotonic(), "process_s": time.process_time(), "merges": manager.current_step()}
                marks[step] = figures | link_bytes()
    # Whoever ends first must not close what another still reads from.
    wait_for_all(folder, told["learner_id"], told["num_learners"], "done")
    if told["learner_id"] == 0:
        save_file(global_model(module, diloco), told["weights"])
    Path(told["out"]).write_text(json.dumps({"start_s": start_s, "end_s": time.monotonic(), "marks": marks}))
    manager.shutdown(wait=False)


def inner(module: Any, max_steps: int) -> tuple[Any, Any]:
    """The module's own optimizer and schedule, which ask the Trainer for nothing but its length."""
    from types import SimpleNamespace

    module.trainer = SimpleNamespace(max_steps=max_steps)
    built = module.configure_optimizers()
    return built["optimizer"], built["lr_scheduler"]["scheduler"]


def draw(data: Any, told: dict[str, Any]) -> Iterator[Any]:
    """This learner's batches, without end; each pass in another order."""
    from torch.utils.data import DataLoader
    from torch.utils.data.distributed import DistributedSampler

    windows = data.train_windows()
    place = {"num_replicas": told["num_learners"], "rank": told["learner_id"], "seed": told["seed"]}
    sampler: Any = DistributedSampler(windows, shuffle=True, **place)
    loader = DataLoader(windows, batch_size=data.batch_size, sampler=sampler, drop_last=True)

    def batches() -> Iterator[Any]:
        epoch = 0
        while True:
            sampler.set_epoch(epoch)
            yield from loader
            epoch += 1

    return batches()


def make_manager(told: dict[str, Any]) -> tuple[Any, Any]:
    """What torchft knows of this learner by, and its store, which must live as long.

    All begin with the same parameters (one seed), so none is sent at the start; none is ever sent to a learner that comes back, because a
    job ends when one of its learners fails.
    """
    from torch.distributed import TCPStore
    from torchft.manager import Manager
    from torchft.process_group import ProcessGroupGloo

    store = TCPStore(told["address"], 0, is_master=True, wait_for_workers=False)
    manager = Manager(
        pg=ProcessGroupGloo(timeout=PATIENCE),
        load_state_dict=None,
        state_dict=None,
        min_replica_size=told["num_learners"],
        use_async_quorum=False,
        init_sync=False,
        **{name: PATIENCE for name in ("timeout", "quorum_timeout", "connect_timeout")},
        rank=0,
        world_size=1,
        store_addr=told["address"],
        store_port=store.port,
        lighthouse_addr=told["endpoint"],
        replica_id=str(told["learner_id"]),
        hostname=told["address"],
    )
    return manager, store


def fragments_of(gpt: Any, num_fragments: int) -> list[Any]:
    """Modules that share all parameters of a `GPT` out among them: runs of blocks, with the embedding in the first, the head in the last.

    Raises:
        ValueError: there are fewer blocks than fragments.
    """
    from torch import nn

    blocks = list(gpt.blocks)
    if not 1 <= num_fragments <= len(blocks):
        raise ValueError(
            f"num_fragments={num_fragments}: torchft takes modules, and there are {len(blocks)} blocks. Give 1 to {len(blocks)}."
        )
    ends = [len(blocks) * i // num_fragments for i in range(num_fragments + 1)]
    parts = [blocks[a:b] for a, b in zip(ends, ends[1:], strict=False)]
    parts[0].insert(0, gpt.embedding)
    parts[-1] += [gpt.norm, gpt.lm_head]
    return [nn.ModuleList(part) for part in parts]


def global_model(module: Any, diloco: Any) -> dict[str, Any]:
    """The parameters by name, each as its last exchange left it."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {
        names[id(parameter)]: fragment.original_parameters[name].clone()
        for fragment in diloco._fragments
        for name, parameter in fragment._model_fragment.named_parameters()
    }


if __name__ == "__main__":
    train(json.loads(Path(sys.argv[1]).read_text()))

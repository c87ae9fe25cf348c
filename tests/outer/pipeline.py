"""Ten rounds of codec, merge, outer step, publication and adoption, as a program: its last line is a digest of every byte that it made.

    python pipeline.py record FILE      computes norms and scales and writes them to FILE
    python pipeline.py replay FILE      uses those in FILE

The inputs come from integer arithmetic, because torch's random numbers depend on the CPU's instructions too. Inner steps are
elementwise and exact in the same sense.
"""

from __future__ import annotations

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import nn

from lightning_diloco.outer import (
    FragmentState,
    FragmentView,
    MergeAccumulator,
    buffer_of,
    decode,
    decode_publication,
    encode,
    encode_publication,
    momentum_at,
    outer_step,
    plan_layout,
    pseudo_gradient,
    rebase_delta,
)

ROUNDS = 10


def noise(seed: int, size: int) -> torch.Tensor:
    """Values in [-1, 1) from a multiplicative hash."""
    mixed = (torch.arange(size, dtype=torch.int64) + seed * 7919) * 2654435761 % (1 << 32)
    mixed = (mixed ^ (mixed >> 15)) * 2246822519 % (1 << 32)
    return (mixed.double() / 2.0**31 - 1.0).float()


def build() -> nn.Module:
    """A model with averaged, radial and bfloat16 tensors, of sizes that no vector length divides."""
    return nn.ModuleDict({"embed": nn.Embedding(61, 13), "body": nn.Linear(131, 77), "low": nn.Linear(59, 37).to(torch.bfloat16)})


def run(wire: str, recorded: list | None) -> tuple[str, list]:
    """All rounds; the digest and what was recorded."""
    modules = [build() for _ in range(3)]
    fragment = plan_layout(modules[0], num_fragments=1, merge="rda", mean_patterns=()).fragments[0]
    views = [FragmentView(module, fragment) for module in modules]
    size = fragment.num_params
    state = FragmentState.founded(noise(1, size))
    for view in views:
        view.copy_from(state.theta)
    bases, digest, records = [state.shadow] * 3, hashlib.sha256(), []
    for index in range(ROUNDS):
        given = recorded[index] if recorded is not None else {"norms": [None] * 3, "scales": None}
        accumulator, decoded, norms = MergeAccumulator(fragment), [], []
        for m, view in enumerate(views):
            view.add_(view.split(noise(10 + 3 * index + m, size) * 0.01))
            local = torch.empty(size, dtype=torch.float32)
            view.copy_to(local)
            payload = encode(pseudo_gradient(bases[m], local), wire)
            digest.update(buffer_of(payload))
            decoded.append(decode(payload, size, wire))
            norms.append(accumulator.fold(decoded[m], 1000.0 * (m + 1) + 1 / 3, norms=given["norms"][m]).norms)
        merged, end = accumulator.result(scales=given["scales"])
        records.append({"norms": norms, "scales": end.scales})
        stepped = outer_step(state, merged, lr=0.7, momentum=momentum_at(index + 1, 0.9, 5))
        payload, shadow = encode_publication(stepped.theta, state.shadow, wire)
        state = FragmentState(theta=stepped.theta, momentum=stepped.momentum, shadow=shadow, merge_index=stepped.merge_index)
        for m, view in enumerate(views):
            published = decode_publication(payload, bases[m], size, wire)
            view.add_(view.split(rebase_delta(published, bases[m], decoded[m] if m != index % 3 else None)))
            bases[m] = published
            view.copy_to(local)
            for tensor in (published, local):
                digest.update(buffer_of(tensor))
        for tensor in (merged, state.theta, state.momentum, payload):
            digest.update(buffer_of(tensor))
    return digest.hexdigest(), records


def main() -> None:
    """All wire dtypes."""
    mode, path = sys.argv[1], Path(sys.argv[2])
    recorded = json.loads(path.read_text()) if mode == "replay" else {}
    results = {wire: run(wire, recorded.get(wire)) for wire in ("fp32", "bf16", "int4")}
    if mode == "record":
        path.write_text(json.dumps({wire: records for wire, (_, records) in results.items()}))
    summary = {"capability": torch.backends.cpu.get_cpu_capability(), "digests": {wire: digest for wire, (digest, _) in results.items()}}
    sys.stdout.write(json.dumps(summary) + "\n")


if __name__ == "__main__":
    main()

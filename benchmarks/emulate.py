"""M learners in one process on a perfect schedule, to try ideas in a fraction of the time; what holds is then run on the real runtime.

    .venv/bin/python benchmarks/emulate.py NAME=VALUE ... [--json FILE] [--cpu N]
    .venv/bin/python benchmarks/emulate.py method=diloco learners=4 steps=800 lr=2 seed=0
    .venv/bin/python benchmarks/emulate.py method=ddp learners=4 steps=800 lr=2

Model, data and inner optimizer are those of the recipe `quality`; merges, outer steps and adoption are the functions of
`lightning_diloco.outer` that the syncer and the learners call. What is perfect is the schedule: every learner contributes to every merge of
a fragment at the same inner step, and gets the result `delay` steps later; with 0 before its next step. `method=ddp` is one model on the
batches of all learners, which is what data parallel training computes. `lr` is in multiples of 3e-3.

With `--json` a result is appended to the file under its settings, and settings that the file holds are not run again.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from dataclasses import asdict, dataclass, fields, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from emulate_adamw import OtherAdamW, step_together
from emulate_arguments import read
from hydra import compose, initialize_config_dir
from torch import Tensor, nn

from benchmarks.row_file import read_rows, write_rows
from lightning_diloco.config import SyncConfig
from lightning_diloco.outer import FragmentState, FragmentView, MergeAccumulator, last_step, momentum_at, outer_step, plan_layout
from recipes.byte_model import warmup_cosine
from recipes.gpt_text import build

ROOT = Path(__file__).resolve().parent.parent
torch.set_num_threads(1)
DEFAULTS = SyncConfig()
NAMED = ("method", "learners", "steps", "lr", "seed", "batch", "outer_lr", "outer_momentum", "warmup")
"""What the name of a row always says: defaults change."""


@dataclass(kw_only=True)
class Settings:
    """One run."""

    method: str = "diloco"
    learners: int = 4
    steps: int = 800
    lr: float = 1.0
    seed: int = 0
    interval: int = 24
    fragments: int = 24
    delay: int = 2
    merge: str = "rda"
    adopt: str = "rebase"
    outer_lr: float = DEFAULTS.outer_lr
    outer_momentum: float = DEFAULTS.outer_momentum
    warmup: int = DEFAULTS.outer_momentum_warmup
    idea: str = ""
    """What is tried beside, NAME:NUMBER joined by ``+``.

    ``cool:F``: momentum falls to 0 over the last share F of the run.
    ``rise``: momentum rises from 0 to its highest over the whole run.
    ``average:F``: also validate a running average of the published fragments, with weight F for the newest.
    ``smooth:N``: an adopted difference is added in N equal parts, one a step.
    ``agree:G``: every element of the merge is weighted by (its agreement)^G, (sum d)^2 / (M sum d^2), and each tensor keeps its length.
    ``cautious``: momentum moves only elements in which it agrees with g; ``cautious:S``: and there S times as far.
    ``restart``: elements of the momentum buffer that disagree with g begin again as g.
    ``direct:A``: the outer step is A g + lr mu b', where Nesterov's has A = lr.
    ``fine``: the length of every element of the merge is the mean of the learners' (RDA by element).
    ``follow``: the momentum buffer shrinks as merges do, by the length of this one over that of the one before, if that is below 1.
    ``stretch:F``: intervals are as long in steps that count as their inner rate, F times as long at most: short where the rate is high.
    ``noise:F``: every element is stretched by what its noise shortens it at a learner's batch; moments over merges with weight F.
    """
    inner: str = "adamw"
    """``muon``: the matrices of the blocks by `torch.optim.Muon`, whose rate is matched to AdamW's, and the rest by AdamW.

    ``shared``, ``estimate``: AdamW with another second moment, see `emulate_adamw`.
    """
    beta2: float = 0.95
    """Of the inner AdamW; 0.95 is the recipe's."""
    batch: int = 64
    """Windows of a learner and step."""


class Run:
    """One run of one method.

    Args:
        settings: see `Settings`.
    """

    def __init__(self, settings: Settings) -> None:
        self.s = settings
        with initialize_config_dir(str(ROOT / "recipes" / "conf"), version_base="1.3"):
            cfg = compose("config", overrides=["recipe=quality"])
        self.peak_lr = 3e-3 * settings.lr
        self.cfg = cfg
        torch.manual_seed(settings.seed)
        first, data = build(cfg)
        data.setup()
        self.windows = data.train_windows()
        self.val_batches = [batch.long() for batch in data.val_dataloader()]
        self.batch = settings.batch * (settings.learners if settings.method == "ddp" else 1)
        self.models: list[Any] = [first]
        for _ in range(0 if settings.method == "ddp" else settings.learners - 1):
            model, _ = build(cfg)
            model.load_state_dict(first.state_dict())
            self.models.append(model)
        self.optimizers = [self._optimizers(model) for model in self.models]
        self.order = torch.randperm(len(self.windows), generator=torch.Generator().manual_seed(settings.seed))

    def _optimizers(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        hp = self.cfg.model
        named = list(model.named_parameters())
        matrices = [p for name, p in named if self.s.inner == "muon" and p.ndim == 2 and ".blocks." in name]
        rest = [p for _, p in named if all(p is not other for other in matrices)]
        groups = [
            {"params": [p for p in rest if p.ndim >= 2], "weight_decay": hp.weight_decay},
            {"params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
        ]
        if self.s.inner in ("shared", "estimate"):
            return [OtherAdamW(groups, self.peak_lr, beta2=self.s.beta2, learners=self.s.learners)]
        adamw = torch.optim.AdamW(groups, lr=self.peak_lr, betas=(0.9, self.s.beta2), fused=True)
        if not matrices:
            return [adamw]
        muon = torch.optim.Muon(matrices, lr=self.peak_lr, weight_decay=hp.weight_decay, adjust_lr_fn="match_rms_adamw")
        return [adamw, muon]

    def inner_rate(self, step: int) -> float:
        """The learning rate of an inner step."""
        hp = self.cfg.model
        return self.peak_lr * warmup_cosine(step, warmup_steps=hp.warmup_steps, max_steps=self.s.steps, floor=hp.final_lr_share)

    def inner_step(self, index: int, step: int) -> None:
        """One optimizer step of one learner on its own batch."""
        model, optimizers = self.models[index], self.optimizers[index]
        for group in [group for optimizer in optimizers for group in optimizer.param_groups]:
            group["lr"] = self.inner_rate(step)
        first = (step * len(self.models) + index) * self.batch
        rows = self.order[torch.arange(first, first + self.batch) % len(self.order)]
        batch = torch.stack([self.windows[int(i)] for i in rows]).long()
        loss = F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            if self.s.inner != "shared":
                optimizer.step()

    @torch.no_grad()
    def validate(self, model: nn.Module) -> float:
        """Nats per byte on the recipe's validation windows."""
        total = count = 0.0
        for batch in self.val_batches:
            total += float(F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"))
            count += batch[:, 1:].numel()
        return total / count

    def train(self) -> dict[str, float]:
        """Train; returns the validation loss of the final model, and of what else was looked at."""
        if self.s.method == "ddp":
            for step in range(self.s.steps):
                self.inner_step(0, step)
            return {"val_loss": self.validate(self.models[0])}
        return Outer(self).train()


class Outer:
    """The outer loop of one run."""

    def __init__(self, run: Run) -> None:
        self.run, self.s = run, run.s
        patterns = ("lm_head", "head", "classifier", "fc_out")
        self.layout = plan_layout(run.models[0], num_fragments=self.s.fragments, merge=self.s.merge, mean_patterns=patterns)  # type: ignore[arg-type]
        self.views = [[FragmentView(model, f) for f in self.layout.fragments] for model in run.models]
        start = [self._copy(0, p) for p in range(len(self.layout.fragments))]
        self.states = [FragmentState.founded(flat) for flat in start]
        self.bases = list(start)
        self.opened = [0] * len(start)
        self.on_way: dict[int, tuple[int, list[Tensor]]] = {}
        self.ideas = {part.split(":")[0]: float(part.split(":")[1]) if ":" in part else 1.0 for part in self.s.idea.split("+") if part}
        self.average: dict[int, Tensor] = {}
        self.moments: dict[int, tuple[int, Tensor]] = {}
        self.pending: dict[tuple[int, int], tuple[int, Tensor]] = {}
        self.num_fragments = len(start)
        self.lengths: dict[int, float] = {}
        self.due: dict[int, float] = {}
        rates = [run.inner_rate(step) for step in range(self.s.steps)]
        self.rated = list(accumulate((rate * len(rates) / sum(rates) for rate in rates), initial=0.0))

    def _copy(self, learner: int, fragment: int) -> Tensor:
        flat = torch.empty(self.layout.fragments[fragment].num_params)
        self.views[learner][fragment].copy_to(flat)
        return flat

    def train(self) -> dict[str, float]:
        """All steps, then the last merges."""
        s = self.s
        for step in range(s.steps):
            for index in range(s.learners):
                self.run.inner_step(index, step)
            if s.inner == "shared":
                step_together([optimizers[0] for optimizers in self.run.optimizers])
            done = step + 1
            self._add_pending()
            for p in [p for p, (at, _) in self.on_way.items() if at <= done]:
                self._adopt(p)
            for p in range(self.num_fragments):
                if done < s.steps and p not in self.on_way and done > self.opened[p] and self._is_due(p, done):
                    self._open(p, done)
        for p in list(self.on_way):
            self._adopt(p)
        found = {"published": self._validate([state.theta for state in self.states])}
        if self.average:
            found["average"] = self._validate([self.average[p] for p in range(self.num_fragments)])
        last: dict[str, list[Tensor]] = {"val_loss": [], "mean": []}
        for p, state in enumerate(self.states):
            contributions = [self.bases[p] - self._ahead(m, p) for m in range(s.learners)]
            share = min(1.0, (s.steps - self.opened[p]) / s.interval)
            mean = sum(contributions[1:], contributions[0]) / s.learners
            last["val_loss"].append(last_step(state, self._merge(p, contributions), lr=s.outer_lr, share=share).theta)
            last["mean"].append(last_step(state, mean, lr=1.0, share=share).theta)
        return {**found, **{name: self._validate(flats) for name, flats in last.items()}}

    def _is_due(self, p: int, done: int) -> bool:
        s, offset = self.s, p * self.s.interval // self.num_fragments
        if "stretch" not in self.ideas:
            return done % s.interval == offset % s.interval
        # In steps that count as their inner rate, over its mean.
        due = self.due.setdefault(p, offset or s.interval)
        if self.rated[done] < due and done - self.opened[p] < self.ideas["stretch"] * s.interval:
            return False
        self.due[p] = max(due, self.rated[done] - s.interval) + s.interval
        return True

    def _merge(self, p: int, contributions: list[Tensor]) -> Tensor:
        accumulator = MergeAccumulator(self.layout.fragments[p])
        for d in contributions:
            accumulator.fold(d, 1.0)
        merged = accumulator.result()[0]
        if "fine" in self.ideas:
            stack = torch.stack(contributions)
            return stack.abs().mean(0).mul_(stack.mean(0).sign())
        if "noise" in self.ideas:
            return self._without_noise(p, torch.stack(contributions))
        if "agree" not in self.ideas:
            return merged
        mean = torch.stack(contributions).mean(0)
        agreement = mean.square().div_(torch.stack(contributions).square().mean(0).clamp_min_(1e-30))
        weighted = merged * agreement.pow(self.ideas["agree"])
        lengths = [part.length for part in self.layout.fragments[p].slices]
        for part, whole in zip(weighted.split(lengths), merged.split(lengths), strict=True):
            part.mul_(whole.norm() / part.norm().clamp_min(1e-30))
        return weighted

    def _without_noise(self, p: int, stack: Tensor) -> Tensor:
        """The mean, stretched as a step of AdamW would be longer at the batch of all.

        With s the squared gradient's part that is signal and q the variance of a learner's that is sqrt((s + q) / (s + q / M)). Over H
        steps a signal adds up as H and noise as sqrt(H).
        """
        m, share = self.s.learners, self.ideas["noise"]
        now = torch.stack([stack.mean(0).square(), stack.var(0)])
        count, moments = self.moments.get(p, (0, torch.zeros_like(now)))
        moments = moments + (now - moments) * share
        self.moments[p] = (count + 1, moments)
        square, variance = moments / (1 - (1 - share) ** (count + 1))
        signal = (square - variance / m).clamp_min_(0.0) / self.s.interval
        return stack.mean(0) * ((signal + variance) / (signal + variance / m).clamp_min(1e-30)).sqrt_()

    def _open(self, p: int, done: int) -> None:
        s = self.s
        contributions = [self.bases[p] - self._ahead(m, p) for m in range(s.learners)]
        state = self.states[p]
        momentum = self._momentum(state.merge_index + 1, done)
        g = self._merge(p, contributions)
        if "restart" in self.ideas:
            state = replace(state, momentum=torch.where(state.momentum * g > 0, state.momentum, 0.0))
        if "follow" in self.ideas:
            length = float(g.norm())
            state = replace(state, momentum=state.momentum * min(1.0, length / self.lengths.get(p, length)))
            self.lengths[p] = length
        before = state.theta
        state = outer_step(state, g, lr=s.outer_lr, momentum=momentum)
        if "cautious" in self.ideas:
            coast = torch.where(state.momentum * g > 0, state.momentum, 0.0).mul_(momentum * self.ideas["cautious"])
            state = replace(state, theta=before - s.outer_lr * (g + coast))
        if "direct" in self.ideas:
            state = replace(state, theta=state.theta - (self.ideas["direct"] - s.outer_lr) * g)
        self.states[p] = state
        self.opened[p] = done
        self.on_way[p] = (done + s.delay, contributions)
        if s.delay == 0:  # before the next step; what is on its way is looked at before a round opens
            self._adopt(p)

    def _momentum(self, merge: int, done: int) -> float:
        if "rise" in self.ideas:
            return self.s.outer_momentum * done / self.s.steps
        momentum = momentum_at(merge, self.s.outer_momentum, self.s.warmup)
        if "cool" in self.ideas:
            # Momentum falls to 0 over the last share of the run.
            momentum *= min(1.0, (1 - done / self.s.steps) / self.ideas["cool"])
        return momentum

    def _adopt(self, p: int) -> None:
        _, contributions = self.on_way.pop(p)
        published = self.states[p].theta
        for m in range(self.s.learners):
            delta = published - (self.bases[p] - contributions[m])
            if self.s.adopt == "overwrite":
                self._put(m, p, published)
            elif "smooth" in self.ideas:
                left = self.pending.pop((m, p), None)
                delta = delta if left is None else delta + left[0] * left[1]
                parts = int(self.ideas["smooth"])
                self.pending[m, p] = (parts, delta / parts)
            else:
                self._put(m, p, self._copy(m, p) + delta)
        self.bases[p] = published
        if "average" in self.ideas:
            before, share = self.average.get(p, published), self.ideas["average"]
            self.average[p] = before + (published - before) * share

    def _ahead(self, m: int, p: int) -> Tensor:
        """The learner's fragment with all that it has adopted, what is still to be added included."""
        left = self.pending.get((m, p))
        return self._copy(m, p) if left is None else self._copy(m, p) + left[0] * left[1]

    def _add_pending(self) -> None:
        for (m, p), (parts, part) in list(self.pending.items()):
            self._put(m, p, self._copy(m, p) + part)
            if parts == 1:
                del self.pending[m, p]
            else:
                self.pending[m, p] = (parts - 1, part)

    def _put(self, learner: int, p: int, flat: Tensor) -> None:
        parameters = dict(self.run.models[learner].named_parameters())
        with torch.no_grad():
            for part, values in zip(
                self.layout.fragments[p].slices, flat.split([x.length for x in self.layout.fragments[p].slices]), strict=True
            ):
                parameters[part.name].view(-1).copy_(values)

    def _validate(self, flats: list[Tensor]) -> float:
        kept = [self._copy(0, p) for p in range(self.num_fragments)]
        for p, flat in enumerate(flats):
            self._put(0, p, flat)
        loss = self.run.validate(self.run.models[0])
        for p, flat in enumerate(kept):
            self._put(0, p, flat)
        return loss


def main() -> int:
    """Run what the command line says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="NAME=VALUE", help="see `Settings`; a value may be a list: lr=1,2,4")
    parser.add_argument("--json", type=Path, help="results so far")
    parser.add_argument("--cpu", type=int, help="pin to this core")
    arguments = parser.parse_args()
    if arguments.cpu is not None:
        os.sched_setaffinity(0, {arguments.cpu})
    kinds = {f.name: type(f.default) for f in fields(Settings)}
    rows: list[dict[str, Any]] = [{}]
    for item in arguments.settings:
        name, _, value = item.partition("=")
        if name not in kinds:
            parser.error(f"{name!r} is no setting: there are {', '.join(kinds)}.")
        rows = [{**row, name: part} for row in rows for part in read(parser, name, kinds[name], value)]
    for row in rows:
        settings = Settings(**row)
        if settings.method == "ddp" and settings.inner in ("shared", "estimate"):
            parser.error(f"inner={settings.inner} is about learners; method=ddp has none.")
        name = " ".join(f"{k}={v}" for k, v in asdict(settings).items() if v != getattr(Settings, k) or k in NAMED)
        known = read_rows(arguments.json, {}) if arguments.json else {}
        if name not in known:
            start_s = time.monotonic()
            result = Run(settings).train()
            result["seconds"] = round(time.monotonic() - start_s, 1)
            result = {k: v if math.isfinite(v) else None for k, v in result.items()}
            # Again: another process may have added rows meanwhile.
            known = {**(read_rows(arguments.json, {}) if arguments.json else {}), name: result}
            if arguments.json:
                write_rows(arguments.json, known)
        print(name, {k: "not finite" if v is None else round(v, 4) for k, v in known[name].items()}, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

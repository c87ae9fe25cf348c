"""Reading a metrics endpoint, and holding what it says against `summary.json`."""

from __future__ import annotations

import urllib.request
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

SAME = {
    "diloco_tokens_total": "tokens",
    "diloco_tokens_merged_total": "tokens_merged",
    "diloco_tokens_pending": "tokens_pending",
    "diloco_merges_total": "merges",
    "diloco_merge_members_mean": "mean_members",
    "diloco_wall_seconds": "wall_s",
    "diloco_goodput_ratio": "goodput",
    "diloco_goodput_alive_ratio": "goodput_alive",
    "diloco_uptime_ratio": "uptime",
}
OF_LEARNERS = {
    "diloco_learner_inner_steps_total": "inner_steps",
    "diloco_learner_tokens_total": "tokens",
    "diloco_learner_tokens_discarded_total": "discarded",
    "diloco_learner_rounds_merged_total": "rounds_merged",
    "diloco_learner_rounds_eligible_total": "rounds_eligible",
    "diloco_learner_stall_seconds_total": "stall_s",
    "diloco_learner_incarnations_total": "incarnations",
}


def scrape(url: str) -> str:
    with urllib.request.urlopen(url, timeout=20) as answer:
        return answer.read().decode()


def samples_of(text: str) -> dict[tuple[str, str], float]:
    """Values by name and labels, which are written ``a=1,b=2``."""
    return {
        (sample.name, ",".join(f"{k}={v}" for k, v in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def assert_equals_summary(text: str, summary: dict[str, Any]) -> None:
    """Every figure of the endpoint that is in the summary has the summary's value, and there are no others of its name."""
    samples = samples_of(text)
    wanted = {(name, ""): summary[figure] for name, figure in SAME.items() if summary[figure] is not None}
    wanted |= {("diloco_tokens_discarded_total", f"reason={reason}"): n for reason, n in summary["discarded_by_reason"].items()}
    wanted |= {("diloco_payload_bytes_total", f"direction={way}"): summary[f"bytes_{way}"] for way in ("up", "down")}
    wanted |= {("diloco_fragment_version", f"fragment={f['fragment_id']}"): f["version"] for f in summary["fragments"]}
    wanted |= {("diloco_job_status", f"status={s}"): float(s == summary["status"]) for s in ("running", "finished", "stopped", "failed")}
    wanted |= {(name, f"learner={x['learner_id']}"): x[figure] for name, figure in OF_LEARNERS.items() for x in summary["learners"]}
    names = {name for name, _ in wanted}
    assert {key: value for key, value in samples.items() if key[0] in names} == wanted

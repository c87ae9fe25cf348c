"""What the tape says while it grows: who is a member, and when somebody was last in a merge. Plain JSON, nothing of the package."""

from __future__ import annotations

import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

__all__ = ["TapeWatch"]


class TapeWatch:
    """Follows the tape of a job. Times are monotonic seconds at which a line was seen, up to half a second after it was written.

    Args:
        path: of the tape, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._due_s = 0.0
        self.members: dict[int, int] = {}
        """By learner id the incarnation that is a member now."""
        self.joined: dict[tuple[int, int], float] = {}
        """By (learner id, incarnation), when its join was seen."""
        self.left: dict[tuple[int, int], str] = {}
        """By (learner id, incarnation), why it ended."""
        self.merged: dict[tuple[int, int], float] = {}
        """By (learner id, incarnation), when a merge of it was seen last."""
        self.epochs: dict[int, float] = {}
        """By epoch, when its first merge was seen."""
        self.restarts = 0
        self.discarded: dict[tuple[int, str], int] = defaultdict(int)
        """By learner id and reason, tokens summed over fragments."""

    def look(self) -> None:
        """Read what is new, at most ten times a second."""
        now_s = time.monotonic()
        if now_s < self._due_s or not self._path.exists():
            return
        self._due_s = now_s + 0.1
        with self._path.open("rb") as file:
            file.seek(self._offset)
            data = file.read()
        end = data.rfind(b"\n") + 1
        self._offset += end
        for line in data[:end].splitlines():
            self._feed(json.loads(line), now_s)

    def _feed(self, line: dict[str, Any], now_s: float) -> None:
        event = line["event"]
        if event == "merge":
            for member in line["members"]:
                self.merged[member["learner_id"], member["incarnation"]] = now_s
            self.epochs.setdefault(line["version"][0], now_s)
        elif event == "join":
            self.members[line["learner_id"]] = line["incarnation"]
            self.joined[line["learner_id"], line["incarnation"]] = now_s
        elif event == "leave":
            self.left[line["learner_id"], line["incarnation"]] = line["reason"]
            if self.members.get(line["learner_id"]) == line["incarnation"]:
                del self.members[line["learner_id"]]
        elif event == "restart":
            self.restarts += 1
        elif event == "discard":
            self.discarded[line["learner_id"], line["reason"]] += line["tokens"]

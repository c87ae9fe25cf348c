"""Which part of a model a learner wants, and whether it is at the right door: looked at before the rules see its `Hello`.

A learner that dials a syncer does not know whether it has several shards. It says `Hello` for the whole model, as to any syncer. The lead
of a syncer with shards answers `Sharded`: where they all are. Then the learner comes to each with its part's layout, whose fingerprint
says which part it is. From there on a shard is a syncer like any other, and its rules know nothing of the others.
"""

from __future__ import annotations

from collections.abc import Callable

from lightning_diloco.outer import part_of
from lightning_diloco.protocol.messages import PROTOCOL_VERSION, Hello, JoinRefused, Message, Sharded
from lightning_diloco.runtime.service_options import ServiceOptions

__all__ = ["ShardDoor"]


class ShardDoor:
    """The door of one shard.

    Args:
        options: of its service.
        say: sends a message to a session.
    """

    def __init__(self, options: ServiceOptions, say: Callable[[str, Message], None]) -> None:
        self._options, self._say = options, say

    def turns_away(self, session: str, hello: Hello) -> bool:
        """Whether this process was answered here: it is to go elsewhere, or may not come in."""
        options = self._options
        wanted, ours = part_of(hello.fingerprint), (options.shard, options.num_shards)
        is_stranger = hello.protocol_version != PROTOCOL_VERSION or (options.token and hello.token != options.token)
        if wanted == ours or is_stranger:
            return False  # the rules have the word for strangers
        if wanted == (0, 1) and options.shard_endpoints:
            self._say(session, Sharded(endpoints=options.shard_endpoints))
        elif wanted == (0, 1):
            sentence = f"This is shard {ours[0]} of {ours[1]} of a syncer. Dial the address that the syncer has printed at its start."
            self._say(session, JoinRefused(reason="wrong_layout", detail=sentence))
        else:
            sentence = f"Part {wanted[0]} of {wanted[1]} of a model: this is shard {ours[0]} of {ours[1]}. Start the learner again."
            self._say(session, JoinRefused(reason="wrong_layout", detail=sentence))
        return True

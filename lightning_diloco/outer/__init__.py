"""Numerics of the outer loop: fragments, pseudo-gradients, merge, outer optimizer, codecs, adoption.

Pure functions and small objects on flat float32 fragments. Nothing here knows that a learner exists: no identities, sockets,
clocks or threads. Every result is the same on every machine, except for reductions (norms), which can be recorded and given back.
"""

from __future__ import annotations

from lightning_diloco.outer.adopt import rebase_delta, reference
from lightning_diloco.outer.checksum import buffer_of, sha256_of
from lightning_diloco.outer.codec import (
    bytes_of,
    check_payload,
    decode,
    decode_full,
    decode_publication,
    encode,
    encode_full,
    encode_in_place,
    encode_publication,
    is_finite,
    payload_bytes,
)
from lightning_diloco.outer.encoded import Encoded
from lightning_diloco.outer.layout import balanced_fragments, plan_layout
from lightning_diloco.outer.memory import BLOCK_ELEMENTS, blocks, flat
from lightning_diloco.outer.merge import FoldRecord, MergeAccumulator, Merged, MergeRecord
from lightning_diloco.outer.norms import Norms, measure
from lightning_diloco.outer.optimizer import FragmentState, last_step, momentum_at, outer_step, recovered_momentum
from lightning_diloco.outer.pseudo_gradient import pseudo_gradient
from lightning_diloco.outer.publishing import OuterStep, Published, take_step
from lightning_diloco.outer.shards import global_id, part_of, parts_of, whole
from lightning_diloco.outer.spec import Fragment, Layout, TensorSlice, TensorSpec
from lightning_diloco.outer.static import load_static, pack_static, static_bytes
from lightning_diloco.outer.views import FragmentView

__all__ = [
    "BLOCK_ELEMENTS",
    "Encoded",
    "FoldRecord",
    "Fragment",
    "FragmentState",
    "FragmentView",
    "Layout",
    "MergeAccumulator",
    "MergeRecord",
    "Merged",
    "Norms",
    "OuterStep",
    "Published",
    "TensorSlice",
    "TensorSpec",
    "balanced_fragments",
    "blocks",
    "buffer_of",
    "bytes_of",
    "check_payload",
    "decode",
    "decode_full",
    "decode_publication",
    "encode",
    "encode_full",
    "encode_in_place",
    "encode_publication",
    "flat",
    "global_id",
    "is_finite",
    "load_static",
    "last_step",
    "measure",
    "momentum_at",
    "outer_step",
    "pack_static",
    "part_of",
    "parts_of",
    "payload_bytes",
    "plan_layout",
    "pseudo_gradient",
    "rebase_delta",
    "recovered_momentum",
    "reference",
    "sha256_of",
    "static_bytes",
    "take_step",
    "whole",
]

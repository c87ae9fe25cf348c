"""What a learner does about values that the syncer refused, and the bound above which both take values for not finite.

One refusal names one fragment. But one step after a parameter has become NaN every gradient is NaN, and so are all fragments: mended one
by one, each would be poisoned again by those that are not. So while such a heal is due, every fragment is looked at, and the rules heal
all that are poisoned at one boundary. It costs a pass over the parameters, in a step that was lost anyway.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_diloco.outer import Encoded, Fragment, FragmentView, decode, measure, reference
from lightning_diloco.protocol.actions import Heal
from lightning_diloco.protocol.learner_state import FragmentState

__all__ = ["MAX_NORM", "Remedy", "describe", "is_heal_due", "is_sound", "poisoned_fragments", "tensors_of"]

MAX_NORM = 1e30
"""A contribution of this norm or more counts as not finite: two of them can overflow float32 in the outer step, and NaN is for good."""


def is_sound(norm: float) -> bool:
    """Whether a contribution of this norm counts as finite; learner and syncer must answer alike."""
    return norm < MAX_NORM


def describe(learner_id: int, heal: Heal, norm_gate: float | None, fragment_id: int | None = None) -> str:
    """What was refused, by which rule, what happens now, and what the user can do.

    Args:
        learner_id: of this learner.
        heal: what the rules ask for.
        norm_gate: of the job.
        fragment_id: number of the fragment in the whole model (None: the one in `heal`).
    """
    if heal.reason == "norm":
        rule = f"its norm per step is above norm_gate={norm_gate} times the running median of this fragment"
        remedy = "If such jumps are normal in this training, pass norm_gate=None or a larger factor."
    else:
        rule = "a value in it is not finite, or too large for float32"
        remedy = "If it comes again, lower the inner learning rate or clip the gradients."
    return (
        f"Learner {learner_id}: fragment {heal.fragment_id if fragment_id is None else fragment_id} was refused ({heal.reason}): {rule}. "
        f"Its parameters go back to the last published ones. {remedy}"
    )


@dataclass(frozen=True, slots=True)
class Remedy:
    """Host copies from which a healed fragment is mended: its base, and the payload of a contribution on its way (None: there is none)."""

    fragment: Fragment
    base: Tensor
    sent: Encoded | None

    def values(self) -> Tensor:
        """What the parameters become, flat float32 [N]: base minus what is on its way, if the syncer will not refuse that as well."""
        sent = self.sent
        if sent is None or not is_sound(measure(self.fragment, sent).whole):
            return self.base
        return reference(self.base, decode(sent.payload, sent.num_elements, sent.wire_dtype))


def is_heal_due(fragments: Sequence[FragmentState]) -> bool:
    """Whether one of them was refused for a value that is not finite."""
    return any(fragment.heal == "nonfinite" for fragment in fragments)


def poisoned_fragments(module: nn.Module, views: Sequence[FragmentView]) -> tuple[int, ...]:
    """The fragments that are not finite."""
    return tuple(i for i, view in enumerate(views) if not _is_finite(module, view))


def _is_finite(module: nn.Module, view: FragmentView) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in tensors_of(module, view))


def tensors_of(module: nn.Module, view: FragmentView) -> list[Tensor]:
    """The parameters or buffers of a fragment, pruned ones too (`torch.nn.utils.prune` renames them)."""
    return [_tensor(module, part.name, view.fragment.holds_values) for part in view.fragment.slices]


def _tensor(module: nn.Module, name: str, is_buffer: bool) -> Tensor:
    path, _, leaf = name.rpartition(".")
    owner = module.get_submodule(path)
    if is_buffer:
        return owner.get_buffer(leaf)
    return owner.get_parameter(leaf if owner._parameters.get(leaf) is not None else f"{leaf}_orig")

"""Matches the calls that a model makes now to those of a recorded pass, one by one.

Knows nothing about what is done at a call.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from attrfast.trace import Call, Numbering, written_to


class PlanMismatchError(Exception):
    """The model made another call than the recorded one."""


class Follower:
    """Where a running model is in its record.

    Args:
        names: id -> name of the model's parameters and buffers, which are no values.
        calls: the record.

    Attributes:
        numbering: values by the numbers that they have in the record.
    """

    def __init__(self, names: dict[int, str], calls: Sequence[Call]) -> None:
        self.calls = calls
        self.numbering = Numbering(names)
        self.index = 0

    def meet(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        """The recorded call that the model is about to make again.

        Raises:
            PlanMismatchError: it makes another one.
        """
        call = self.calls[self.index] if self.index < len(self.calls) else None
        inputs, state = self.numbering.given(args, kwargs)
        if call is None or (call.name, call.inputs, call.state) != (name, inputs, state):
            known = "no further call" if call is None else f"{call.name}{call.inputs} of {call.state}"
            raise PlanMismatchError(
                f"call {self.index} is {name}{inputs} of {state}, recorded was {known}"
            )
        self.index += 1
        return call

    def leave(
        self, call: Call, out: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> list[torch.Tensor]:
        """The tensors that the call made, now numbered.

        Raises:
            PlanMismatchError: it made more or fewer than were recorded.
        """
        made = self.numbering.made(out, written_to(call.name, args, kwargs))
        if len(made) != len(call.outputs):
            raise PlanMismatchError(f"call {call.index}, {call.name}, made {len(made)} tensors")
        for tensor in made:
            self.numbering.new(tensor)
        return made

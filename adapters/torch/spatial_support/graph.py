"""Which calls a response is made of, and which of them feeds which, read from autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import Node as Made

from .recording import ConvCall, PoolCall

NODE = -1
"""Stands among the calls' numbers for the node whose response it is."""

Feeds: TypeAlias = dict[int, list[int]]
"""The numbers of the calls that a call's input is made of with no other call between; those of the node's too."""


class Graph:
    """The calls that a response is made of, by way of their inputs, not of offsets and masks.

    Parameters
    ----------
    response : Tensor
    calls : sequence of ConvCall and PoolCall
        Probed, in the order in which they ran.

    Attributes
    ----------
    calls : dict of int to ConvCall or PoolCall
        By their numbers, in the order in which they ran.
    """

    def __init__(self, response: Tensor, calls: Sequence[ConvCall | PoolCall]) -> None:
        results = {call.probe.result: number for number, call in enumerate(calls) if call.probe is not None}
        self._next = {NODE: _nearest(response.grad_fn, results)}
        waiting = list(self._next[NODE])
        while waiting:
            number = waiting.pop()
            probe = calls[number].probe
            if number not in self._next and probe is not None:
                self._next[number] = _nearest(probe.source, results)
                waiting += self._next[number]
        self.calls = {number: calls[number] for number in sorted(self._next) if number != NODE}

    def feeds(self, chosen: Collection[int], detours: Collection[int] = ()) -> Feeds:
        """What feeds what, if only the chosen calls are looked at.

        A call that can be reached both directly and through another one, as around a shortcut, counts as reached
        through the other one alone. Not so if that is a detour, which counts only where there is no other way.
        """
        near: dict[int, set[int]] = {}  # the chosen calls with no other chosen one between
        far: dict[int, set[int]] = {}  # all chosen ones
        for number in (*self.calls, NODE):  # what feeds a call has run before it
            near[number], far[number] = set(), set()
            for other in self._next[number]:
                near[number] |= {other} if other in chosen else near[other]
                far[number] |= far[other] | ({other} if other in chosen else set())
        feeds: Feeds = {}
        for number in (*chosen, NODE):
            ways = near[number].difference(detours) or near[number]
            feeds[number] = sorted(other for other in ways if not any(other in far[way] for way in ways))
        return feeds


def _nearest(made: Made | None, results: dict[Made | None, int]) -> set[int]:
    """The numbers of the calls whose results something was made of, with no other call between."""
    found: set[int] = set()
    seen: set[Made] = set()
    waiting = [made]
    while waiting:
        step = waiting.pop()
        if step is None or step in seen:
            continue
        seen.add(step)
        if step in results:
            found.add(results[step])
        else:
            waiting += [before for before, _ in step.next_functions]
    return found

"""Graph of the recorded calls that contribute to a response, read from autograd's graph."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TypeAlias

from torch import Tensor
from torch.autograd.graph import Node as GradFn

from .recording import ConvCall, PoolCall

NODE = -1
"""Key of the node among the numbers of the calls."""

Inputs: TypeAlias = dict[int, list[int]]
"""For each call and for the node: the numbers of the calls that feed it directly."""


class CallGraph:
    """Calls that a response depends on through their inputs, not through offsets and masks.

    Parameters
    ----------
    response : Tensor
    calls : sequence of ConvCall and PoolCall
        From a probing recorder.

    Attributes
    ----------
    calls : dict of int to ConvCall or PoolCall
        Calls by number, in the order of execution.
    """

    def __init__(self, response: Tensor, calls: Sequence[ConvCall | PoolCall]) -> None:
        results = {call.result_grad_fn: number for number, call in enumerate(calls)}
        self._inputs = {NODE: _nearest_calls(response.grad_fn, results)}
        waiting = list(self._inputs[NODE])
        while waiting:
            number = waiting.pop()
            if number not in self._inputs:
                self._inputs[number] = _nearest_calls(calls[number].input_grad_fn, results)
                waiting += self._inputs[number]
        self.calls = {number: calls[number] for number in sorted(self._inputs) if number != NODE}

    def inputs(self, chosen: Collection[int], detours: Collection[int] = ()) -> Inputs:
        """Return the inputs of the node and the chosen calls in the graph of the chosen calls alone.

        A call that is reached both directly and through another call, as around a skip connection, counts as reached
        through the other call only. Calls in `detours` count only if there is no other path.
        """
        direct: dict[int, set[int]] = {}  # chosen calls without another chosen call in between
        all_before: dict[int, set[int]] = {}
        for number in (*self.calls, NODE):  # inputs have smaller numbers
            direct[number], all_before[number] = set(), set()
            for other in self._inputs[number]:
                itself = {other}.intersection(chosen)
                direct[number] |= itself or direct[other]
                all_before[number] |= all_before[other] | itself
        inputs: Inputs = {}
        for number in (*chosen, NODE):
            paths = direct[number].difference(detours) or direct[number]
            inputs[number] = sorted(other for other in paths if not any(other in all_before[path] for path in paths))
        return inputs


def _nearest_calls(start: GradFn | None, results: dict[GradFn | None, int]) -> set[int]:
    """Return the numbers of the calls that an autograd node depends on without another call in between."""
    found: set[int] = set()
    seen: set[GradFn] = set()
    waiting = [start]
    while waiting:
        grad_fn = waiting.pop()
        if grad_fn is None or grad_fn in seen:
            continue
        seen.add(grad_fn)
        if grad_fn in results:
            found.add(results[grad_fn])
        else:
            waiting += [before for before, _ in grad_fn.next_functions]
    return found

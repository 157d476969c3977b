"""Which operation first made a number that is not finite, forwards or backwards.

Nothing is looked at until a loss or a gradient is broken. Then the pass is computed again from its tape, on copies, and
looked at as it goes. An infinity that comes from outside (a mask) is on purpose until something makes NaN of it.
"""

from __future__ import annotations

import logging
import math
import re
from contextlib import closing
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any
from weakref import ref

import torch
from torch import Tensor

from gradflow import statistics
from gradflow.recorder.hooks import undisturbed
from gradflow.recorder.measurable import measurable
from gradflow.schema import OUTSIDE
from gradflow.tracing.tape import CUSTOM, Program

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

    from torch.utils.hooks import RemovableHandle

    from gradflow.tracing.tape import Note, Tape

    Gradients = tuple[Tensor | None, ...]

log = logging.getLogger("gradflow")
_UNSEEN = "it came out of code whose operations are not seen"
_WORD = re.compile(r"(?<=[a-z])(?=[A-Z])")


@dataclass(frozen=True, slots=True)
class Origin:
    """Where numbers stopped being finite; without an `operation` it could not be told, and `reason` says why."""

    direction: str
    operation: str
    module: str
    n: int = 0
    nonfinite: int = 0
    reason: str = ""


def broken(tensor: Tensor | None) -> int:
    """NaN and infinite elements of a tensor in the host's memory; 0 for any other."""
    seen = None if tensor is None or not (tensor.is_floating_point() or tensor.is_complex()) else measurable(tensor)
    if seen is None or seen.device.type != "cpu":
        return 0
    return int(statistics.measure(seen, ("square", "nonfinite"))["nonfinite"])


@dataclass(frozen=True, slots=True)
class Output:
    """What a module gave: its key on the tape, after how many notes, and what wants to know of it."""

    key: int
    after: int
    use: Callable[[Tensor], None]


class Pass:
    """A pass that is over, as its tape had it, and its loss."""

    def __init__(self, tape: Tape, loss: Tensor, on_error: Callable[[Exception], None]) -> None:
        self._program = Program(tape)
        self._loss = ref(loss)
        self._custom = _CustomFunctions(tape.custom, on_error)

    def watch(self) -> None:
        """Its backward pass is about to run."""
        self._custom.watch()

    def close(self) -> None:
        """Its backward pass is over."""
        self._custom.close()

    # ------------------------------------------------------------------ forwards

    def forwards(self, owners: Mapping[int, str], outputs: Iterable[Output]) -> Origin:
        """The operation that the first NaN or infinity in the loss came from; `outputs` are looked at on the way.

        `owners`: paths of the modules that own parameters and buffers, by `id` of the tensor.
        """
        search = _Search(self._program)
        waiting = list(outputs)
        keep = {id(self._loss), *(output.key for output in waiting)}
        with closing(self._program.run(keep=keep)) as steps:
            for at, note, results in steps:
                search.see(at, note, results)
                while waiting and waiting[0].after <= at + 1:
                    output = waiting.pop(0)
                    if output.key in self._program.values:
                        output.use(self._program.values[output.key])
        return search.origin(id(self._loss), owners)

    # ------------------------------------------------------------------ backwards

    def backwards(self) -> Origin:
        """The operation that was the first to send back a gradient that is not finite."""
        if self._custom.origin is not None:
            return self._custom.origin
        owner: dict[Any, Note] = {}
        seen = True
        with closing(self._program.run(grad=True, keep={id(self._loss)})) as steps:
            for _, note, results in steps:
                seen = seen and results is not None
                owner.update({result.grad_fn: note for result in results or () if result.grad_fn is not None})
            loss = self._program.values.get(id(self._loss))
            found = None if loss is None or loss.grad_fn is None else _first_sender(loss)
        if found is None:
            sure = seen and not self._custom.any
            told = "when the pass was computed again, all gradients were finite" if sure else _UNSEEN
            return Origin("backward", "", "", reason=told)
        of = _note_of(found.node, found.above, owner)
        named = (node_name(found.node), "") if of is None else (of.name, _module(of.scope))
        return Origin("backward", *named, found.n, found.nonfinite)


class _Search:
    """Follows broken numbers through a pass that runs again. Culprits are notes, given tensors, or None: on purpose."""

    def __init__(self, program: Program) -> None:
        self._program = program
        self._blame: dict[int, tuple[str, int] | None] = {}
        self._given: dict[int, bool | None] = {}
        self._counts: dict[int, tuple[int, int]] = {}
        self._unknown: set[int] = set()
        self._last: tuple[str, int] | None = None
        self._unseen = False

    def see(self, at: int, note: Note, results: list[Tensor] | None) -> None:
        """A note has run again."""
        made, read = note.made, note.read
        if results is None:
            self._unknown.update(made)
            return
        bad = [result for result in results if broken(result)]
        culprit = self._culprit(at, note, read, bad) if bad else None
        for key in made:
            self._blame.pop(key, None)
            self._unknown.discard(key)
        if not bad:
            return
        self._blame.update(dict.fromkeys(made, culprit))
        if culprit == ("note", at):
            self._counts[at] = (bad[0].numel(), broken(bad[0]))
        self._last = self._last or culprit

    def _culprit(self, at: int, note: Note, read: list[int], bad: list[Tensor]) -> tuple[str, int] | None:
        blamed = [self._blame[key] for key in read if key in self._blame]
        given = [key for key in read if key not in self._blame and self._is_given(key)]
        real = [culprit for culprit in blamed if culprit is not None]
        real += [("given", key) for key in given if self._given[key]]
        if real:
            return min(real)
        values = self._program.values
        if self._last and any(broken(values.get(key)) for key in {*read} - {*note.made} - {*given} - {*self._blame}):
            return self._last  # overwritten through a view
        on_purpose = blamed or given or any(map(math.isinf, _numbers((note.args, note.kwargs))))
        return None if on_purpose and not any(bool(torch.isnan(result).any()) for result in bad) else ("note", at)

    def _is_given(self, key: int) -> bool:
        """Whether a tensor from outside is broken; it is remembered whether by NaN."""
        if key not in self._given:
            tensor = self._program.given(key)
            bad = broken(tensor)
            self._given[key] = bool(torch.isnan(tensor.detach()).any()) if tensor is not None and bad else None
        return self._given[key] is not None

    def origin(self, goal: int, owners: Mapping[int, str]) -> Origin:
        """What is to blame for the tensor of a key."""
        culprit = self._blame.get(goal)
        if culprit is None:  # infinite on purpose, or not on the tape
            reason = "an infinity was put in on purpose" if goal in self._blame else _UNSEEN
            return Origin("forward", "", "", reason=reason)
        kind, which = culprit
        if kind == "given":
            return _from_outside(self._program.given(which), owners)
        note = self._program.notes[which]
        unread = not self._unknown.isdisjoint(note.read)
        return Origin(
            "forward", note.name, _module(note.scope), *self._counts[which],
            reason="not all that it read could be computed again" if unread else "",
        )  # fmt: skip


def _from_outside(tensor: Tensor | None, owners: Mapping[int, str]) -> Origin:
    """The blame of a tensor that the pass was given: a weight, a batch, or the result of something not seen."""
    if tensor is None:
        return Origin("forward", "", "", reason=_UNSEEN)
    n, nonfinite = tensor.numel(), broken(tensor.detach())
    if id(tensor) in owners:
        return Origin("forward", "parameter", owners[id(tensor)], n, nonfinite)
    return Origin("forward", "input" if tensor.grad_fn is None else node_name(tensor.grad_fn), "", n, nonfinite)


def _numbers(value: Any) -> Iterator[float]:
    """Numbers in noted arguments."""
    if isinstance(value, float):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _numbers(item)


def _module(scope: str | None) -> str:
    return OUTSIDE if scope is None else scope


@dataclass(frozen=True, slots=True)
class _Sender:
    """An autograd node that got finite gradients and sent one that is not; `above`: the nodes that send to each."""

    node: Any
    n: int
    nonfinite: int
    above: Mapping[Any, list[Any]]


def _broken_here(sent: Gradients, got: Gradients) -> Tensor | None:
    """The first gradient that a node sent broken, if it got none that is."""
    bad = next((each for each in sent if broken(each)), None)
    return None if bad is None or any(map(broken, got)) else bad


def _first_sender(loss: Tensor) -> _Sender | None:
    """The first node that breaks a gradient in the backward pass of a loss, which runs."""
    nodes: list[Any] = [loss.grad_fn]
    above: dict[Any, list[Any]] = {loss.grad_fn: []}
    for node in nodes:  # which grows meanwhile
        for child, _ in node.next_functions:
            if child is not None:
                if child not in above:
                    above[child] = []
                    nodes.append(child)
                above[child].append(node)
    found: list[_Sender] = []

    def look(at: int, sent: Gradients, got: Gradients) -> None:
        bad = None if found else _broken_here(sent, got)
        if bad is not None:
            found.append(_Sender(nodes[at], bad.numel(), broken(bad), above))

    handles = [node.register_hook(partial(look, at)) for at, node in enumerate(nodes)]
    try:
        loss.backward()  # type: ignore[no-untyped-call]
    except RuntimeError:
        log.debug("a backward pass could not be run again", exc_info=True)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def _note_of(node: Any, above: Mapping[Any, list[Any]], owner: Mapping[Any, Note]) -> Note | None:
    """The operation that a node is part of: the nearest towards the loss that gave a noted result."""
    queue = [node]
    for each in queue:  # which grows meanwhile
        if each in owner:
            return owner[each]
        queue += [sender for sender in above[each] if sender not in queue]
    return None


class _CustomFunctions:
    """The custom autograd functions of a pass: what they send back is looked at when it is sent, for they run once."""

    def __init__(self, nodes: Mapping[Any, str | None], on_error: Callable[[Exception], None]) -> None:
        self.origin: Origin | None = None
        self._on_error = on_error
        self._nodes = nodes
        self._handles: list[RemovableHandle] = []

    @property
    def any(self) -> bool:
        """Whether there are any."""
        return bool(self._nodes)

    def watch(self) -> None:
        """Hook them."""
        for node, scope in self._nodes.items():
            self._handles.append(node.register_hook(partial(self._look, node_name(node), _module(scope))))

    def _look(self, name: str, module: str, sent: Gradients, got: Gradients) -> None:
        try:
            with undisturbed():
                bad = None if self.origin is not None else _broken_here(sent, got)
                if bad is not None:
                    self.origin = Origin("backward", name, module, bad.numel(), broken(bad))
        except Exception as error:  # noqa: BLE001 (whatever it is, the backward pass goes on)
            self._on_error(error)

    def close(self) -> None:
        """Take every hook off."""
        while self._handles:
            self._handles.pop().remove()


def node_name(node: Any) -> str:
    """What an autograd node is the backward of: `InfiniteSlope` (a custom function's class), `log_softmax`."""
    name = str(node.name()).rpartition("::")[2].rstrip("0123456789").removesuffix("Backward")
    return name if isinstance(node, CUSTOM) else _WORD.sub("_", name).lower()

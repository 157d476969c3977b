"""What a pass computes, noted operation by operation, so that it can be computed again if its numbers turn out broken.

A tape keeps alive what a pass is given (batches, weights) and nothing that it makes. It is run again on copies, from
the same random state, as a program of PyTorch's own operations: no code of the model runs a second time.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack
from functools import cached_property, lru_cache
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn

from gradflow.tracing.operations import operation
from gradflow.tracing.reentrant import in_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Container, Generator, Iterator, Sequence

log = logging.getLogger("gradflow")
_MOST_NOTES = 200_000
CUSTOM = torch.autograd.function.BackwardCFunction
"""The autograd nodes of functions that are written in Python."""
_CHECKPOINT = "CheckpointFunctionBackward"
_RESULTS = (Tensor, tuple, list)
_FLAT = frozenset({int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size})
_BUILT_IN = (BuiltinFunctionType, MethodDescriptorType, MethodWrapperType, WrapperDescriptorType)
_no_functions = torch._C.DisableTorchFunction  # noqa: SLF001
_any_autocast = torch._C._is_any_autocast_enabled  # noqa: SLF001


class Note(NamedTuple):
    """One operation of a pass.

    Attributes:
        func: What was called.
        args: Its arguments, with weak references in the place of tensors.
        kwargs: Its keyword arguments, likewise.
        results: Weak references to the tensors that it gave.
        scope: Path of the module in whose forward it ran, None outside of the model.
        grad: Whether gradients are followed through it.
        autocast: Precision that autocast brought it to, if any.
    """

    func: Any
    args: Any
    kwargs: Any
    results: tuple[ref[Tensor], ...]
    scope: str | None
    grad: bool
    autocast: torch.dtype | None

    @property
    def name(self) -> str:
        """Canonical name of the operation."""
        name = operation(self.func).name
        return "div" if name == "rdiv" else name

    @property
    def read(self) -> list[int]:
        """Keys (identities of weak references) of the tensors that it read."""
        return [id(of) for of in _leaves((self.args, self.kwargs))]

    @property
    def made(self) -> list[int]:
        """Keys of its results; an operation in place gives what it read."""
        return [id(of) for of in self.results]


class Tape:
    """The operations of a pass.

    Attributes:
        scope: Path of the module whose forward is running, None outside of the model.
        given: Tensors that came from outside of it, by key, with the weak reference that the key stands for.
        custom: Autograd nodes of custom functions, and the modules that they ran in.
    """

    def __init__(self, on_error: Callable[[Exception], None]) -> None:
        self.scope: str | None = None
        self._on_error = on_error
        self.clear()

    def clear(self) -> None:
        """Begin anew; who holds the lists of the pass so far keeps them."""
        self._notes: list[tuple[Any, ...]] = []
        self.given: dict[int, tuple[ref[Tensor], Tensor]] = {}
        self.custom: dict[Any, str | None] = {}
        self.random: Tensor | None = None
        self._hidden: dict[int, str | None] = {}  # results of what autograd did not follow, and where it ran
        self._made: set[int] = set()

    def __len__(self) -> int:
        return len(self._notes)

    def run(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run an operation and note it (at every operation of a watched step)."""
        if self.random is None:
            self.random = torch.get_rng_state()
        out = func(*args, **kwargs)
        kind = type(out)
        if kind is Tensor or out is None or (kind is not torch.Size and isinstance(out, _RESULTS)):
            try:
                self._add(func, args, kwargs, out)
            except Exception as error:  # noqa: BLE001 (whatever it is, the model goes on)
                self._on_error(error)
        return out

    def _add(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> None:
        if not _computes(func) or len(self._notes) >= _MOST_NOTES or _draws(kwargs, args, out):
            return  # what it gave counts as given
        if type(out) is Tensor:
            results: tuple[ref[Tensor], ...] = (ref(out),)
        else:
            results = tuple([ref(tensor) for tensor in _results(func, args, out)])
        if not results:
            return
        made, hidden = self._made, self._hidden
        weak: list[Any] = []
        for value in args:
            kind = type(value)
            if kind is Tensor or kind is nn.Parameter:
                of = ref(value)
                if id(of) not in made or id(of) in hidden:
                    self._from_outside(of, value)
                weak.append(of)
            else:
                weak.append(value if kind in _FLAT else self._weak(value))
        grad = torch.is_grad_enabled() or in_checkpoint()
        self._notes.append((
            func, weak, self._weak(kwargs) if kwargs else kwargs, results, self.scope, grad,
            torch.get_autocast_dtype("cpu") if _any_autocast() and torch.is_autocast_enabled("cpu") else None,
        ))  # fmt: skip
        for of in results:
            made.add(id(of))
            if not grad:
                hidden[id(of)] = self.scope

    def _weak(self, value: Any) -> Any:
        """The value with weak references in the place of tensors."""
        if isinstance(value, Tensor):
            of = ref(value)
            if id(of) not in self._made or id(of) in self._hidden:
                self._from_outside(of, value)
            return of
        kind = type(value)
        if kind is tuple or kind is list:
            return kind([self._weak(item) for item in value])
        if kind is dict:
            return {key: self._weak(item) for key, item in value.items()}
        return value

    def _from_outside(self, of: ref[Tensor], tensor: Tensor) -> None:
        """A tensor is read that no followed operation has made: it is given, or a custom function's result."""
        key = id(of)
        if key in self.given:
            return
        if key not in self._made:
            self.given[key] = of, tensor
        scope = self._hidden.pop(key, self.scope)
        node = tensor.grad_fn
        if isinstance(node, CUSTOM) and node.name() != _CHECKPOINT:
            self.custom[node] = scope


Moment = tuple[int, Note, "list[Tensor] | None"]
"""Number of a note that has run again, itself, and its results; None if it cannot be run again."""


class Program:
    """A tape as it was at some moment, to be run again."""

    def __init__(self, tape: Tape) -> None:
        self._noted = tape._notes  # noqa: SLF001
        self._given = tape.given
        self._random = tape.random
        self.values: dict[int, Tensor] = {}

    @cached_property
    def notes(self) -> list[Note]:
        """The operations in order."""
        return [Note(*note) for note in self._noted]

    def given(self, key: int) -> Tensor | None:
        """The tensor that the pass was given under a key."""
        return self._given[key][1] if key in self._given else None

    def run(self, *, keep: Container[int], grad: bool = False) -> Generator[Moment, None, None]:
        """Run the notes in order, and stop after each.

        `values` holds the tensors by key as they are then, those to `keep` longer than they are needed. With `grad`
        autograd follows what it followed before.
        """
        last = {key: at for at, note in enumerate(self.notes) for key in (*note.read, *note.made)}
        self.values = {}
        with ExitStack() as stack:
            stack.enter_context(_no_functions())
            stack.enter_context(torch.random.fork_rng(devices=[]))
            if self._random is not None:
                torch.set_rng_state(self._random)
            for at, note in enumerate(self.notes):
                yield at, note, self._again(note, grad=grad and note.grad)
                for key in {*note.read, *note.made}:
                    if last[key] == at and key not in keep:
                        self.values.pop(key, None)

    def _again(self, note: Note, *, grad: bool) -> list[Tensor] | None:
        for key in note.read:
            if key not in self.values and key in self._given:
                given = self._given[key][1]
                self.values[key] = given.detach().clone().requires_grad_(given.requires_grad)
        results: list[Tensor] = []
        if not note.kwargs.get("generator") and all(key in self.values for key in note.read):
            try:
                results = self._called(note, grad=grad)
            except Exception:
                log.debug("%s could not be run again", note.name, exc_info=True)
        for key in note.made:
            self.values.pop(key, None)
        if len(results) != len(note.made):
            return None
        self.values.update(zip(note.made, results, strict=True))
        return results

    def _called(self, note: Note, *, grad: bool) -> list[Tensor]:
        casts = torch.autocast("cpu", note.autocast or torch.bfloat16, note.autocast is not None, cache_enabled=False)
        with torch.set_grad_enabled(grad), casts:
            args, kwargs = self._strong(note.args), self._strong(note.kwargs)
            return _results(note.func, args, note.func(*args, **kwargs))

    def _strong(self, value: Any) -> Any:
        """Noted arguments with tensors for weak references."""
        if type(value) is ref:
            return self.values[id(value)]
        if type(value) is dict:
            return {key: self._strong(item) for key, item in value.items()}
        return type(value)([self._strong(item) for item in value]) if type(value) in {tuple, list} else value


def _results(func: Any, args: Sequence[Any], out: Any) -> list[Tensor]:
    """The tensors that an operation gave: what it returned, or what it overwrote (`x[i] = y` returns None)."""
    if out is None:
        out = args[:1] if operation(func).inplace else ()
    return [tensor for tensor in ((out,) if isinstance(out, Tensor) else out) if isinstance(tensor, Tensor)]


def _leaves(value: Any) -> Iterator[ref[Tensor]]:
    """Weak references in noted arguments, in order."""
    if type(value) is ref:
        yield value
    elif type(value) in {tuple, list, dict}:
        for item in value.values() if type(value) is dict else value:
            yield from _leaves(item)


def _draws(kwargs: dict[str, Any], args: tuple[Any, ...], out: Any) -> bool:
    """Whether an operation makes its result with a random generator of the model's, which is not drawn from again."""
    return bool(kwargs) and kwargs.get("generator") is not None and not (args and out is args[0])


@lru_cache(maxsize=4096)
def _computes(func: Any) -> bool:
    """Whether an operation gives tensors and does nothing else: PyTorch's own, and no communication."""
    if operation(func).unseen:
        return False
    if isinstance(func, _BUILT_IN):
        return True
    if isinstance(func, FunctionType):
        return func.__module__.startswith("torch.") and not func.__module__.startswith("torch.distributed")
    return getattr(func, "namespace", None) == "aten"

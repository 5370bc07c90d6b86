"""What every call of an op goes through, and how an op becomes torch operators: written once for all rooms.

A room declares its op in ``op.py``. What the op takes and gives are two NamedTuples, whose docstrings are where shapes
and dtypes are written down; `Operator` makes the rest of them::

    OPERATOR = Operator(
        "verify_tree", VerifyTreeInputs, VerifiedPath, package=__package__,
        check=check, buffers=buffers, check_values=check_values, out_rule="be a triple (nodes, ...)",
    )

The public function turns its arguments into inputs and ends in ``return OPERATOR(inputs, out, backend, debug)``. From
there every call of every op takes the same way: types -> torch's dispatcher, where it has something to do -> structure
-> the caller's buffers, or new ones -> choice of a backend -> values -> the backend. Torch's fake tensors take the part
of it that reads no values. Nothing is written before all checks have passed.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from sequoia_kernels import checks
from sequoia_kernels.ops import backends

__all__ = ["Buffer", "Operator"]

Inputs = TypeVar("Inputs", bound=tuple[Any, ...])
Outputs = TypeVar("Outputs", bound=tuple[Any, ...])

# Annotation of a field -> its type in an operator's schema. Integers are symbolic, so that sizes may vary in a trace.
_SCHEMA_TYPES: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    list[Tensor]: "Tensor[]",
    list[Tensor | None]: "Tensor?[]",
    int: "SymInt",
    int | None: "SymInt?",
    list[int]: "SymInt[]",
    float: "float",
    float | None: "float?",
    bool: "bool",
    str: "str",
}

# Where a version of torch cannot tell how many modes want to see operators, there always seems to be one.
_num_dispatch_modes: Callable[[], int] = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)
_transform_level: Callable[[], int | None] = getattr(torch._C._functorch, "maybe_current_level", lambda: 0)

_library = torch.library.Library("sequoia", "FRAGMENT")


class Buffer(NamedTuple):
    """What an output looks like: contiguous where the op makes it, of any strides where the caller does."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    legend: str
    """names of the dimensions, as messages write them"""


class Operator(Generic[Inputs, Outputs]):
    """One op of the package.

    Args:
        name: of the op: its room, its public function and ``torch.ops.sequoia.<name>``.
        inputs: NamedTuple of what the op takes. Its first tensor says where the op runs.
        outputs: NamedTuple of the tensors that it gives; a field that may be None is one that is not always asked for.
            None for an op that writes to its inputs.
        package: dotted name of the room.
        check: raises unless types, dtypes, shapes, layouts, devices and options of inputs fit together. Reads no values
            of tensors, and takes fake tensors.
        buffers: what each output looks like, None for one that is not asked for.
        check_values: raises unless the values of inputs are in range. Called where reading them costs no wait, and
            under ``debug``.
        check_use: raises where values are in range, but nobody passes them on purpose: mistakes of decoding loops that
            would go on without a word. Called under ``debug`` only, on every device.
        out_rule: what the caller's buffers must be, as in ``out must <rule>``.
        out_names: how messages name these buffers; ``out.<field>`` unless given.
        mutated: fields of the inputs that the op writes to.
        launches: splits a call into the backends' calls, in their order; a call is one of its own unless given.

    Notes:
        The operators take the inputs' fields in order, then ``debug`` and ``backend``; ``<name>.out`` also the outputs.
        Ops with an output that may be None return a list.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        outputs: type[Outputs] | None = None,
        *,
        package: str | None,
        check: Callable[[Inputs], None],
        buffers: Callable[[Inputs], Sequence[Buffer | None]] = lambda inputs: (),
        check_values: Callable[[Inputs], None] = lambda inputs: None,
        check_use: Callable[[Any], None] = lambda launch: None,
        out_rule: str = "",
        out_names: Sequence[str] | None = None,
        mutated: Sequence[str] = (),
        launches: Callable[[Inputs], Sequence[Any]] | None = None,
    ) -> None:
        self.name = name
        self.check, self.buffers, self.check_values, self.launches = check, buffers, check_values, launches
        self.check_use = check_use
        self._inputs: Any = inputs
        self._outputs: Any = outputs
        self._out_rule = out_rule
        types = typing.get_type_hints(inputs)
        self._tensors = [(index, field, types[field]) for index, field in enumerate(types) if _is_tensor(types[field])]
        self._flags = [(index, field) for index, field in enumerate(types) if types[field] is bool]
        backends.register_room(name, package or "")

        letters = iter("abcdefgh")
        fields = [_field(field, kind, letters if field in mutated else None) for field, kind in types.items()]
        arguments = ", ".join([*fields, "bool debug", "str backend"])
        if outputs is None:
            self._operator = _define(f"{name}({arguments}) -> ()", self._run_in_place, self._fake_in_place)
            return
        kinds = typing.get_type_hints(outputs)
        self._out_names = list(out_names or (f"out.{field}" for field in kinds))
        returned = "Tensor[]" if Tensor | None in kinds.values() else f"({', '.join(['Tensor'] * len(kinds))})"
        written = ", ".join(_field(field, kind, letters) for field, kind in kinds.items())
        self._operator = _define(f"{name}({arguments}) -> {returned}", self._run, self._fake)
        self._out_operator = _define(f"{name}.out({arguments}, {written}) -> ()", self._run_out, self._fake_out)

    def __call__(self, inputs: Inputs, out: Any = None, backend: str = "auto", debug: bool = False) -> Outputs:
        """Run the op.

        Args:
            inputs: what it takes; types are checked here, all else behind the dispatcher.
            out: the caller's buffers, or None.
            backend: name of a backend, or "auto".
            debug: check values on devices other than the CPU, too, and how the op is used.
        """
        checks.check_options(self.name, backend, debug=debug)
        for index, name in self._flags:
            if type(inputs[index]) is not bool:
                checks.check_options(self.name, backend, **{name: inputs[index]})
        directly = _dispatcher_is_idle()
        for index, name, kind in self._tensors:
            value = inputs[index]
            if type(value) is not Tensor and (value is not None or kind is Tensor):
                checks.check_tensor(self.name, name, value)
                directly = False  # a subclass wants to see operators
        if directly and not _first_tensor(inputs).is_meta and (out is None or self._outputs is None):
            return self._execute(inputs, None, debug, backend)  # type: ignore[return-value]
        if self._outputs is None:
            self._operator(*inputs, debug, backend)
            return ()  # type: ignore[return-value]
        if out is None:
            return self._outputs(*self._operator(*inputs, debug, backend))
        if not isinstance(out, tuple) or len(out) != len(self._out_names):
            raise TypeError(f"{self.name}: out must {self._out_rule}, got {type(out).__name__}")
        for name, wanted, buffer in zip(self._out_names, self.buffers(inputs), out):
            if wanted is not None or buffer is not None:
                checks.check_tensor(self.name, name, buffer)
        self._out_operator(*inputs, debug, backend, *out)
        return self._outputs(*out)

    def new_outputs(self, inputs: Inputs) -> Outputs:
        """Allocate what the op would, for callers of a backend's own ``run``."""
        new_empty = _first_tensor(inputs).new_empty
        return self._outputs._make(
            [None if buffer is None else new_empty(buffer.shape, dtype=buffer.dtype) for buffer in self.buffers(inputs)]
        )

    def _execute(self, inputs: Inputs, outputs: Outputs | None, debug: bool, backend: str) -> Outputs | None:
        self.check(inputs)
        if outputs is not None:
            self._check_out(inputs, outputs)
            given = {name: inputs[index] for index, name, _ in self._tensors}
            checks.check_memory(self.name, dict(zip(self._out_names, outputs)), given)
        launches = (inputs,) if self.launches is None else self.launches(inputs)
        calls = [(self._choose(launch, backend), launch) for launch in launches]
        if self._outputs is not None:
            if outputs is None:
                outputs = self.new_outputs(inputs)
            if outputs[0].numel() == 0:  # no rows, no requests: nothing to look at either
                return outputs
        for chosen, launch in calls:
            if debug or not chosen.checks_values:
                self._check_readable(launch, debug)
            if debug:
                self.check_use(launch)
        for chosen, launch in calls:
            chosen.run(launch, outputs)
        return outputs

    def _choose(self, launch: Any, backend: str) -> backends.Backend:
        first = _first_tensor(launch)
        return backends.choose(self.name, backend, "cpu" if first.is_cpu else first.device.type, launch)

    def _check_readable(self, launch: Any, debug: bool) -> None:
        if debug or _first_tensor(launch).is_cpu:
            self.check_values(launch)

    def _check_out(self, inputs: Inputs, outputs: Outputs) -> None:
        device = _first_tensor(inputs).device
        for name, wanted, buffer in zip(self._out_names, self.buffers(inputs), outputs):
            if wanted is not None:
                checks.check_out(self.name, name, buffer, wanted.shape, wanted.dtype, device, wanted.legend)

    # The implementations of the torch operators: the arguments are those of the schema.

    def _run(self, *arguments: Any) -> Any:
        *inputs, debug, backend = arguments
        return _returned(self._execute(self._inputs(*inputs), None, debug, backend))

    def _fake(self, *arguments: Any) -> Any:
        inputs = self._inputs(*arguments[:-2])
        self.check(inputs)
        return _returned(self.new_outputs(inputs))

    def _run_out(self, *arguments: Any) -> None:
        inputs, outputs = self._split(arguments)
        *inputs, debug, backend = inputs
        self._execute(self._inputs(*inputs), self._outputs(*outputs), debug, backend)

    def _fake_out(self, *arguments: Any) -> None:
        inputs, outputs = self._split(arguments)
        inputs = self._inputs(*inputs[:-2])
        self.check(inputs)
        self._check_out(inputs, self._outputs(*outputs))

    def _split(self, arguments: tuple[Any, ...]) -> tuple[Any, Any]:
        border = len(arguments) - len(self._out_names)
        return arguments[:border], arguments[border:]

    def _run_in_place(self, *arguments: Any) -> None:
        self._run(*arguments)

    def _fake_in_place(self, *arguments: Any) -> None:
        self.check(self._inputs(*arguments[:-2]))


def _dispatcher_is_idle() -> bool:
    """Whether torch's dispatcher would do nothing but call the implementation: no gradients, modes, traces or vmap.

    A decoding step of a small model attends once a layer. On the demo pair (24 layers, a tree of 12 nodes, float32, one
    thread, `generate` with and without this in turn in one process, medians) the dispatcher costs 4 % of the loop.
    """
    return (
        not torch.compiler.is_compiling()
        and torch.is_inference_mode_enabled()
        and _num_dispatch_modes() == 0
        and _transform_level() is None
        and not torch.jit.is_tracing()
    )


def _is_tensor(kind: Any) -> bool:
    return kind in (Tensor, Tensor | None)


def _field(name: str, kind: Any, letters: Any) -> str:
    """An argument in a schema; one that is written is marked with a letter of its own."""
    schema_type = _SCHEMA_TYPES[kind]
    if letters is not None:
        schema_type = schema_type.replace("Tensor", f"Tensor({next(letters)}!)")
    return f"{schema_type} {name}"


def _first_tensor(values: tuple[Any, ...]) -> Tensor:
    for value in values:
        if isinstance(value, Tensor):
            return value
    raise AssertionError("an op has a tensor among its inputs")


def _returned(outputs: tuple[Any, ...] | None) -> list[Tensor]:
    return [output for output in outputs or () if output is not None]


def _define(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """Define an operator for every device and give its overload.

    ``torch.library.custom_op`` would do the same with several times the overhead a call.
    """
    name, _, overload = schema.partition("(")[0].partition(".")
    qualified = f"{name}.{overload}" if overload else name
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    _library.impl(qualified, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"sequoia::{qualified}", fake, lib=_library)
    return getattr(getattr(torch.ops.sequoia, name), overload or "default")

"""Data races inside one program of a kernel, found in its TTGIR: a buffer that threads both read and write, unordered.

Triton gives a load and a store of one tensor layouts of their own, so the thread that writes an element need not be the
one that read it. Threads of a program are ordered by a barrier only, by a value that crosses from the reading thread to
the writing one, or where both are the same thread. A pair of accesses is reported unless one of these holds:

- the same elements in the same layout, held by one warp each: the same thread reads and writes;
- the same elements, read before written, and what is written depends on what was read: the change of layout between
  the two passes through a barrier where it passes between warps;
- a barrier on every path from one to the other: `tl.debug_barrier()`, or a reduction of a tensor over all warps;
- an asynchronous copy is over, for every thread, after a wait and a barrier behind it.

Elements are the same when their addresses are computed alike. Addresses that differ in nothing but the iteration of a
loop are taken for disjoint, all others on one buffer for overlapping. Stores to other ranks' memory go by addresses
from a table, one buffer of their own here: tests/kernels/exchange/test_exchange_order.py orders those.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import pairwise

import attrs

Path = tuple[tuple[int, str], ...]
"""Ifs and loops around an operation, outermost first: line, and the branch or the iteration."""

TABLE = "memory at addresses from a table"
"""Buffer of every pointer that is made of an integer."""

POINTER_OPS = frozenset(
    "tt.addptr tt.splat tt.unsplat tt.broadcast tt.expand_dims tt.bitcast tt.reshape tt.trans tt.join tt.split tt.cat "
    "arith.select".split()
)
"""Operations that make pointers of pointers into the same buffers."""

BARRIERS = frozenset(("gpu.barrier", "ttg.barrier", "ttg.local_barrier"))
"""Every thread of the program arrives before one leaves."""

WAITS = frozenset(("ttg.async_wait", "ttng.wait_barrier", "ttng.async_tma_store_wait"))
"""An asynchronous copy is over for the thread that waits."""

ACCESSES = {
    "tt.load": "load",
    "tt.store": "store",
    "tt.atomic_rmw": "atomic",
    "tt.atomic_cas": "atomic",
    "ttg.async_copy_global_to_local": "async load",
    "ttng.async_tma_copy_global_to_local": "async load",
    "ttng.async_tma_gather": "async load",
    "ttng.async_tma_copy_local_to_global": "async store",
    "ttng.async_tma_scatter": "async store",
    "ttng.async_tma_reduce": "async store",
    "tt.elementwise_inline_asm": "atomic",
}
"""Operations that touch global memory at their first operand; assembly does when that is a pointer."""

UNKNOWN = frozenset(("tt.call", "cf.br", "cf.cond_br"))
"""Operations behind which accesses would be missed."""

VALUE = re.compile(r"%[\w-]+(?:#\d+)?")
RESULT = r"%[\w-]+(?::\d+)?"
LOCATION = re.compile(r" ?\bloc\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)")


@attrs.frozen
class Region:
    """A block of operations, and the names of its arguments."""

    arguments: tuple[str, ...]
    operations: tuple[Operation, ...]


@attrs.frozen
class Operation:
    """One operation as printed: `results = name operands : types`."""

    line: int
    results: tuple[str, ...]
    name: str
    head: str  # what stands between name and types
    types: str
    regions: tuple[Region, ...]


@attrs.frozen
class Value:
    """What is known of an SSA value."""

    term: int  # equal for values computed alike
    form: int  # the same, whatever the iterations of the loops around
    roots: frozenset[str] = frozenset()  # buffers a pointer may point into
    loads: frozenset[int] = frozenset()  # accesses it was computed from


@attrs.frozen(kw_only=True)
class Event:
    """An access, a barrier or a wait, in the order of the program."""

    kind: str  # load, store, atomic, async load, async store, barrier, wait
    path: Path
    address: Value = Value(-1, -1)
    layout: str = ""
    replicated: bool = False  # whether threads of several warps hold an element
    stored: frozenset[int] = frozenset()  # accesses that the stored value was computed from


def races(ttgir: str, same: Mapping[str, str] | None = None) -> list[str]:
    """Buffers that a program reads and writes in no order, one line each.

    same     argument -> argument, where callers pass one tensor (or its stride) as both
    Raises:  ValueError for an operation that this reader does not know and that takes a pointer.
    """
    text = LOCATION.sub("", ttgir)
    layouts = dict(re.findall(r"^(#\w+) = (.*)$", text, re.MULTILINE))
    warps = re.search(r'"ttg.num-warps" = (\d+)', text)
    if warps is None or text.count("tt.func ") != 1:
        raise ValueError("races: expected a module of one function with ttg.num-warps, got another; inline its calls")
    arguments, body = parse(text)
    walk = Walk(layouts=layouts, warps=int(warps[1]))
    same = same or {}
    unknown = [name for pair in same.items() for name in pair if f"%{name}" not in arguments]
    if unknown:
        raise ValueError(f"races: expected arguments of the kernel in `same`, got {unknown}; name them as it does")
    for name, kind in arguments.items():
        key = "%" + same.get(name[1:], name[1:])
        buffers = frozenset((key[1:],)) if re.match(r"!tt\.(ptr|tensordesc)", kind) else frozenset[str]()
        walk.values[name] = walk.value(key, (), roots=buffers)
    walk.run(body.operations, ())
    return walk.report()


# Text to operations


def parse(text: str) -> tuple[dict[str, str], Region]:
    """Arguments of the function with their types, and its body."""
    lines = [line.strip() for line in text.splitlines()]
    start = next(at for at, line in enumerate(lines) if line.startswith("tt.func "))
    signature = re.sub(r" ?\{[^{}]*\}", "", lines[start][lines[start].index("(") + 1 : lines[start].rindex(")")])
    arguments = dict(re.findall(r"(%[\w-]+): (.+?)(?=, %|$)", signature))
    region, _, _ = _region(lines, start + 1)
    return arguments, region


def _region(lines: Sequence[str], at: int) -> tuple[Region, str, int]:
    """Operations up to the line that closes the region, that line, and the number of the next."""
    arguments: tuple[str, ...] = ()
    operations: list[Operation] = []
    while not lines[at].startswith("}"):
        line = lines[at]
        if line.startswith("^bb0"):
            arguments = tuple(VALUE.findall(line))
            at += 1
        elif line.startswith("^"):
            raise ValueError(f"races: expected structured control flow, got the block {line}; use if and for")
        elif line:
            operation, at = _operation(lines, at)
            operations.append(operation)
        else:
            at += 1
    return Region(arguments, tuple(operations)), lines[at], at + 1


def _operation(lines: Sequence[str], at: int) -> tuple[Operation, int]:
    """The operation that begins on a line, with its regions, and the number of the line after it."""
    line = lines[at]
    matched = re.match(rf'(?:({RESULT}(?:, {RESULT})*) = )?"?([a-z_]+\.[\w.]+)"?(.*)$', line)
    if matched is None:
        raise ValueError(f"races: expected an operation of MLIR, got {line!r}; read it in `_operation`")
    named, name, rest = matched.groups()
    results = tuple(result for group in (named or "").split(", ") for result in _numbered(group))
    if name == "ttg.warp_specialize":
        return _specialized(lines, at, rest)
    regions: list[Region] = []
    opened, here, at = rest.endswith("{"), at, at + 1
    head, types = _split(rest.removesuffix("({").removesuffix("{"))
    while opened:
        region, closing, at = _region(lines, at)
        regions.append(region)
        opened = closing.endswith("{")
        if not opened and " : " in closing:
            types = closing.split(" : ", 1)[1]
    return Operation(here, results, name, head, types, tuple(regions)), at


def _specialized(lines: Sequence[str], here: int, rest: str) -> tuple[Operation, int]:
    """Warps that run regions of their own: those of the kernel, and others, whose last argument is their number."""
    regions: list[Region] = []
    at, closing = here + 1, "}"
    while closing == "}" and (not regions or lines[at].startswith("partition")):
        arguments = re.findall(r"(%[\w-]+): |num_warps\((\d+)\)", lines[at])
        region, closing, at = _region(lines, at + 1)
        regions.append(Region(tuple(name or number for name, number in arguments), region.operations))
    return Operation(here, (), "ttg.warp_specialize", rest[: rest.index(")")], "", tuple(regions)), at


def _numbered(group: str) -> Sequence[str]:
    """Names of the results that are printed as one: "%x:2" stands for %x#0 and %x#1."""
    name, _, number = group.partition(":")
    return [f"{name}#{at}" for at in range(int(number))] if number else [name] if name else []


def _split(text: str) -> tuple[str, str]:
    """What stands before and after the last colon outside of all brackets."""
    depth, at = 0, len(text)
    for place, (character, after) in enumerate(pairwise(text + " ")):
        if character in "([{<":
            depth += 1
        elif character in ")]}" or (character == ">" and text[place - 1] != "-"):
            depth -= 1
        elif character == ":" and after == " " and depth == 0:
            at = place
    return text[:at].strip(), text[at + 1 :].strip()


# Layouts


def layout_of(types: str, layouts: Mapping[str, str]) -> tuple[tuple[int, ...], str]:
    """Shape and layout of the first tensor of a type, names resolved; ((), "") for a scalar."""
    matched = re.match(r"\(?tensor<((?:\d+x)+)(?:!tt\.ptr<[^>]*>|\w+), ", types)
    if matched is None:
        return (), ""
    depth, end = 0, matched.end()
    while depth or types[end] != ">":
        depth += {"<": 1, ">": -1}.get(types[end], 0)
        end += 1
    shape = tuple(int(size) for size in matched[1].split("x")[:-1])
    return shape, _resolved(types[matched.end() : end], layouts)


def _resolved(layout: str, layouts: Mapping[str, str]) -> str:
    return re.sub(r"#\w+(?![\w.])", lambda name: _resolved(layouts[name[0]], layouts), layout)


def replicated(shape: Sequence[int], layout: str, warps: int) -> bool:
    """Whether threads of several warps hold the same element."""
    return warps > 1 and (not shape or _warps(layout, shape) < warps)


def _warps(layout: str, shape: Sequence[int]) -> int:
    """Warps that hold elements which no other of them holds."""
    kind = layout.split("<", 1)[0]
    if kind == "#ttg.slice":
        matched = re.fullmatch(r"#ttg\.slice<\{dim = (\d+), parent = (.*)\}>", layout)
        if matched is None:
            raise ValueError(f"races: expected a slice of a layout, got {layout}; read it in `_warps`")
        dim = int(matched[1])
        return _warps(matched[2], (*shape[:dim], 1, *shape[dim:]))
    if kind == "#ttg.linear":
        bases = re.findall(r"\[([\d, ]+)\]", layout.split("warp = ")[1].split("block = ")[0])
        crossing = [basis for basis in bases if any(int(x) % n for x, n in zip(basis.split(","), shape, strict=True))]
        return 1 << len(crossing)
    if kind == "#ttg.blocked":
        sizes = [_numbers(layout, key) for key in ("sizePerThread", "threadsPerWarp")]
        tile = [size * threads for size, threads in zip(*sizes, strict=True)]
    elif kind == "#ttg.nvidia_mma":
        tile = _numbers(layout, "instrShape")[: len(shape)]
    else:
        raise ValueError(f"races: expected a blocked, slice, linear or nvidia_mma layout, got {layout}; add it here")
    total = 1
    for size, per_warp, number in zip(shape, tile, _numbers(layout, "warpsPerCTA"), strict=True):
        total *= min(number, max(1, size // per_warp))
    return total


def _numbers(layout: str, key: str) -> list[int]:
    matched = re.search(rf"{key} = \[([\d, ]+)\]", layout)
    if matched is None:
        raise ValueError(f"races: expected {key} in a layout, got {layout}; read it in `_warps`")
    return [int(number) for number in matched[1].split(",")]


# Operations to accesses


@attrs.define(kw_only=True)
class Walk:
    """One pass over a function: values by name, and what happened in order. The body of a loop is walked twice."""

    layouts: Mapping[str, str]
    warps: int
    values: dict[str, Value] = attrs.field(factory=dict)
    events: list[Event] = attrs.field(factory=list)
    terms: dict[tuple[object, ...], int] = attrs.field(factory=dict)

    def value(
        self,
        text: str,
        operands: Sequence[Value],
        *,
        iteration: str = "",
        roots: frozenset[str] = frozenset(),
        loads: frozenset[int] = frozenset(),
    ) -> Value:
        """A value computed by `text` from others; with `iteration`, another one in each."""

        def term(*key: object) -> int:
            return self.terms.setdefault(key, len(self.terms))

        return Value(
            term(text, iteration, *(operand.term for operand in operands)),
            term(text, "", *(operand.form for operand in operands)),
            roots,
            loads.union(*(operand.loads for operand in operands)),
        )

    def operands(self, operation: Operation) -> list[Value]:
        text = re.sub(r'"[^"]*"', "", operation.head)
        return [self.values[name] for name in VALUE.findall(text)]

    def run(self, operations: Sequence[Operation], path: Path) -> list[Value]:
        """Walk operations; the values that the last of them yields."""
        for operation in operations:
            if operation.name in ("scf.for", "scf.while"):
                self.loop(operation, path)
            elif operation.name == "scf.if":
                self.branches(operation, path)
            elif operation.name == "ttg.warp_specialize":
                self.partitions(operation, path)
            elif operation.name == "scf.yield":
                return self.operands(operation)
            elif operation.name == "scf.condition":
                return self.operands(operation)[1:]
            else:
                self.simple(operation, path)
        return []

    def branches(self, operation: Operation, path: Path) -> None:
        """An if: one region or the other."""
        condition = self.operands(operation)
        yielded = [
            self.run(region.operations, (*path, (operation.line, name)))
            for region, name in zip(operation.regions, ("then", "else"), strict=False)
        ]
        for name, *chosen in zip(operation.results, *yielded, strict=True) if operation.results else ():
            roots = frozenset[str]().union(*(value.roots for value in chosen))
            self.values[name] = self.value(f"if {operation.line} {name}", [*condition, *chosen], roots=roots)

    def partitions(self, operation: Operation, path: Path) -> None:
        """Regions that run side by side: nothing orders their accesses, so none may store what another one touches."""
        captured, warps = self.operands(operation), self.warps
        for number, region in enumerate(operation.regions):
            self.warps = int(region.arguments[-1]) if number else warps
            self.values.update(zip(region.arguments, captured, strict=False))
            self.run(region.operations, (*path, (operation.line, f"warps {number}")))
        self.warps = warps

    def loop(self, operation: Operation, path: Path) -> None:
        """A loop: until it is known which buffers its arguments may point into, then two iterations."""
        name = VALUE.pattern
        carried = re.findall(rf"({name}) = ({name})(?=[,)])", operation.head)
        initial = [self.values[value] for _, value in carried]
        roots = [value.roots for value in initial]
        bounds = re.match(rf"{name} = {name} to {name} step {name}", operation.head)
        key = f"loop {operation.line}"

        def iterate(iteration: str, entering: Sequence[Value]) -> tuple[list[Value], list[Value]]:
            """Values that leave the loop, and those that enter the next iteration."""
            inside = (*path, (operation.line, iteration))
            for at, (argument, _) in enumerate(carried):
                self.values[argument] = self.value(
                    f"{key} {at}", [initial[at]], iteration=iteration, roots=roots[at], loads=entering[at].loads
                )
            if bounds is not None:
                counter, *limits = VALUE.findall(bounds[0])
                self.values[counter] = self.value(key, [self.values[limit] for limit in limits], iteration=iteration)
                yielded = self.run(operation.regions[0].operations, inside)
                return yielded, yielded
            before, body = operation.regions
            leaving = self.run(before.operations, inside)
            self.values.update(zip(body.arguments, leaving, strict=True))
            return leaving, self.run(body.operations, inside)

        while True:
            mark = len(self.events)
            _, yielded = iterate("", initial)
            del self.events[mark:]
            grown = [known | value.roots for known, value in zip(roots, yielded, strict=True)]
            if grown == roots:
                break
            roots = grown
        _, first = iterate("first", initial)
        entering = [
            attrs.evolve(value, loads=value.loads | after.loads) for value, after in zip(initial, first, strict=True)
        ]
        leaving, _ = iterate("second", entering)
        for at, (result, value) in enumerate(zip(operation.results, leaving, strict=True)):
            sources = [value, initial[at]] if bounds is not None else [value]
            held = frozenset[str]().union(*(source.roots for source in sources))
            self.values[result] = self.value(f"{key} result {at}", sources, roots=held)

    def simple(self, operation: Operation, path: Path) -> None:
        """An operation without control flow."""
        name, operands = operation.name, self.operands(operation)
        if name == "ttg.convert_layout":
            self.values[operation.results[0]] = operands[0]
            return
        shape, layout = layout_of(operation.types, self.layouts)
        roots, loads = frozenset[str]().union(*(operand.roots for operand in operands)), frozenset[int]()
        if name in ACCESSES and (roots or name != "tt.elementwise_inline_asm"):
            address = operands[0]
            coordinates = re.match(r"%[\w-]+\[([^\]]*)\]", operation.head)
            if coordinates is not None:
                chosen = [self.values[value] for value in VALUE.findall(coordinates[1])]
                address = self.value("block", [address, *chosen], roots=address.roots)
            if not address.roots:
                raise ValueError(f"races: expected a pointer of known origin, got {name} {operation.head}; follow it")
            loads = frozenset((len(self.events),))
            event = Event(
                kind=ACCESSES[name],
                path=path,
                address=address,
                layout=f"{shape} {layout}" if shape else "a scalar",
                replicated=replicated(shape, layout, self.warps),
                stored=frozenset[int]().union(*(operand.loads for operand in operands)),
            )
            self.events.append(event)
            roots = frozenset[str]()
        elif name in BARRIERS or (name == "tt.reduce" and self.reduces_over_warps(operation, shape, layout)):
            self.events.append(Event(kind="barrier", path=path))
        elif name in WAITS:
            self.events.append(Event(kind="wait", path=path))
        elif name == "tt.int_to_ptr":
            roots = frozenset((TABLE,))
        elif name == "tt.ptr_to_int":
            roots = frozenset[str]()  # a number; a pointer made of it would be one from a table
        elif roots and name not in POINTER_OPS:
            raise ValueError(f"races: expected an operation known to take a pointer, got {name}; say what it does")
        elif name in UNKNOWN:
            raise ValueError(f"races: expected operations that it can follow, got {name}; follow it")
        text = f"{name} {VALUE.sub('%', operation.head)} {shape}"
        for number, result in enumerate(operation.results):
            self.values[result] = self.value(f"{text} {number}", operands, roots=roots, loads=loads)

    def reduces_over_warps(self, operation: Operation, shape: tuple[int, ...], layout: str) -> bool:
        """Whether partial sums of all warps meet in shared memory, where there is a barrier between."""
        scalar = "tensor<" not in operation.types.split(" -> ")[1]
        return scalar and self.warps > 1 and not replicated(shape, layout, self.warps)

    def report(self) -> list[str]:
        """Pairs of accesses in no order, each once."""
        lines = dict.fromkeys(
            f"{', '.join(sorted(one.address.roots & other.address.roots))}: {one.kind} in {one.layout}, then "
            f"{other.kind} in {other.layout}, with neither a barrier nor the value between them"
            for earlier, one in enumerate(self.events)
            for later, other in enumerate(self.events[earlier + 1 :], earlier + 1)
            if conflicts(one, other) and not self.ordered(earlier, later)
        )
        return list(lines)

    def ordered(self, earlier: int, later: int) -> bool:
        """Whether every thread's earlier access is over before any thread's later one."""
        one, other = self.events[earlier], self.events[later]
        if beside(one, other):
            return False
        marks = [
            event.kind
            for event in self.events[earlier:later]
            if event.kind in ("wait", "barrier") and (within(one, event) or within(other, event))
        ]
        if one.kind.startswith("async"):
            return "wait" in marks and "barrier" in marks[marks.index("wait") :]
        if "barrier" in marks:
            return True
        if other.kind.startswith("async"):
            return False
        if self.warps == 1:
            return True
        if one.address.term != other.address.term or one.replicated or other.replicated:
            return False
        return one.layout == other.layout or (one.kind == "load" and earlier in other.stored)


def beside(one: Event, other: Event) -> bool:
    """Whether other warps make the other access, at a time of their own."""
    both = zip(one.path, other.path, strict=False)
    return any(mine[0] == its[0] and mine != its and mine[1].startswith("warps") for mine, its in both)


def within(access: Event, mark: Event) -> bool:
    """Whether a barrier or wait is passed whenever the access is made."""
    return access.path[: len(mark.path)] == mark.path


def conflicts(one: Event, other: Event) -> bool:
    """Whether two accesses may touch one element, and one of them reads and one writes."""
    kinds = (one.kind, other.kind)
    if not one.address.roots & other.address.roots or kinds in (("atomic", "atomic"), ("store", "store")):
        return False
    if not any("store" in kind or kind == "atomic" for kind in kinds) or kinds == ("async store", "async store"):
        return False
    if one.address.form == other.address.form and one.address.term != other.address.term:
        return False  # the same access in another iteration
    for (line, here), (other_line, there) in zip(one.path, other.path, strict=False):
        if (line, here) != (other_line, there):
            return not (line == other_line and {here, there} == {"then", "else"})
    return True

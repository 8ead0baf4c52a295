"""What a compiled program says of itself: pure functions on the text of its optimised HLO.

A loop's body is written once; here it counts as often as it runs.
"""

from collections import Counter
from collections.abc import Collection, Iterator
import dataclasses
import re

# Bytes and steps are of one device: the text is the program that each of them runs.
COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-broadcast", "collective-permute", "ragged-all-to-all",
    "reduce-scatter",
)  # fmt: skip
# Instructions whose computations run as programs of their own; others' (a fusion's) are a part of the instruction.
_CONTROL = ("while", "call", "conditional", "async-start")

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) (?:\(.*)?\{$")
_NAME = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = ")
_OPCODE = re.compile(r" ?([\w\-]+)\(")
_OPERAND = re.compile(r"(?:^|[\s,/])%?([A-Za-z_][\w.\-]*)(?=,|$)")
_ARRAY = re.compile(r"\b([a-z]+)(\d*)[a-z\d]*\[([\d,<=]*)\]")
_CALLEES = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation|branch_computations|called_computations)="
    r"(\{[^}]*\}|%?[\w.\-]+)"
)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line: ``name = shape opcode(operands), attributes``.

    ``operands`` are the names of others, ``arguments`` the text in the parentheses, which a constant's value is.
    """

    name: str
    shape: str
    opcode: str
    arguments: str
    attributes: str

    @property
    def operands(self) -> list[str]:
        """Names of the instructions whose results it takes."""
        return _OPERAND.findall(self.arguments)

    def attribute(self, pattern: str) -> str | None:
        """What the pattern's group finds among the attributes."""
        match = re.search(pattern, self.attributes)
        return match and match[1]


@dataclasses.dataclass(frozen=True)
class Program:
    """``computations`` by name, each with its instructions by name; ``entry`` is the one that is run."""

    entry: str
    computations: dict[str, dict[str, Instruction]]


def parse(text: str) -> Program:
    """Reads a module's text, as of ``compiled.as_text()``."""
    computations, entry, current = {}, "", None
    for line in text.splitlines():
        if header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
        elif current is not None and (match := _NAME.match(line)):
            instruction = _instruction(match[1], line[match.end() :])
            current[instruction.name] = instruction
    return Program(entry, computations)


def _instruction(name: str, rest: str) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    opcode = _OPCODE.match(rest, end)
    close = _closing(rest, opcode.end() - 1)
    return Instruction(name, rest[:end], opcode[1], rest[opcode.end() : close], rest[close + 1 :])


def _closing(text: str, start: int) -> int:
    """Where the parenthesis that opens at ``start`` closes."""
    depth = 0
    for place in range(start, len(text)):
        depth += {"(": 1, ")": -1}.get(text[place], 0)
        if not depth:
            return place
    return len(text)


def shape_bytes(shape: str) -> int:
    """Bytes of an array or of a tuple's arrays together, without what tiles are filled up with."""
    return sum(size for _, size in _arrays(shape))


def dimensions(shape: str) -> list[int]:
    """The sizes of a (single) array."""
    return _arrays(shape)[0][0]


def _arrays(shape: str) -> list[tuple[list[int], int]]:
    found = []
    for kind, bits, sizes in _ARRAY.findall(shape):
        sizes = [int(size.lstrip("<=")) for size in sizes.split(",") if size]
        count = 1
        for size in sizes:
            count *= size
        width = 8 if kind == "pred" else int(bits or 0)
        found.append((sizes, -(-count * width // 8)))
    return found


def trips(loop: Instruction, program: Program) -> int | None:
    """How often a ``while`` runs: as the compiler notes, or by the one bound that its condition compares with.

    JAX's loops count up from zero by one (``scan``, ``fori_loop`` from 0); None where that is not what is found.
    """
    known = loop.attribute(r'known_trip_count[^\d}]*"?n"?:"?(\d+)')
    if known:
        return int(known)
    condition = list(program.computations.get(loop.attribute(r"condition=%?([\w.\-]+)"), {}).values())
    for name in [name for instruction in condition for name in _callees(instruction)]:  # It may be fused.
        condition += program.computations.get(name, {}).values()
    bounds = [i.arguments for i in condition if i.opcode == "constant" and re.match(r"[su](32|64)\[\]", i.shape)]
    below = any(i.opcode == "compare" and "direction=LT" in i.attributes for i in condition)
    return int(bounds[0]) if below and len(bounds) == 1 and bounds[0].isdecimal() else None


def _callees(instruction: Instruction) -> list[str]:
    if instruction.opcode.endswith(("-done", "-update")):  # Of what their start has called.
        return []
    return [
        name.strip().lstrip("%")
        for group in _CALLEES.findall(instruction.attributes)
        for name in group.strip("{}").split(",")
    ]


def executions(program: Program, through: Collection[str] | None = None) -> Counter[str]:
    """How often each computation runs; a loop whose trips are unknown once, and of branches all.

    Args:
      program: of ``parse``.
      through: opcodes whose computations are followed; all when not given.
    """
    counts: Counter[str] = Counter()

    def visit(name: str, times: int) -> None:
        counts[name] += times
        for instruction in program.computations.get(name, {}).values():
            if through is None or instruction.opcode in through:
                repeats = (trips(instruction, program) or 1) if instruction.opcode == "while" else 1
                for callee in _callees(instruction):
                    visit(callee, times * repeats)

    visit(program.entry, 1)
    return counts


def instructions(
    program: Program, through: Collection[str] | None = None
) -> Iterator[tuple[Instruction, dict[str, Instruction], int]]:
    """Every instruction that runs, with its computation and how often."""
    for name, times in executions(program, through).items():
        computation = program.computations.get(name, {})
        for instruction in computation.values():
            yield instruction, computation, times


def estimated_cycles(program: Program) -> int | None:
    """The compiler's estimates together: cycles of the core's clock a device works; None where it made none.

    Collectives and copies beside the computation are not among them.
    """
    found = [
        times * int(cycles)
        for instruction, _, times in instructions(program, _CONTROL)
        if (cycles := instruction.attribute(r'"estimated_cycles":"(\d+)"'))
    ]
    return sum(found) if found else None


@dataclasses.dataclass(frozen=True)
class Collective:
    """One exchange between devices: its kind, the bytes of what each device gives or gets (the more of the two), and
    how often it runs.
    """  # fmt: skip

    kind: str
    bytes: int
    times: int


def collectives(program: Program) -> list[Collective]:
    """The exchanges of a step; one that is started here and ended there is one."""
    found = []
    for instruction, computation, times in instructions(program):
        kind = instruction.opcode.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        given = sum(shape_bytes(computation[name].shape) for name in instruction.operands if name in computation)
        got = shape_bytes(instruction.shape)
        if instruction.opcode != kind and kind != "all-reduce":  # These starts' results hold their operands too.
            got -= given
        found.append(Collective(kind, max(given, got), times))
    return found

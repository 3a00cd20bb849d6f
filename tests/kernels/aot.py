"""What the compiler makes of a kernel for a GPU that is not here: registers, spills, memory, instructions, data races.

`compile_all` starts one process without the interpreter for all kernels it is given. To look at a kernel by hand, give
the same requests as JSON: `python -m tests.kernels.aot < requests.json`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import attrs

from tests.kernels.races import races
from tests.kernels.registers import overwritten

TARGETS = (90, 100)
"""Compute capabilities that nmoe supports, times ten."""

SHARED_LIMIT = 232_448
"""Bytes of shared memory a block may have, on both targets."""

TENSOR_LIMIT = 512
"""Columns of tensor memory; beyond them Triton 3.6 emits an empty kernel and reports success."""


@attrs.frozen(kw_only=True)
class Request:
    """One kernel at one set of compile-time values.

    kernel     "nmoe.effects.kernels.norm:forward_kernel"
    signature  type of every run-time argument: "*bf16", "*fp32", "i32", "fp32", "tensordesc<bf16[128,64]>";
               of a kernel of Gluon a descriptor with its layout, "tensordesc<bf16[128, 64],NVMMASharedLayout(...)>"
    constants  value of every constexpr argument, and of arguments that are None or 1
    aligned    arguments that are multiples of 16: pointers and strides; None: every pointer
    same       argument -> argument, where the kernel is launched with one tensor, or its stride, as both
    """

    kernel: str
    signature: Mapping[str, str]
    constants: Mapping[str, Any] = attrs.field(factory=dict)
    aligned: Sequence[str] | None = None
    warps: int = 4
    stages: int = 3
    libraries: Mapping[str, str] = attrs.field(factory=dict)  # name and path of bitcode to link with
    same: Mapping[str, str] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Compiled:
    """What one kernel became on one target."""

    kernel: str
    target: int  # 90 or 100
    registers: int  # of a thread
    stack: int  # bytes of a thread
    spills: int  # loads and stores of local memory, instructions
    shared: int  # bytes of a block
    tensor: int  # columns of tensor memory
    scratch: int  # bytes of global scratch
    wgmma: int  # tensor-core instructions of sm_90, HGMMA and its kin
    tcgen05: int  # those of sm_100, UTC*MMA
    mma: int  # the old ones, HMMA and its kin: slow on both targets
    wide: int  # global loads and stores of 16 bytes or more a thread, bulk copies included
    narrow: int  # all others
    atomics: int
    races: list[str]  # buffers read and written in no order, tests/kernels/races.py
    outlived: list[str]  # left operands of products that stay in registers from step to step of a loop
    unfenced: list[str]  # what threads read, given back to asynchronous copies without a fence
    overwritten: list[str]  # instructions that write registers of a product under way, tests/kernels/registers.py
    serialized: list[str]  # why products of sm_90 wait for one another, in ptxas's words
    ptx: str = attrs.field(repr=False)
    sass: str = attrs.field(repr=False)

    def problems(self, *, spills: int = 0, tensor_cores: bool = False) -> list[str]:
        """Why the kernel must not ship: races, overwritten operands, too much memory or spills, slow products."""
        found = [f"data race: {race}" for race in self.races]
        found += [f"left operand {name} of a product is in registers since before its loop" for name in self.outlived]
        found += [f"{name}: read by threads, given back to TMA without fence_async_shared" for name in self.unfenced]
        found += [f"written while a product that has it is under way: {each}" for each in self.overwritten[:3]]
        if self.shared > SHARED_LIMIT:
            found.append(f"{self.shared} bytes of shared memory, limit {SHARED_LIMIT}")
        if self.tensor > TENSOR_LIMIT:
            found.append(f"{self.tensor} columns of tensor memory, limit {TENSOR_LIMIT}")
        if self.spills > spills:
            found.append(f"{self.spills} spill instructions, limit {spills}")
        found += [f"products wait for one another: {reason}" for reason in self.serialized]
        if tensor_cores and not (self.wgmma if self.target < 100 else self.tcgen05):
            found.append("no tensor-core instruction of its generation")
        return [f"{self.kernel} on sm_{self.target}: {problem}" for problem in found]


def compile_all(requests: Sequence[Request], cache: Path, *, targets: Sequence[int] = TARGETS) -> list[Compiled]:
    """Every kernel for every target: all of `requests` for the first target, then for the next.

    cache    folder that Triton may fill
    Raises:  RuntimeError with the compiler's words when a kernel does not compile.
    """
    told = json.dumps({"targets": list(targets), "requests": [attrs.asdict(each) for each in requests]})
    kept = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.aot"],
        input=told,
        env={**kept, "TRITON_CACHE_DIR": str(cache)},
        cwd=Path(__file__).resolve().parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"ahead-of-time compilation failed:\n{done.stderr[-4000:]}")
    return [Compiled(**each) for each in json.loads(done.stdout.splitlines()[-1])]


def compile_one(request: Request, target: int) -> Compiled:
    """One kernel on one target, in a process that does not interpret."""
    import triton
    import triton.knobs
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource, GluonJITFunction

    module, name = request.kernel.split(":")
    kernel = getattr(importlib.import_module(module), name)
    order = list(kernel.arg_names)
    unknown = [each for each in order if each not in request.signature and each not in request.constants]
    if unknown:
        raise ValueError(f"{request.kernel}: every argument has a type or a value, got none for {unknown}")
    fixed = {each.name for each in kernel.params if each.is_constexpr}
    varying = [each for each, value in request.constants.items() if each not in fixed and value not in (None, 1)]
    if varying:
        raise ValueError(f"{request.kernel}: a launch passes {varying} at run time; give a type, got a value")
    aligned = request.aligned
    if aligned is None:
        aligned = [each for each in order if request.signature.get(each, "").startswith("*")]
    source = (GluonASTSource if isinstance(kernel, GluonJITFunction) else ASTSource)(
        fn=kernel,
        signature={each: "constexpr" if each in request.constants else request.signature[each] for each in order},
        constexprs={(order.index(each),): value for each, value in request.constants.items()},
        attrs={(order.index(each),): [["tt.divisibility", 16]] for each in aligned},
    )
    options: dict[str, Any] = {"num_warps": request.warps, "num_stages": request.stages}
    if request.libraries:
        options["extern_libs"] = dict(request.libraries)
    with redirect_stdout(StringIO()) as said, triton.knobs.nvidia.scope():
        triton.knobs.nvidia.dump_ptxas_log = True
        built = triton.compile(source, target=GPUTarget("cuda", target, 32), options=options)
    tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(built.asm["cubin"])
        file.flush()
        usage = read(tools / "cuobjdump", "-res-usage", file.name)
        sass = read(tools / "cuobjdump", "-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"{request.kernel}: cuobjdump tells registers and stack, got {usage!r}")
    metadata: Any = built.metadata
    return Compiled(
        kernel=request.kernel,
        target=target,
        registers=int(found[1]),
        stack=int(found[2]),
        shared=metadata.shared,
        tensor=getattr(metadata, "tmem_size", 0) or 0,
        scratch=metadata.global_scratch_size,
        races=races(built.asm["ttgir"], request.same),
        outlived=outlived(built.asm["ttgir"]),
        unfenced=unfenced(built.asm["ttgir"]),
        overwritten=overwritten(sass),
        serialized=serialized(said.getvalue()),
        ptx=built.asm["ptx"],
        sass=sass,
        **counts(sass),
    )


def serialized(said: str) -> list[str]:
    """Why products of sm_90 wait for one another, of what ptxas said."""
    return re.findall(r" are serialized due to (.*?) (?:in|for) (?:the )?function", said)


def outlived(ttgir: str) -> list[str]:
    """Left operands of wgmma in registers that were made before the innermost loop around it.

    ptxas of Triton 3.6 may give such registers to another value within the loop: from the second step on the product is
    wrong, and neither the interpreter nor PTX shows it (docs/log.md, 2026-11-28).
    """
    found: list[str] = []
    scopes: list[tuple[bool, set[str]]] = [(False, set())]  # whether a scope is a loop, and the values made in it
    for line in ttgir.splitlines():
        code = re.sub(r"\s*loc\([^()]*\)", "", line).strip()
        if code.startswith("}"):
            scopes.pop()
        product = re.search(r"ttng\.warp_group_dot (%\w+).* : tensor<", code)
        loops = [place for place, (loop, _) in enumerate(scopes) if loop]
        if product and loops and not any(product[1] in names for _, names in scopes[loops[-1] :]):
            found.append(product[1])
        made, loop, carried = code.partition("scf.for" if "scf.for" in code else "scf.while")
        scopes[-1][1].update(re.findall(r"^(%\w+)", made))
        if code.endswith("{"):
            scopes.append((bool(loop), set(re.findall(r"(%\w+) =", carried))))
    return found


def unfenced(ttgir: str) -> list[str]:
    """Values that warps read of shared memory, and then arrive at a barrier without a fence for asynchronous copies.

    Where a barrier gives shared memory back to warps that load, TMA may write before the read has taken place: 503 of
    12,600 calls had other bits, none of 17,640 with the fence (docs/log.md, 2026-11-30). What is of a format that TMA
    brings none of is copied by threads, in the order of their own accesses.
    """
    found: list[str] = []
    pending: list[str] = []
    brought = set(re.findall(r"ttng\.async_tma_\w+ .*-> !ttg\.memdesc<[\dx]*x(\w+),", ttgir))
    if "ttg.warp_specialize" in ttgir:
        for line in ttgir.splitlines():
            if made := re.search(r"(%\w+) = ttg\.local_load .* : !ttg\.memdesc<[\dx]*x(\w+),", line):
                pending += [made[1]] if made[2] in brought else []
            elif "ttng.fence_async_shared" in line:
                pending.clear()
            elif "ttng.arrive_barrier" in line:
                found += pending
                pending.clear()
    return found


def read(*command: str | Path) -> str:
    """What a tool prints."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def counts(sass: str) -> dict[str, int]:
    """Instructions of each kind in a disassembly."""
    opcodes = re.findall(r"^\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?\s*([A-Z][\w.]*)", sass, re.MULTILINE)
    memory = [each for each in opcodes if re.match(r"(LDG|STG|LDGSTS|LD|ST)(\.|$)", each)]
    bulk = sum(each.startswith(("UTMALDG", "UTMASTG", "UBLKCP", "UBLKRED")) for each in opcodes)
    wide = sum(bool(re.search(r"\.(128|256|ENL2)", each)) for each in memory)
    return {
        "spills": sum(bool(re.match(r"(LDL|STL)(\.|$)", each)) for each in opcodes),
        "wgmma": sum(bool(re.match(r"[HIQB]GMMA(\.|$)", each)) for each in opcodes),
        "tcgen05": sum(bool(re.match(r"UTC\w*MMA(\.|$)", each)) for each in opcodes),
        "mma": sum(bool(re.match(r"[HIQBD]MMA(\.|$)", each)) for each in opcodes),
        "wide": wide + bulk,
        "narrow": len(memory) - wide,
        "atomics": sum(bool(re.match(r"(ATOM|ATOMG|RED|REDG)(\.|$)", each)) for each in opcodes),
    }


def main() -> None:
    """Requests as JSON on stdin, results as one line of JSON on stdout, progress on stderr."""
    told = json.load(sys.stdin)
    requests = [Request(**each) for each in told["requests"]]
    results: list[dict[str, Any]] = []
    for target in told["targets"]:
        for request in requests:
            results.append(attrs.asdict(compile_one(request, target)))
            print(f"{len(results)} of {len(told['targets']) * len(requests)} compiled", file=sys.stderr)
    print(json.dumps(results))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Build the libraries of CANN that torch_npu asks for: simulated, or inert.

Every operator entry point that the wheel names becomes a few instructions that hand all
argument registers to ``sim_prepare``; what the wheel needs beyond ``cann.c`` answers 0.
"""

from __future__ import annotations

__all__ = ["LIBRARIES", "build"]

import re
import subprocess
from pathlib import Path

import torch

HERE = Path(__file__).parent
LOOKED_UP = (
    "aclrtSetDeviceSatMode", "aclrtSetOpWaitTimeout", "aclrtSetOpExecuteTimeOut",
    "aclrtSetStreamFailureMode", "aclrtPeekAtLastError", "aclrtGetLastError", "aclrtCmoAsync",
    "aclrtSetStreamOverflowSwitch", "aclrtGetStreamOverflowSwitch", "aclrtCtxSetSysParamOpt",
    "aclrtSetSysParamOpt", "aclrtDestroyStreamForce", "aclrtUnSubscribeReport",
    "aclrtSubscribeReport", "aclGetCannAttributeList", "aclGetCannAttribute",
    "aclSetCompileopt", "aclrtSetStreamAttribute",
)  # fmt: skip
"""Functions that the wheel looks up by name, and that may do nothing."""
LIBRARIES = (
    "libascendcl.so", "libhccl.so", "libacl_op_compiler.so", "libge_runner.so", "libgraph.so",
    "libacl_tdt_channel.so", "libopapi.so", "libnnopbase.so", "libruntime.so",
)  # fmt: skip
_COMMON = """
    .text
sim_common:
    pushq %rbp
    movq %rsp, %rbp
    subq $176, %rsp
    movups %xmm0, (%rsp)
    movups %xmm1, 16(%rsp)
    movups %xmm2, 32(%rsp)
    movups %xmm3, 48(%rsp)
    movups %xmm4, 64(%rsp)
    movups %xmm5, 80(%rsp)
    movups %xmm6, 96(%rsp)
    movups %xmm7, 112(%rsp)
    movq %rdi, 128(%rsp)
    movq %rsi, 136(%rsp)
    movq %rdx, 144(%rsp)
    movq %rcx, 152(%rsp)
    movq %r8, 160(%rsp)
    movq %r9, 168(%rsp)
    movq %rax, %rdi
    leaq 128(%rsp), %rsi
    movq %rsp, %rdx
    leaq 16(%rbp), %rcx
    call sim_prepare
    leave
    ret
"""


def build(site: Path, target: Path, *, inert: bool = False) -> list[str]:
    """Compile into ``target``, with the wheel's headers; the operators' names in their order.

    Args:
        site: Folder into which the wheel was unpacked.
        target: Folder for the libraries.
        inert: Stubs only: no device, but schemas and shapes.
    """
    names = operators(site / "torch_npu/lib/libtorch_npu.so")
    ours = [] if inert else [HERE / "cann.c"]
    made = set() if inert else defined(HERE / "cann.c")
    missing = sorted((undefined(site) | ({*LOOKED_UP} if not inert else set())) - made)
    (target / "stubs.c").write_text(
        "".join(f"long {name}(void) {{ return 0; }}\n" for name in missing)
    )
    if not inert:
        (target / "operators.S").write_text(assembly(names))
        table = ", ".join(f'"{name}"' for name in names)
        (target / "names.c").write_text(f"const char *const sim_names[] = {{{table}}};\n")
        ours += [target / "operators.S", target / "names.c"]
    library = target / LIBRARIES[0]
    subprocess.run(
        ["gcc", "-O1", "-Wall", "-Werror", "-shared", "-fPIC", "-pthread",
         f"-I{site / 'torch_npu/include'}", *map(str, ours), str(target / "stubs.c"),
         "-Wl,-Bsymbolic", "-o", str(library), "-ldl"],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    for name in LIBRARIES[1:]:
        if not (target / name).exists():
            (target / name).symlink_to(library.name)
    return names


def operators(library: Path) -> list[str]:
    """Entry points that the wheel names."""
    found = re.findall(rb"\0(aclnn[A-Z][A-Za-z0-9]*)(?=\0)", library.read_bytes())
    names = {name.decode() for name in found}
    return sorted(
        names | {name + "GetWorkspaceSize" for name in names if "WorkspaceSize" not in name}
    )


def assembly(names: list[str]) -> str:
    lines = [_COMMON]
    for index, name in enumerate(names):
        lines.append(f"    .globl {name}\n{name}:")
        if name.endswith("WorkspaceSize"):
            lines.append(f"    movq ${index}, %rax\n    jmp sim_common")
        else:
            lines.append("    jmp sim_launch")
    lines.append('    .section .note.GNU-stack,"",@progbits\n')
    return "\n".join(lines)


def undefined(site: Path) -> set[str]:
    """Symbols that the wheel's libraries take from elsewhere than torch and the system."""
    ours = [*site.glob("torch_npu/lib/*.so"), *site.glob("torch_npu/_C*.so")]
    wheel = [library for library in ours if "atb" not in library.name]
    folder = Path(torch.__file__).parent / "lib"
    known = set().union(
        *(symbols(path, "--defined-only") for path in [*wheel, *folder.glob("*.so*")])
    )
    found = set().union(*(symbols(path, "--undefined-only") for path in wheel))
    # Others are of the system: weak and without a version, so they only look missing.
    wanted = re.compile(r"acl\w+|rt[A-Z]\w+|Hccl\w+|Msprof\w+")
    return {name for name in found - known if wanted.fullmatch(name)}


def symbols(library: Path, which: str) -> set[str]:
    out = subprocess.run(
        ["nm", "-D", which, str(library)], check=True, capture_output=True, text=True
    ).stdout
    return {line.split()[-1] for line in out.splitlines()}


def defined(source: Path) -> set[str]:
    return set(
        re.findall(r"\b((?:acl|rt)\w+)\([^;{}]*\)\s*\{", source.read_text(encoding="utf-8"))
    )

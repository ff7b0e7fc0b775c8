"""What a user can choose about compilation: the `[compile]` section."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

PARTITIONING_BACKENDS = ("inductor", "aot_eager")
"""Those that choose what the backward keeps, and can do so by a memory budget."""


@dataclass
class CompileConfig:
    enable: bool = False
    """Compile with torch.compile, layer by layer."""

    components: list[str] = field(default_factory=lambda: ["model", "loss"])
    """What is compiled: any of "model" (each decoder layer) and "loss" (the chunked head and cross-entropy)."""

    backend: str = "inductor"
    """The torch.compile backend, e.g. "inductor" or "aot_eager"."""

    def problems(self) -> list[str]:
        unknown = [name for name in self.components if name not in ("model", "loss")]
        found = [f'compile.components has "{name}": must be among "model" and "loss"; remove it.' for name in unknown]
        if self.enable and self.backend not in torch.compiler.list_backends(exclude_tags=()):
            names = ", ".join(torch.compiler.list_backends())
            found.append(f'compile.backend = "{self.backend}": torch has no such backend; choose among {names}.')
        return found

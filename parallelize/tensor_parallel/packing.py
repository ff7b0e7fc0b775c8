"""stub until the packing branch lands"""
from dataclasses import dataclass
import torch

@dataclass(frozen=True)
class Packing:
    dim: int
    segments: tuple[int, ...]
    degree: int

    def stored_order(self):
        starts, total = [], 0
        for size in self.segments:
            starts.append(total); total += size
        return torch.cat([torch.arange(start + r * (size // self.degree), start + (r + 1) * (size // self.degree)) for r in range(self.degree) for start, size in zip(starts, self.segments)])

    def to_stored(self, full):
        return full.index_select(self.dim, self.stored_order())

    def to_original(self, full):
        return full.index_select(self.dim, torch.argsort(self.stored_order()))

def set_packing(module, name, packing):
    vars(module).setdefault("packings", {})[name] = packing

def packing_of(model, name):
    owner, _, own = name.rpartition(".")
    return vars(model.get_submodule(owner)).get("packings", {}).get(own)

"""Asynchronous tensor parallelism: exchanges in pieces, each of them while another piece is being multiplied.

torch's compiler does it ("micro-pipelining", torch/_inductor/fx_passes/micro_pipeline_tp.py). In a compiled layer it
looks for two patterns, which sequence parallelism has at the borders of regions and plain tensor parallelism has not:

    all-gather -> matrix products            symm_mem.fused_all_gather_matmul
    matrix product -> reduce-scatter         symm_mem.fused_matmul_reduce_scatter

in the form that `collectives.py` gives them (for a dimension other than the first, the gathered pieces split and
concatenated). Linears without a bias qualify; one with a bias is an addmm, which it leaves as it is, and so do
sequences that the number of ranks does not divide, which are padded and cut between the two. The fused operators write
into each other's GPU memory and need NVLink or the like, and NCCL.

Read in the source of torch 2.13, whose pass takes only groups that `enable_symm_mem_for_group` was called for, although
that function is deprecated since 2.11 as needless. Whether it is faster, and on what, has not been measured here.
"""

from __future__ import annotations

import warnings

import torch.distributed as dist


def overlap_in_compiled_code(group: dist.ProcessGroup) -> None:
    """Let layers compiled from now on overlap their exchanges over `group` with matrix products; needs CUDA.

    A setting of the compiler for the whole process: it changes how other compiled code that has the patterns runs over
    this group, but not what it computes.
    """
    import torch._inductor.config  # slow to import, and only needed here
    from torch.distributed._symmetric_memory import enable_symm_mem_for_group

    torch._inductor.config._micro_pipeline_tp = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*enable_symm_mem_for_group", FutureWarning)
        enable_symm_mem_for_group(group.group_name)

"""Triton kernels, one file each: the kernel, the operator of PyTorch in front of it, and its plain-torch reference.

    file                      what it computes
    rms_norm.py               RMSNorm, Llama's and Gemma's orders of rounding
    gated_activation.py       act(gate) * up: SwiGLU, GeGLU, and squared ReLU alone
    rotary.py                 rotary embedding of queries and keys, halves and interleaved
    linear_cross_entropy.py   the loss of a linear head, without logits; beside it ..._kernels.py and ..._tiles.py
    attention_block.py        attention of some queries to some keys, for context parallelism; beside it ..._kernels.py,
                              ..._parts.py (what they share) and ..._tiles.py (how they cut their work)
    search.py                 which of a few ways to cut its work a kernel is fastest with
    replace.py                puts kernels into a model, module by module

An operator launches its kernel on a GPU (and on any device in Triton's interpreter), and computes the reference
everywhere else, so that a model with kernels runs everywhere. The compiler, FSDP2 and recomputation see one operator.
"""

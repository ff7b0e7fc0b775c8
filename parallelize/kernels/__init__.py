"""Triton kernels, one file each: the kernel, the operator of PyTorch in front of it, and its plain-torch reference.

    file               what it computes
    rms_norm.py        RMSNorm, Llama's and Gemma's orders of rounding
    linear_cross_entropy.py, linear_cross_entropy_kernels.py
                       the loss of a linear head, without logits
    replace.py         puts them into a model, module by module

An operator launches its kernel on a GPU (and on any device in Triton's interpreter), and computes the reference
everywhere else, so that a model with kernels runs everywhere. The compiler, FSDP2 and recomputation see one operator.
"""

"""Context parallelism: ranks that share every sequence, and attention over all of it.

Read in this order: `layout.py` (which tokens a rank has), `masks.py` (what sees what), `blocks.py` (one block),
`merge.py` and `blockwise.py` (many blocks), `exchange.py` (what travels), `ring.py`, `allgather.py`, `ulysses.py` and
`levels.py` (the methods; `methods.py` names them, and `operator.py` is what models call), `cut.py`, `flash.py` and
`kernels.py` (blocks through flash kernels). `whole.py` is for what runs on the whole sequence on every rank.
"""

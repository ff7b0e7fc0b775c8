"""Pipeline parallelism: which layers a rank has, and in which order it runs micro-batches through them.

Read in this order: `schedules.py` (names, placement, rules, torch's object), `timeline.py` (when ranks are idle),
`schedule_file.py` (a schedule of one's own), `split.py` (which layers each stage gets), `runtime.py` (a batch
through the stages of a rank), `shared.py` (gradients of what several ranks hold).
"""

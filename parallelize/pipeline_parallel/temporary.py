from torch.distributed.pipelining.schedules import get_schedule_class, PipelineScheduleSingle
V = {"zbvzerobubble", "dualpipev"}
def stage_count(schedule, pp, layers, layers_per_stage):
    return pp if schedule.lower() in ("1f1b", "gpipe") else 2 * pp
def rank_of_stage(schedule, stage, pp, stages):
    if schedule.lower() in V:
        return stage if stage < pp else 2 * pp - 1 - stage
    return stage % pp
def build_schedule(name, csv, stages, micro_batches, loss_fn):
    cls = get_schedule_class(name)
    if issubclass(cls, PipelineScheduleSingle):
        return cls(stages[0], micro_batches, loss_fn=loss_fn, scale_grads=False)
    return cls(stages, micro_batches, loss_fn=loss_fn, scale_grads=False)
def split_layers(costs, *, first_cost, last_cost, stages, forbidden_cuts=()):
    import itertools
    n = len(costs)
    allowed = [c for c in range(1, n) if c not in forbidden_cuts]
    best = None
    for cuts in itertools.combinations(allowed, stages - 1):
        bounds = [0, *cuts, n]
        m = max(b - a for a, b in zip(bounds, bounds[1:]))
        if best is None or m < best[0]:
            best = (m, [range(a, b) for a, b in zip(bounds, bounds[1:])])
    return best[1]

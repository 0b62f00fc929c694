"""The learning rate and TrAct's lambda as pure functions of the step, from fvcore's schedulers."""

from collections.abc import Callable, Sequence

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
    ConstantParamScheduler,
    CosineParamScheduler,
    LinearParamScheduler,
    MultiStepParamScheduler,
    ParamScheduler,
)


def lr_schedule(
    *,
    base_lr: float,
    max_iter: int,
    steps: Sequence[int] | None = None,
    gamma: float = 0.1,
    end_lr: float = 0.0,
    warmup_iters: int = 0,
    warmup_factor: float = 0.001,
) -> Callable[[int], float]:
    """A function from the optimizer step, 0 to `max_iter - 1`, to the learning rate.

    Args:
        base_lr: the learning rate after the warm-up.
        max_iter: number of steps in all.
        steps: milestones at which the rate is multiplied by `gamma`; None = a cosine from `base_lr`
            to `end_lr` instead.
        gamma: factor at each milestone.
        end_lr: last value of the cosine.
        warmup_iters: steps over which the rate grows linearly; 0 = no warm-up.
        warmup_factor: the first rate, as a fraction of that at which the warm-up ends.
    """
    main: ParamScheduler
    if steps is None:
        main = CosineParamScheduler(base_lr, end_lr)
    else:
        # A run that is cut short keeps the milestones that it reaches.
        milestones = sorted({step for step in steps if 0 < step < max_iter})
        passed = sum(step <= 0 for step in set(steps))
        values = [base_lr * gamma ** (passed + k) for k in range(len(milestones) + 1)]
        main = MultiStepParamScheduler(values, milestones=milestones, num_updates=max_iter)
    length = warmup_iters / max_iter
    if length >= 1:  # a run that is cut short can be all warm-up
        return lambda step: (
            base_lr * (warmup_factor + (1 - warmup_factor) * min(step / warmup_iters, 1.0))
        )
    if length > 0:
        top = main(length)
        warmup = LinearParamScheduler(warmup_factor * top, top)
        main = CompositeParamScheduler(
            [warmup, main], interval_scaling=["rescaled", "fixed"], lengths=[length, 1 - length]
        )
    return lambda step: main(step / max_iter)


def lambda_schedule(
    *,
    lambda_: float,
    end: float | None = None,
    kind: str = "constant",
    stop_at: int = 0,
    max_iter: int,
) -> Callable[[int], float | None]:
    """A function from the optimizer step, counted from 0, to TrAct's lambda; None = TrAct is off.

    Args:
        lambda_: its value at the first step.
        end: its value at the end of "linear" and "cosine"; None = `lambda_`.
        kind: one of `choices.LAMBDA_SCHEDULES`.
        stop_at: the first step without TrAct, at which the schedule ends as well; 0 = never.
        max_iter: number of steps in all.
    """
    last = lambda_ if end is None else end
    value: ParamScheduler = {
        "constant": ConstantParamScheduler(lambda_),
        "linear": LinearParamScheduler(lambda_, last),
        "cosine": CosineParamScheduler(lambda_, last),
    }[kind]
    length = stop_at or max_iter
    return lambda step: None if 0 < stop_at <= step else value(min(step / length, 1.0))

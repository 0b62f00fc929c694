"""The learning rate as a pure function of the step, from fvcore's schedulers."""

from collections.abc import Callable, Sequence

from fvcore.common.param_scheduler import (
    CompositeParamScheduler,
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
        max_iter: steps in all.
        steps: where the rate is multiplied by `gamma`; None: a cosine from `base_lr` to `end_lr`.
        gamma: factor at each of `steps`.
        end_lr: where the cosine ends.
        warmup_iters: steps over which the rate grows linearly; 0 = none.
        warmup_factor: what the first step's rate is to the rate at which the warm-up ends.
    """
    main: ParamScheduler
    if steps is None:
        main = CosineParamScheduler(base_lr, end_lr)
    else:
        milestones = [step for step in steps if step < max_iter]  # an early stop keeps the recipe
        main = MultiStepParamScheduler(
            [base_lr * gamma**k for k in range(len(milestones) + 1)],
            milestones=milestones,
            num_updates=max_iter,
        )
    length = warmup_iters / max_iter
    if length >= 1:  # a run cut short is all warm-up
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

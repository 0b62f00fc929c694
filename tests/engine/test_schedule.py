import pytest

from tract_det.engine.schedule import lr_schedule


def test_steps_and_warmup_factor_by_factor():
    lr = lr_schedule(
        base_lr=1.0, max_iter=100, steps=[50, 80], gamma=0.1, warmup_iters=10, warmup_factor=0.0
    )
    assert [lr(k) for k in (0, 5, 9)] == pytest.approx([0.0, 0.5, 0.9])
    assert [lr(k) for k in (10, 49, 50, 79, 80, 99)] == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])


def test_cosine_starts_at_the_base_rate_and_ends_at_the_end_rate():
    lr = lr_schedule(base_lr=2.0, max_iter=100, end_lr=0.5)
    assert lr(0) == pytest.approx(2.0)
    assert lr(50) == pytest.approx(1.25)
    assert lr(99) == pytest.approx(0.5, abs=1e-2)


def test_the_warmup_meets_the_cosine():
    lr = lr_schedule(base_lr=1.0, max_iter=200, warmup_iters=20, warmup_factor=0.1)
    plain = lr_schedule(base_lr=1.0, max_iter=200)
    assert lr(20) == pytest.approx(plain(20))
    assert lr(0) == pytest.approx(0.1 * plain(20))
    assert all(lr(k) < lr(k + 1) for k in range(19))


def test_a_run_shortened_on_the_command_line_keeps_its_warm_up():
    short = lr_schedule(base_lr=1.0, max_iter=5, steps=[50, 80], warmup_iters=100)
    whole = lr_schedule(base_lr=1.0, max_iter=900, steps=[500, 800], warmup_iters=100)
    assert [short(k) for k in range(5)] == pytest.approx([whole(k) for k in range(5)])

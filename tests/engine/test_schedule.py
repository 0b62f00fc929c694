import pytest

from tract_det.engine.schedule import lambda_schedule, lr_schedule


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


def test_lambda_stays_where_nothing_is_scheduled():
    at = lambda_schedule(lambda_=0.1, max_iter=10)
    assert [at(k) for k in (0, 5, 9)] == [0.1] * 3


def test_lambda_goes_to_its_end_in_a_line_or_a_cosine():
    line = lambda_schedule(lambda_=0.1, end=0.3, kind="linear", max_iter=100)
    wave = lambda_schedule(lambda_=0.1, end=0.3, kind="cosine", max_iter=100)
    assert [line(k) for k in (0, 25, 50, 100)] == pytest.approx([0.1, 0.15, 0.2, 0.3])
    assert [wave(k) for k in (0, 50, 100)] == pytest.approx([0.1, 0.2, 0.3])
    assert wave(25) < line(25)


def test_tract_is_off_from_its_stop_on_and_the_schedule_ends_there():
    at = lambda_schedule(lambda_=0.1, end=0.3, kind="linear", stop_at=10, max_iter=100)
    assert at(9) == pytest.approx(0.28)
    assert at(10) is None and at(99) is None


@pytest.mark.parametrize("max_iter", [1, 2, 3, 4])
def test_a_run_of_hardly_more_steps_than_milestones_drops_the_rate_where_they_are(max_iter):
    rate = lr_schedule(base_lr=1.0, max_iter=max_iter, steps=[1, 2], gamma=0.1)
    expected = [1.0, 0.1, 0.01, 0.01][:max_iter]
    assert [rate(step) for step in range(max_iter)] == pytest.approx(expected)


def test_a_milestone_at_the_first_step_has_passed_before_it():
    rate = lr_schedule(base_lr=1.0, max_iter=10, steps=[0, 5], gamma=0.1)
    assert [rate(step) for step in (0, 4, 5)] == pytest.approx([0.1, 0.1, 0.01])

"""Laws of the death budget, on its own clock."""

from deltal.run.deaths import LONGEST_BACKOFF, WINDOW, DeathBudget, is_blameless


def test_one_death_more_than_allowed_in_the_window_is_too_many():
    budget = DeathBudget(3)
    assert [budget.note("rollout", 1, now=float(i)) for i in range(4)] == [True, True, True, False]
    assert budget.note("verify", 1, now=4.0), "roles are counted apart"
    assert budget.note("rollout", 1, now=3.5 + WINDOW), "old ones are forgotten"
    assert budget.told == {"rollout": 5, "verify": 1}


def test_a_large_fleet_may_have_a_death_for_each_member():
    budget = DeathBudget(3)
    assert all(budget.note("rollout", 64, now=0.0) for _ in range(64))
    assert not budget.note("rollout", 64, now=1.0)


def test_a_node_that_is_lost_costs_none_of_the_budget():
    budget = DeathBudget(1)
    assert all(budget.note("rollout", 1, now=0.0, blameless=True) for _ in range(16))
    assert budget.told["rollout"] == 16
    assert is_blameless(RuntimeError("The actor died because its node has died. Node Id: 0a1b"))
    assert not is_blameless(RuntimeError("The actor died unexpectedly before finishing this task."))


def test_deaths_in_a_row_are_answered_later_and_later():
    budget = DeathBudget(100)
    waits = []
    for i in range(12):
        budget.note("rollout", 1, now=float(i))
        waits.append(budget.backoff("rollout"))
    assert waits[:4] == [0.0, 1.0, 3.0, 7.0]
    assert waits[-1] == LONGEST_BACKOFF

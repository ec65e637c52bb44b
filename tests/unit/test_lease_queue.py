"""Laws of the lease queue, on its own clock."""

from hypothesis import given
from hypothesis import strategies as st

from deltal.queues.lease_queue import LeaseQueue
from deltal.types import GroupId


def gid(index: int) -> GroupId:
    return GroupId(purpose="train", epoch=0, index=index)


def filled(count: int) -> LeaseQueue[str]:
    queue: LeaseQueue[str] = LeaseQueue(lease_seconds=10.0)
    queue.put([(gid(i), f"item {i}") for i in range(count)], now=0.0)
    return queue


def test_entries_are_leased_in_the_order_they_were_put():
    assert [lease.item for lease in filled(3).lease(2, now=0.0)] == ["item 0", "item 1"]


def test_a_key_is_held_once_whether_waiting_or_leased():
    queue = filled(2)
    queue.lease(1, now=0.0)
    assert queue.put([(gid(0), "again"), (gid(1), "again"), (gid(2), "new")], now=1.0) == 1
    assert queue.keys(now=1.0) == {gid(0), gid(1), gid(2)}


def test_a_lease_that_is_not_renewed_ends_and_its_entry_comes_first():
    queue = filled(2)
    queue.lease(1, now=0.0)
    assert queue.lease(2, now=9.9)[0].key == gid(1)
    again = queue.lease(1, now=10.0)
    assert again[0].key == gid(0)
    assert again[0].deliveries == 2


def test_a_renewed_lease_lasts():
    queue = filled(1)
    (lease,) = queue.lease(1, now=0.0)
    for now in (8.0, 16.0, 24.0):
        queue.renew([(lease.token, lease.key)], now=now)
    assert queue.lease(1, now=33.0) == []
    assert queue.lease(1, now=34.0)[0].key == gid(0)


def test_an_acked_entry_never_comes_back():
    queue = filled(1)
    (lease,) = queue.lease(1, now=0.0)
    queue.ack([lease.token])
    queue.ack([lease.token])
    assert queue.lease(1, now=100.0) == []
    assert queue.keys(now=100.0) == set()


def test_a_renewal_tells_a_restarted_queue_what_its_readers_hold():
    queue: LeaseQueue[str] = LeaseQueue(lease_seconds=10.0, incarnation="second life")
    queue.renew([("first life-7", gid(7))], now=0.0)
    assert gid(7) in queue.keys(now=9.0)
    assert queue.keys(now=10.0) == set(), "its payload is gone, so it must not be offered; reconcile puts it again"


def test_a_renewal_takes_a_second_copy_out_of_the_queue():
    queue = filled(1)
    queue.renew([("first life-7", gid(0))], now=0.0)
    assert queue.lease(1, now=1.0) == []


def test_a_lease_given_back_is_no_delivery():
    queue = filled(1)
    (lease,) = queue.lease(1, now=0.0)
    queue.give_back([lease.token], now=1.0)
    assert queue.lease(1, now=1.0)[0].deliveries == 1


def test_an_entry_that_ends_every_reader_is_named():
    queue = filled(1)
    for crash in range(3):
        queue.lease(1, now=crash * 20.0)
    queue.expire(now=100.0)
    assert queue.delivered(3) == [gid(0)]
    assert queue.delivered(4) == []


@given(
    st.lists(
        st.tuples(st.sampled_from(["put", "lease", "ack", "renew", "back", "tick"]), st.integers(0, 5)), max_size=60
    )
)
def test_nothing_is_lost_or_doubled_whatever_the_order_of_calls(calls: list[tuple[str, int]]):
    queue: LeaseQueue[int] = LeaseQueue(lease_seconds=3.0)
    now, held, expected = 0.0, {}, set()
    for call, number in calls:
        if call == "put":
            queue.put([(gid(number), number)], now=now)
            expected.add(gid(number))
        elif call == "lease":
            for lease in queue.lease(1 + number, now=now):
                assert lease.item == lease.key.index
                held[lease.token] = lease
        elif call == "tick":
            now += number
        elif held:
            token = sorted(held)[number % len(held)]
            lease = held[token]
            if call == "renew" and lease.deadline > now:
                queue.renew([(token, lease.key)], now=now)
            elif call == "ack" and lease.deadline > now:
                queue.ack([token])
                del held[token]
                expected.discard(lease.key)
            elif call == "back":
                queue.give_back([held.pop(token).token], now=now)
        assert queue.keys(now=now) == expected
        assert queue.waiting + queue.leased == len(expected)


def test_who_holds_what_was_removed_is_told_and_its_lease_is_not_made_again():
    queue = filled(2)
    held = [(lease.token, lease.key) for lease in queue.lease(2, now=0.0)]
    queue.remove([gid(0)])
    assert queue.renew(held, now=1.0) == [gid(0)]
    assert queue.keys(now=1.0) == {gid(1)}
    assert queue.put([(gid(0), "of another evaluation")], now=2.0) == 1
    assert queue.renew(held[1:], now=2.0) == []


def test_what_two_readers_died_of_is_handed_out_alone():
    queue = filled(4)
    for now in (0.0, 10.0):
        assert len(queue.lease(2, now=now)) == 2
    later = [queue.lease(3, now=20.0) for _ in range(3)]
    assert [[lease.key for lease in leases] for leases in later] == [[gid(0)], [gid(1)], [gid(2), gid(3)]]
    assert [leases[0].deliveries for leases in later] == [3, 3, 1]
    queue.ack([later[1][0].token])
    queue.expire(now=30.0)
    assert queue.delivered(3) == [gid(0)], "only what its reader died of alone is poisoned"

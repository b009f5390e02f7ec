"""Which job is next."""

from app.jobs.policy import choose, position


async def test_one_client_is_served_in_order_of_arrival(make_jobs) -> None:
    """Without anyone else, first come is first served."""
    waiting = make_jobs(["a1", "a2", "a3"])

    assert choose(waiting, {}).id == "a1"
    assert choose(waiting[1:], {"a": 5}).id == "a2"


async def test_a_client_with_eight_images_does_not_hold_up_another(make_jobs) -> None:
    """The other client's single picture comes right after the first of the eight."""
    waiting = make_jobs(["a2", "a3", "a4", "a5", "a6", "a7", "a8", "b1"])

    assert choose(waiting, {"a": 0}).id == "b1"


async def test_clients_take_turns(make_jobs) -> None:
    """Three clients with two pictures each are served round and round."""
    waiting = make_jobs(["a1", "a2", "b1", "b2", "c1", "c2"])
    served: dict[str, int] = {}
    order = []
    for turn in range(6):
        job = choose(waiting, served)
        waiting.remove(job)
        served[job.client] = turn
        order.append(job.id)

    assert order == ["a1", "b1", "c1", "a2", "b2", "c2"]


async def test_position_counts_who_starts_before(make_jobs) -> None:
    """A position follows the same policy as the serving."""
    waiting = make_jobs(["a1", "a2", "a3", "b1"])
    by_id = {job.id: job for job in waiting}

    assert [position(by_id[name], waiting, {"a": 3}) for name in ("b1", "a1", "a2", "a3")] == [
        0,
        1,
        2,
        3,
    ]

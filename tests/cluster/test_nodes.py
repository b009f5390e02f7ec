"""Two nodes under Ray Serve, one of which is lost with all its processes."""

from __future__ import annotations

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.support.ray_cluster import Cluster, generate, wait_until

pytestmark = pytest.mark.system


def test_a_lost_node_costs_the_requests_on_it(network, tmp_path) -> None:
    """Those on the other are answered, and so are all that come after."""
    gate = tmp_path / "gate"
    gate.touch()
    with Cluster(tmp_path, KLEIN_HOST="0.0.0.0", KLEIN_QUEUE_IMAGES="4") as cluster:
        cluster.start(cpus=2)
        cluster.start(address="127.0.0.2", cpus=2)
        words = ("--nodes", "2", "--replicas", "2", "--cores", "1")
        cluster.deploy(f"slow=0.4, 'gate={gate}'", *words, proxy_location="HeadOnly")
        cluster.wait_for(2)
        gate.unlink()
        with ThreadPoolExecutor(4) as pool:
            asked = [pool.submit(generate, seed) for seed in range(4)]
            wait_until(lambda: sorted(cluster.running().values()) == [2, 2])
            cluster.kill_node(1)
            wait_until(lambda: sum(each.done() for each in asked) == 2)
            gate.touch()
            others = [generate(seed).status for seed in range(6)]
            answers = [each.result() for each in asked]

    assert Counter(each.status == 200 for each in answers) == {True: 2, False: 2}
    assert others == [200] * 6

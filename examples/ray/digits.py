"""Samples digits on workers that Ray places on two nodes, which are both on this machine.

    pip install 'draft-refine[ray]'
    python examples/ray/digits.py

On a cluster, leave out `two_nodes` and call `drp.on_ray("auto", workers=8, device="cuda")`.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray.cluster_utils import Cluster

import drp


@contextmanager
def two_nodes() -> Iterator[str]:
    """Start a Ray cluster of a head and two nodes, and return its address."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    with two_nodes() as address:
        workers = drp.on_ray(address, workers=2, device="cpu", strategy="SPREAD")
        options = {"labels": [3, 1, 4], "steps": 48, "mode": "aggressive"}
        with drp.Leader("digits", devices=workers) as leader:
            result = leader.sample(**options)
        print(f"{result.steps} steps in {result.rounds} rounds on {', '.join(result.devices)}")
        expected = drp.reference("digits", devices=2, **options)
        print("bit-identical to one process:", bool((result.samples == expected.samples).all()))

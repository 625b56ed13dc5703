"""A Ray Serve deployment with a leader, whose workers Ray places on the cluster.

    pip install 'draft-refine[ray]' 'ray[serve]'
    python examples/ray/serve_digits.py

The script sends one request to its own deployment, and ends. On a cluster, call `drp.on_ray` with `device="cuda"`, and
start it by `serve run serve_digits:app`. The replica needs one core; its workers have a separate placement group.
"""

from __future__ import annotations

import asyncio
import json
import urllib.request
from typing import Any

import ray
from ray import serve
from starlette.requests import Request

import drp

WORKERS = 2


@serve.deployment(ray_actor_options={"num_cpus": 1}, max_ongoing_requests=16)
class Digits:
    """POST {"labels": [3, 1, 4], "seed": 0} returns the samples' shape and their mean."""

    def __init__(self, workers: int) -> None:
        self.leader = drp.Leader("digits", devices=drp.on_ray(workers=workers, device="cpu", strategy="SPREAD"))

    async def __call__(self, request: Request) -> dict[str, Any]:
        """Sample for one request. The leader executes several requests concurrently."""
        body = await request.json()
        run = self.leader.submit(labels=body["labels"], seed=body.get("seed", 0))
        result = await asyncio.wrap_future(run)
        return {"shape": list(result.samples.shape), "mean": float(result.samples.mean()), "devices": result.devices}

    def check_health(self) -> None:
        """Raise RuntimeError if all workers were lost, so that Serve replaces the replica."""
        if self.leader.closed:
            raise RuntimeError("the leader is closed")


app = Digits.bind(WORKERS)

if __name__ == "__main__":
    ray.init(num_cpus=WORKERS + 2, include_dashboard=False)
    serve.run(app)
    body = json.dumps({"labels": [3, 1, 4]}).encode()
    with urllib.request.urlopen(urllib.request.Request("http://127.0.0.1:8000", body), timeout=60) as answer:
        print(json.load(answer))
    serve.shutdown()
    ray.shutdown()

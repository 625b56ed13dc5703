"""A Ray Serve deployment that holds a leader, whose workers Ray places on the cluster beside it.

    pip install 'draft-refine[ray]' 'ray[serve]'
    python examples/ray/serve_digits.py

It asks its own deployment for digits, and ends. On a cluster, call `drp.on_ray` with `device="cuda"`, and start it by
`serve run serve_digits:app`. The replica needs a core of its own; its workers are in a placement group of theirs.
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
        """Draw what a request asks for. The leader takes several requests at once."""
        asked = await request.json()
        run = self.leader.submit(labels=asked["labels"], seed=asked.get("seed", 0))
        result = await asyncio.wrap_future(run)
        return {"shape": list(result.samples.shape), "mean": float(result.samples.mean()), "devices": result.devices}

    def check_health(self) -> None:
        """Have Serve replace a replica whose workers are lost and could not be replaced."""
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

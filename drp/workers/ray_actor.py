"""A worker as an actor of Ray, which dials its leader like any worker on another machine."""

from __future__ import annotations

import importlib
import os
import socket
from dataclasses import replace
from typing import Any

from drp.workers.dialed import DialConfig, serve
from drp.workers.parent_death import LEADER_GONE


class RayActor:
    """The class of the actor; its process ends with the connection to the leader."""

    def serve(self, config: DialConfig) -> None:
        """Evaluate drafts until the leader ends this worker; raise the error that ends it before."""
        ray: Any = importlib.import_module("ray")
        context = ray.get_runtime_context()
        host = f"{socket.gethostname()[:80]}-{context.get_node_id()[:6]}"
        if config.device == "cuda":
            from drp.protocol.cuda import uuid_of

            config = replace(config, device=f"cuda:{ray.get_gpu_ids()[0]}", gpu=uuid_of(0))
        serve(replace(config, host=host), lambda: os._exit(LEADER_GONE))

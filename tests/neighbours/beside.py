"""Pictures beside one neighbour in a running WebUI: what they look like, which calls they took, what those cost."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from client import Generation
from neighbour_cases import Case
from real_hosts import ours
from server import Server

Settings = Mapping[str, Any]


class Beside:
    """One row of the table in the WebUI that its neighbour is in."""

    def __init__(self, case: Case, server: Server) -> None:
        self.case = case
        self.server = server
        self._scripts = {name: {"args": list(value["args"])} for name, value in case.scripts.items()}
        for unit in self._scripts.get("controlnet", {}).get("args", []):
            models = server.client.call("/controlnet/model_list")["model_list"]
            unit["model"] = next((model for model in models if model.startswith(unit["model"])), unit["model"])

    def made(
        self, settings: Settings | None = None, *, expect: int = 200, idle: bool = False, **more: Any
    ) -> Generation:
        """One request, of the case's size unless ``more`` says another, at which the case's payload has the last word;
        ``idle`` leaves the neighbour's own script out.
        """
        scripts = {} if idle else self._scripts
        payload = {
            **square(self.case.size), **more, **self.case.payload, "alwayson_scripts": {**scripts, **ours(settings)},
        }
        client = self.server.client
        make = client.img2img if "init_images" in payload else client.txt2img
        return make(expect=expect, **payload)

    def rows(self) -> str:
        """The rows of each U-Net call of the last picture's last step."""
        state = self.server.client.call("/probe/state")
        last = state["times"][-1]
        calls = zip(reversed(state["calls"]), reversed(state["times"]), strict=True)
        return "+".join(reversed([str(rows) for rows, _ in itertools.takewhile(lambda call: call[1] == last, calls)]))

    def operations(self, settings: Settings | None = None, *, idle: bool = False) -> int:
        """Of the U-Net in all steps of a larger picture but the first."""
        client = self.server.client
        client.call("/probe/count/1", {})
        self.made(settings, idle=idle, steps=2, **square(256))
        times, each = client.call("/probe/state")["times"], client.call("/probe/count/0", {})["each"]
        return sum(count for time, count in zip(times, each, strict=True) if time != times[0])

    def apart_and_together(self, settings: Settings | None = None) -> int:
        """How far two pictures of one request are from the same two of a request each, of 255."""
        request = {"steps": 2, **square(128)}
        both = self.made(settings, batch_size=2, **request)
        alone = [self.made(settings, seed=seed, **request) for seed in (1, 2)]
        pairs = zip(both.images, (one.images[0] for one in alone), strict=False)  # ControlNet adds its hint
        return max(int(np.abs(a.astype(int) - b.astype(int)).max()) for a, b in pairs)


def square(side: int) -> dict[str, int]:
    """A request's size."""
    return {"width": side, "height": side}

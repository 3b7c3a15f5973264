"""A small client for the WebUI's HTTP API: pictures come back as arrays, failures as exceptions that say why."""

from __future__ import annotations

import base64
import contextlib
import io
import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

Json = dict[str, Any]
Picture = np.ndarray[Any, np.dtype[np.uint8]]

DEFAULTS: Json = {
    "prompt": "a cat",
    "negative_prompt": "a dog",
    "seed": 1,
    "steps": 4,
    "cfg_scale": 5.0,
    "width": 128,
    "height": 128,
    "sampler_name": "Euler",
    "scheduler": "Automatic",
}
"""What a request holds where a test says nothing: small, quick, and without randomness of its own."""

REQUEST_TIMEOUT_S = 300.0


class ApiError(AssertionError):
    """The API answered with another status than expected."""


@dataclass(frozen=True, kw_only=True)
class Response:
    """Any answer: HTTP status and decoded JSON (None where the body was none)."""

    status: int
    body: Any


@dataclass(frozen=True, kw_only=True)
class Generation:
    """The answer to txt2img or img2img."""

    status: int
    body: Any
    images: list[Picture]
    """uint8, (height, width, 3), in the order of the answer."""
    png_infotexts: list[str]
    """What each PNG carries in its ``parameters`` chunk; empty text where it has none."""
    info: Json
    """The decoded ``info`` of the answer: ``infotexts``, ``all_seeds``, ``sd_model_name`` and more."""

    @property
    def image(self) -> Picture:
        """The only picture; an error where there are several, so that no test overlooks one."""
        (image,) = self.images
        return image

    @property
    def infotext(self) -> str:
        """The infotext of the first picture."""
        text: str = self.info["infotexts"][0]
        return text


def encode_image(image: Picture) -> str:
    """Turn an array (height, width[, channels]) into the base64 PNG the API takes."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def decode_image(encoded: str) -> tuple[Picture, str]:
    """Array and ``parameters`` text of one base64 picture from the API."""
    with Image.open(io.BytesIO(base64.b64decode(encoded.rpartition(",")[2]))) as image:
        return np.asarray(image.convert("RGB")), str(image.info.get("parameters", ""))


def _encode_arrays(payload: Json) -> Json:
    def encoded(value: Any) -> Any:
        if isinstance(value, np.ndarray):
            return encode_image(value)
        return [encoded(item) for item in value] if isinstance(value, list) else value

    return {key: encoded(value) for key, value in payload.items()}


@dataclass(frozen=True)
class Client:
    """Talks to one running WebUI. Safe to use from several threads: it holds nothing but the address.

    ``lazy``: a checkpoint that is chosen is loaded when the next picture is made, as in forks.
    """

    url: str
    lazy: bool = False

    def request(
        self, path: str, payload: Json | None = None, *, timeout: float = REQUEST_TIMEOUT_S, auth: str | None = None
    ) -> Response:
        """GET without a payload, POST with one; every HTTP status is an answer, not an exception.

        ``auth`` is ``user:password``.
        """
        data = None if payload is None else json.dumps(payload).encode()
        headers = {"Content-Type": "application/json"}
        if auth is not None:
            headers["Authorization"] = "Basic " + base64.b64encode(auth.encode()).decode("ascii")
        request = urllib.request.Request(f"{self.url}{path}", data, headers)
        try:
            with urllib.request.urlopen(request, timeout=timeout) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return Response(status=status, body=json.loads(text))
        except ValueError:
            return Response(status=status, body=None)

    def call(self, path: str, payload: Json | None = None, *, expect: int = 200) -> Any:
        """The decoded body of an answer with the expected status; `ApiError` for any other."""
        response = self.request(path, payload)
        if response.status != expect:
            raise ApiError(f"{path} answered {response.status}, not {expect}: {str(response.body)[:2000]}")
        return response.body

    def _generate(self, path: str, payload: Json, expect: int) -> Generation:
        body = self.call(path, _encode_arrays(DEFAULTS | payload), expect=expect)
        answer = body if isinstance(body, dict) else {}
        decoded = [decode_image(image) for image in answer.get("images") or []]
        return Generation(
            status=expect,
            body=body,
            images=[image for image, _ in decoded],
            png_infotexts=[text for _, text in decoded],
            info=json.loads(answer["info"]) if "info" in answer else {},
        )

    def txt2img(self, *, expect: int = 200, **payload: Any) -> Generation:
        """Generate from text; the keywords are the API's own, over `DEFAULTS`."""
        return self._generate("/sdapi/v1/txt2img", payload, expect)

    def img2img(self, *, expect: int = 200, **payload: Any) -> Generation:
        """Generate from ``init_images`` (arrays), with ``mask`` (an array) for inpainting."""
        return self._generate("/sdapi/v1/img2img", payload, expect)

    def get_options(self) -> Json:
        """All settings of the WebUI."""
        options: Json = self.call("/sdapi/v1/options")
        return options

    def set_options(self, **options: Any) -> None:
        """Change settings for good (that is, for the life of this server)."""
        self.call("/sdapi/v1/options", options)

    @contextlib.contextmanager
    def options(self, **options: Any) -> Iterator[None]:
        """Change settings for the length of a ``with`` block."""
        before = self.get_options()
        self.set_options(**options)
        try:
            yield
        finally:
            self.set_options(**{key: before[key] for key in options})

    def load_checkpoint(self, name: str) -> None:
        """Switch the checkpoint; returns when it is loaded.

        A checkpoint that fails to load is only printed by the WebUI; ``info["sd_model_name"]`` of the next picture
        tells which one made it.
        """
        self.set_options(sd_model_checkpoint=f"{name}.safetensors")
        if self.lazy:
            self.txt2img(steps=1, width=64, height=64)

    def progress(self) -> Json:
        """State of the running generation: ``progress`` from 0 to 1 and ``state``."""
        progress: Json = self.call("/sdapi/v1/progress?skip_current_image=true")
        return progress

    def interrupt(self) -> None:
        """Stop the running generation at its next step; its request then answers with what there is."""
        self.call("/sdapi/v1/interrupt", {})

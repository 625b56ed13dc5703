"""The body of a request to OpenAI's images endpoint."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AliasChoices, BaseModel, ConfigDict, Field, model_validator

from drp.http.jobs import ImageRequest
from drp.limits import MAX_DRAFTS, MAX_GUIDANCE, MAX_STEPS

MAX_PARTIAL_IMAGES = 100
MAX_BODY = 1 << 20
"""Maximum size of a request in bytes."""

RUN_OPTIONS = (
    *("steps", "seed", "mode", "drafts", "guidance", "solver", "rule", "tolerance", "stride", "offsets"),
    "negative_prompt",
)

SECOND_NAMES = {"steps": "num_inference_steps", "guidance": "guidance_scale"}
"""Names of options in diffusers, which are accepted as well as drp's, by the latter."""

Word = Annotated[str, Field(max_length=200)]


class Body(BaseModel):
    """OpenAI's fields, and the options of a run, also by diffusers' names. A null field counts as missing.

    quality, style, moderation, user: accepted without effect.
    """

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    prompt: Annotated[str, Field(max_length=32_000)]
    model: Word | None = None
    n: Annotated[int, Field(ge=1, le=10)] = 1
    size: Word | None = None
    quality: Literal["auto", "standard", "hd", "low", "medium", "high"] = "auto"
    style: Literal["auto", "vivid", "natural"] = "auto"
    background: Literal["auto", "opaque"] = "auto"
    moderation: Literal["auto", "low"] = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png", "jpeg", "webp"] = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] = 100
    stream: bool = False
    partial_images: Annotated[int, Field(ge=0, le=MAX_PARTIAL_IMAGES)] = 0
    timeline: bool = False
    user: Word | None = None
    steps: Annotated[int, Field(ge=1, le=MAX_STEPS)] | None = Field(
        None, validation_alias=AliasChoices("steps", SECOND_NAMES["steps"])
    )
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    mode: Word | None = None
    drafts: Annotated[int, Field(ge=1, le=MAX_DRAFTS)] | None = None
    guidance: Annotated[float, Field(ge=-MAX_GUIDANCE, le=MAX_GUIDANCE)] | None = Field(
        None, validation_alias=AliasChoices("guidance", SECOND_NAMES["guidance"])
    )
    negative_prompt: Annotated[str, Field(max_length=32_000)] | None = None
    solver: Word | None = None
    rule: Word | None = None
    tolerance: Annotated[float, Field(ge=0)] | None = None
    stride: Annotated[float, Field(ge=1, le=10_000)] | None = None
    offsets: Word | Annotated[list[Annotated[int, Field(ge=1, le=10_000)]], Field(max_length=256)] | None = None

    @model_validator(mode="before")
    @classmethod
    def _leave_out_nulls(cls, given: Any) -> Any:
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given

    def image_request(self) -> ImageRequest:
        given = {name: getattr(self, name) for name in RUN_OPTIONS}
        options = {name: value for name, value in given.items() if value is not None}
        previews = self.partial_images if self.stream else 0
        return ImageRequest(self.prompt, self.n, self.size, previews, self.stream and self.timeline, options)

    def facts(self, width: int, height: int) -> dict[str, Any]:
        """Return the fields of the answer that describe its images."""
        return {
            "background": "opaque",
            "output_format": self.output_format,
            "quality": self.quality,
            "size": f"{width}x{height}",
        }

"""What a request may ask for, and how one is refused."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from ultra.config import Positive, Section

RETRY_AFTER_S = 5.0
"""When a refused request may come again; most answers take less."""


class ApiError(ValueError):
    """A request that is not answered, in the form OpenAI's clients read."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        param: str | None = None,
        code: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code
        self.retry_after_s = retry_after_s

    @property
    def headers(self) -> dict[str, str]:
        """Those of the response beside the usual ones."""
        if self.retry_after_s is None:
            return {}
        return {"Retry-After": f"{self.retry_after_s:.0f}"}

    def body(self) -> dict[str, Any]:
        """Return the response's JSON."""
        kinds = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
        kind = kinds.get(
            self.status, "invalid_request_error" if self.status < 500 else "server_error"
        )
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


def too_busy() -> ApiError:
    """Return the refusal of a request that may come again soon."""
    return ApiError("too many requests, try again soon", status=429, retry_after_s=RETRY_AFTER_S)


class Limits(Section):
    """What a request may ask for."""

    models: Annotated[dict[str, str], Field(min_length=1, default_factory=lambda: {"ultra": ""})]
    """Name of a model -> its checkpoint; the page asks the first."""
    max_open_questions: Positive = 96
    """Questions in work in one ingress; those beyond are refused unread."""
    max_frames: Annotated[int, Field(ge=1, le=64)] = 16
    """Frames of one request."""
    max_image_mib: Positive = 8
    """Size of one encoded frame."""
    max_image_pixels: Positive = 25_000_000
    """Pixels of one frame, checked before it is decoded."""
    max_dicom_mib: Positive = 128
    """Size of a DICOM file that frames are taken from."""
    body_timeout_s: Positive = 30
    """Seconds in which a request must have come whole."""
    allowed_image_hosts: tuple[str, ...] = ()
    """Hosts that images are fetched from; see fetch.Fetcher. None: data URLs only."""
    allowed_image_networks: tuple[str, ...] = ()
    """Networks of them that are not public."""
    max_new_tokens: Positive = 256
    """Longest answer, and the one a request gets that does not say."""

    @property
    def max_body_bytes(self) -> int:
        """Bytes of a whole request: every frame at its largest, in base64, and the text.

        Frames of earlier messages, which come again with the conversation, count as well.
        """
        return self.max_frames * self.max_image_mib * 2**20 * 4 // 3 + 2**20


class ServeArgs(Limits):
    """What serve_config.yaml says about the application.

    Checkpoints are local paths or s3:// addresses, readable from every node, or versions of a
    registered model in MLflow: models:/NAME@ALIAS or models:/NAME/3. MLflow is asked for their
    addresses when the application is built. Serve builds again only what has other `args`: to
    serve what an alias has moved to, name that version.
    """

    tracking_uri: str = ""
    """MLflow's address for `models:/`; empty: MLFLOW_TRACKING_URI."""

    deadline_s: Positive = 120
    """Seconds from a request's arrival to the end of its answer."""
    api_keys_file: str = ""
    """A file on the ingress's node; see security.load_keys."""
    encoder_cache_mib: Annotated[int, Field(ge=0)] = 1024
    """What one encoder replica remembers of frames."""
    max_prefill_tokens: Positive | None = None
    """Tokens of prompts that may wait in one language replica; None: 16 or more longest ones."""
    encoder_device: str = "cpu"
    """`cuda` where the deployment's ray_actor_options give it a GPU."""
    language_device: str = "cpu"

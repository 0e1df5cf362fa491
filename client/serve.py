"""Predictions over HTTP, for programs inside the house: JSON in, JSON or FHIR's RiskAssessment out.

It listens on loopback and asks for nothing there; anywhere else it speaks TLS 1.3 and asks for a token. What comes in
is checked like records, answered, and forgotten: no value is logged.
"""

import base64
import binascii
import hashlib
import hmac
import io
import json
import logging
import re
import signal
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from torch import Tensor

from client.records.extras import needed
from client.records.images import scaled
from client.records.manifest import IMAGES, Manifest
from client.records.tabular import encode_rows
from client.usable import UsableModel
from shared_models.errors import ConfigError, FederationError, RecordsError
from shared_models.listening import address, brief_server, is_loopback, listen, names_loopback, read_token
from shared_models.tasks import Choice, Head, ImageInput, Survival, TableInput, Task

log = logging.getLogger("konsil.serve")

MOST_ROWS = 1000
LONGEST_BODY = 16 * 1024 * 1024  # bytes
PATHS = frozenset({"/predict", "/card", "/healthz"})
FHIR = "application/fhir+json"
HEADERS = {"cache-control": "no-store", "x-content-type-options": "nosniff"}
_SUBJECT = re.compile(r"(https://[A-Za-z0-9./:_-]{1,500}/)?Patient/[A-Za-z0-9.-]{1,64}")
_MAKE_TOKEN = "Run: (umask 077; openssl rand -hex 32 > FILE), and pass --token-file FILE."  # noqa: S105 - no token


@dataclass(frozen=True)
class Place:
    """Where to listen.

    Attributes:
        host: An address of this machine.
        port: 0 for a free one.
        token_file: Its first line is what a request has to show, as ``Authorization: Bearer``.
        certificate: Of TLS, with ``key``.
        key: Its private key.
    """

    host: str = "127.0.0.1"
    port: int = 8300
    token_file: Path | None = None
    certificate: Path | None = None
    key: Path | None = None


class RefusedError(Exception):
    """A request that is answered with an error.

    Args:
        status: HTTP's.
        text: What is wrong with it, for whoever asked.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


def serve(model: UsableModel, place: Place) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Raises:
        ConfigError: The task's input cannot be sent as JSON; the address is not loopback and token or TLS are missing;
            or the port is in use.
        IdentityError: The token file or the TLS files cannot be used.
    """
    app = guarded(make_app(model), place)
    tls = (place.certificate, place.key) if place.certificate and place.key else None
    server = brief_server(app, tls=tls, hint="Check --certificate and --key.")
    with listen(place.host, place.port, hint="Stop what uses the port, or choose another: --port.") as listener:
        host, port = listener.getsockname()[:2]
        log.info("%s://%s answers for %s", "https" if tls else "http", address(host, port), model.task.name)
        signal.signal(signal.SIGTERM, lambda *_: setattr(server, "should_exit", True))
        server.run(sockets=[listener])


def guarded(app: FastAPI, place: Place) -> "Guard":
    """The application behind what keeps others out.

    Raises:
        ConfigError: The address is not loopback, and token or TLS are missing.
        IdentityError: The token file cannot be used.
    """
    loopback = is_loopback(place.host)
    if (place.certificate is None) != (place.key is None):
        raise ConfigError("--certificate and --key need each other", hint="Pass both, or none.")
    if not loopback and (place.token_file is None or place.certificate is None):
        raise ConfigError(
            f"predictions would be open to everybody who reaches {place.host}",
            hint=f"Pass --certificate, --key and --token-file, or listen on 127.0.0.1. {_MAKE_TOKEN}",
        )
    token = None if place.token_file is None else read_token(place.token_file, hint=_MAKE_TOKEN)
    return Guard(app, token, loopback=loopback)


class Guard:
    """In front of the application: who may ask, and how much.

    Args:
        app: What answers.
        token: That a request has to show; None where none has to.
        loopback: Whether requests must name this machine as their host: a foreign page whose name was made to point
            here (DNS rebinding) names its own.
    """

    def __init__(self, app: FastAPI, token: str | None, *, loopback: bool) -> None:
        self._app, self._loopback = app, loopback
        self._token = None if token is None else _digest(token)

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """One request, as ASGI has it."""
        request = Request(scope)
        refusal = self._refusal(request)
        status = 0

        async def send_with_headers(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                extra = [(name.encode("ascii"), value.encode("ascii")) for name, value in HEADERS.items()]
                message["headers"] = [*message["headers"], *extra]
            await send(message)

        await (refusal or self._app)(scope, receive, send_with_headers)
        path = request.url.path if request.url.path in PATHS else "another path"  # never what somebody made of it
        log.info("%s %s: %d", request.method, path, status)

    def _refusal(self, request: Request) -> Response | None:
        if self._loopback and not names_loopback(request.headers.get("host", "")):
            return _problem(421, "this is only for the machine that it runs on")
        kind, _, shown = request.headers.get("authorization", "").partition(" ")
        right = kind.lower() == "bearer" and hmac.compare_digest(_digest(shown.strip()), self._token or b"")
        if self._token is None or right or request.url.path == "/healthz":
            return None
        refusal = _problem(401, "show the token")
        refusal.headers["www-authenticate"] = "Bearer"
        return refusal


def make_app(model: UsableModel) -> FastAPI:
    """``POST /predict``, ``GET /card`` and ``GET /healthz``, without a guard.

    Raises:
        ConfigError: The task's input cannot be sent as JSON.
    """
    if not isinstance(model.task.input, TableInput | ImageInput):
        raise ConfigError(
            f"inputs of kind {model.task.input.kind} are not served",
            hint="Tables and images are. For others: konsil-hospital predict.",
        )
    app = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)  # their documents load scripts from elsewhere

    @app.get("/healthz")
    def healthz() -> Response:
        return JSONResponse({"status": "ok"})

    @app.get("/card")
    def card() -> Response:
        return JSONResponse(describe(model))

    @app.post("/predict")
    async def predict(request: Request) -> Response:
        try:
            asked = parse(await _body(request))
            outputs = await run_in_threadpool(answer, model, asked)
            if _wants_fhir(request):
                return JSONResponse(risk_assessments(model, asked, outputs), media_type=FHIR)
        except RefusedError as error:
            return _problem(error.status, str(error))
        except RecordsError as error:
            return _problem(422, str(error))
        return JSONResponse({"predictions": predictions(model, outputs), "intended_use": model.intended_use})

    @app.exception_handler(FederationError)
    def failed(_: Request, error: FederationError) -> Response:
        log.warning("a request failed: %s", error.code)  # a text could quote a value
        return _problem(500, "the request could not be answered")

    return app


def describe(model: UsableModel) -> dict[str, Any]:
    """What is served, for whoever wants to ask: the model's card in short, and the schema of a row."""
    return {
        "study": model.plan.study,
        "purpose": model.plan.purpose,
        "plan_digest": model.plan.digest(),
        "task": model.task.name,
        "description": model.task.description,
        "network": model.plan.network.name,
        "input": model.task.input.model_dump(mode="json"),
        "outputs": list(model.columns),
        "intended_use": model.intended_use,
    }


@dataclass(frozen=True)
class Asked:
    """A request.

    Attributes:
        rows: One object per record.
        subjects: A reference to the Patient of each record; empty where there are none.
    """

    rows: list[Mapping[str, str]]
    subjects: list[str]


def parse(body: bytes) -> Asked:
    """Read ``{"rows": [{column: value, ...}, ...], "subjects": ["Patient/...", ...]}``; the latter may be left out.

    Numbers stay as they are written, so that they are checked as they would be in a file.

    Raises:
        RefusedError: It is something else.
    """
    try:
        asked = json.loads(body, parse_float=str, parse_int=str, parse_constant=str)
    except (ValueError, RecursionError):
        raise RefusedError(400, "the body is no JSON") from None
    if not isinstance(asked, dict) or not {"rows"} <= set(asked) <= {"rows", "subjects"}:
        raise RefusedError(422, 'the body is not {"rows": [...], "subjects": [...]}')
    rows, subjects = asked["rows"], asked.get("subjects", [])
    if not isinstance(rows, list) or not 1 <= len(rows) <= MOST_ROWS:
        raise RefusedError(422, f"rows is not a list of 1 to {MOST_ROWS}")
    if not all(isinstance(row, dict) and all(isinstance(v, str) for v in row.values()) for row in rows):
        raise RefusedError(422, "a row is not an object of texts and numbers")
    if not isinstance(subjects, list) or (subjects and len(subjects) != len(rows)):
        raise RefusedError(422, "subjects is not a list of one for each row")
    if not all(isinstance(subject, str) and _SUBJECT.fullmatch(subject) for subject in subjects):
        raise RefusedError(422, 'a subject is no reference such as "Patient/123"')
    return Asked(rows, subjects)


def answer(model: UsableModel, asked: Asked) -> Tensor:
    """Outputs for the rows of a request, shape ``(n, len(model.columns))``.

    Raises:
        RefusedError: A row has a column that the task has not, or an image is none.
        RecordsError: A value is missing, or outside what the task allows; as of a file.
    """
    schema = model.task.input
    if isinstance(schema, ImageInput):
        inputs = torch.from_numpy(scaled(np.stack([_image(row, schema) for row in asked.rows])))
    else:
        assert isinstance(schema, TableInput)  # noqa: S101 - make_app has looked
        inputs = _encoded(model.task, [column.name for column in schema.columns], asked.rows)
    with torch.inference_mode():
        outputs = model.outputs(inputs)
    if not outputs.isfinite().all():
        raise RefusedError(500, "the model gives no finite number for a row")
    return outputs


def _encoded(task: Task, names: list[str], rows: Sequence[Mapping[str, str]]) -> Tensor:
    for number, row in enumerate(rows):
        if unknown := sorted(set(row) - set(names)):
            raise RefusedError(422, f"row {number}: no column of the task: {', '.join(map(repr, unknown))[:200]}")
    frame = pd.DataFrame([[row.get(name, "") for name in names] for row in rows], columns=names, dtype=object)
    request = Manifest(task=task.name, file=Path("request.jsonl"), validation_fraction=0.0, one_row_per_patient=True)
    return encode_rows(frame, request, task)


def predictions(model: UsableModel, outputs: Tensor) -> list[dict[str, Any]]:
    """What the model says of each record: its outputs by column, and the predicted classes."""
    classes = model.predicted(outputs)
    return [
        {
            **dict(zip(model.columns, row, strict=True)),
            **{column: names[number] for column, names in classes.items()},
        }
        for number, row in enumerate(outputs.double().tolist())
    ]


def risk_assessments(model: UsableModel, asked: Asked, outputs: Tensor) -> dict[str, Any]:
    """A RiskAssessment for each record; of several, a Bundle of them.

    Its status is ``preliminary``: nobody has looked at it. ``whenRange`` has the time by which an event happens.

    Raises:
        RefusedError: No subjects were named, or the task predicts something that is no risk.

    Source:
        HL7 FHIR R4: RiskAssessment, whose probabilities are from 0 to 1.
    """
    if not asked.subjects:
        raise RefusedError(422, "a RiskAssessment needs a subject: name one for each row")
    if not all(isinstance(head, Choice | Survival) for head in model.task.heads):
        raise RefusedError(406, f"task {model.task.name} predicts no risk: ask for JSON")
    now = datetime.now(UTC).isoformat(timespec="seconds")
    method = f"{model.plan.network.name} of study {model.plan.study}, plan {model.plan.digest()}"
    found = [
        {
            "resourceType": "RiskAssessment",
            "status": "preliminary",
            "method": {"text": method},
            "subject": {"reference": subject},
            "occurrenceDateTime": now,
            "prediction": _risks(model.task.heads, row),
            "note": [{"text": model.intended_use}],
        }
        for subject, row in zip(asked.subjects, outputs.double().tolist(), strict=True)
    ]
    if len(found) == 1:
        return found[0]
    return {"resourceType": "Bundle", "type": "collection", "entry": [{"resource": resource} for resource in found]}


def _risks(heads: Sequence[Head], row: Sequence[float]) -> list[dict[str, Any]]:
    """Predictions of a RiskAssessment, from a record's outputs in their order."""
    found, outputs = [], iter(row)
    for head in heads:
        name = "" if len(heads) == 1 else f"{head.name}: "
        if isinstance(head, Choice):
            found += [
                {"outcome": {"text": f"{name}{label}"}, "probabilityDecimal": round(next(outputs), 6)}
                for label in head.classes
            ]
        elif isinstance(head, Survival):
            found += [
                {
                    "outcome": {"text": head.name},
                    "probabilityDecimal": round(next(outputs), 6),
                    "whenRange": {"high": {"value": edge, "unit": head.unit}},
                }
                for edge in head.edges
            ]
    return found


def _image(row: Mapping[str, str], schema: ImageInput) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """The PNG of a row, base64, as pixels of shape ``(channels, height, width)``; of exactly the task's size."""
    if set(row) != {IMAGES}:
        raise RefusedError(422, f'a row is not {{"{IMAGES}": "a PNG, in base64"}}')
    with needed("images", "pillow"):
        from PIL import Image  # noqa: PLC0415  # an extra
    try:
        content = base64.b64decode(row[IMAGES], validate=True)
        with Image.open(io.BytesIO(content), formats=("PNG",)) as picture:
            if (picture.height, picture.width) != (schema.height, schema.width):
                raise RefusedError(422, f"an image is not of {schema.height} x {schema.width} pixels")
            if picture.mode != ("L" if schema.channels == 1 else "RGB"):
                raise RefusedError(422, f"an image is not {'grey, 8 bits' if schema.channels == 1 else 'RGB'}")
            pixels = np.asarray(picture)
    except (binascii.Error, OSError, SyntaxError, ValueError):  # PIL's errors of damaged files
        raise RefusedError(422, "an image is no PNG in base64") from None
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


async def _body(request: Request) -> bytes:
    body = b""
    async for piece in request.stream():
        body += piece
        if len(body) > LONGEST_BODY:
            raise RefusedError(413, f"the body is longer than {LONGEST_BODY} bytes")
    return body


def _wants_fhir(request: Request) -> bool:
    """By ``?format=fhir``, or by the header."""
    wanted = request.query_params.get("format", "")
    if wanted not in {"", "json", "fhir"}:
        raise RefusedError(422, "format is json or fhir")
    return wanted == "fhir" or (not wanted and FHIR in request.headers.get("accept", "").lower())


def _problem(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).digest()

"""Predictions over HTTP: checked like records, answered in JSON or FHIR, and nobody else's to ask for."""

import base64
import io
import json
import logging
import os
import signal
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image

from client import serve
from client.export import made_up_inputs
from client.records.images import scaled
from client.serve import FHIR, Place, guarded, make_app
from client.usable import UsableModel
from server.pki import Authority
from shared_models import plan
from shared_models.errors import ConfigError, IdentityError
from shared_models.model_file import INTENDED_USE
from shared_models.tasks import Categorical, ImageInput, Numeric, Quantity, SeriesInput, Survival, TableInput, Task
from tests.client.made_up import numeric, table, task_of, usable, written_model

SCHEMA = TableInput(
    columns=(
        Numeric(name="age", unit="year", low=0, high=100),
        Numeric(name="lactate", unit="mmol/L", low=0.1, high=40, scale="log"),
        Categorical(name="stage", categories=("i", "ii", "iii")),
    )
)
ROW: dict[str, Any] = {"age": 50, "lactate": 2.0, "stage": "ii"}
TOKEN = "f" * 32
LOGISTIC = plan.LogisticRegression(name="logistic-regression")


def model_of(task: Task) -> UsableModel:
    """A model of that task whose outputs differ from record to record."""
    return usable(task, plan.Mlp(name="mlp", hidden=(6,)), seed=4)


MODEL = model_of(task_of(SCHEMA))


def client_of(model: UsableModel, place: Place | None = None) -> TestClient:
    """A client of that model's service, on this machine."""
    return TestClient(guarded(make_app(model), place or Place()), base_url="http://127.0.0.1:8300")


@pytest.fixture(scope="module")
def client() -> TestClient:
    """A client of the model above."""
    return client_of(MODEL)


def test_a_row_gets_the_networks_own_probabilities(client: TestClient) -> None:
    """Encoded as the task says: half the range of the age, the logarithm's place of the lactate, an indicator."""
    answer = client.post("/predict", json={"rows": [ROW, ROW | {"stage": "i", "age": 100}]})

    place = 4 * np.log(2.0 / 0.1) / np.log(40 / 0.1) - 2
    with torch.no_grad():
        logits = MODEL.network(torch.tensor([[0, place, 1, 0], [2, place, 0, 0]], dtype=torch.float32))
    expected = logits.sigmoid()[:, 0].tolist()
    found = answer.json()
    assert answer.status_code == 200
    assert [row["probability_class 1"] for row in found["predictions"]] == pytest.approx(expected, abs=1e-6)
    assert [row["predicted"] for row in found["predictions"]] == [f"class {int(p > 0.5)}" for p in expected]
    assert found["intended_use"] == INTENDED_USE
    assert answer.headers["cache-control"] == "no-store"


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"age": 101}, "row 0, column 'age', value '101': is outside the public range 0 to 100 year"),
        ({"age": "old"}, "is not a number"),
        ({"age": "NaN"}, "is not a finite number"),
        ({"stage": "iv"}, "is none of i, ii, iii"),
        ({"lactate": ""}, "the value is missing"),
        ({"lactate": None}, "a row is not an object of texts and numbers"),
        ({"lactate": True}, "a row is not an object of texts and numbers"),
        ({"lactate": [2]}, "a row is not an object of texts and numbers"),
        ({"laktate": 2}, "row 0: no column of the task: 'laktate'"),
    ],
)
def test_values_are_checked_like_records(client: TestClient, row: dict[str, Any], words: str) -> None:
    """With the words that a file's error has; nothing is predicted for the other rows either."""
    answer = client.post("/predict", json={"rows": [ROW | row, ROW]})

    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_a_column_that_is_left_out_is_missing(client: TestClient) -> None:
    """It is not taken for anything."""
    answer = client.post("/predict", json={"rows": [{"age": 50, "stage": "i"}]})

    assert answer.status_code == 422
    assert "column 'lactate'" in answer.json()["error"]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"no json", 400),
        (b"[" * 100_000, 400),
        (b"[]", 422),
        (b'{"rows": []}', 422),
        (b'{"rows": {}}', 422),
        (b'{"rows": [{}], "more": 1}', 422),
        (b'{"rows": [1]}', 422),
        (b'{"rows": [{"age": Infinity, "lactate": 1, "stage": "i"}]}', 422),
        (b"\xff", 400),
    ],
)
def test_what_is_no_request_is_refused(client: TestClient, body: bytes, status: int) -> None:
    """Without a traceback."""
    answer = client.post("/predict", content=body)

    assert answer.status_code == status
    assert list(answer.json()) == ["error"]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from([*ROW, "rows", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@examples(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=JSON, subjects=JSON)
def test_nothing_that_is_sent_breaks_it(client: TestClient, rows: Any, subjects: Any) -> None:
    """Whatever it is, there is an answer: a prediction or what is wrong with it."""
    answer = client.post("/predict", content=json.dumps({"rows": rows, "subjects": subjects}))

    assert answer.status_code in {200, 422}


def test_too_much_at_once_is_refused(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than a thousand, or a longer body than fits, declared or not."""
    monkeypatch.setattr(serve, "LONGEST_BODY", 100_000)

    rows = client.post("/predict", json={"rows": [{}] * 1001})
    body = client.post("/predict", content=(b" " * 10_000 for _ in range(11)))

    assert rows.status_code == 422
    assert body.status_code == 413


def test_no_value_is_logged(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    """Neither of a request that is answered nor of one that is refused, nor what somebody made of the address."""
    caplog.set_level(logging.DEBUG, logger="konsil")

    client.post("/predict?age=61.6161", json={"rows": [ROW | {"age": 61.6161}]})
    client.post("/predict", json={"rows": [ROW | {"age": 161.6161}], "subjects": ["Patient/secret"]})
    client.get("/patients/secret")

    assert [record.message for record in caplog.records if record.name == "konsil.serve"] == [
        "POST /predict: 200",
        "POST /predict: 422",
        "GET another path: 404",
    ]


# FHIR


def test_fhir_is_a_risk_assessment(client: TestClient) -> None:
    """By the address or by the header: subject, method, a probability of each class, and the intended use."""
    asked = {"rows": [ROW], "subjects": ["Patient/123"]}

    by_address = client.post("/predict?format=fhir", json=asked)
    by_header = client.post("/predict", json=asked, headers={"accept": FHIR})
    plain = client.post("/predict", json=asked).json()["predictions"][0]

    for answer in (by_address, by_header):
        found = answer.json()
        assert answer.headers["content-type"] == FHIR
        assert (found["resourceType"], found["status"]) == ("RiskAssessment", "preliminary")
        assert found["subject"] == {"reference": "Patient/123"}
        assert MODEL.plan.digest() in found["method"]["text"]
        assert found["note"] == [{"text": INTENDED_USE}]
        assert [(p["outcome"]["text"], p["probabilityDecimal"]) for p in found["prediction"]] == [
            (name, round(plain[f"probability_{name}"], 6)) for name in ("class 0", "class 1")
        ]
        assert found["occurrenceDateTime"].endswith("+00:00")


def test_several_records_are_a_bundle(client: TestClient) -> None:
    """In the order of the rows."""
    asked = {"rows": [ROW, ROW], "subjects": ["Patient/a", "https://fhir.example.org/r4/Patient/b"]}

    found = client.post("/predict?format=fhir", json=asked).json()

    assert (found["resourceType"], found["type"]) == ("Bundle", "collection")
    assert [entry["resource"]["subject"]["reference"] for entry in found["entry"]] == asked["subjects"]


@pytest.mark.parametrize(
    ("subjects", "words"),
    [
        ([], "needs a subject"),
        (["Patient/a", "Patient/b"], "one for each row"),
        (["John Smith"], "is no reference"),
        (["Patient/../Group/1"], "is no reference"),
        ("Patient/a", "not a list"),
    ],
)
def test_a_subject_is_a_reference(client: TestClient, subjects: Any, words: str) -> None:
    """To a Patient, one for each row; a name is none."""
    answer = client.post("/predict?format=fhir", json={"rows": [ROW], "subjects": subjects})

    assert answer.status_code == 422
    assert words in answer.json()["error"]


def test_an_event_has_the_time_by_which_it_happens() -> None:
    """Survival is a prediction for each interval; a quantity is no risk, and an unknown format none."""
    death = Survival(name="death", time="time", event="event", unit="day", edges=(30, 90))
    asked = {"rows": [ROW], "subjects": ["Patient/a"]}

    found = client_of(model_of(task_of(SCHEMA, (death,)))).post("/predict?format=fhir", json=asked).json()
    dose = client_of(model_of(task_of(SCHEMA, (Quantity(measure=numeric("dose")),))))

    assert [p["whenRange"]["high"] for p in found["prediction"]] == [
        {"value": 30, "unit": "day"},
        {"value": 90, "unit": "day"},
    ]
    assert 0 < found["prediction"][0]["probabilityDecimal"] < found["prediction"][1]["probabilityDecimal"] < 1
    assert dose.post("/predict?format=fhir", json=asked).status_code == 406
    assert -1 <= dose.post("/predict", json=asked).json()["predictions"][0]["dose"] <= 1
    assert dose.post("/predict?format=xml", json=asked).status_code == 422


# images


def test_images_come_as_png() -> None:
    """Grey pictures of the task's size, as in training; anything else is refused."""
    model = usable(task_of(ImageInput(channels=1, height=28, width=30)), plan.Cnn(name="cnn", channels=(4,)))
    pixels = np.random.default_rng(0).integers(0, 256, (28, 30), dtype=np.uint8)
    client = client_of(model)

    def send(picture: Image.Image, form: str = "PNG") -> Any:
        stream = io.BytesIO()
        picture.save(stream, format=form)
        return client.post("/predict", json={"rows": [{"images": base64.b64encode(stream.getvalue()).decode()}]})

    found = send(Image.fromarray(pixels))
    with torch.no_grad():
        expected = model.network(torch.from_numpy(scaled(pixels[None, None]))).sigmoid().item()
    assert found.json()["predictions"][0]["probability_class 1"] == pytest.approx(expected, abs=1e-6)
    for picture, form in (
        (Image.fromarray(pixels.T), "PNG"),
        (Image.fromarray(pixels).convert("RGB"), "PNG"),
        (Image.fromarray(pixels).convert("I;16"), "PNG"),
        (Image.fromarray(pixels), "JPEG"),
    ):
        assert send(picture, form).status_code == 422
    for text in ("", "%%%", base64.b64encode(b"no picture").decode(), base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()):
        assert client.post("/predict", json={"rows": [{"images": text}]}).status_code == 422


def test_series_are_not_served() -> None:
    """The command says what to do instead."""
    task = task_of(SeriesInput(variables=(numeric("a"),), steps=4, step_unit="hour"))

    with pytest.raises(ConfigError, match="inputs of kind series are not served"):
        make_app(usable(task, plan.Lstm(name="lstm", hidden=2)))


def test_no_number_is_no_answer() -> None:
    """A model that diverged says nothing, instead of NaN."""
    model = usable(task_of(SCHEMA), LOGISTIC)
    with torch.no_grad():
        next(model.network.parameters()).fill_(torch.nan)

    answer = client_of(model).post("/predict", json={"rows": [ROW]})

    assert answer.status_code == 500
    assert "no finite number" in answer.json()["error"]


# who may ask


def test_the_card_says_what_is_served(client: TestClient) -> None:
    """What it is for, and how a row is made; and whether it is there."""
    card = client.get("/card").json()

    assert card["intended_use"] == INTENDED_USE
    assert card["plan_digest"] == MODEL.plan.digest()
    assert TableInput.model_validate_json(json.dumps(card["input"])) == SCHEMA
    assert card["outputs"] == ["probability_class 0", "probability_class 1"]
    assert client.get("/healthz").json() == {"status": "ok"}
    assert client.get("/docs").status_code == 404


def test_on_loopback_another_host_is_refused(client: TestClient) -> None:
    """A page elsewhere whose name was made to point here asks under its own name."""
    for path in ("/healthz", "/card", "/predict"):
        assert client.get(path, headers={"host": "evil.example.org:8300"}).status_code == 421
    assert client.get("/card", headers={"host": "localhost:9"}).status_code == 200


@pytest.fixture
def token_file(tmp_path: Path) -> Path:
    """A token, for its owner alone."""
    file = tmp_path / "token"
    file.touch(mode=0o600)
    file.write_text(f"{TOKEN}\n", encoding="ascii")
    return file


def test_a_token_is_asked_for_where_there_is_one(token_file: Path) -> None:
    """Of everything but whether it is there; also on loopback, where it is optional."""
    client = client_of(MODEL, Place(token_file=token_file))

    def ask(header: str) -> int:
        return client.get("/card", headers={b"authorization": header.encode()} if header else {}).status_code

    wrong = ("", f"Bearer {TOKEN[:-1]}", f"Basic {TOKEN}", "Bearer", "Bearer é")
    assert [ask(header) for header in wrong] == [401] * len(wrong)
    assert ask(f"Bearer {TOKEN}") == ask(f"bearer {TOKEN}") == 200
    assert client.get("/healthz").status_code == 200


def test_elsewhere_needs_token_and_tls(token_file: Path, tmp_path: Path) -> None:
    """Before anything listens; a token that others can read is none."""
    for place in (
        Place(host="0.0.0.0"),  # noqa: S104 - it is refused
        Place(host="192.0.2.1", token_file=token_file),
        Place(host="::", certificate=tmp_path / "tls.pem", key=tmp_path / "tls.key"),
    ):
        with pytest.raises(ConfigError, match="open to everybody who reaches"):
            serve.serve(MODEL, place)
    with pytest.raises(ConfigError, match="need each other"):
        serve.serve(MODEL, Place(certificate=tmp_path / "tls.pem"))
    token_file.chmod(0o644)
    with pytest.raises(IdentityError, match="open to others"):
        serve.serve(MODEL, Place(token_file=token_file))


def test_a_process_answers_over_tls_until_it_is_told_to_end(tmp_path: Path, token_file: Path) -> None:
    """The real command, on a free port: it says what the model is for, answers, and ends with SIGTERM."""
    model = written_model(tmp_path / "model.safetensors", "heart-disease", plan.Mlp(name="mlp", hidden=(4,)))
    authority = Authority(tmp_path / "pki")
    authority.issue(tmp_path, "localhost", hosts=["localhost"])
    row = {
        "age": 54,
        "sex": "male",
        "chest_pain": "asymptomatic",
        "resting_blood_pressure": 130,
        "cholesterol": 250,
        "fasting_blood_sugar": "normal",
        "resting_ecg": "normal",
        "maximum_heart_rate": 140,
        "exercise_angina": "yes",
        "st_depression": 1.5,
    }
    options = ["--model", model, "--port", "0", "--token-file", token_file]
    options += ["--certificate", tmp_path / "tls.pem", "--key", tmp_path / "tls.key"]
    process = subprocess.Popen(
        [sys.executable, "-m", "client.cli", "serve", *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
    )
    assert process.stderr is not None
    try:
        listening = next(line for line in process.stderr if "answers for heart-disease" in line)
        url = listening.split("INFO ")[1].split(" ")[0].replace("127.0.0.1", "localhost")
        context = ssl.create_default_context(cafile=str(authority.certificate))
        asked = {"rows": [row], "subjects": ["Patient/1"]}
        with httpx.Client(base_url=url, verify=context, timeout=30) as client:
            found = client.post("/predict?format=fhir", json=asked, headers={"authorization": f"Bearer {TOKEN}"}).json()
            refused = client.post("/predict", json=asked).status_code
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=30)
    finally:
        process.kill()
        process.communicate()

    assert process.returncode == 0
    assert refused == 401
    assert sum(prediction["probabilityDecimal"] for prediction in found["prediction"]) == pytest.approx(1, abs=2e-6)
    assert INTENDED_USE in said
    assert "Traceback" not in errors


def test_made_up_rows_have_outputs_that_differ() -> None:
    """So that the tests above compare something."""
    with torch.no_grad():
        outputs = MODEL.outputs(made_up_inputs(MODEL.task, 20))
        narrow = model_of(task_of(table(2))).outputs(made_up_inputs(task_of(table(2)), 20))

    assert outputs.std(dim=0).min() > 0.01
    assert narrow.shape == (20, 2)

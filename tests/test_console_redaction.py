"""Redaction: what sounds secret is masked, whatever it is called exactly; what only looks alike is not."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import pytest

from durable_cluster.ops.console.formats import line
from durable_cluster.ops.console.redaction import MASK, redacted

ID = "0123456789abcdef0123456789abcdef"


@pytest.mark.parametrize(
    "name",
    [
        *("password", "Password", "PASSWORD", "old_password", "passwordHash", "user-password", "db.password"),
        *("token", "accessToken", "access_token", "X-Auth-Token", "refreshTOKEN", "apiKey", "API_KEY", "api-key"),
        *(
            "Authorization",
            "clientSecret",
            "private_key",
            "card",
            "cardNumber",
            "card_number",
            "CVV",
            "iban",
            "pin",
            "Set-Cookie",
        ),
        *("password2", "token_1", "oauth2Token", "passWord", "pass-phrase", "creditcard", "sessionId", "APIKey"),
    ],
)
def test_what_sounds_secret_is_masked(name: str) -> None:
    assert redacted({name: "hunter2"}) == {name: MASK}
    assert redacted({name: 1234}) == {name: MASK}
    assert redacted({name: {"deep": ["hunter2"]}}) == {name: MASK}


@pytest.mark.parametrize(
    "name",
    [
        *("passwords", "old_passwords", "tokens", "accessTokens", "secrets", "clientSecrets", "api_keys", "apiKeys"),
        *(
            "API-KEYS",
            "X-Api-Keys",
            "apikeys",
            "credentials",
            "cookies",
            "pins",
            "private-keys",
            "Signatures",
            "tokens2",
        ),
    ],
)
def test_several_of_what_sounds_secret_are_masked_and_their_number_is_shown(name: str) -> None:
    assert redacted({name: "hunter2"}) == {name: MASK}
    assert redacted({name: ["hunter2", 1234]}) == {name: MASK}
    assert redacted({name: {"of": "ada"}}) == {name: MASK}
    assert redacted({name: 4096}) == {name: 4096}


def test_numbers_of_tokens_are_shown() -> None:
    usage = {"max_tokens": 4096, "inputTokens": 17, "tokens_used": 0.5, "token": 17}
    assert redacted(usage) == usage | {"token": MASK}


@pytest.mark.parametrize(
    "name",
    ["discarded", "tokenizer", "secretary", "passport_valid", "spinner", "pines", "cardinality", "keys", "author"],
)
def test_what_only_looks_alike_is_shown(name: str) -> None:
    assert redacted({name: "tea"}) == {name: "tea"}


@pytest.mark.parametrize("value", [None, True, False])
def test_that_there_is_no_secret_is_no_secret(value: bool | None) -> None:
    assert redacted({"password": value}) == {"password": value}


def test_it_is_found_however_deep_and_the_rest_stays_as_it_was() -> None:
    value = {"order": [{"lines": 3, "payment": {"card": "4111", "total": 1.5}}, "password"], "n": None}
    assert redacted(value) == {"order": [{"lines": 3, "payment": {"card": MASK, "total": 1.5}}, "password"], "n": None}
    assert value["order"][0]["payment"]["card"] == "4111"  # type: ignore[index]


def test_names_can_be_added_in_any_spelling() -> None:
    value = {"patientName": "Ada", "patient": "Ada", "name": "Ada"}
    assert redacted(value, ["patient-name"]) == {"patientName": MASK, "patient": "Ada", "name": "Ada"}
    value = {"salary": "x", "Salaries": ["x"], "geheimzahl": "x", "Geheimzahl": "x", "adres": "x", "adreses": "x"}
    assert redacted(value, ["salary", "Geheimzahl", "adres"]) == dict.fromkeys(value, MASK)
    assert redacted({"пароль": "x", "Пароль": "x", "слово": "x"}, ["пароль"]) == {
        "пароль": MASK,
        "Пароль": MASK,
        "слово": "x",
    }


def test_ids_of_workflows_are_truncated_wherever_they_stand() -> None:
    value = {"child": ID, "said": f"see {ID}.", ID: [ID]}
    assert ID not in str(redacted(value))
    assert redacted({"child": ID}) == {"child": "0123456789ab…"}
    assert redacted({"digest": ID * 2}) == {"digest": ID * 2}


def test_a_value_of_any_depth_is_no_trouble() -> None:
    deep: Any = "x"
    for _ in range(900):
        deep = [deep]
    assert MASK in str(redacted(deep))


@pytest.mark.parametrize("whole", [ID, ID.upper(), str(UUID(ID)), str(UUID(ID)).upper()])
def test_a_whole_id_is_truncated_however_it_is_written(whole: str) -> None:
    assert redacted({whole: [f"after {whole}."]}) == {f"{ID[:12]}…": [f"after {ID[:12]}…."]}
    assert line(f"no  workflow {whole}") == f"no workflow {ID[:12]}…"
    assert line({"id": whole}, 60) == f'{{"id":"{ID[:12]}…"}}'


def test_what_is_longer_than_an_id_is_none() -> None:
    digest = ID * 2
    assert redacted(digest) == line(digest) == digest

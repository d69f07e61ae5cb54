"""The documents against the code they speak of."""

from __future__ import annotations

import re

from python_backends.core.errors import RefusalReason
from python_backends.core.paths import repository_root
from python_backends.core.tensors import ROUTER_INPUTS, ROUTER_OUTPUTS
from router.types import Proof
from scripts.reference import render_api, render_configuration, render_observability

ROOT = repository_root()


def test_configuration_page_is_the_code() -> None:
    """scripts/reference writes it again."""
    assert (ROOT / "docs" / "configuration.md").read_text() == render_configuration()


def test_api_page_is_the_code() -> None:
    text = (ROOT / "docs" / "api.md").read_text()
    assert text == render_api()
    assert all(f"`{tensor.name}`" in text for tensor in (*ROUTER_INPUTS, *ROUTER_OUTPUTS))


def test_observability_page_is_the_code() -> None:
    assert (ROOT / "docs" / "observability.md").read_text() == render_observability()


def test_paths_that_the_documents_name_exist() -> None:
    named = re.compile(r"`((?:python_backends|router|loadtest|configs|scripts|tests|docs|model_repository)/[\w./-]*)`")
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for path in named.findall(page.read_text()):
            assert (ROOT / path).exists(), f"{page.name} names {path}"


def test_the_guide_to_the_proof_explains_every_field_and_verdict() -> None:
    text = (ROOT / "docs" / "guides" / "reading-the-proof.md").read_text()
    plain = {"arrival_ns", "e2e_ms", "prefill_worker", "decode_worker", "request_id", "trace_id"}  # their names say it
    for name in {*Proof.__struct_fields__} - plain - {"prefill_tokens_computed"}:
        assert f"`{name}`" in text, name
    for reason in RefusalReason:
        assert f"`{reason.value}`" in text, reason

"""HTTPS where a certificate is configured."""

from __future__ import annotations

import ssl
from pathlib import Path

import httpx
import pytest
import trustme

from serve.config import ConfigurationError
from serve.loading import load_settings
from tests.served import served


def test_the_service_speaks_tls_with_the_certificate_it_is_given(tmp_path: Path):
    authority = trustme.CA()
    certificate = authority.issue_cert("127.0.0.1")
    certificate.private_key_pem.write_to_path(tmp_path / "key.pem")
    certificate.cert_chain_pems[0].write_to_path(tmp_path / "certificate.pem")
    settings = {
        "base": {"name": "base"},
        "engine": {"kind": "fake"},
        "adapters": {"roots": [], "preload": {}},
        "server": {"tls_certificate": str(tmp_path / "certificate.pem"), "tls_key": str(tmp_path / "key.pem")},
    }
    trusted = ssl.create_default_context()
    authority.configure_trust(trusted)
    with served(tmp_path, settings, verify=trusted) as running:
        assert running.url.startswith("https://")
        body = {"model": "base", "prompt": "a b", "max_tokens": 2}
        answered = httpx.post(f"{running.url}/v1/completions", json=body, verify=trusted)
        assert answered.json()["choices"][0]["text"] == "base a "
        with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
            httpx.get(f"{running.url}/healthz")
        with pytest.raises(httpx.HTTPError):
            httpx.get(f"{running.url.replace('https', 'http')}/healthz")


def test_half_of_tls_is_no_configuration():
    with pytest.raises(ConfigurationError, match="belong together"):
        load_settings({"server": {"tls_key": "key.pem"}})

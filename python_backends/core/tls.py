"""Certificates that the deployment file names, looked at before anybody relies on them."""

from __future__ import annotations

import ssl

from python_backends.core.errors import ConfigError


def check_authority(path: str, setting: str) -> None:
    """Raises ConfigError, which names the setting, when the file has no certificate (PEM)."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
    except OSError as error:  # ssl.SSLError included
        raise ConfigError(f"{setting}: {path}: {error.strerror or error}; give the authority's certificate as PEM") from error


def check_certificate(path: str, key_path: str, settings: str) -> None:
    """Raises ConfigError, which names the settings, when there is no such certificate (PEM), or the key is not its own."""
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(path, key_path, password="")  # never asks a terminal for one
    except OSError as error:
        why = error.strerror or error
        raise ConfigError(f"{settings}: {path}, {key_path}: {why}; give a certificate and its key as PEM") from error

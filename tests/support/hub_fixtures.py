"""Fixtures of whoever talks to the loopback Hub."""

import logging
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants
from loopback_hub import LoopbackHub
from pushes import ANN, BOB, LOGGERS, READER, TOKENS

from mono_quant.io.hub.client import Hub


@pytest.fixture
def server() -> Iterator[LoopbackHub]:
    with LoopbackHub() as running:
        running.add_user("ann", ANN, orgs=["team"])
        running.add_user("bob", BOB)
        running.add_user("eve", READER, role="read")
        yield running
        huggingface_hub.close_session()


@pytest.fixture
def hub(server: LoopbackHub, tmp_path: Path) -> Hub:
    return Hub(token=ANN, endpoint=server.endpoint, cache_dir=tmp_path / "cache")


@pytest.fixture
def naps(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Let nobody sleep; return how long they would have."""
    slept: list[float] = []
    for module in (
        "huggingface_hub.utils._http",
        "huggingface_hub.file_download",
        "mono_quant.io.hub.client",
        "mono_quant.io.hub.push",
        "mono_quant.io.hub.branch",
    ):
        monkeypatch.setattr(f"{module}.time", SimpleNamespace(sleep=slept.append))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    return slept


@pytest.fixture
def no_token_anywhere(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> Iterator[None]:
    for name in LOGGERS:
        logging.getLogger(name).propagate = True
        caplog.set_level(logging.DEBUG, logger=name)
    yield
    out, err = capfd.readouterr()
    said = out + err + caplog.text + "".join(repr(record.args) for record in caplog.records)
    assert not [token for token in TOKENS if token in said]
    for path in tmp_path.rglob("*"):
        if path.is_file():
            assert not [token for token in TOKENS if token.encode() in path.read_bytes()], path

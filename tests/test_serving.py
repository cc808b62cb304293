"""A patched model answers behind the server of transformers."""

import base64
import io
import json
import socket
import time
import urllib.request
from pathlib import Path

import pytest
from PIL import Image

import vlmaccel
from vlmaccel.serving import PatchedServe

MODEL = str(Path(vlmaccel.__file__).parent / "assets" / "tiny-llava")
pytest.importorskip("uvicorn", reason="the server needs pip install 'transformers[serving]'")
pytest.importorskip("openai", reason="the server needs pip install 'transformers[serving]'")


@pytest.fixture
def port():
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def wait_for(server):
    for _ in range(300):
        if server.server.started:
            return
        time.sleep(0.1)
    raise TimeoutError("the server does not start")


def answer(port):
    picture = io.BytesIO()
    Image.new("RGB", (192, 192), "red").save(picture, "PNG")
    url = "data:image/png;base64," + base64.b64encode(picture.getvalue()).decode()
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "describe the image."}]
    body = {"model": MODEL, "messages": [{"role": "user", "content": content}], "max_tokens": 8}
    request = urllib.request.Request(
        f"http://localhost:{port}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=60) as reply:
        return json.load(reply)["choices"][0]["message"]["content"]


def test_requests_go_to_the_patched_model(port):
    server = PatchedServe(MODEL, "fastv", {"layer": 2, "ratio": 0.25}, port=port, device="cpu")
    try:
        wait_for(server)
        assert answer(port)
        assert vlmaccel.stats(server.model).visual_tokens == [576, 576, 144, 144, 144, 144]
    finally:
        server.kill_server()


def test_a_wrong_method_is_said_before_it_listens(port):
    with pytest.raises(ValueError, match="there is no method 'fastvv'"):
        PatchedServe(MODEL, "fastvv", port=port, device="cpu")
    with socket.socket() as nobody:
        assert nobody.connect_ex(("localhost", port))

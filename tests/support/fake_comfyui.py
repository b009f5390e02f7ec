"""ComfyUI's server as the comparison sees it, without ComfyUI: a file to be put into a "checkout"
as main.py.

It takes the arguments that ComfyUI 0.3.75 takes, wants the three files where it is told that the
models are, follows the graph's links to prompt, seed and size, and draws what the scripted engine
draws, each value one less. A history is empty at the first look. A file `old` beside it takes the
node Flux2Scheduler away, a file `full` has pictures fail.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from PIL import Image

HERE = Path(__file__).resolve().parent
NODES = {
    *("UNETLoader", "CLIPLoader", "VAELoader", "CLIPTextEncode", "BasicGuider", "RandomNoise"),
    *("KSamplerSelect", "EmptyFlux2LatentImage", "SamplerCustomAdvanced", "VAEDecode", "SaveImage"),
    *([] if (HERE / "old").exists() else ["Flux2Scheduler"]),
}
FILES = (
    ("UNETLoader", "unet_name", "diffusion_models"),
    ("CLIPLoader", "clip_name", "text_encoders"),
    ("VAELoader", "vae_name", "vae"),
)


class Refused(Exception):
    """A graph that cannot be run."""


def draw(graph: dict, models: Path) -> bytes:
    """Make the PNG that *graph* asks for."""

    def only(kind):
        (node,) = [node["inputs"] for node in graph.values() if node["class_type"] == kind]
        return node

    for node in graph.values():
        links = [value for value in node["inputs"].values() if isinstance(value, list)]
        if node["class_type"] not in NODES or not {key for key, _ in links} <= set(graph):
            raise Refused(f"no such node: {node}")
    for kind, key, folder in FILES:
        if not (models / folder / only(kind)[key]).is_file():
            raise Refused(f"value not in list: {only(kind)[key]}")
    if only("CLIPLoader")["type"] != "flux2":
        raise Refused("another encoder")
    size = only("EmptyFlux2LatentImage")["width"], only("EmptyFlux2LatentImage")["height"]
    if (only("Flux2Scheduler")["steps"], only("Flux2Scheduler")["width"]) != (4, size[0]):
        raise Refused("another schedule")
    text = f"{only('CLIPTextEncode')['text']}|{only('RandomNoise')['noise_seed']}"
    colour = tuple(abs(byte - 1) for byte in hashlib.sha256(text.encode()).digest()[:3])
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "png")
    return file.getvalue()


class Handler(BaseHTTPRequestHandler):
    """The routes."""

    protocol_version = "HTTP/1.1"
    models = Path()
    pictures: dict[str, bytes] = {}  # noqa: RUF012
    looked: set[str] = set()  # noqa: RUF012

    def do_GET(self):
        path, _, query = self.path.partition("?")
        if path == "/system_stats":
            return self.answer({"system": {"comfyui_version": "0.0.1", "pytorch_version": "2.0"}})
        if path == "/object_info":
            return self.answer({key: {} for key in NODES})
        if path == "/view":
            asked = dict(urllib.parse.parse_qsl(query, keep_blank_values=True))
            assert (asked["subfolder"], asked["type"]) == ("", "output")
            return self.answer(self.pictures[asked["filename"]])
        number = path.removeprefix("/history/")
        if number not in self.looked:
            self.looked.add(number)
            return self.answer({})
        return self.answer({number: self.history(number)})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        number = f"id-{len(self.pictures)}"
        try:
            self.pictures[number] = draw(body["prompt"], self.models)
        except Refused as refusal:
            return self.answer({"error": str(refusal)}, 400)
        return self.answer({"prompt_id": number, "number": 1, "node_errors": {}})

    def history(self, number):
        messages = [["execution_start", {"timestamp": 1000}]]
        if (HERE / "full").exists():
            error = {"node_type": "VAEDecode", "exception_type": "torch.OutOfMemoryError"}
            messages.append(["execution_error", error | {"exception_message": "no room"}])
            return {"outputs": {}, "status": {"status_str": "error", "messages": messages}}
        messages.append(["execution_success", {"timestamp": 1250}])
        image = {"filename": number, "subfolder": "", "type": "output"}
        status = {"status_str": "success", "completed": True, "messages": messages}
        return {"outputs": {"save": {"images": [image]}}, "status": status}

    def answer(self, body, status=200):
        sent = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("content-length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, *_):
        """Say nothing."""


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    for name in ("listen", "extra-model-paths-config", "database-url"):
        parser.add_argument(f"--{name}", required=True)
    for name in ("front-end-root", "output-directory", "temp-directory", "input-directory"):
        parser.add_argument(
            f"--{name}", required=True, type=lambda path: list(Path(path).iterdir())
        )
    parser.add_argument("--user-directory", required=True)
    parser.add_argument("--port", type=int, required=True)
    for name in ("disable-auto-launch", "disable-all-custom-nodes", "cpu"):
        parser.add_argument(f"--{name}", action="store_true")
    asked = parser.parse_args()
    (paths,) = json.loads(Path(asked.extra_model_paths_config).read_text()).values()
    Handler.models = Path(paths["base_path"])
    time.sleep(0.1)  # a start that takes a while: the first questions are refused
    ThreadingHTTPServer((asked.listen, asked.port), Handler).serve_forever()

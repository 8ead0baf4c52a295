"""Weights by address and by name of the hub, from servers on this machine: fetched whole, checked, once."""

from collections.abc import Callable, Iterator
import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import os
import pathlib
import socket
import subprocess
import sys
import threading

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save

from resnet_jax import UsageError, load_pretrained
from resnet_jax.pretrained.fetch import fetch

ROOT = pathlib.Path(__file__).parents[2]
CONTENT = bytes(range(256)) * 300
Routes = dict[str, Callable[[BaseHTTPRequestHandler], None]]


class Server:
    """Answers what ``routes`` say, 404 elsewhere, and keeps the paths it was asked for."""

    def __init__(self, answer: Callable[[BaseHTTPRequestHandler], None]):
        self.asked: list[str] = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(handler) -> None:
                self.asked.append(handler.path)
                answer(handler)

            do_HEAD = do_GET

            def log_message(handler, *arguments: object) -> None:
                """Says nothing."""

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def stop(self) -> None:
        """From here on the port is closed."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


def reply(handler: BaseHTTPRequestHandler, status: int, headers: dict[str, str], body: bytes = b"") -> None:
    handler.send_response(status)
    for name, value in ({"Content-Length": str(len(body))} | headers | {"Connection": "close"}).items():
        handler.send_header(name, value)
    handler.end_headers()
    if handler.command == "GET":
        handler.wfile.write(body)


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def files(folder: pathlib.Path) -> list[pathlib.Path]:
    return [path for path in folder.rglob("*") if not path.is_dir()]


def resnet(blocks: tuple[int, ...], widths: tuple[int, ...], classes: int, head: str) -> dict[str, np.ndarray]:
    """Random arrays in torchvision's names: of a CIFAR net where there are three stages, else of ImageNet's basic."""
    random, arrays = np.random.default_rng(0), {}

    def add_conv(name: str, bn: str, outside: int, inside: int, size: int) -> None:
        arrays[f"{name}.weight"] = random.normal(0, 0.1, (outside, inside, size, size)).astype(np.float32)
        for part in ("weight", "bias", "running_mean", "running_var"):
            arrays[f"{bn}.{part}"] = random.uniform(0.5, 2, outside).astype(np.float32)

    cifar = len(blocks) == 3
    add_conv("conv1", "bn1", widths[0], 3, 3 if cifar else 7)
    inside = widths[0]
    for stage, (count, width) in enumerate(zip(blocks, widths, strict=True), start=1):
        for block in range(count):
            name = f"layer{stage}.{block}"
            if inside != width and not cifar:
                add_conv(f"{name}.downsample.0", f"{name}.downsample.1", width, inside, 1)
            add_conv(f"{name}.conv1", f"{name}.bn1", width, inside, 3)
            add_conv(f"{name}.conv2", f"{name}.bn2", width, width, 3)
            inside = width
    arrays[f"{head}.weight"] = random.normal(0, 0.1, (classes, inside)).astype(np.float32)
    arrays[f"{head}.bias"] = random.normal(0, 0.1, classes).astype(np.float32)
    return arrays


CIFAR_8 = save(resnet((1, 1, 1), (16, 32, 64), 10, "linear"))


# Addresses.


@pytest.fixture
def cache(tmp_path, monkeypatch) -> pathlib.Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return tmp_path / "cache"


def break_off(handler: BaseHTTPRequestHandler) -> None:
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(CONTENT)))
    handler.end_headers()
    handler.wfile.write(CONTENT[: len(CONTENT) // 2])


def break_off_a_chunk(handler: BaseHTTPRequestHandler) -> None:
    handler.protocol_version = "HTTP/1.1"
    handler.send_response(200)
    handler.send_header("Transfer-Encoding", "chunked")
    handler.send_header("Connection", "close")
    handler.end_headers()
    handler.wfile.write(f"{len(CONTENT):x}\r\n".encode() + CONTENT[: len(CONTENT) // 2])


ROUTES: Routes = {
    "/net.bin": lambda handler: reply(handler, 200, {}, CONTENT),
    "/net.safetensors": lambda handler: reply(handler, 200, {}, CIFAR_8),
    "/moved.bin": lambda handler: reply(handler, 302, {"Location": "/net.bin"}),
    "/half.bin": break_off,
    "/chunked.bin": break_off_a_chunk,
    "/hangs_up.bin": lambda handler: handler.connection.close(),
    "/no_http.bin": lambda handler: handler.wfile.write(b"what?\r\n\r\n"),
}


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(lambda handler: ROUTES.get(handler.path, lambda one: reply(one, 404, {}))(handler))
    yield server
    server.stop()


def refused(source: str, cache: pathlib.Path) -> str:
    with pytest.raises(UsageError) as error:
        fetch(source)
    text = str(error.value)
    assert "\n" not in text
    assert files(cache) == []
    return text


def test_an_address_is_fetched_once_and_kept(cache):
    server = Server(ROUTES["/net.bin"])
    source = f"{server.url}/folder/net.bin#sha256={sha256(CONTENT).upper()}"
    try:
        first = fetch(source)
        assert first.read_bytes() == CONTENT
        assert first.name == "net.bin"  # Its ending says what kind of file it is.
        assert fetch(source) == first
        assert server.asked == ["/folder/net.bin"]
    finally:
        server.stop()
    assert fetch(source) == first
    assert files(cache) == [first]


def test_files_of_one_name_do_not_get_mixed_up(server, cache):
    other = Server(lambda handler: reply(handler, 200, {}, b"other"))
    try:
        one = fetch(f"{server.url}/net.bin#sha256={sha256(CONTENT)}")
        two = fetch(f"{other.url}/net.bin#sha256={sha256(b'other')}")
    finally:
        other.stop()
    assert (one.read_bytes(), two.read_bytes()) == (CONTENT, b"other")


def test_an_address_that_sends_on_is_followed(server, cache):
    assert fetch(f"{server.url}/moved.bin#sha256={sha256(CONTENT)}").read_bytes() == CONTENT


def test_weights_of_an_address_are_those_of_the_file(server, cache, tmp_path):
    (tmp_path / "net.safetensors").write_bytes(CIFAR_8)
    _, expected, _ = load_pretrained(str(tmp_path / "net.safetensors"), "cifar_resnet8")
    _, found, _ = load_pretrained(f"{server.url}/net.safetensors#sha256={sha256(CIFAR_8)}", "cifar_resnet8")
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_checksum_is_named_with_the_expected_one_and_nothing_is_kept(server, cache):
    text = refused(f"{server.url}/net.bin#sha256={'0' * 64}", cache)
    assert f"{server.url}/net.bin: " in text
    assert sha256(CONTENT) in text
    assert "0" * 64 in text


@pytest.mark.parametrize("fragment", ["", "#", "#sha256=", "#sha256=abc123", f"#sha256={'g' * 64}", f"#{'0' * 64}"])
def test_an_address_without_a_whole_checksum_is_told_how_to_write_it(fragment, server, cache):
    text = refused(f"{server.url}/net.bin{fragment}", cache)
    assert f"{server.url}/net.bin#sha256=<64 hexadecimal digits>" in text
    assert server.asked == []


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("nowhere.bin", "404"),
        ("half.bin", f"{len(CONTENT) // 2} bytes of {len(CONTENT)} came"),
        ("chunked.bin", ""),
        ("hangs_up.bin", ""),
        ("no_http.bin", ""),
    ],
)
def test_a_server_that_does_not_give_the_whole_file_is_one_line(path, says, server, cache):
    text = refused(f"{server.url}/{path}#sha256={sha256(CONTENT)}", cache)
    assert f"{server.url}/{path}: could not be fetched (" in text
    assert says in text
    assert "fetch it elsewhere and name the file" in text


@pytest.mark.parametrize(
    "host", ["127.0.0.1:{port}", "[::1", "", "127.0.0.1:{port}/with a space", "127.0.0.1:port", "127.0.0.1:{port}/é"]
)
def test_no_network_or_no_address_at_all_is_one_line(host, cache):
    url = f"http://{host.format(port=closed_port())}/net.bin"
    assert "could not be fetched (" in refused(f"{url}#sha256={sha256(CONTENT)}", cache)


def test_what_follows_a_question_mark_is_no_part_of_the_files_name(server, cache, monkeypatch):
    monkeypatch.setitem(ROUTES, "/net.safetensors?download=true", ROUTES["/net.safetensors"])
    source = f"{server.url}/net.safetensors?download=true#sha256={sha256(CIFAR_8)}"
    assert fetch(source).suffix == ".safetensors"


# The hub. Its package reads its environment when it is imported, so each of these is a process of its own.

# Offline it tries again after 1, 2, 4, 8 and 8 seconds, which nobody waits for here.
NO_WAITING = "import time; time.sleep = lambda seconds: None\n"
NO_HUB = "import sys; sys.modules['huggingface_hub'] = None\n"
TIMMS = {
    "architecture": "resnet18",
    "pretrained_cfg": {"input_size": [3, 96, 96], "crop_pct": 0.75, "interpolation": "bicubic",
                       "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6]},
}  # fmt: skip
OLD_COMMIT, NEW_COMMIT = "a" * 40, "b" * 40
Repositories = dict[str, dict[str, dict[str, bytes]]]  # Name -> revision -> file -> content.
COMMITS = {"main": NEW_COMMIT, "v1": OLD_COMMIT, OLD_COMMIT: OLD_COMMIT, NEW_COMMIT: NEW_COMMIT}


def hub(repositories: Repositories) -> Server:
    """What hf_hub_download asks of the hub: /OWNER/NAME/resolve/REVISION/FILE, errors by their code."""

    def answer(handler: BaseHTTPRequestHandler) -> None:
        name, _, rest = handler.path.lstrip("/").partition("/resolve/")
        revision, _, file = rest.partition("/")
        if name not in repositories:
            return reply(handler, 404, {"X-Error-Code": "RepoNotFound"})
        # Every commit answers to its own name too.
        names = (known for known in repositories[name] if revision in (known, COMMITS[known]))
        revision = next(names, None)
        if revision is None:
            return reply(handler, 404, {"X-Error-Code": "RevisionNotFound"})
        commit = {"X-Repo-Commit": COMMITS[revision]}
        if file not in repositories[name][revision]:
            return reply(handler, 404, {"X-Error-Code": "EntryNotFound"} | commit)
        content = repositories[name][revision][file]
        return reply(handler, 200, {"ETag": f'"{sha256(content)}"'} | commit, content)

    return Server(answer)


def python(endpoint: str, cwd: pathlib.Path, *arguments: str, before: str = NO_WAITING) -> subprocess.CompletedProcess:
    """Python with an empty home folder, which runs ``before`` first."""
    start = cwd / "start"
    start.mkdir(exist_ok=True)
    (start / "sitecustomize.py").write_text(before)
    environment = {"PYTHONPATH": f"{start}:{ROOT}", "JAX_PLATFORMS": "cpu", "PATH": os.environ["PATH"],
                   "HOME": str(cwd / "home"), "HF_HOME": str(cwd / "hub"), "HF_ENDPOINT": endpoint,
                   "PYTHONDONTWRITEBYTECODE": "1"}  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments], cwd=cwd, env=environment, capture_output=True, text=True, timeout=120
    )


def convert(endpoint: str, cwd: pathlib.Path, *arguments: str, before: str = NO_WAITING) -> subprocess.CompletedProcess:
    return python(endpoint, cwd, "-m", "resnet_jax.convert", *arguments, before=before)


def converted(endpoint: str, cwd: pathlib.Path, *arguments: str) -> dict[str, np.ndarray]:
    result = convert(endpoint, cwd, *arguments, "--output=out.safetensors")
    assert result.returncode == 0, result.stderr
    arrays = load_file(cwd / "out.safetensors")
    return {name: array for name, array in arrays.items() if not name.endswith(".num_batches_tracked")}


def metadata(file: pathlib.Path) -> dict[str, str]:
    content = file.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def cifar(head_bias: float) -> bytes:
    arrays = resnet((1, 1, 1), (16, 32, 64), 10, "linear")
    return save(arrays | {"linear.bias": np.full(10, head_bias, np.float32)})


def test_timms_repository_says_its_network_and_preprocessing_also_when_the_hub_is_gone(tmp_path):
    pytest.importorskip("huggingface_hub")
    arrays = resnet((2, 2, 2, 2), (64, 128, 256, 512), 7, "fc")
    content = {"model.safetensors": save(arrays), "config.json": json.dumps(TIMMS).encode()}
    server = hub({"timm/net": {"main": content}})
    try:
        online = converted(server.url, tmp_path, "--weights=hf:timm/net")
    finally:
        server.stop()
    said = metadata(tmp_path / "out.safetensors")
    assert said["model"] == "resnet18"
    assert json.loads(said["preprocessing"]) == {
        "mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "image_size": 96, "resize": 128, "interpolation": "bicubic",
    }  # fmt: skip
    assert json.loads(said["history"])["source"].startswith("hf:timm/net (")
    assert online.keys() == arrays.keys()  # torchvision's names go in and come out.
    for name, array in arrays.items():
        np.testing.assert_array_equal(online[name], array, err_msg=name)
    (tmp_path / "out.safetensors").unlink()
    offline = converted(server.url, tmp_path, "--weights=hf:timm/net")
    jax.tree.map(np.testing.assert_array_equal, offline, online)


def test_a_revision_is_the_one_that_is_fetched_and_found_again(tmp_path):
    pytest.importorskip("huggingface_hub")
    code = """
import sys, resnet_jax
for name in sys.argv[1:]:
    _, variables, _ = resnet_jax.load_pretrained(name, "cifar_resnet8")
    print(float(variables["params"]["head"]["bias"][0]))
"""
    old, new = {"model.safetensors": cifar(1.0)}, {"model.safetensors": cifar(2.0)}
    server = hub({"me/net": {"main": new, "v1": old, OLD_COMMIT: old}})
    arguments = ("-c", code, "hf:me/net", "hf:me/net@v1", f"hf:me/net@{OLD_COMMIT}")
    try:
        online = python(server.url, tmp_path, *arguments)
    finally:
        server.stop()
    # That there is no config.json is remembered too.
    offline = python(server.url, tmp_path, *arguments)
    for result in (online, offline):
        assert result.returncode == 0, result.stderr
        assert result.stdout.split() == ["2.0", "1.0", "1.0"]


REPOSITORIES: Repositories = {
    "me/net": {"main": {"model.safetensors": CIFAR_8}},
    "me/torch": {"main": {"pytorch_model.bin": b"anything"}},
    "me/cut": {"main": {"model.safetensors": CIFAR_8[:5000]}},
    "me/other": {
        "main": {
            "model.safetensors": CIFAR_8,
            "config.json": json.dumps(TIMMS | {"architecture": "resnetaa50"}).encode(),
        }
    },
    "me/somebodys": {"main": {"model.safetensors": CIFAR_8, "config.json": b'{"model_type": "resnet"}'}},
}


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:me/torch", "hf:me/torch: has no model.safetensors"),
        ("hf:me/nothing", "hf:me/nothing: no such repository or revision"),
        ("hf:me/net@v7", "hf:me/net@v7: no such repository or revision"),
        ("hf:me/net/deeper", "hf:me/net/deeper: expected hf:OWNER/NAME"),
        ("hf:", "hf:: expected hf:OWNER/NAME"),
        ("hf:me/net", "does not say which network it is of: --model=NAME"),
        ("hf:me/somebodys", "does not say which network it is of: --model=NAME"),
        ("hf:me/cut", "not a whole .safetensors file"),
        ("hf:me/other", "is of timm's resnetaa50, which is no network here"),
    ],
)
def test_what_the_hub_does_not_have_is_one_line_and_no_output(name, says, tmp_path):
    pytest.importorskip("huggingface_hub")
    server = hub(REPOSITORIES)
    try:
        result = convert(server.url, tmp_path, f"--weights={name}", "--output=out.safetensors")
    finally:
        server.stop()
    assert_one_line(result, says, tmp_path)


def assert_one_line(result: subprocess.CompletedProcess, says: str, cwd: pathlib.Path) -> None:
    assert result.returncode == 2, result.stderr
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert list(cwd.glob("out*")) == []


def test_no_network_and_nothing_fetched_before_is_one_line(tmp_path):
    pytest.importorskip("huggingface_hub")
    endpoint = f"http://127.0.0.1:{closed_port()}"
    result = convert(endpoint, tmp_path, "--weights=hf:me/net", "--output=out.safetensors")
    assert_one_line(result, "Connection refused), and model.safetensors was not fetched before", tmp_path)


@pytest.mark.parametrize("at", ["HEAD", "GET"])
def test_a_hub_that_breaks_off_is_one_line(at, tmp_path):
    pytest.importorskip("huggingface_hub")

    def answer(handler: BaseHTTPRequestHandler) -> None:
        headers = {"ETag": '"1"', "X-Repo-Commit": NEW_COMMIT, "Content-Length": str(len(CONTENT))}
        if at == "GET" or handler.command == "GET":
            reply(handler, 200, headers, CONTENT[: len(CONTENT) // 2])

    server = Server(answer)
    try:
        result = convert(server.url, tmp_path, "--weights=hf:me/net", "--output=out.safetensors")
    finally:
        server.stop()
    assert_one_line(result, "hf:me/net: ", tmp_path)


def test_a_name_of_the_hub_without_its_package_says_what_to_install(tmp_path):
    result = convert("", tmp_path, "--weights=hf:me/net", "--output=out.safetensors", before=NO_HUB)
    assert_one_line(result, "pip install 'resnet_jax[hub]'", tmp_path)

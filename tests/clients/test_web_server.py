"""What `examples/web` lets nobody do: the log, links, names, pipes, and a manifest's paths. Needs Node.js alone."""

from __future__ import annotations

import http.client
import json
import os
import socket
import subprocess

import pytest

from tests.clients.conftest import ROOT, node

pytestmark = pytest.mark.clients

WEB = ROOT / "examples" / "web"


class Server:
    """`serve.mjs` on a folder."""

    def __init__(self, folder):
        command = [node(), WEB / "serve.mjs", "--port", "0", "--bundle", folder]
        self.process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, text=True)
        self.port = int(self.line().rstrip("/").rpartition(":")[2])

    def line(self):
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, path, host="localhost", method="GET"):
        """Status and body."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.putrequest(method, path, skip_host=True)
        if host is not None:
            connection.putheader("Host", host)
        connection.endheaders()
        response = connection.getresponse()
        body = response.read()
        connection.close()
        return response.status, body


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "manifest.json").write_text("{}")
    (tmp_path / "secret").write_text("secret")
    return tmp_path / "bundle"


@pytest.fixture
def server(folder):
    served = Server(folder)
    yield served
    served.process.terminate()
    served.process.wait(timeout=60)
    served.process.stdout.close()


def test_a_file_is_sent(server):
    assert server.ask("/bundle/manifest.json") == (200, b"{}")
    assert server.line() == "200 /bundle/manifest.json"
    assert server.ask("/") == (200, (WEB / "index.html").read_bytes())


def test_no_request_prints_a_line_of_its_own(server):
    assert server.ask("/no%0A200%20/secret%1B[2J")[0] == 404
    assert server.line() == "404 /no%0A200%20/secret%1B[2J"


def test_an_address_that_is_none_gets_an_answer(server):
    assert server.ask("/%zz")[0] == 404
    assert server.ask("/bundle/manifest.json")[0] == 200


@pytest.mark.parametrize("name", ["link", "folder/secret", "folder"])
def test_a_link_that_leads_outside_is_not_followed(server, folder, name):
    (folder / "link").symlink_to(folder.parent / "secret")
    (folder / "folder").symlink_to(folder.parent)
    assert server.ask(f"/bundle/{name}")[0] == 404


def test_a_link_that_stays_inside_is_followed(server, folder):
    (folder / "link").symlink_to("manifest.json")
    assert server.ask("/bundle/link") == (200, b"{}")


def test_a_pipe_is_not_waited_for(server, folder):
    os.mkfifo(folder / "pipe")
    assert server.ask("/bundle/pipe")[0] == 404


@pytest.mark.parametrize("host", ["evil.example", "localhost.evil.example", "evil.example:80", "", None, "127.0.0.1.x"])
def test_a_page_of_another_site_is_not_answered(server, host):
    status, body = server.ask("/bundle/manifest.json", host=host)
    assert status in (400, 421)  # Node.js itself refuses a request without a name
    assert body == b""


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000"])
def test_this_machines_names_are_answered(server, host):
    assert server.ask("/bundle/manifest.json", host=host) == (200, b"{}")


def test_a_client_that_goes_away_stops_nothing(server, folder):
    (folder / "large").write_bytes(bytes(1 << 24))
    with socket.create_connection(("127.0.0.1", server.port)) as client:
        client.sendall(b"GET /bundle/large HTTP/1.1\r\nHost: localhost\r\n\r\n")
        client.recv(100)
    assert server.ask("/bundle/manifest.json") == (200, b"{}")


OPEN = """
import { Bundle } from "WEB/bundle.js";
const manifest = JSON.parse(process.argv[1]), asked = [];
globalThis.fetch = async (url) => {
  asked.push(String(url));
  return { ok: true, json: async () => manifest, arrayBuffer: async () => new ArrayBuffer(0) };
};
const cache = { keys: async () => [], match: async () => undefined, put: async () => undefined };
globalThis.caches = { open: async () => cache };
let problem = null;
try {
  const bundle = await Bundle.open(new URL("https://example.org/page/bundle/"));
  for (const file of manifest.files) await bundle.fetch(file);
} catch (error) {
  problem = error.message;
}
console.log(JSON.stringify({ asked, problem }));
""".replace("WEB", WEB.as_uri())

EMPTY = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


def opened(path, where="files"):
    """What the page asks the network for, and what it complains of, on a bundle with a file of this path."""
    file = {"path": path, "size": 0, "sha256": EMPTY}
    manifest = {
        "format": "prefix-export.bundle", "format_version": 1, "mode": "feed", "flavour": "portable", "target": "web",
        "cache": "fp32", "max_length": 10, "geometry": {"layers": [{}], "context_length": 10, "vocab_size": 10},
        "files": [file] if where == "files" else [],
        "tasks": {} if where == "files" else {"a": {"file": file, "prefix_length": 1, "position_base": 1}},
    }  # fmt: skip
    command = [node(), "--input-type=module", "-e", OPEN, json.dumps(manifest)]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


@pytest.mark.parametrize("where", ["files", "tasks"])
@pytest.mark.parametrize(
    "path",
    [
        "https://evil.example/x",
        "//evil.example/x",
        "/x",
        "../x",
        "a/../../x",
        "a\\..\\x",
        "\\\\evil.example\\x",
        "a//b",
        "",
    ],
)
def test_a_path_that_leads_elsewhere_is_refused_before_it_is_asked_for(path, where):
    found = opened(path, where)
    assert found["asked"] == ["https://example.org/page/bundle/manifest.json"]
    assert found["problem"] == f"manifest.json: {where}: expected what the format says, found something else"


@pytest.mark.parametrize(
    ("path", "asked"), [("a/b.c", "a/b.c"), ("a b", "a%20b"), ("a#b?c", "a%23b%3Fc"), ("%2e%2e", "%252e%252e")]
)
def test_a_path_inside_is_asked_for_as_it_is(path, asked):
    found = opened(path)
    assert found["problem"] is None
    assert found["asked"][1] == f"https://example.org/page/bundle/{asked}?sha256={EMPTY}"

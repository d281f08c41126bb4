"""The service's door and limits: nothing acts on a request that was not allowed, and no request is an internal error."""

from __future__ import annotations

import itertools
import logging
import os
import select
import socket
import tempfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import parse_qs, quote, urlsplit

import numpy as np
import pytest
from asked import BOUNDARY, FORM, ask, form, served
from odd_images import damaged_files, encoded, noise

pytest.importorskip("lancedb", reason="no lancedb: pip install 'clipvisionalign[search]'")

from clipvisionalign.cli import main
from clipvisionalign.search.hits import Hit
from clipvisionalign.search.server.app import create_app
from clipvisionalign.search.server.limits import Limits
from clipvisionalign.search.server.middleware import SESSION_COOKIE
from clipvisionalign.search.server.run import _serve, bind_sockets, page_url, read_token, run_server

SECRET = "k7 %&+ü/?#secret"
LIMITS = Limits(upload_bytes=200_000, seconds=5)


def _unreadable(*_):
    raise OSError("no table")


class Stub:
    """What the service asks a `Searcher`, without an index."""

    manifest = SimpleNamespace(kind="exact", recall=1.0, folder="/a hidden folder")
    encoder = SimpleNamespace(design="self", reranks=False)
    aligner = None
    table = SimpleNamespace(
        count_rows=lambda: 4321, version=1, schema=[], read=_unreadable, read_reachable=_unreadable, unreachable=()
    )
    caption_table, metadata, index = None, {"hidden_column": False}, "/a hidden index"
    reader = None
    assessor = SimpleNamespace(calibrated_on="")
    score, raised = 0.5, None

    def search_batch(self, queries):
        return [self.search_one(query) for query in queries]

    def search_one(self, query):
        if query.captions:
            raise ValueError("no captions")
        if self.raised is not None:
            raise self.raised
        return [Hit(1, "a.jpg", self.score, 2, 3, 4)]

    def vector_of(self, number):
        return np.full(4, self.score, dtype=np.float32)

    def value(self, number, column):
        return encoded(noise(), "JPEG")

    def image_source(self, number):
        return encoded(noise(), "PNG")


@pytest.fixture
def app(monkeypatch):
    def explain(aligner, image, caption):
        raise ValueError("nothing to explain")

    monkeypatch.setattr("clipvisionalign.explain.heatmaps.explain", explain)
    return create_app([Stub()], SECRET, LIMITS)


def carried(token: str, where: str) -> tuple[str, list[tuple[str, str]]]:
    """Query and headers of a request that carries a token there."""
    if where == "query":
        return f"token={quote(token, safe='')}&q=a&id=1&caption=b", []
    utf8 = token.encode().decode("latin-1")
    name, value = {
        "header": ("authorization", f"Bearer {utf8}"), "other scheme": ("authorization", f"Basic {utf8}"),
        "cookie": ("cookie", f"token={quote(token)}; {SESSION_COOKIE}={quote(token)}"),
    }[where]  # fmt: skip
    return "q=a&id=1&caption=b", [(name, value)]


def holds_secret(response) -> bool:
    """Whether the token stands anywhere in an answer, in any writing."""
    everything = repr(response.headers).encode() + response.body
    return any(each.encode() in everything for each in (SECRET, quote(SECRET), quote(SECRET, safe=""), "secret"))


# --- the door --------------------------------------------------------------------------------------------------------

METHODS = ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE", "CONNECT", "get", "BREW")
ODD_PATHS = (
    "//health", "/health/", "/HEALTH", "/health;x", "/./health", "/health/../search", "/x/../health", "/health%2f", "/page",
    "/page/", "/page/../app.py", "/page/../health", "/docs/files", "/docs/files/../../health", "", "/nothing", "/image",
    "/image/1/", "/metrics/", "/redoc", "\\health", "/health\x00", "/health?token=x", "*",
)  # fmt: skip


def routes(app) -> list[str]:
    """A path of every route."""
    return [*{route.path.replace("{id}", "1") for route in app.routes}, "/page/page.js", "/docs/files/swagger-ui.css"]


def test_nothing_is_answered_without_the_token_and_nothing_tells_it(app):
    """Every route, method and odd path, with no, wrong and right token, in header, query and cookie."""
    tokens = {"none": "", "wrong": "wrong", "begins like it": SECRET[:-1], "longer": SECRET + "x", "right": SECRET}
    counts: Counter[tuple[str, str]] = Counter()
    for path, method in itertools.product([*routes(app), *ODD_PATHS], METHODS):
        for (name, token), where in itertools.product(tokens.items(), ("header", "query", "cookie", "other scheme")):
            query, headers = carried(token, where)
            response = ask(app, path, query, method, headers)
            case = f"{method} {path!r} with {name} token in {where}: {response}"
            assert not holds_secret(response), case
            allowed = name == "right" and where in ("header", "query")
            counts["allowed" if allowed else "not", str(response.status)] += 1
            if allowed:
                assert response.status not in (401, 500), case
            elif path == "/health" and method in ("GET", "HEAD"):
                assert response.status in (200, 405), case
                assert b"4321" not in response.body, case
                assert b"hidden" not in response.body, case
            else:
                assert response.status == 401, case
            gets_cookie = allowed and where == "query" and response.status < 400
            assert bool(response.header("set-cookie")) == gets_cookie, case
    assert counts["allowed", "200"] > 20


def test_what_a_client_can_word_otherwise_opens_nothing(app):
    for host in ("here/health?", "here/health#", "/health", "health", "", "a@b/health", "[::1", "\xff"):
        assert ask(app, "/search", "q=a", headers=[("host", host), ("x-forwarded-host", "/health")]).status == 401
    for headers in (
        [("x-original-url", "/health")],
        [("x-http-method-override", "GET")],
        [("forwarded", "host=/health")],
    ):
        assert ask(app, "/metrics", headers=headers).status == 401
    for query in (
        b"\xff\xfe",
        b"token",
        b"token=",
        b"token=%ff%fe",
        b"token[]=x",
        b"TOKEN=" + quote(SECRET).encode(),
        b"&&&=",
    ):
        assert ask(app, "/search", query).status == 401
    for kind in ("Bearer", "bearer  ", "Bearer\t", "", "Token x"):
        assert ask(app, "/", headers=[("authorization", kind)]).status == 401
    response = ask(app, "/page/page.js", kind="websocket")
    assert response.status == 0


def test_the_cookie_is_no_copy_of_the_token_and_opens_this_service_alone(app):
    query, _ = carried(SECRET, "query")
    responses = [ask(each, "/", query) for each in (app, app, create_app([Stub()], SECRET, LIMITS))]
    cookies = [response.header("set-cookie") for response in responses]
    values = [cookie.partition(";")[0].partition("=")[2] for cookie in cookies]
    assert values[0] == values[1] != values[2]
    assert len(values[0]) >= 32
    assert {"HttpOnly", "SameSite=strict", "Path=/"} <= set(cookies[0].split("; "))
    headers = [("cookie", f"other=1; {SESSION_COOKIE}={values[0]}")]
    assert ask(app, "/image/1", headers=headers).status == 200
    assert not ask(app, "/image/1", headers=headers).header("set-cookie")
    assert ask(app, "/image/1", headers=[("cookie", f"{SESSION_COOKIE}={values[2]}")]).status == 401
    # A wrong header beside a right cookie, as a proxy may add one, shuts nothing.
    assert ask(app, "/image/1", headers=[*headers, ("authorization", "Basic YTpi")]).status == 200
    reply = ask(app, "/health", headers=headers)
    assert b"4321" in reply.body


def test_without_a_token_all_is_answered_and_no_cookie_set():
    app = create_app([Stub()], limits=LIMITS)
    for query in ("", "token=anything"):
        response = ask(app, "/health", query)
        assert response.status == 200
        assert b"4321" in response.body
        assert not response.header("set-cookie")


def test_the_token_comes_from_a_file_or_the_environment(monkeypatch, tmp_path, capsys):
    monkeypatch.delenv("CLIPVISIONALIGN_TOKEN", raising=False)
    assert read_token() == ""
    monkeypatch.setenv("CLIPVISIONALIGN_TOKEN", "from outside")
    file = tmp_path / "token"
    file.write_text(f"{SECRET}\n")
    assert (read_token(), read_token(file=file), read_token("given")) == ("from outside", SECRET, "given")
    for odd in (" padded ", "two\nlines", "no\udcffUTF-8"):
        monkeypatch.setenv("CLIPVISIONALIGN_TOKEN", odd)
        with pytest.raises(ValueError, match="CLIPVISIONALIGN_TOKEN: a token is") as error:
            read_token()
        assert odd not in str(error.value)
    for odd in ("", "\n", "two\nlines"):
        file.write_text(odd)
        with pytest.raises(ValueError, match="token"):
            read_token(file=file)
    with pytest.raises(FileNotFoundError):
        read_token(file=tmp_path / "nothing")
    address = page_url("::1", 80, SECRET)
    assert parse_qs(urlsplit(address).query)["token"] == [SECRET]
    assert urlsplit(address).netloc == "[::1]:80"
    assert page_url("127.0.0.1", 8000) == "http://127.0.0.1:8000/"
    monkeypatch.delenv("CLIPVISIONALIGN_TOKEN")
    with pytest.raises(ValueError, match="CLIPVISIONALIGN_TOKEN"):
        run_server(["nowhere"], host="0.0.0.0")
    assert main(["serve", "nowhere", "--token", "visible"]) == 1
    assert "--token-file" in capsys.readouterr().err


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("announced", [None, "10", "0"])
def test_a_body_is_counted_as_it_arrives(monkeypatch, tmp_path, announced):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    app = create_app([Stub()], limits=LIMITS)
    headers = FORM if announced is None else [*FORM, ("content-length", announced)]
    head, end = form(b"@").split(b"@")
    for path in ("/similar", "/captions"):
        response = ask(app, path, method="POST", headers=headers, pieces=[head, *[bytes(50_000)] * 100, end])
        assert (response.status, response.header("connection")) == (413, "close")
        assert b"at most 200,000 bytes" in response.body
        assert response.header("x-content-type-options") == "nosniff"
    # As much as is allowed is refused for what it is.
    form_data = form(bytes(LIMITS.upload_bytes))
    pieces = [form_data[start : start + 50_000] for start in range(0, len(form_data), 50_000)]
    assert ask(app, "/similar", method="POST", headers=FORM, pieces=pieces).status == 422
    assert (
        ask(app, "/similar", method="POST", headers=FORM, pieces=[form(bytes(LIMITS.upload_bytes + 1))]).status == 413
    )
    assert not list(tmp_path.iterdir())
    assert b'requests_total{path="/similar",status="413"}' in ask(app, "/metrics").body


@pytest.mark.parametrize("length", ["\xb2", "-1", "abc", "1e3", "1_0", " ", "9" * 5000])
def test_an_odd_length_is_refused(length):
    response = ask(
        create_app([Stub()], limits=LIMITS), "/similar", method="POST", headers=[*FORM, ("content-length", length)]
    )
    assert response.status in (400, 413)


def chunked_upload(port: int, total: int, piece: int = 2**18) -> tuple[int, bytes]:
    """Send a form of so many bytes in chunks, until there is an answer; how much was sent, and the answer."""
    head = (
        f"POST /similar HTTP/1.1\r\nHost: 127.0.0.1\r\nTransfer-Encoding: chunked\r\nContent-Type: {FORM[0][1]}\r\n\r\n"
    )
    start = form(b"@").partition(b"@")[0]
    sent = 0
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + b"%x\r\n%b\r\n" % (len(start), start))
        chunk = b"%x\r\n%b\r\n" % (piece, bytes(piece))
        while sent < total and not select.select([connection], [], [], 0)[0]:
            try:
                connection.sendall(chunk)
            except OSError:
                break
            sent += piece
        response = b""
        while b"bytes" not in response and (more := connection.recv(65536)):
            response += more
    return sent, response


def test_a_chunked_upload_of_a_gigabyte_is_cut_at_the_limit_and_leaves_nothing(monkeypatch, tmp_path):
    """Over a real socket, with the service's own limits."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    limits = Limits()
    with served(create_app([Stub()], limits=limits)) as port:
        before = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
        for _ in range(2):
            sent, response = chunked_upload(port, 2**30)
            assert response.startswith(b"HTTP/1.1 413"), response[:200]
            # What the socket's buffers hold besides.
            assert sent < limits.body_bytes + 40 * 2**20
        assert not list(tmp_path.iterdir())
        if before:
            assert len(os.listdir("/proc/self/fd")) <= before + 2
            assert not any(str(tmp_path) in where for where in open_files())
        # The next is answered as ever.
        assert ask_over(port, form(encoded(noise(), "PNG"))).startswith(b"HTTP/1.1 200")


def open_files() -> list[str]:
    """What this process has open, deleted files among it."""
    open_paths = []
    for name in os.listdir("/proc/self/fd"):
        try:
            open_paths.append(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            continue
    return open_paths


def ask_over(port: int, body: bytes) -> bytes:
    """The beginning of the answer to an upload."""
    head = f"POST /similar HTTP/1.1\r\nHost: a\r\nContent-Type: {FORM[0][1]}\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", port), timeout=20) as connection:
        connection.sendall(head.encode() + body)
        return connection.recv(65536)


# --- no internal errors ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "raised", [RuntimeError("lance error"), OSError("no such column"), TypeError("int"), ValueError("bad")]
)
def test_what_the_database_raises_of_a_filter_is_no_internal_error(raised):
    stub = Stub()
    stub.raised = raised
    app = create_app([stub], limits=LIMITS)
    for path, query, more in (("/search", "q=a&where=width>1", {}), ("/similar", "id=1&where=width>1", {}),
                              ("/similar", "where=width>1", {"method": "POST", "headers": FORM, "pieces": [form(encoded(noise(), "PNG"))]})):  # fmt: skip
        response = ask(app, path, query, **more)
        assert response.status == 422
        assert str(raised).encode() in response.body


def test_a_port_in_use_and_a_host_of_another_machine_come_before_all_else(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as used:
        port = used.getsockname()[1]
        assert main(["serve", str(tmp_path / "nowhere"), "--port", str(port)]) == 1
        assert f"127.0.0.1, port {port}: Address already in use: give another --port" in capsys.readouterr().err
        # Of a name all addresses are taken, or none.
        assert main(["serve", str(tmp_path / "nowhere"), "--host", "localhost", "--port", str(port)]) == 1
        assert "give another --port" in capsys.readouterr().err
    for port_number in (65536, 70000, -1):
        assert main(["serve", str(tmp_path / "nowhere"), f"--port={port_number}"]) == 1
        assert f"port {port_number}: from 0" in capsys.readouterr().err
    (tmp_path / "token").write_text("secret")
    elsewhere = ["--host", "203.0.113.77", "--token-file", str(tmp_path / "token")]
    assert main(["serve", str(tmp_path / "nowhere"), *elsewhere]) == 1
    assert "203.0.113.77, port 8000: Cannot assign requested address: give another --host" in capsys.readouterr().err
    for sockets in (bind_sockets("localhost", 0), bind_sockets("127.0.0.1", port), bind_sockets("", 0)):
        for each in sockets:
            with each, pytest.raises(OSError, match="refused"), socket.socket(each.family) as client:
                # Nothing listens yet.
                client.connect(each.getsockname())


def test_of_two_services_that_reserve_a_port_the_later_one_ends_with_the_way_out():
    (first,), (second,) = bind_sockets("127.0.0.1", 0), [socket.socket()]
    with first, second:
        second.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        second.bind(first.getsockname())
        second.listen()
        with pytest.raises(OSError, match=r"Address already in use: give another --port"):
            _serve([], [first], "127.0.0.1", "", True, True)


@pytest.mark.parametrize(("raised", "status"), [(OSError("gone"), 503), (RuntimeError("lance"), 503), (MemoryError(), 413), (KeyError("no image 1"), 404)])  # fmt: skip
def test_an_index_that_cannot_be_read_is_told_so(raised, status, caplog):
    stub = Stub()
    stub.raised = raised
    with caplog.at_level(logging.ERROR):
        assert ask(create_app([stub], limits=LIMITS), "/search", "q=a").status == status
    assert bool(caplog.records) == (status == 503)


@pytest.mark.parametrize("score", [np.nan, np.inf, -np.inf])
def test_scores_that_are_no_numbers_are_a_users_error(score):
    stub = Stub()
    stub.score = score
    app = create_app([stub], limits=LIMITS)
    for query in ("q=a", "q=a&where=width>1", "q=a&rerank=2"):
        assert ask(app, "/search", query).status == 422
    assert ask(app, "/similar", "id=7").status == 422


def test_the_metrics_are_as_prometheus_reads_them():
    from prometheus_client.parser import text_string_to_metric_families

    app = create_app([Stub()], limits=LIMITS)
    for path in ("/search", "/search", "/nothing", '/a"b\nc'):
        ask(app, path, "q=a")
    response = ask(app, "/metrics")
    assert response.header("content-type") == "text/plain; version=0.0.4; charset=utf-8"
    samples = {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(response.body.decode())
        for sample in family.samples
    }
    assert samples["clipvisionalign_requests_total", "/search", "200"] == 2
    assert samples["clipvisionalign_requests_total", "other", "404"] == 2
    assert samples["clipvisionalign_request_seconds_count", "/search"] == 2
    assert samples["clipvisionalign_request_seconds_bucket", "+Inf", "/search"] == 2
    assert samples["clipvisionalign_encoded_texts_total",] == 2
    assert 1 <= samples["clipvisionalign_encoder_calls_total",] <= 2
    assert len({name for name, *_ in samples}) == 6


# --- images ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_200_files_are_indexed_or_listed_and_the_service_agrees(tiny_runs, tmp_path):
    """In two dozen formats and eight conditions: 2xx for what was indexed, 4xx for what was listed, chunked or not."""
    from clipvisionalign.search.broken_files import read_broken_files
    from clipvisionalign.search.indexer import build_index
    from clipvisionalign.search.searcher import Searcher
    from clipvisionalign.search.tables import open_image_table

    source, index = tmp_path / "files", tmp_path / "index"
    source.mkdir()
    files = damaged_files(200, seed=4)
    for name, data in files.items():
        (source / name).write_bytes(data)
    report = build_index(tiny_runs["self"], source, index)
    rows = open_image_table(index).search().limit(1000).select(["id", "path"]).to_arrow().to_pylist()
    indexed, listed = {row["path"] for row in rows}, {row["path"] for row in read_broken_files(index)}
    assert not indexed & listed
    assert indexed | listed == set(files)
    assert (report.encoded, report.broken) == (len(indexed), len(listed))
    assert min(len(indexed), len(listed)) > 60
    app = create_app([Searcher(index)])
    for name, data in files.items():
        body = form(data)
        pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
        for headers, sent in (([*FORM, ("content-length", str(len(body)))], [body]), (FORM, pieces)):
            response = ask(app, "/similar", "count=1", "POST", headers, sent)
            assert response.status // 100 == (2 if name in indexed else 4), f"{name}: {response}"
    for row in rows:
        assert ask(app, f"/image/{row['id']}", "large=true").status == 200
        assert ask(app, f"/image/{row['id']}").status == 200
    # What was indexed is damaged, or taken away, meanwhile.
    (source / rows[0]["path"]).write_bytes(b"damaged")
    (source / rows[1]["path"]).unlink()
    assert ask(app, f"/image/{rows[0]['id']}", "large=true").status == 422
    assert ask(app, f"/image/{rows[1]['id']}", "large=true").status == 404
    assert BOUNDARY.encode() in form(b"")

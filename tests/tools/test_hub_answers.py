"""Whatever a hub answers: the bytes that it lists, in time, or one message."""

from __future__ import annotations

import gzip
import json
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from huggingface_hub import constants
from safetensors.numpy import save

from qsens.config import Roots
from qsens.errors import QsensError, TryAgain, UserError
from qsens.tools.fetch import fetch_model
from tests.tools.hub_server import COMMIT, Repository, serving

WEIGHTS = "model-00001-of-00002.safetensors"
OTHER = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"
MIB = 1 << 20
Reply = Callable[[BaseHTTPRequestHandler], bool]


@pytest.fixture
def repository() -> Repository:
    shards = {
        WEIGHTS: {"a.weight": np.arange(6, dtype=np.float32)},
        OTHER: {"b.weight": np.ones((2, 3), np.float32)},
    }
    index = {"weight_map": {key: name for name, held in shards.items() for key in held}}
    return Repository(
        "owner/tiny",
        {
            "config.json": b'{"model_type": "llama"}',
            "tokenizer.json": b"{}",
            INDEX: json.dumps(index).encode(),
            **{name: save(held) for name, held in shards.items()},
        },
    )


@pytest.fixture
def fetch(
    repository: Repository, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., dict[str, Any]]]:
    """Fetch the repository to ``out``, in this process."""
    roots = Roots(root=tmp_path, results=tmp_path, configs=Roots.from_environment().configs)
    with ExitStack() as stack:
        endpoint = stack.enter_context(serving(repository))
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield lambda **options: fetch_model("owner/tiny", tmp_path / "out", roots=roots, **options)


def refused(
    fetch: Callable[..., dict[str, Any]], tmp_path: Path, kind: type[QsensError], **options: Any
) -> str:
    """Fetch; return what the one message of that kind says. Nothing is there then."""
    with pytest.raises(QsensError) as caught:
        fetch(**options)
    assert type(caught.value) is kind, caught.value
    assert caught.value.what.isprintable()
    assert caught.value.remedy
    assert not (tmp_path / "out").exists()
    return str(caught.value)


def answer(
    body: bytes = b"", status: int = 200, length: int | None = None, **headers: str
) -> Reply:
    """Answer with a body; its length is told as it is, or as given."""

    def reply(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)
        return True

    return reply


def chunked(pieces: Iterable[bytes], sent: list[int] | None = None, **headers: str) -> Reply:
    """Answer without a length, piece by piece; ``sent`` takes how many bytes were sent."""

    def reply(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        for piece in pieces:
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
            if sent is not None:
                sent.append(len(piece))
        handler.wfile.write(b"0\r\n\r\n")
        return True

    return reply


def redirect(to: str, status: int = 302) -> Reply:
    return answer(b"", status, Location=to)


def once(reply: Reply) -> Reply:
    """Answer so the first time, and then as the hub does."""
    asked: list[int] = []

    def first(handler: BaseHTTPRequestHandler) -> bool:
        asked.append(1)
        return len(asked) == 1 and reply(handler)

    return first


def bomb(size: int) -> bytes:
    return gzip.compress(bytes(size))


def left_over(tmp_path: Path, content: bytes) -> Path:
    """Leave a part of config.json, as an earlier try does."""
    part = tmp_path / f".out.{COMMIT[:12]}.partial/config.json.part"
    part.parent.mkdir()
    part.write_bytes(content)
    return part


def parts(tmp_path: Path) -> dict[str, int]:
    """Return the sizes of what an earlier try left."""
    return {
        path.name: path.stat().st_size
        for partial in tmp_path.glob(".out.*.partial")
        for path in partial.iterdir()
    }


def test_an_endless_body_is_left_at_the_listed_size(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    sent: list[int] = []
    repository.replies["config.json"] = chunked((bytes(MIB) for _ in range(64)), sent)
    said = refused(fetch, tmp_path, TryAgain)
    size = len(repository.files["config.json"])
    assert f"more than {size} bytes come, and that is not what the hub lists" in said
    assert sum(sent) < 32 * MIB  # what fits into buffers
    assert "config.json" not in parts(tmp_path)
    assert parts(tmp_path)["config.json.part"] == 0


@pytest.mark.parametrize("by", [1, -1])
@pytest.mark.parametrize("told", [True, False])
def test_another_length_than_listed_is_not_kept(
    by: int, told: bool, repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    content = repository.files["config.json"]
    body = content + b" " if by > 0 else content[:-1]
    repository.replies["config.json"] = answer(body) if told else chunked([body])
    said = refused(fetch, tmp_path, TryAgain)
    if told:
        assert f"{len(body)} bytes come, and that is not what the hub lists" in said
    elif by > 0:
        assert f"more than {len(content)} bytes come" in said
    else:
        assert f"{len(body)} of {len(content)} bytes came" in said
    assert "config.json" not in parts(tmp_path)
    assert parts(tmp_path).get("config.json.part", 0) < len(content)
    repository.replies.clear()
    assert fetch()["commit"] == COMMIT


def test_a_compressed_answer_is_refused(repository: Repository, fetch: Any, tmp_path: Path) -> None:
    repository.replies["config.json"] = answer(bomb(64 * MIB), Content_Encoding="gzip")
    assert "its answer is compressed" in refused(fetch, tmp_path, UserError)
    repository.replies = {"listing": answer(bomb(64 * MIB), Content_Encoding="gzip")}
    assert "its answer is compressed" in refused(fetch, tmp_path, UserError)
    assert set(parts(tmp_path).values()) <= {0, *map(len, repository.files.values())}


def test_an_endless_listing_is_left(repository: Repository, fetch: Any, tmp_path: Path) -> None:
    sent: list[int] = []
    repository.replies["listing"] = chunked((b" " * MIB for _ in range(128)), sent)
    assert f"more than {16 * MIB} bytes come" in refused(fetch, tmp_path, TryAgain)
    assert sum(sent) < 64 * MIB
    repository.replies["listing"] = answer(b"", length=17 * MIB)
    assert f"{17 * MIB} bytes come" in refused(fetch, tmp_path, TryAgain)


@pytest.mark.parametrize(
    "reply",
    [
        answer(b"x" * 10, 206, Content_Range="bytes 0-9/10"),
        answer(b"x" * 10, 206, Content_Range="bytes 7-16/200"),
        answer(b"x" * 10, 206, Content_Range="nonsense"),
        answer(b"x" * 10, 206),
        answer(b"", 416, Content_Range="bytes */200"),
    ],
)
def test_what_does_not_go_on_is_begun_again(
    reply: Reply, repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    content = repository.files["config.json"]
    repository.replies["config.json"] = once(answer(content[:5], length=len(content)))
    left_over(tmp_path, content[:5])
    repository.replies["config.json"] = once(reply)
    said = fetch()
    assert (tmp_path / "out/config.json").read_bytes() == content
    asked = [h.get("range") for _, path, h in repository.asked if path.endswith("/config.json")]
    assert asked == ["bytes=5-", None]
    assert said["downloaded_bytes"] == sum(map(len, repository.files.values()))


def test_a_whole_answer_to_a_part_is_taken_from_its_beginning(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    content = repository.files["config.json"]
    left_over(tmp_path, b"other")
    repository.replies["config.json"] = answer(content)
    fetch()
    assert (tmp_path / "out/config.json").read_bytes() == content


@pytest.mark.parametrize("stretch", [1 << 16, 1 << 24])
def test_a_connection_that_is_cut_again_and_again(
    stretch: int,
    repository: Repository,
    fetch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As long as enough comes each time; else three times are enough."""
    monkeypatch.setattr("qsens.tools.transfer._STRETCH", stretch)
    monkeypatch.setattr("qsens.tools.transfer._PAUSE", 0)
    content = repository.files["config.json"] + b" " * 500_000
    repository.files["config.json"] = content

    def cut(handler: BaseHTTPRequestHandler) -> bool:
        start = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        handler.end_headers()
        handler.wfile.write(content[start : start + 100_000])
        return True

    repository.replies["config.json"] = cut
    if stretch == 1 << 16:
        fetch()
        assert (tmp_path / "out/config.json").read_bytes() == content
    else:
        refused(fetch, tmp_path, TryAgain)
        assert parts(tmp_path)["config.json.part"] == 300_000


def test_a_page_in_place_of_a_file_costs_no_part(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    content = repository.files["config.json"]
    part = left_over(tmp_path, content[:5])
    repository.replies["config.json"] = answer(b"<html>Log in</html>")
    assert "19 bytes come" in refused(fetch, tmp_path, TryAgain)
    repository.replies["config.json"] = answer(bomb(MIB), Content_Encoding="gzip")
    refused(fetch, tmp_path, UserError)
    assert part.read_bytes() == content[:5]


def test_whole_files_of_an_earlier_try_are_compared_with_their_digest(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    partial = tmp_path / f".out.{COMMIT[:12]}.partial"
    partial.mkdir()
    (partial / "tokenizer.json").write_bytes(b"[]")  # as long as the listed one
    (partial / "tokenizer_other.json").write_bytes(b"{}")  # not listed
    (partial / "config.json").write_bytes(repository.files["config.json"])
    (partial / "old").mkdir()
    (partial / "old/config.json").write_bytes(b"{}")
    said = fetch()
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *repository.files,
        "qsens-source.json",
    }
    whole = sum(map(len, repository.files.values()))
    assert said["downloaded_bytes"] == whole - len(repository.files["config.json"])


@pytest.mark.parametrize("status", [201, 204, 206, 304, 400, 404, 410, 416, 451])
def test_any_other_status_is_refused(
    status: int, repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    repository.replies["config.json"] = answer(b"", status)
    assert f"status {status}" in refused(fetch, tmp_path, UserError)


def test_a_busy_hub_is_not_waited_for_as_long_as_it_says(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    repository.replies["config.json"] = answer(b"", 429, Retry_After="999999999")
    assert "status 429" in refused(fetch, tmp_path, TryAgain)
    repository.replies["config.json"] = once(answer(b"", 503))
    assert fetch()["commit"] == COMMIT


def test_redirects_are_counted_and_their_bodies_left(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    sent: list[int] = []

    def around(handler: BaseHTTPRequestHandler) -> bool:
        handler.send_response(302)
        handler.send_header("Location", handler.path)
        handler.send_header("Content-Length", str(64 * MIB))
        handler.end_headers()
        for _ in range(64):
            handler.wfile.write(bytes(MIB))
            sent.append(MIB)
        return True

    repository.replies["config.json"] = around
    assert "redirects more than 5 times" in refused(fetch, tmp_path, UserError)
    assert len([path for _, path, _ in repository.asked if path.endswith("/config.json")]) == 6
    assert sum(sent) < 6 * 32 * MIB


@pytest.mark.parametrize(
    ("to", "kind", "said"),
    [
        ("ftp://127.0.0.1/config.json", UserError, "redirects to something else than HTTP"),
        ("file:///etc/passwd", UserError, "redirects to something else than HTTP"),
        ("javascript:alert(1)", UserError, "leads to an address that nobody can ask"),
        ("http://127.0.0.1:99999/", UserError, "leads to an address that nobody can ask"),
        ("http://a..b/", TryAgain, "the connection failed"),
    ],
)
def test_redirects_to_elsewhere_are_not_followed(
    to: str,
    kind: type[QsensError],
    said: str,
    repository: Repository,
    fetch: Any,
    tmp_path: Path,
) -> None:
    repository.replies["config.json"] = redirect(to)
    assert said in refused(fetch, tmp_path, kind)
    repository.replies = {"listing": redirect(to)}
    assert said in refused(fetch, tmp_path, kind)


def test_an_encrypted_connection_stays_one() -> None:
    from qsens.tools.transfer import Unfit, refuse_redirect

    hub = httpx.URL("https://hub.example/config.json")
    refuse_redirect(hub, httpx.URL("https://cdn.example/blob"))
    refuse_redirect(httpx.URL("http://hub.example"), hub)
    with pytest.raises(Unfit, match="not encrypted"):
        refuse_redirect(hub, httpx.URL("http://hub.example/config.json"))


def test_a_proxy_that_nobody_can_use_is_said(
    fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "nonsense://me:secret@127.0.0.1:1")
    said = refused(fetch, tmp_path, UserError)
    assert "names a proxy or certificates that cannot be used" in said
    assert "secret" not in said


@pytest.mark.parametrize(
    "endpoint", ["http://127.0.0.1:99999", "http://[::1", "http://", "ftp://hub.example", "hub"]
)
def test_an_endpoint_that_is_no_address_is_said(
    endpoint: str, fetch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    assert "HF_ENDPOINT is no address of a hub" in refused(fetch, tmp_path, UserError)


def slow(handler: BaseHTTPRequestHandler, first: bytes, again: bytes) -> bool:
    """Send bytes for as long as somebody listens, in time after time."""
    handler.wfile.write(first)
    for _ in range(600):
        handler.wfile.write(again)
        handler.wfile.flush()
        time.sleep(0.1)
    return True


@pytest.mark.parametrize("name", ["listing", "config.json"])
@pytest.mark.parametrize(
    ("first", "again"),
    [
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\n \r\n"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100023\r\n\r\n{", b""),
        (b"HTTP/1.1 200 OK\r\n", b"a: b\r\n"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
        (b"", b""),
    ],
)
def test_a_trickle_is_not_waited_for(
    name: str,
    first: bytes,
    again: bytes,
    repository: Repository,
    fetch: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    repository.files["config.json"] += b" " * 100_000  # a trickle would take hours
    monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.5)
    repository.replies[name] = lambda handler: slow(handler, first, again)
    started = time.monotonic()
    said = refused(fetch, tmp_path, TryAgain)
    assert "less than 64 KiB came in 0.5 s" in said
    assert time.monotonic() - started < 20


def test_no_digest_no_checkpoint_unless_told(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    listed = repository.listed()
    for entry in listed["siblings"]:
        if entry["rfilename"] in (WEIGHTS, "config.json"):
            entry.pop("lfs", None)
            del entry["blobId"]
    repository.replies["listing"] = answer(json.dumps(listed).encode())
    said = refused(fetch, tmp_path, UserError)
    assert "the hub lists no digest of config.json" in said
    assert "--allow-unverified" in said
    assert fetch(allow_unverified=True)["unverified"] == 2
    record = json.loads((tmp_path / "out/qsens-source.json").read_text())
    assert record["unverified"] == ["config.json", WEIGHTS]
    with pytest.raises(UserError, match=r"the hub listed no digest of config\.json and 1 others"):
        fetch()
    assert fetch(allow_unverified=True)["downloaded_bytes"] == 0


def test_without_a_digest_a_part_is_not_gone_on_with(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    listed = repository.listed()
    for entry in listed["siblings"]:
        entry.pop("lfs", None)
        del entry["blobId"]
    repository.replies["listing"] = answer(json.dumps(listed).encode())
    left_over(tmp_path, b"other")
    fetch(allow_unverified=True)
    assert (tmp_path / "out/config.json").read_bytes() == repository.files["config.json"]


def of(name: str, **change: Any) -> Callable[[dict[str, Any]], None]:
    """Change what is listed of a file."""

    def apply(listed: dict[str, Any]) -> None:
        (entry,) = (one for one in listed["siblings"] if one["rfilename"] == name)
        entry.update(change)

    return apply


def top(**change: Any) -> Callable[[dict[str, Any]], None]:
    return lambda listed: listed.update(change)


def extra(name: str, size: Any = 2) -> Callable[[dict[str, Any]], None]:
    blob = "9e26dfeeb6e641a33dae4961196235bdb965b21b"
    return lambda listed: listed["siblings"].append(
        {"rfilename": name, "size": size, "blobId": blob}
    )


@pytest.mark.parametrize(
    ("change", "said"),
    [
        *((of(WEIGHTS, size=size), f"the size of {WEIGHTS} is") for size in (-1, 1 << 63, 10**400)),
        *((of(WEIGHTS, size=size), f"the size of {WEIGHTS} is") for size in (1.5, True, None, "7")),
        *((of(WEIGHTS, size=size), f"the size of {WEIGHTS} is") for size in (float("nan"), [], {})),
        (of(WEIGHTS, lfs={}), f"the digest of {WEIGHTS} is None"),
        (of(WEIGHTS, lfs=[]), f"the digest of {WEIGHTS} is []"),
        (of(WEIGHTS, lfs={"sha256": "ab" * 31}), f"the digest of {WEIGHTS} is"),
        (of(WEIGHTS, lfs={"sha256": 5}), f"the digest of {WEIGHTS} is 5"),
        (of("config.json", blobId="AB" * 20), "the digest of config.json is"),
        (of("config.json", blobId=["a"]), "the digest of config.json is"),
        (of("config.json", rfilename=None), "as a file"),
        (of("config.json", rfilename="../config.json"), "has no config.json"),
        (of("config.json", rfilename="/config.json"), "has no config.json"),
        (of("config.json", rfilename="a/config.json"), "has no config.json"),
        (of("config.json", rfilename="\ud800"), "half of a surrogate pair"),
        (extra("tokenizer\n.json"), "is no name of a file"),
        (extra("tokenizer\x1b[2J.json"), "is no name of a file"),
        (extra("tokenizer\0.json"), "is no name of a file"),
        (extra("tokenizer\\..\\x.json"), "is no name of a file"),
        (extra("tokenizer" + "x" * 300 + ".json"), "is no name of a file"),
        (extra("tokenizer" + "\u20ac" * 90 + ".json"), "is no name of a file"),
        (extra("tokenizer.json"), "lists tokenizer.json twice"),
        (extra("tokenizer_config.json", (1 << 28) + 1), "has 268435457 bytes, and at most"),
        (of(INDEX, size=(1 << 24) + 1), f"its {INDEX} has 16777217 bytes, and at most 16777216"),
        (of("config.json", size=(1 << 24) + 1), "its config.json has 16777217 bytes"),
        (top(siblings=None), "its list of files is None"),
        (top(siblings={"a": 1}), "its list of files is"),
        (top(siblings=[]), "has no config.json"),
        (top(siblings=[None]), "lists None as a file"),
        (top(siblings=["config.json"]), "as a file"),
        (top(sha=None), "its commit is None"),
        (top(sha="main"), "its commit is main"),
        (top(sha="5F" * 20), "its commit is"),
        (top(sha=f"{COMMIT}\n"), "its commit is"),
        (top(sha="../../" + "a" * 34), "its commit is"),
    ],
)
def test_a_broken_listing_is_one_message(
    change: Callable[[dict[str, Any]], None],
    said: str,
    repository: Repository,
    fetch: Any,
    tmp_path: Path,
) -> None:
    listed = repository.listed()
    change(listed)
    repository.replies["listing"] = answer(json.dumps(listed).encode())
    assert said in refused(fetch, tmp_path, UserError)
    assert not any(path.endswith(".safetensors") for _, path, _ in repository.asked)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"<html>Log in</html>",
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"sha": ' + b"9" * 5000 + b"}",
        b'{"x": ' + b"[" * 200 + b"]" * 200 + b"}",
    ],
)
def test_no_listing_is_one_message(
    body: bytes, repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    repository.replies["listing"] = answer(body)
    assert "its answer is not that of a hub" in refused(fetch, tmp_path, UserError)


def test_what_is_not_wanted_may_be_listed_as_it_likes(repository: Repository, fetch: Any) -> None:
    listed = repository.listed()
    listed["siblings"] += [{"rfilename": "docs/\\x\n.md", "size": None}, {"rfilename": "../x"}]
    repository.replies["listing"] = answer(json.dumps(listed).encode())
    assert fetch()["files"] == 5


def test_another_commit_than_the_pinned_one_is_refused(
    repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    repository.replies["listing"] = answer(
        json.dumps(repository.listed() | {"sha": "ab" * 20}).encode()
    )
    said = refused(fetch, tmp_path, UserError, revision=COMMIT)
    assert "commit 5f5f5f5f5f5f was asked for, and it is of abababababab" in said


def test_so_many_files_and_no_more(repository: Repository, fetch: Any, tmp_path: Path) -> None:
    repository.files |= {f"tokenizer_{at}.json": b"{}" for at in range(1000)}
    said = refused(fetch, tmp_path, UserError)
    assert "1002 of its files are those of a checkpoint, and at most 1000 are taken" in said
    for at in range(1000):
        del repository.files[f"tokenizer_{at}.json"]
    names = [f"m{at}.safetensors" for at in range(1001)]
    repository.files |= dict.fromkeys(names, b"")
    index = {"weight_map": {str(at): name for at, name in enumerate(names)}}
    repository.files[INDEX] = json.dumps(index).encode()
    said = refused(fetch, tmp_path, UserError)
    assert "1001 of its files are those of a checkpoint" in said
    assert not any(path.endswith(".safetensors") for _, path, _ in repository.asked)


@pytest.mark.parametrize(
    ("index", "said"),
    [
        (b"[" * 200 + b"]" * 200, "nests deeper than 100 levels"),
        (b"[]", "has no weight_map"),
        (b'{"weight_map": {"a": 5}}', "is broken: it says that a is in 5"),
        (b'{"weight_map": {"a": "../x.safetensors"}}', "outside the checkpoint"),
        (b'{"weight_map": {"a": "/etc/passwd"}}', "outside the checkpoint"),
        (b'{"weight_map": {"a": "config.json"}}', "is no .safetensors file"),
        (b'{"weight_map": {"a": "\\ud800"}}', "half of a surrogate pair"),
        (b'{"weight_map": {"a": "x\\u0000.safetensors"}}', "which is not there"),
        (b'{"weight_map": {"a": "a/b.safetensors"}}', "is no name of a file"),
    ],
)
def test_a_broken_index_is_one_message(
    index: bytes, said: str, repository: Repository, fetch: Any, tmp_path: Path
) -> None:
    repository.files[INDEX] = index
    repository.files["a/b.safetensors"] = b""
    assert said in refused(fetch, tmp_path, UserError)


@pytest.mark.parametrize(
    "source",
    [
        b"[" * 100_000,
        b'{"schema_version": ' + b"9" * 5000 + b"}",
        json.dumps(
            {"repository": "owner/tiny", "revision": "main", "commit": COMMIT}
            | {"files": {"\0": 1}}
        ).encode(),
        json.dumps(
            {"repository": "owner/tiny", "revision": "main", "commit": COMMIT}
            | {"files": {"n" * 300: 1}}
        ).encode(),
    ],
)
def test_a_broken_record_is_no_checkpoint(source: bytes, fetch: Any, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/qsens-source.json").write_bytes(source)
    with pytest.raises(UserError, match="holds files that fetch-model did not write whole"):
        fetch()

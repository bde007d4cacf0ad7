"""The labelling session and its HTTP protocol, over real sockets and real files."""

import http.client
import json
import subprocess
import sys
import threading
from io import BytesIO

import pytest
from PIL import Image

from rewards import UserError
from rewards.preferences.labels import LabelSession, StaleChoice
from rewards.preferences.pairs import Pair, read_pairs
from rewards.preferences.server import LabelServer


@pytest.fixture
def pairs(tmp_path):
    for number in range(8):
        Image.new("RGB", (8, 8), (30 * number, 0, 0)).save(tmp_path / f"{number}.png")
    return [Pair(prompt=f"prompt {i}", a=tmp_path / f"{2 * i}.png", b=tmp_path / f"{2 * i + 1}.png") for i in range(4)]


@pytest.fixture
def output(tmp_path):
    return tmp_path / "labels" / "labels.jsonl"


@pytest.fixture
def server(pairs, output):
    with LabelSession(pairs, output) as session, LabelServer(session) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def ask(server, method, path, body=None, **headers):
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=10)
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    own = {"Content-Type": "application/json"} if content is not None else {}
    connection.request(method, path, content, own | {name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    data = answer.read()
    connection.close()
    return answer.status, data, answer.headers


def choose(server, pair, choice):
    status, data, _ = ask(server, "POST", "/choose", {"pair": pair, "choice": choice})
    return status, json.loads(data)


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# --------------------------------------------------------------------------------------------------------- the session


def test_the_label_says_which_picture_was_chosen_whatever_side_it_was_on(pairs, output):
    many = [Pair(prompt=f"{i}", a=pairs[0].a, b=pairs[0].b) for i in range(40)]
    with LabelSession(many, output) as session:
        sides = [session.a_is_left(i) for i in range(40)]
        for number in range(40):
            session.choose(number, "left")
    assert 8 < sum(sides) < 32  # both orders occur
    assert [pair.label for pair in read_pairs(output, labelled=True)] == [float(side) for side in sides]
    assert [line["left"] for line in lines(output)] == ["a" if side else "b" for side in sides]


def test_a_session_goes_on_where_the_file_ends_and_shows_no_pair_twice(pairs, output):
    with LabelSession(pairs, output) as session:
        session.choose(0, "tie")
        session.choose(1, "skip")
    mirrored = [Pair(prompt=p.prompt, a=p.b, b=p.a) for p in pairs]
    with LabelSession([*mirrored, *pairs], output) as session:
        progress = session.progress()
        assert (progress.total, progress.current, progress.labelled, progress.skipped) == (4, 2, 1, 1)


def test_a_line_that_a_crash_cut_short_is_dropped_and_its_pair_shown_again(pairs, output):
    with LabelSession(pairs, output) as session:
        session.choose(0, "left")
        session.choose(1, "left")
    output.write_bytes(output.read_bytes()[:-9])
    with LabelSession(pairs, output) as session:
        assert session.progress().current == 1
        session.choose(1, "right")
    assert len(read_pairs(output, labelled=True)) == 2


def test_every_choice_is_in_the_file_when_the_process_is_killed(pairs, output, tmp_path):
    names = [(str(pair.a), str(pair.b), pair.prompt) for pair in pairs]
    program = f"""
import os
from pathlib import Path
from rewards.preferences.labels import LabelSession
from rewards.preferences.pairs import Pair
session = LabelSession([Pair(prompt=p, a=Path(a), b=Path(b)) for a, b, p in {names!r}], Path({str(output)!r}))
session.choose(0, "left")
session.choose(1, "tie")
os.kill(os.getpid(), 9)
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert len(read_pairs(output, labelled=True)) == 2
    with LabelSession(pairs, output) as session:  # the lock died with its holder
        assert session.progress().current == 2


def test_undo_removes_the_last_line_also_after_a_restart_and_nothing_of_other_sessions(pairs, output):
    with LabelSession(pairs[:1], output) as session:
        session.choose(0, "left")
    kept = output.read_bytes()
    with LabelSession(pairs[1:], output) as session:
        session.choose(0, "left")
        session.choose(1, "tie")
    with LabelSession(pairs[1:], output) as session:
        assert session.undo().current == 1
        assert session.undo().current == 0
        assert session.undo().current == 0
    assert output.read_bytes() == kept


def test_a_pair_that_is_not_the_current_one_cannot_be_chosen(pairs, output):
    with LabelSession(pairs, output) as session:
        session.choose(0, "left")
        for number in (0, 2):
            with pytest.raises(StaleChoice):
                session.choose(number, "left")
    assert len(lines(output)) == 1


def test_a_second_session_on_the_same_file_is_refused(pairs, output):
    with LabelSession(pairs, output), pytest.raises(ValueError, match="open for labelling in another process"):
        LabelSession(pairs, output)


def test_a_malformed_label_file_is_refused_by_line_and_left_as_it_is(pairs, output):
    output.parent.mkdir()
    output.write_text("{}\n")
    with pytest.raises(ValueError, match=r"labels.jsonl: line 1: 'prompt' must be a text"):
        LabelSession(pairs, output)
    assert output.read_text() == "{}\n"


@pytest.mark.parametrize(
    "content",
    [
        b"years of notes without a final newline",
        b"\x89PNG\nrest of a picture",
        b'{"prompt": "a red circle"}',
        b'{"another": "kind of fi',
        b'{"prompt": "no pictures", "n": 1}\n{"prompt": "a re',
    ],
)
def test_a_file_that_is_none_of_labels_is_refused_and_left_as_it_is(pairs, output, content):
    output.parent.mkdir()
    output.write_bytes(content)
    with pytest.raises(UserError, match=r"labels.jsonl: line 1: "):
        LabelSession(pairs, output)
    assert output.read_bytes() == content


def test_a_last_label_without_a_line_end_is_kept(pairs, output):
    with LabelSession(pairs, output) as session:
        session.choose(0, "left")
        session.choose(1, "left")
    output.write_bytes(output.read_bytes()[:-1])
    with LabelSession(pairs, output) as session:
        assert session.progress().current == 2
        session.choose(2, "right")
    assert len(read_pairs(output, labelled=True)) == 3


# --------------------------------------------------------------------------------------------------------- the protocol


def test_choices_over_http_are_saved_and_the_last_state_is_done(server, output):
    assert json.loads(ask(server, "GET", "/state")[1])["prompt"] == "prompt 0"
    for number, choice in enumerate(["left", "tie", "skip", "right"]):
        status, state = choose(server, number, choice)
        assert (status, len(lines(output))) == (200, number + 1)
    assert (state["current"], state["labelled"], state["skipped"], state["prompt"]) == (None, 3, 1, "")
    status, data, _ = ask(server, "POST", "/undo", {})
    assert (status, json.loads(data)["current"]) == (200, 3)


def test_a_choice_sent_twice_counts_once(server, output):
    assert choose(server, 0, "left")[0] == 200
    status, state = choose(server, 0, "left")
    assert (status, state["current"]) == (409, 1)
    assert len(lines(output)) == 1


def test_two_windows_at_once_make_one_label_a_pair(server, output):
    statuses = []
    threads = [threading.Thread(target=lambda: statuses.append(choose(server, 0, "left")[0])) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200] + [409] * 7
    assert len(lines(output)) == 1


def test_pictures_are_served_by_pair_and_side_as_png(server):
    session = server.session
    for number in range(4):
        for side in ("left", "right"):
            status, data, headers = ask(server, "GET", f"/picture/{number}/{side}")
            shown = (
                session.pairs[number].a if session.a_is_left(number) == (side == "left") else session.pairs[number].b
            )
            with Image.open(BytesIO(data)) as picture, Image.open(shown) as original:
                assert picture.tobytes() == original.tobytes()
            assert (status, headers["Content-Type"]) == (200, "image/png")


@pytest.mark.parametrize(
    "path",
    ["/picture/4/left", "/picture/-1/left", "/picture/0/up", "/picture/0", "/../labels.jsonl"],
)
def test_nothing_else_can_be_fetched(server, path):
    assert ask(server, "GET", path)[0] == 404


@pytest.mark.parametrize(
    ("body", "headers", "status"),
    [
        (b"{", {}, 400),
        (b"[]", {}, 400),
        ({"pair": 0, "choice": "up"}, {}, 400),
        ({"pair": True, "choice": "left"}, {}, 400),
        ({"pair": "0", "choice": "left"}, {}, 400),
        ({"pair": 0, "choice": "left"}, {"Content_Type": "text/plain"}, 415),
        ({"pair": 0, "choice": "left"}, {"Origin": "http://elsewhere.example"}, 403),
        ({"pair": 0, "choice": "left"}, {"Host": "rebound.example"}, 403),
        (b" " * 5000, {}, 413),
    ],
)
def test_bad_and_foreign_requests_change_nothing(server, output, body, headers, status):
    assert ask(server, "POST", "/choose", body, **headers)[0] == status
    assert output.read_text() == ""


def test_the_page_is_one_file_that_loads_nothing_from_elsewhere(server):
    status, page, headers = ask(server, "GET", "/")
    assert status == 200
    assert b"http" not in page.replace(b"http-equiv", b"")
    assert "default-src 'none'" in headers["Content-Security-Policy"]


def test_it_listens_on_this_machine_alone(server):
    assert server.server_address[0] == "127.0.0.1"

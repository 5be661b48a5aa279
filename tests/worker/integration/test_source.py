"""The source room, over a local directory and over a real sshd: the same promises on both."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import signal
import subprocess
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from needed import needed

from lab_audio import source
from lab_audio.contracts import SourceFile
from lab_audio.errors import ConfigError, Fatal, NotFound, Permanent, Retryable
from lab_audio.media import archive

from processes import free_ports
from sshd import Sshd, make_key, sshd

ODD_NAMES = [
    "a b.mp3",
    "new\nline.mp3",
    "'quote\".mp3",
    "-rf.mp3",
    "--checkpoint-action=exec=touch owned.mp3",
    "back\\nslash\\.mp3",
    "$(touch owned) `touch owned`;&|.MP3",
    "* ? [a].mp3",
    "über/straße/日本.mp3",
    "latin-\udce9.mp3",
    "tab\there.mp3",
    "sub dir/-x.mp3",
    "n" * 251 + ".mp3",
    "l/" * 300 + "deep.mp3",
    "%s%n.tar",
]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sshd]:
    with needed():
        sshd()
    with Sshd(tmp_path_factory.mktemp("sshd")) as running:
        yield running


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    path = tmp_path / "it's a $HOME"
    path.mkdir()
    return path


@pytest.fixture(params=["local", "ssh"])
def where(request: pytest.FixtureRequest, directory: Path) -> source.Source:
    if request.param == "local":
        return source.parse(str(directory))
    running: Sshd = request.getfixturevalue("server")
    return behind(running, directory)


def behind(running: Sshd, directory: Path) -> source.Source:
    return source.parse(running.url(directory), ssh_key=running.key, ssh_known_hosts=running.known_hosts)


def put(directory: Path, name: str, content: bytes = b"x") -> SourceFile:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return SourceFile(name, len(content), path.stat().st_mtime_ns)


def streamed(where: source.Source, files: list[SourceFile]) -> list[tuple[SourceFile, bytes]]:
    with source.stream(where, files) as members:
        return [(file, content.read()) for file, content in members]


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "did not happen in time"
        time.sleep(0.02)


def test_recordings_and_archives_are_listed_and_nothing_else(where: source.Source, directory: Path) -> None:
    wanted = [put(directory, name, b"abc") for name in ["a.mp3", "B.MP3", "c/d/e.Mp3", "f.tar", "c/g.TaR"]]
    for name in ["h.wav", "mp3", "a.mp3.part", ".i.mp3", ".transferred/j.mp3", "c/.hidden/k.mp3"]:
        put(directory, name)
    (directory / "dir.mp3").mkdir()
    (directory / "link.mp3").symlink_to("a.mp3")
    (directory / "linked").symlink_to("c")
    os.mkfifo(directory / "fifo.mp3")
    assert source.settled(where, 0) == sorted(wanted)


def test_any_name_goes_the_whole_way(where: source.Source, directory: Path, tmp_path: Path) -> None:
    files = sorted(put(directory, name, name.encode("utf-8", "surrogateescape")) for name in ODD_NAMES)
    assert source.settled(where, 0) == files
    assert source.stat(where, (f.path for f in files)) == {f.path: f for f in files}
    with source.stream(where, files) as members:
        built = archive.build(members, tmp_path / "a.tar")
    assert built.file_count == len(files)
    with (tmp_path / "a.tar").open("rb") as tar:
        assert list(archive.sources(tar)) == files
    for file in files[::3]:
        digest, size = source.fetch_file(where, file, tmp_path / "one")
        content = file.path.encode("utf-8", "surrogateescape")
        assert (digest, size) == (hashlib.sha256(content).hexdigest(), len(content))
        assert (tmp_path / "one").read_bytes() == content
    assert source.apply_fate(where, files[::2], "delete") == {f.path for f in files[::2]}
    assert source.apply_fate(where, files[1::2], "move") == {f.path for f in files[1::2]}
    assert source.settled(where, 0) == []
    for file in files[1::2]:
        assert (directory / ".transferred" / file.path).read_bytes()
    assert not list(tmp_path.rglob("owned")) and not Path("owned").exists()


def test_times_are_exact(where: source.Source, directory: Path) -> None:
    for number, ns in enumerate([0, 1, 999_999_999, 1_750_000_000_123_456_789, -1, -1_500_000_001]):
        put(directory, f"{number}.mp3")
        os.utime(directory / f"{number}.mp3", ns=(0, ns))
    files = source.settled(where, 0)
    assert [f.mtime_ns for f in files] == [(directory / f.path).stat().st_mtime_ns for f in files]
    assert len({f.mtime_ns for f in files}) == 6
    assert [f for f, _ in streamed(where, files)] == files
    assert len(source.apply_fate(where, files, "delete")) == 6


def test_a_growing_file_is_not_taken_and_then_it_is(where: source.Source, directory: Path) -> None:
    put(directory, "growing.mp3")
    old = time.time_ns() - 3600 * 10**9
    stop = threading.Event()

    def grow() -> None:
        with (directory / "growing.mp3").open("ab", buffering=0) as file:
            while not stop.is_set():
                file.write(b"x")
                os.utime(directory / "growing.mp3", ns=(old, old))  # as a copy that keeps times does
                time.sleep(0.01)

    writer = threading.Thread(target=grow)
    writer.start()
    try:
        until(lambda: (directory / "growing.mp3").stat().st_size > 10)
        for _ in range(5):
            assert source.settled(where, 10) == []
        assert [f.path for f in source.settled(where, 0)] == ["growing.mp3"]
    finally:
        stop.set()
        writer.join()
    until(lambda: len(source.settled(where, 1)) == 1)


def test_what_vanished_or_changed_since_the_listing_is_left_out(where: source.Source, directory: Path) -> None:
    files = [put(directory, f"{n}.mp3", b"%d" % n * 5000) for n in range(6)]
    (directory / "1.mp3").unlink()
    put(directory, "2.mp3", b"longer" * 5000)
    os.utime(directory / "3.mp3", ns=(0, files[3].mtime_ns + 1))
    (directory / "4.mp3").unlink()
    (directory / "4.mp3").symlink_to("0.mp3")
    assert streamed(where, files) == [(files[0], b"0" * 5000), (files[5], b"5" * 5000)]
    assert streamed(where, files[1:2]) == []
    assert streamed(where, []) == []
    now = source.stat(where, [f.path for f in files])
    assert sorted(now) == ["0.mp3", "2.mp3", "3.mp3", "5.mp3"]
    assert [f for f in files if now.get(f.path) == f] == [files[0], files[5]]


def test_a_file_that_changes_while_it_is_read_stops_the_archive(
    where: source.Source, directory: Path, tmp_path: Path
) -> None:
    big = 24 << 20  # more than lies in pipes and buffers, so that tar is still reading
    files = [
        put(directory, "a.mp3", bytes(big)),
        put(directory, "b.mp3", bytes(big)),
        put(directory, "c.mp3"),
    ]
    with pytest.raises(Retryable, match=r"'b\.mp3' changed"), source.stream(where, files) as members:
        for file, content in members:
            if file.path == "b.mp3":
                os.truncate(directory / "b.mp3", 5)
            content.read()
    assert [f for f, _ in streamed(where, files)] == [files[0], files[2]]


def test_hard_links_arrive_as_two_files_and_in_the_order_asked(where: source.Source, directory: Path) -> None:
    a, c = put(directory, "a.mp3", b"same"), put(directory, "c.mp3", b"other")
    os.link(directory / "a.mp3", directory / "b.mp3")
    b = SourceFile("b.mp3", a.size, a.mtime_ns)
    assert streamed(where, [c, b, a]) == [(c, b"other"), (b, b"same"), (a, b"same")]


def test_members_need_not_be_read_and_a_stream_may_be_left(where: source.Source, directory: Path) -> None:
    files = [put(directory, f"{n}.mp3", bytes([n]) * 3_000_000) for n in range(5)]
    with source.stream(where, files) as members:
        assert [file for file, _ in members] == files
    with source.stream(where, files) as members:
        next(members)
    with pytest.raises(KeyError), source.stream(where, files) as members:
        raise KeyError


def test_two_thousand_files(where: source.Source, directory: Path, tmp_path: Path) -> None:
    files = sorted(put(directory, f"{n % 7}/{n:05} recording.mp3", b"%d" % n) for n in range(2000))
    assert source.settled(where, 0) == files
    builds = []
    for name in ("a.tar", "b.tar"):
        with source.stream(where, files) as members:
            builds.append(archive.build(members, tmp_path / name))
    assert builds[0] == builds[1]
    assert builds[0].file_count == 2000
    assert len(source.stat(where, (f.path for f in files))) == 2000
    assert source.apply_fate(where, files, "move") == {f.path for f in files}
    assert sum(f.is_file() for f in (directory / ".transferred").rglob("*")) == 2000


@pytest.mark.parametrize("fate", ["move", "delete"])
def test_fate_touches_only_what_is_unchanged(where: source.Source, directory: Path, fate: str) -> None:
    same, longer, touched, gone = (put(directory, f"{n}.mp3", b"abc") for n in "abcd")
    put(directory, "b.mp3", b"abcd")
    os.utime(directory / "b.mp3", ns=(0, longer.mtime_ns))
    os.utime(directory / "c.mp3", ns=(0, touched.mtime_ns + 1))
    (directory / "d.mp3").unlink()
    done = source.apply_fate(where, [same, longer, touched, gone], fate)  # type: ignore[arg-type]
    assert done == {"a.mp3", "d.mp3"}
    assert sorted(p.name for p in directory.iterdir() if p.is_file()) == ["b.mp3", "c.mp3"]
    moved = directory / ".transferred" / "a.mp3"
    assert moved.exists() == (fate == "move")
    assert source.apply_fate(where, [same], fate) == {"a.mp3"}  # type: ignore[arg-type]
    assert source.apply_fate(where, [], fate) == set()  # type: ignore[arg-type]


def test_a_moved_file_never_replaces_another(where: source.Source, directory: Path) -> None:
    for content in (b"one", b"two", b"three"):
        file = put(directory, "s/a.mp3", content)
        assert source.apply_fate(where, [file], "move") == {"s/a.mp3"}
    kept = sorted((directory / ".transferred" / "s").iterdir())
    assert [(p.name, p.read_bytes()) for p in kept] == [
        ("a.mp3", b"one"),
        ("a.mp3.1", b"two"),
        ("a.mp3.2", b"three"),
    ]


def test_a_fate_that_fails_is_not_done(where: source.Source, directory: Path) -> None:
    file = put(directory, "a.mp3")
    (directory / ".transferred").write_text("a file is in the way")
    assert source.apply_fate(where, [file], "move") == set()
    assert (directory / "a.mp3").exists()


def test_a_fetched_file_is_as_listed_or_an_error(
    where: source.Source, directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put(directory, "a.tar", b"abc" * 1_000_000)
    to = tmp_path / "to"
    assert source.fetch_file(where, file, to) == (hashlib.sha256(b"abc" * 1_000_000).hexdigest(), 3_000_000)
    assert to.read_bytes() == b"abc" * 1_000_000
    assert to.stat().st_mode & 0o777 == 0o600
    for changed in (SourceFile("a.tar", 5, file.mtime_ns), SourceFile("a.tar", file.size, file.mtime_ns - 1)):
        with pytest.raises(Permanent, match="not as it was listed"):
            source.fetch_file(where, changed, to)
    with monkeypatch.context() as patch, pytest.raises(Retryable, match="No space left"):
        patch.setattr("os.fchmod", lambda fd, mode: None)  # /dev/full is everybody's
        source.fetch_file(where, file, Path("/dev/full"))
    with pytest.raises(Fatal, match="cannot write"):
        source.fetch_file(where, file, tmp_path / "missing" / "to")
    (directory / "a.tar").unlink()
    with pytest.raises(NotFound, match="gone"):
        source.fetch_file(where, file, to)


@pytest.mark.parametrize("path", ["", "/etc/passwd", "../a.mp3", "a/../../b.mp3", "a\0b", "a//b", "./a", "a/"])
def test_paths_outside_the_source_are_refused(where: source.Source, path: str, tmp_path: Path) -> None:
    file = SourceFile(path, 1, 1)
    with pytest.raises(Permanent, match="not a path inside"):
        source.stat(where, [path])
    with pytest.raises(Permanent, match="not a path inside"):
        streamed(where, [file])
    with pytest.raises(Permanent, match="not a path inside"):
        source.apply_fate(where, [file], "delete")
    with pytest.raises(Permanent, match="not a path inside"):
        source.fetch_file(where, file, tmp_path / "to")


def test_a_missing_directory_names_the_setting(where: source.Source, directory: Path, tmp_path: Path) -> None:
    directory.rmdir()
    file = SourceFile("a.mp3", 1, 1)
    for question in (
        lambda: source.settled(where, 0),
        lambda: source.stat(where, ["a.mp3"]),
        lambda: streamed(where, [file]),
        lambda: source.fetch_file(where, file, tmp_path / "to"),
        lambda: source.apply_fate(where, [file], "delete"),
    ):
        with pytest.raises(ConfigError, match=r"SOURCE: directory .* cannot be entered"):
            question()


def fake_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, **scripts: str) -> None:
    """Programs of a source that lies."""
    (tmp_path / "bin").mkdir()
    for name, script in scripts.items():
        (tmp_path / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")


@pytest.mark.parametrize(
    "answer",
    [
        r"printf '1 1.0000000000 1.0000000000 .//etc/x.mp3\0'",
        r"printf '1 1.0000000000 1.0000000000 ./../x.mp3\0'",
        r"printf '1 1.0000000000 1.0000000000 ./a/../x.mp3\0'",
        r"printf '1 1.0000000000 1.0000000000 /x.mp3\0'",
        r"printf '%s 1.0000000000 1.0000000000 ./x.mp3\0' -1",
        r"printf 'garbage\0'",
        r"printf '\0'",
        "head -c 300000 /dev/zero | tr '\\0' x",
    ],
)
def test_a_list_that_lies_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: str
) -> None:
    fake_programs(tmp_path, monkeypatch, find=answer)
    with pytest.raises(Fatal):
        source.settled(source.parse(str(directory)), 0)


def test_a_chatty_shell_is_told_apart(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_programs(
        tmp_path,
        monkeypatch,
        date='echo Welcome!; /bin/date "$@"',
        tar='echo Welcome!; sleep 0; exec /bin/tar "$@"',
    )
    put(directory, "a.mp3")
    where = source.parse(str(directory))
    with pytest.raises(Fatal, match="login shell"):
        source.settled(where, 0)
    with pytest.raises(Fatal, match="login shell"):
        streamed(where, [SourceFile("a.mp3", 1, 1)])


def test_a_tar_that_would_fill_memory_is_refused(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Headers without end, sparse maps, more bytes than were asked for, and what never ends after it."""
    file = put(directory, "a.mp3", b"x" * 1000)
    where, made = source.parse(str(directory)), tmp_path / "made"
    fake_programs(tmp_path, monkeypatch, tar=f"cat >/dev/null; cat {made}; exec cat /dev/zero")
    for kind in (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_SPARSE, tarfile.DIRTYPE):
        header = tarfile.TarInfo("a.mp3")
        header.type, header.size = kind, 1 << 40
        made.write_bytes(header.tobuf(tarfile.GNU_FORMAT))
        with pytest.raises(Fatal, match="cannot be understood"):
            streamed(where, [file])
    other = tarfile.TarInfo("b.mp3")
    other.size = 1 << 40
    for data, error in ((other.tobuf(tarfile.GNU_FORMAT), Retryable), (bytes(1024), Fatal)):
        made.write_bytes(data)
        with pytest.raises(error, match=r"cannot be understood|more comes than"):
            streamed(where, [file])


def test_a_list_without_end_is_refused(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_FILES", 1000)
    record = r"1 1.0000000000 1.0000000000 ./x.mp3\0"
    fake_programs(tmp_path, monkeypatch, find=f"exec perl -e 'while (1) {{ print qq({record}) }}'")
    with pytest.raises(Fatal, match="more than 1000 files"):
        source.settled(source.parse(str(directory)), 0)
    fake = tmp_path / "bin" / "xargs"
    fake.write_text("#!/bin/sh\nhead -c 100000 /dev/zero | tr '\\0' 9\n")
    fake.chmod(0o755)
    with pytest.raises(Fatal, match="cannot be understood"):
        source.apply_fate(source.parse(str(directory)), [SourceFile("a.mp3", 1, 1)], "delete")


def test_a_missing_program_is_named(directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_programs(tmp_path, monkeypatch, tar="exit 127")
    with pytest.raises(Fatal, match="needs GNU"):
        streamed(source.parse(str(directory)), [SourceFile("a.mp3", 1, 1)])


@pytest.mark.parametrize("ending", ["exit 2", "kill -9 $$"])
def test_a_tar_that_ends_early_is_tried_again(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    files = [put(directory, f"{n}.mp3", b"x" * 1000) for n in range(3)]
    where = source.parse(str(directory))
    fake_programs(tmp_path, monkeypatch, tar=f'/bin/tar "$@" | head -c "$(cat "{tmp_path}/cut")"; {ending}')
    for cut in (0, 100, 1536, 2000, 2048, 2560, 3600, 6000, 6144):
        (tmp_path / "cut").write_text(str(cut))
        with pytest.raises(Retryable):
            streamed(where, files)


def test_a_lost_connection_is_tried_again(server: Sshd, directory: Path) -> None:
    where = behind(server, directory)
    files = [put(directory, f"{n}.mp3", os.urandom(24 << 20)) for n in range(3)]

    def sessions() -> list[int]:
        """What sshd has started, each before its children."""
        table = subprocess.run(["ps", "-eo", "pid=,ppid="], check=True, capture_output=True, text=True).stdout
        children: dict[int, list[int]] = {}
        for line in table.splitlines():
            pid, parent = map(int, line.split())
            children.setdefault(parent, []).append(pid)
        found = [process.pid for process in server._processes.values()]
        for pid in found:
            found += children.get(pid, [])
        return found[1:]

    with pytest.raises(Retryable, match="no connection"), source.stream(where, files) as members:
        for number, (_, content) in enumerate(members):
            if number == 1:
                for pid in sessions():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            content.read()
    assert len(streamed(where, files)) == 3


def test_a_host_that_does_not_answer_is_tried_again(server: Sshd, directory: Path) -> None:
    (port,) = free_ports(1)
    url = f"ssh://{server.user}@127.0.0.1:{port}{directory}"
    where = source.parse(url, ssh_key=server.key, ssh_known_hosts=server.known_hosts)
    with pytest.raises(Retryable, match="Connection refused"):
        source.settled(where, 0)


def test_an_unknown_host_key_is_fatal(server: Sshd, directory: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text("")
    where = source.parse(server.url(directory), ssh_key=server.key, ssh_known_hosts=known)
    with pytest.raises(Fatal, match=r"not known.*SSH_KNOWN_HOSTS"):
        source.settled(where, 0)
    assert known.read_text() == ""


def test_a_changed_host_key_is_fatal(server: Sshd, directory: Path, tmp_path: Path) -> None:
    known = tmp_path / "known_hosts"
    known.write_text(f"[127.0.0.1]:{server.port} {make_key(tmp_path / 'other')}\n")
    where = source.parse(server.url(directory), ssh_key=server.key, ssh_known_hosts=known)
    with pytest.raises(Fatal, match="not the pinned one"):
        source.settled(where, 0)


def test_a_key_that_is_not_let_in_is_fatal(server: Sshd, directory: Path, tmp_path: Path) -> None:
    make_key(tmp_path / "other")
    where = source.parse(server.url(directory), ssh_key=tmp_path / "other", ssh_known_hosts=server.known_hosts)
    with pytest.raises(Fatal, match="authorized_keys"):
        source.settled(where, 0)


def test_no_secret_of_the_worker_goes_to_a_program(
    directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_programs(tmp_path, monkeypatch, find=f"env > '{tmp_path}/env'")
    monkeypatch.setenv("S3_SECRET_KEY", "hush")
    assert source.settled(source.parse(str(directory)), 0) == []
    assert "PATH=" in (tmp_path / "env").read_text()
    assert "hush" not in (tmp_path / "env").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "relative",
        "",
        "http://a@b/c",
        "ssh://host/dir",
        "ssh://a@b",
        "ssh://-oProxyCommand=x@host/dir",
        "ssh://a@-oProxyCommand=x/dir",
        "ssh://a@b:0/dir",
        "ssh://a@b:65536/dir",
        "ssh://a@b:22x/dir",
        "ssh://a b@c/dir",
        "ssh://a@b c/dir",
        "ssh://a@[::1/dir",
        "ssh://a@[$(x)]/dir",
        "ssh://a@b/d\0",
        "/d\0",
    ],
)
def test_a_wrong_source_names_the_setting(text: str) -> None:
    with pytest.raises(ConfigError, match=r"^SOURCE: "):
        source.parse(text)


def test_wrong_key_files_name_their_setting(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^SSH_KEY: .*cannot be read"):
        source.parse("ssh://a@b/c", ssh_key=tmp_path / "missing")
    with pytest.raises(ConfigError, match=r"^SSH_KNOWN_HOSTS: .*plain path"):
        source.parse("ssh://a@b/c", ssh_known_hosts=tmp_path / "a b")


@pytest.mark.parametrize(
    ("url", "host", "port"),
    [
        ("ssh://me@lab.example.edu/srv/sounds", "lab.example.edu", "22"),
        ("ssh://me@lab.example.edu:2222/srv/sounds", "lab.example.edu", "2222"),
        ("ssh://me@192.0.2.1:22/srv/sounds", "192.0.2.1", "22"),
        ("ssh://me@[2001:db8::1]:2200/srv/sounds", "2001:db8::1", "2200"),
        ("ssh://me@[::1]/srv/sounds", "::1", "22"),
    ],
)
@pytest.mark.usefixtures("server")
def test_ssh_understands_the_transport_as_we_mean_it(url: str, host: str, port: str) -> None:
    where = source.parse(url)
    assert where.directory == "/srv/sounds"
    printed = subprocess.run(
        [where.transport[0], "-G", *where.transport[1:]], check=True, capture_output=True, text=True
    ).stdout
    settings = dict(line.split(" ", 1) for line in printed.lower().splitlines() if " " in line)
    assert (settings["hostname"], settings["port"], settings["user"]) == (host, port, "me")
    assert settings["stricthostkeychecking"] in ("true", "yes")
    assert settings["batchmode"] == "yes"
    assert settings["serveraliveinterval"] != "0"
    assert settings["forwardagent"] == "no"


def test_building_from_a_source_is_one_pass(where: source.Source, directory: Path, tmp_path: Path) -> None:
    """An archive holds what came; the ledger's rows can be made again from it."""
    files = [put(directory, f"{n}.mp3", bytes([n]) * (n * 700)) for n in range(5)]
    (directory / "3.mp3").unlink()
    with source.stream(where, files) as members:
        built = archive.build(members, tmp_path / "a.tar")
    data = (tmp_path / "a.tar").read_bytes()
    assert built.sha256 == hashlib.sha256(data).hexdigest()
    assert list(archive.sources(io.BytesIO(data))) == [f for f in files if f.path != "3.mp3"]


def test_a_file_of_another_age_is_left_out() -> None:
    """With a time that the ledger cannot hold; the other files of its source are taken."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as place:  # most file systems on disks cannot hold it, either
        old, good = Path(place, "old.mp3"), Path(place, "good.mp3")
        for path, seconds in ((old, -11_676_096_000), (good, 1_700_000_000)):
            path.write_bytes(b"x")
            os.utime(path, (seconds, seconds))
        assert old.stat().st_mtime_ns < -(2**63)
        files = source.settled(source.parse(place), 0)
    assert [file.path for file in files] == ["good.mp3"]

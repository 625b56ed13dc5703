"""Who may connect to a server: file modes of its socket, and keys over TCP."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from drp import Client, Leader
from drp.cli import main
from drp.protocol.keys import Keys, make
from drp.server.server import Server
from tests.plain_client import Plain
from tests.serving import Served, serving


def test_only_the_owner_may_come_in(served: Served, free: Leader, tmp_path: Path) -> None:
    path = Path(served.address.removeprefix("ipc://"))
    assert path.stat().st_mode & 0o777 == 0o600
    assert path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ValueError, match="another server listens"):
        Server(free, "model", served.address)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir(mode=0o755)
    for address, message in (
        (f"ipc://{open_to_all}/server", "name a directory of mode 0700"),
        (f"ipc://{tmp_path}/{'d' * 100}", "at most 107 characters"),
        ("tcp://127.0.0.1:*", "with keys, which `drp keys` makes"),
        ("inproc://server", "give ipc://PATH"),
    ):
        with pytest.raises(ValueError, match=message):
            Server(free, "model", address)
    with Client(served.address) as client:
        assert client.status().healthy  # It was not disturbed.


def test_tcp_lets_known_keys_in(free: Leader, tmp_path: Path) -> None:
    made = make(tmp_path / "keys", ["known"])
    assert all(path.stat().st_mode & 0o077 == 0 for path in made)
    assert make(tmp_path / "keys", ["known"]) == []
    make(tmp_path / "others", ["stranger"])
    own, other = tmp_path / "keys", tmp_path / "others"
    with serving(free, tmp_path, address="tcp://127.0.0.1:*", keys=Keys.read(own)) as server:
        with Client(server.address, server_key=own / "server.key", key=own / "clients" / "known.key_secret") as client:
            large = client.sample(shape=(8, 8), count=2000, steps=2).samples
            assert torch.equal(large, free.sample(shape=(8, 8), count=2000, steps=2).samples)
        with pytest.raises(ConnectionError):
            Client(
                server.address, server_key=own / "server.key", key=other / "clients" / "stranger.key_secret", timeout=5
            )
        with pytest.raises(ConnectionError):
            Client(
                server.address,
                server_key=other / "server.key",
                key=own / "clients" / "known.key_secret",
                timeout=0.5,
            )
        bare = Plain(server.address)
        bare.send("Open", version=3, name="without keys")
        assert not bare.socket.poll(300)
        bare.close()
        with pytest.raises(ValueError, match="with server_key and key"):
            Client(server.address)


def test_commands_say_plainly_what_cannot_be(tmp_path: Path) -> None:
    for arguments, message in (
        (["serve", "--listen", "tcp://127.0.0.1:*"], "with keys, which `drp keys` makes"),
        (["serve", "--keys", str(tmp_path)], "`drp keys` makes them"),
        (["serve", "-l", f"ipc://{tmp_path}/server/socket", "--trace", f"{tmp_path}/no/run.json"], "cannot be written"),
        (["keys", str(tmp_path / "keys"), "../anna"], "a name has letters"),
        (["http", "--trace", "run.json"], "drp serve --trace FILE"),
    ):
        done = CliRunner().invoke(main, arguments)
        assert done.exit_code == 1
        assert message in done.output

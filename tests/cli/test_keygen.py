"""`lightning-diloco keygen`, and what a syncer prints for those who join."""

from __future__ import annotations

import json
import re

import pytest

from lightning_diloco.cli.inviting import invite
from lightning_diloco.cli.main import main
from lightning_diloco.runtime.keys import SECRET, SiteKeys, SyncerKeys, read_admitted
from tests.runtime.key_helpers import Keys

KEY = re.compile(r"\b[0-9a-f]{64}\b")


def say(capsys: pytest.CaptureFixture[str], *argv: str) -> str:
    assert main(["keygen", *argv]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


def test_each_step_prints_the_next_one(tmp_path, capsys):
    syncer, site = str(tmp_path / "syncer"), str(tmp_path / "site")
    next_step = say(capsys, syncer).splitlines()[-1].partition("lightning-diloco keygen DIR ")[2].split()
    assert next_step[0] == "--syncer"
    next_step = say(capsys, site, *next_step).splitlines()[-1].partition("lightning-diloco keygen DIR ")[2].split()
    assert next_step[:2] == ["--admit", "NAME"]
    assert say(capsys, syncer, "--admit", "paris", next_step[2]) == "Site paris is admitted.\n"
    keys = SiteKeys.read(tmp_path / "site")
    assert read_admitted(SyncerKeys.read(tmp_path / "syncer").admitted) == {keys.public: "paris"}
    assert say(capsys, syncer, "--revoke", "paris").startswith("Site paris is shut out")
    assert read_admitted(SyncerKeys.read(tmp_path / "syncer").admitted) == {}


def test_json_holds_the_public_key_and_no_secret(tmp_path, capsys):
    syncer, site = tmp_path / "syncer", tmp_path / "site"
    made = json.loads(out := say(capsys, str(syncer), "--json"))
    assert made == {"folder": str(syncer), "public_key": SyncerKeys.read(syncer).public.hex()}
    told = json.loads(out2 := say(capsys, str(site), "--syncer", made["public_key"].upper(), "--json"))
    assert told == {"folder": str(site), "public_key": SiteKeys.read(site).public.hex()}
    for folder in (syncer, site):
        secret = KEY.search((folder / SECRET).read_text())[0]
        assert secret not in out + out2


def test_a_second_keygen_changes_nothing_and_shows_the_public_key(tmp_path, capsys):
    keys = Keys(tmp_path)
    before = (keys.folder / SECRET).read_bytes()
    assert main(["keygen", str(keys.folder)]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "never overwritten" in err and KEY.findall(err) == [keys.public]
    assert (keys.folder / SECRET).read_bytes() == before


def test_each_end_has_a_folder_of_its_own(tmp_path, capsys):
    keys = Keys(tmp_path)
    keys.site("paris")
    syncer, site, run_dir = str(keys.folder), str(keys.site_folder("paris")), tmp_path / "run"
    for argv, whose in (
        (["keygen", site, "--admit", "oslo", "12" * 32], "site"),
        (["keygen", site, "--revoke", "oslo"], "site"),
        (["syncer", "--keys", site, "--run-dir", str(run_dir)], "site"),
        (["syncer", "--keys", site, "--run-dir", str(run_dir), "--shards", "2"], "site"),
        (["keygen", syncer, "--syncer", "12" * 32], "syncer"),
        (["status", "tcp://127.0.0.1:1", "--keys", syncer], "syncer"),
    ):
        assert main(argv) == 2, argv
        out, err = capsys.readouterr()
        assert out == "" and f"is the folder of a {whose}, for" in err and err.count("\n") == 1
    assert not run_dir.exists()


def test_the_invitation_names_host_ports_and_keys(tmp_path):
    keys = Keys(tmp_path)
    assert invite("tcp://127.0.0.1:7777", "tcp://127.0.0.1:4", None) == (
        "Syncer ready. A learner joins with DecoupledDiLoCoStrategy(syncer='tcp://127.0.0.1:7777').\n"
    )
    text = invite("tcp://10.1.2.3:7777", "tcp://10.1.2.3:7778", keys.syncer)
    assert "DecoupledDiLoCoStrategy(syncer='tcp://10.1.2.3:7777', keys='DIR')" in text
    assert "Ports 7777 and 7778 (TCP)" in text and "WARNING" not in text
    assert f"lightning-diloco keygen DIR --syncer {keys.public}" in text and "(admitted: no site yet)" in text
    keys.site("paris"), keys.site("oslo")
    assert "(admitted: oslo, paris)" in invite("tcp://127.0.0.1:7777", "tcp://127.0.0.1:4", keys.syncer)
    assert not any(secret.decode("latin-1") in text for secret in keys.secrets())


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_bound_everywhere_the_invitation_names_an_address_that_others_can_dial(host, tmp_path):
    text = invite(f"tcp://{host}:7777", f"tcp://{host}:7778", Keys(tmp_path).syncer)
    assert host not in text and re.search(r"syncer='tcp://[\w.-]+:7777'", text)


def test_insecure_is_said_loudly():
    text = invite("tcp://10.1.2.3:7777", "tcp://10.1.2.3:7778", None)
    assert "syncer='tcp://10.1.2.3:7777', keys='insecure')" in text
    assert "WARNING: --insecure. Nothing is encrypted" in text

"""Keys as files: modes, never overwritten, refused when others may read or exchange them."""

from __future__ import annotations

import os
import re
import shutil
import stat

import pytest

from lightning_diloco.errors import ConfigurationError
from lightning_diloco.runtime.keys import (
    ADMITTED,
    SECRET,
    SYNCER,
    SiteKeys,
    SyncerKeys,
    admit,
    make_pair,
    read_admitted,
    revoke,
    trust_syncer,
)
from tests.runtime.key_helpers import Keys


def mode(path):
    return stat.S_IMODE(path.stat().st_mode)


def content(root):
    return {path: path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


@pytest.fixture(params=[0o022, 0o000], ids=["umask 022", "umask 000"])
def keys(request, tmp_path):
    before = os.umask(request.param)
    try:
        yield Keys(tmp_path)
    finally:
        os.umask(before)


def test_secrets_have_mode_0600_in_folders_of_mode_0700(keys):
    keys.site("paris")
    site, syncer = keys.site_folder("paris"), keys.folder
    assert {p.relative_to(keys.root).as_posix() for p in content(keys.root)} == {
        "syncer/secret.key",
        "syncer/admitted/paris.key",
        "paris/secret.key",
        "paris/syncer.key",
    }
    assert [mode(p) for p in (site, syncer, syncer / ADMITTED)] == [0o700] * 3
    assert [mode(p / SECRET) for p in (site, syncer)] == [0o600] * 2
    assert [mode(p) for p in (site / SYNCER, syncer / ADMITTED / "paris.key")] == [0o644] * 2


def test_both_ends_know_each_other_and_every_pair_is_another_one(tmp_path):
    keys = Keys(tmp_path)
    paris, oslo = keys.site("paris"), keys.site("oslo")
    assert paris.syncer == oslo.syncer == keys.syncer.public
    assert read_admitted(keys.syncer.admitted) == {paris.public: "paris", oslo.public: "oslo"}
    assert len({paris.secret, oslo.secret, keys.syncer.secret, paris.public, oslo.public, keys.syncer.public}) == 6


def test_nothing_is_ever_overwritten(tmp_path):
    keys, bare = Keys(tmp_path), Keys(tmp_path / "bare")
    paris, oslo = keys.site("paris"), keys.site("oslo")
    before = content(tmp_path)
    with pytest.raises(ConfigurationError, match=f"is there already, and keys are never overwritten. Its public key is {keys.public}"):
        make_pair(keys.folder)
    with pytest.raises(ConfigurationError, match="never overwritten"):
        trust_syncer(keys.site_folder("paris"), oslo.public.hex())
    with pytest.raises(ConfigurationError, match="never overwritten"):
        admit(keys.folder, "paris", "12" * 32)
    with pytest.raises(ConfigurationError, match="this key is admitted as paris"):
        admit(keys.folder, "lyon", paris.public.hex())
    with pytest.raises(ConfigurationError, match="is the key of this syncer"):
        admit(keys.folder, "lyon", keys.public)
    with pytest.raises(ConfigurationError, match="itself"):
        trust_syncer(bare.folder, bare.public)
    assert content(tmp_path) == before
    # Said again, what is so already is no error.
    assert trust_syncer(keys.site_folder("paris"), keys.public) == paris.public
    admit(keys.folder, "paris", paris.public.hex())
    assert content(tmp_path) == before


def test_who_is_revoked_is_gone_and_may_be_admitted_again(tmp_path):
    keys = Keys(tmp_path)
    paris = keys.site("paris")
    keys.revoke("paris")
    assert read_admitted(keys.syncer.admitted) == {}
    with pytest.raises(ConfigurationError, match="Admitted: none"):
        revoke(keys.folder, "paris")
    admit(keys.folder, "paris", paris.public.hex())
    assert read_admitted(keys.syncer.admitted) == {paris.public: "paris"}


@pytest.mark.parametrize("bits", [0o640, 0o604, 0o610, 0o660], ids=oct)
def test_a_secret_that_others_may_read_is_refused(tmp_path, bits):
    keys = Keys(tmp_path)
    keys.site("paris")
    for folder, read in ((keys.folder, SyncerKeys.read), (keys.site_folder("paris"), SiteKeys.read)):
        (folder / SECRET).chmod(bits)
        with pytest.raises(ConfigurationError, match=f"mode 0{bits:o} opens the secret to others of this machine.*chmod 600"):
            read(folder)
        (folder / SECRET).chmod(0o400)
        read(folder)


@pytest.mark.parametrize("bits", [0o770, 0o707, 0o1777], ids=oct)
def test_a_folder_to_which_others_may_write_is_refused(tmp_path, bits):
    keys = Keys(tmp_path)
    keys.site("paris")
    for folder, read in ((keys.folder, SyncerKeys.read), (keys.site_folder("paris"), SiteKeys.read)):
        folder.chmod(bits)
        with pytest.raises(ConfigurationError, match="lets others of this machine write to it.*chmod go-w"):
            read(folder)
        folder.chmod(0o755)
        read(folder)
    (keys.folder / ADMITTED).chmod(bits)
    with pytest.raises(ConfigurationError, match="one could admit itself"):
        SyncerKeys.read(keys.folder)
    with pytest.raises(ConfigurationError, match="write to it"):
        keys.site("oslo")


@pytest.mark.parametrize("bits", [0o666, 0o646, 0o664], ids=oct)
def test_a_public_key_that_others_may_write_is_refused(tmp_path, bits):
    keys = Keys(tmp_path)
    keys.site("paris")
    files = ((SyncerKeys.read, keys.folder, ADMITTED + "/paris.key"), (SiteKeys.read, keys.site_folder("paris"), SYNCER))
    for read, folder, name in files:
        folder.chmod(0o755)
        (folder / name).chmod(bits)
        with pytest.raises(ConfigurationError, match=rf"{name}: mode 0{bits:o} lets others.*put another key in its place\. chmod go-w"):
            read(folder)
        if read is SyncerKeys.read:
            assert read_admitted(folder / ADMITTED) == {}
        (folder / name).chmod(0o644)
        read(folder)


def test_what_belongs_to_somebody_else_is_refused(tmp_path, monkeypatch):
    keys = Keys(tmp_path)
    keys.site("paris")
    folder, me = keys.site_folder("paris"), os.geteuid()
    for path in (folder, folder / SECRET, folder / SYNCER):
        # Only root can give files away; for others, all files are somebody else's if they are somebody else.
        if me == 0:
            os.chown(path, 12345, -1)
        else:
            monkeypatch.setattr(os, "geteuid", lambda: me + 1)
        with pytest.raises(ConfigurationError, match=rf"belongs to another user \(uid {12345 if me == 0 else me}\)"):
            SiteKeys.read(folder)
        if me == 0:
            os.chown(path, 0, -1)
    monkeypatch.undo()
    SiteKeys.read(folder)


def test_revoking_one_of_two_names_of_a_key_names_the_other(tmp_path):
    keys = Keys(tmp_path)
    paris = keys.site("paris")
    shutil.copy(keys.folder / ADMITTED / "paris.key", keys.folder / ADMITTED / "copy.key")
    with pytest.raises(ConfigurationError, match=r"paris\.key is removed, but the same key is admitted as copy\. Revoke that too"):
        revoke(keys.folder, "paris")
    assert read_admitted(keys.folder / ADMITTED) == {paris.public: "copy"}
    revoke(keys.folder, "copy")
    assert read_admitted(keys.folder / ADMITTED) == {}


@pytest.mark.parametrize("text", [b"", b"# nothing\n", b"12" * 31, b"zz" * 32, b"12" * 33, b"\xff" * 64, b"12" * 32 + b"\n" + b"12" * 32])
def test_what_is_no_key_is_refused_and_not_repeated(tmp_path, text):
    keys = Keys(tmp_path)
    keys.site("paris")
    (keys.site_folder("paris") / SECRET).write_bytes(text)
    with pytest.raises(ConfigurationError, match="holds no key") as caught:
        SiteKeys.read(keys.site_folder("paris"))
    assert not re.search("12121|zzz", str(caught.value))
    (keys.folder / ADMITTED / "paris.key").write_bytes(text)
    with pytest.raises(ConfigurationError, match="paris.key: holds no public key"):
        SyncerKeys.read(keys.folder)
    # While a job runs it lets nobody in, and ends nothing.
    assert read_admitted(keys.folder / ADMITTED) == {}


def test_what_is_missing_is_named_with_the_command_that_makes_it(tmp_path):
    keys = Keys(tmp_path)
    with pytest.raises(ConfigurationError, match=r"syncer\.key: is not there.*lightning-diloco keygen \S+ --syncer KEY"):
        SiteKeys.read(keys.folder)
    for read in (SiteKeys.read, SyncerKeys.read):
        with pytest.raises(ConfigurationError, match="there is no such folder. Make the keys with lightning-diloco keygen"):
            read(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir(mode=0o700)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        SyncerKeys.read(tmp_path / "empty")
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="cannot be created"):
        make_pair(tmp_path / "file")


def test_a_sites_folder_is_no_syncers(tmp_path):
    """It would let nobody in, and show the site's key as the syncer's."""
    keys = Keys(tmp_path)
    keys.site("paris")
    site, before = keys.site_folder("paris"), content(tmp_path)
    for use in (SyncerKeys.read, lambda folder: admit(folder, "oslo", "12" * 32), lambda folder: revoke(folder, "oslo")):
        with pytest.raises(ConfigurationError, match=rf"{site}: is the folder of a site, for syncer\.key in it.*Give the syncer's"):
            use(site)
    assert content(tmp_path) == before and not (site / ADMITTED).exists()


@pytest.mark.parametrize("has_secret", [True, False])
def test_a_syncers_folder_is_no_sites(tmp_path, has_secret):
    keys = Keys(tmp_path)
    keys.site("paris")
    if not has_secret:
        (keys.folder / SECRET).unlink()
    before = content(tmp_path)
    for use in (lambda folder: trust_syncer(folder, "12" * 32), *([SiteKeys.read] if has_secret else [])):
        with pytest.raises(ConfigurationError, match=f"{keys.folder}: is the folder of a syncer, for admitted in it.*Give the site's"):
            use(keys.folder)
    assert content(tmp_path) == before


def test_a_folder_with_marks_of_both_ends_is_neither_until_one_is_removed(tmp_path):
    """Until this was refused a slip of the keyboard made one. Who is admitted in it can be shut out all the same."""
    keys = Keys(tmp_path)
    keys.site("paris")
    (keys.folder / SYNCER).write_text("12" * 32)
    for read in (SyncerKeys.read, SiteKeys.read):
        with pytest.raises(ConfigurationError, match="remove (syncer.key|admitted) if this is"):
            read(keys.folder)
    revoke(keys.folder, "paris")
    (keys.folder / SYNCER).unlink()
    assert read_admitted(SyncerKeys.read(keys.folder).admitted) == {}


def test_a_secret_is_in_no_representation(tmp_path):
    keys = Keys(tmp_path)
    shown = f"{keys.site('paris')!r} {keys.syncer!r} {keys.site('paris')} {keys.syncer}".encode()
    assert b"public=" in shown
    assert not any(secret in shown or repr(secret).encode() in shown for secret in keys.secrets())

"""Keys, tenants and the gateway's own table in the configuration."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from agentfuse import config as config_module
from agentfuse.admission import FAMILIES, Gateway, Quota, sha256_of
from agentfuse.config import Config, load_config
from agentfuse.errors import ConfigError
from agentfuse.values import Address

ORGANIZATION = "3F0F9C1E-6F57-4A3E-8D5C-000000000001"


@pytest.fixture(autouse=True)
def _no_configuration_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_module, "DEFAULT_PATH", tmp_path / "none.toml")


def load(tmp_path: Path, text: str, *, listen: str | None = None, **environ: str) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, environ={"HOME": "/root", **environ}, overrides={"listen": listen})


def problem(tmp_path: Path, text: str, **environ: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, text, **environ)
    (only,) = caught.value.problems
    return only


def entry(**changed: str) -> str:
    lines = {"sha256": f'"{sha256_of("key")}"', "organization": f'"{ORGANIZATION}"', **changed}
    return "[[keys]]\n" + "".join(f"{name} = {value}\n" for name, value in lines.items() if value)


def test_hosts_of_a_cluster_are_told_of_each_other_wholly(tmp_path: Path) -> None:
    both = 'advertise = "https://a.example:8443/"\ncluster_secret_file = "/s"\n'
    said = '[gateway]\nlease = "5s"\non_host_lost = "wait"\nexecutes = false\n'
    settings = load(tmp_path, said + both).gateway
    assert (settings.advertise, settings.cluster_secret_file) == ("https://a.example:8443", Path("/s"))
    assert (settings.lease_s, settings.on_host_lost, settings.executes) == (5.0, "wait", False)
    for text, wanted in (
        ('advertise = "http://10.0.0.5:80"', "cluster_secret_file ="),
        ('cluster_secret_file = "/s"', "advertise ="),
        ("executes = false", "advertise"),
        ('advertise = "10.0.0.5:80"', 'write it like "http://10.0.0.5:8080"'),
        ('advertise = "http://10.0.0.5:80/path"', 'write it like "http://10.0.0.5:8080"'),
        ('lease = "500ms"', '"1s" to "1h"'),
        ('on_host_lost = "restart"', '"fail" nor "wait"'),
    ):
        found = problem(tmp_path, f"[gateway]\n{text}\n")
        assert "gateway" in found
        assert wanted in found


def test_without_a_word_there_are_no_keys_and_it_listens_on_this_host_only(tmp_path: Path) -> None:
    assert load(tmp_path, "").gateway == Gateway()
    assert Gateway().listen.host == "127.0.0.1"


def test_everything_can_be_said(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[gateway]\nlisten = "[::1]:80"\ngrace = "5s"\nmax_request = "2MiB"\nblob_secret_file = "/s"\n'
        'public_url = "https://files.example.com:8443/agents/"\n'
        '[tenants.default]\nbytes = "1KiB"\nfiles = 5\n[tenants."a.b"]\nbytes = "2KiB"\n'
        + entry(tenant='"a.b"', scopes='["asteroid", "shinzo:read"]', name='"ci"'),
    ).gateway
    assert (settings.listen, settings.grace_s, settings.max_request_bytes) == (Address("::1", 80), 5.0, 2**21)
    assert settings.blob_secret_file == Path("/s")
    assert settings.public_url == "https://files.example.com:8443/agents"
    assert settings.quota_of("anybody") == Quota(1024, 5)
    assert settings.quota_of("a.b") == Quota(2048, 5)
    (key,) = settings.keys
    assert (key.sha256, key.organization) == (sha256_of("key"), ORGANIZATION.lower())
    assert (key.tenant, key.scopes, key.name) == ("a.b", ("asteroid", "shinzo:read"), "ci")


def test_a_key_is_by_default_for_everything_of_its_organization(tmp_path: Path) -> None:
    (key,) = load(tmp_path, entry()).gateway.keys
    assert (key.tenant, key.scopes) == (ORGANIZATION.lower(), FAMILIES)


def test_the_flag_and_the_dev_key_win_and_add(tmp_path: Path) -> None:
    dev = f"a-key-with:colon:{ORGANIZATION}"
    settings = load(tmp_path, '[gateway]\nlisten = "h:1"\n' + entry(), listen="h:2", AGENTFUSE_DEV_KEY=dev)
    assert settings.gateway.listen == Address("h", 2)
    assert [key.sha256 for key in settings.gateway.keys] == [sha256_of("key"), sha256_of("a-key-with:colon")]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (entry(sha256=""), "keys[0]: sha256 is missing"),
        (entry(organization=""), "keys[0]: organization is missing"),
        (entry() + entry(), "keys[1]: this key is there twice"),
        (entry(sha256='"my secret key"'), "never write the key itself"),
        (entry(organization='"acme"'), '"acme" is not a UUID'),
        (entry(scopes='["tenant-files:write"]'), 'no scope "tenant-files:write"'),
        (entry(scopes="[]"), "not a list of scopes"),
        (entry(tenant='"../other"'), "cannot be a tenant"),
        (entry(tenents='"a"'), "did you mean tenant?"),
        ("[gateway]\nlisten = 80", "gateway.listen: "),
        ("[gateway]\ngrace = 5", "gateway.grace: "),
        ('[gateway]\npublic_url = "files.example.com"', '"https://files.example.com"'),
        ('[gateway]\npublic_url = "https://h/?a=b"', "not a base URL"),
        ('[gateway]\npublic_url = "https://[::1"', "not a base URL"),
        ('[gateway]\ncertificate = "/c.pem"', "set both, or neither"),
        ('[gateway]\nprivate_key = "/k.pem"', "set both, or neither"),
        ('[gateway]\ncertificate = "c.pem"', "gateway.certificate: "),
        ("gateway = 5", "gateway: must be a table"),
        ('[tenants."a/b"]\nbytes = 5', '"a/b" cannot be a tenant'),
        ("[tenants.a]\nfiles = 1000001", "write 1000000 or less"),
        ("[tenants.a]\nbites = 5", "did you mean bytes?"),
        ("tenants = 5", "tenants: must hold tables"),
        ("keys = 5", "keys: must hold tables"),
    ],
)
def test_a_mistake_names_its_key_and_the_fix(tmp_path: Path, text: str, said: str) -> None:
    found = problem(tmp_path, text)
    assert said in found
    assert "my secret key" not in found


@pytest.mark.parametrize("text", ["key", "short:" + ORGANIZATION, "long enough:acme", ":" + ORGANIZATION])
def test_a_dev_key_that_is_none_is_a_mistake_that_does_not_show_it(tmp_path: Path, text: str) -> None:
    found = problem(tmp_path, "", AGENTFUSE_DEV_KEY=text)
    assert found.startswith("AGENTFUSE_DEV_KEY: ")
    assert "long enough" not in found


def test_what_the_example_shows_is_valid(tmp_path: Path) -> None:
    example = (Path(__file__).parents[2] / "docs/config.example.toml").read_text()
    settings = load(tmp_path, re.sub(r"^#(?=[a-z\[])", "", example, flags=re.MULTILINE)).gateway
    assert [key.tenant for key in settings.keys] == ["acme"]
    assert settings.blob_secret_file == Path("/etc/agentfuse/blob.secret")


def test_what_is_said_of_executions_is_understood(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[gateway]\nmounts = "/srv/agents"\nlauncher = ["run", "{home}", "--as={agent}"]\n'
        "max_executions = 7\n"
        'purge_after = "2d"\n'
        'launcher_grace = "3s"\nmax_restarts = 0\nstarter = "systemd"\nmount_unit = "homes@.service"\n',
    ).gateway
    assert (settings.mounts, settings.launcher) == (Path("/srv/agents"), ("run", "{home}", "--as={agent}"))
    assert (settings.max_executions, settings.max_restarts, settings.launcher_grace_s) == (7, 0, 3.0)
    assert settings.purge_after_s == 2 * 24 * 3600.0
    assert (settings.starter, settings.mount_unit) == ("systemd", "homes@.service")


@pytest.mark.parametrize(
    ("line", "fix"),
    [
        ('mounts = "agents"', "absolute path"),
        ('launcher = "run me"', r'write it like \["bwrap"'),
        ("launcher = []", r'write it like \["bwrap"'),
        (
            'launcher = ["run", "{house}"]',
            "{house} stands for nothing; there are {home}, {agent}, {execution}",
        ),
        ("max_executions = 0", "from 1 to"),
        ("max_executions = true", "from 1 to"),
        ("max_restarts = -1", "from 0 to"),
        ('starter = "upstart"', "is not one of child, systemd"),
        ('mount_unit = "homes.service"', "no template unit"),
        ('launcher_grace = "soon"', "not a duration"),
    ],
)
def test_mistakes_about_executions_are_told_with_their_fix(tmp_path: Path, line: str, fix: str) -> None:
    key = line.partition(" ")[0]
    assert re.search(rf":2: gateway\.{key}: .*{fix}", problem(tmp_path, f"[gateway]\n{line}\n"))


def test_a_unit_says_who_starts_daemons_whatever_the_file_says(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('[gateway]\nstarter = "child"\n')
    environ = {"HOME": "/", "AGENTFUSE_STARTER": "systemd"}
    assert load_config(path, environ=environ, overrides={}).gateway.starter == "systemd"
    with pytest.raises(ConfigError, match=r"AGENTFUSE_STARTER.*upstart.* is not one of child, systemd"):
        load_config(path, environ={**environ, "AGENTFUSE_STARTER": "upstart"}, overrides={})

"""Configuration: sources, sizes, ids, and every mistake reported at once."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agentfuse import config as config_module
from agentfuse.attribution import CreatorRule
from agentfuse.config import (
    Config,
    format_size,
    load_config,
    parse_agent_id,
    parse_duration,
    parse_execution_id,
    parse_size,
)
from agentfuse.errors import ConfigError, UsageError
from agentfuse.regions import DEFAULT_REGIONS, Creator, Region, Scope, SyncPolicy

EXAMPLE = Path(__file__).parents[2] / "docs/config.example.toml"


@pytest.fixture(autouse=True)
def _no_configuration_of_this_host(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(config_module, "DEFAULT_PATH", tmp_path / "none.toml")


def load(tmp_path: Path, text: str, **overrides: object) -> Config:
    path = tmp_path / "config.toml"
    path.write_text(text)
    return load_config(path, environ={"HOME": "/root"}, overrides=overrides)


def problems(path: Path | None, environ: Mapping[str, str] | None = None, **overrides: object) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(path, environ=environ or {"HOME": "/root"}, overrides=overrides)
    return caught.value.problems


def mistakes(tmp_path: Path, text: str | bytes) -> list[str]:
    path = tmp_path / "config.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return [problem.removeprefix(f"{path}:") for problem in problems(path)]


def test_without_any_source_the_defaults_are_sound() -> None:
    settings = load_config(None, environ={"HOME": "/root"}, overrides={})
    assert settings.owner == (os.geteuid(), os.getegid())
    assert settings.regions == DEFAULT_REGIONS
    assert settings.store == (settings.state / "store").as_uri()
    assert (settings.xattrs, settings.keep_ended_s, settings.mount_options) == (False, 86400.0, ())
    assert (settings.sync_delay_s, settings.checkpoint_interval_s, settings.flush_timeout_s) == (5, 15, 60)
    assert settings.cache_bytes == 1024**3
    assert {region.name: region.sync.value for region in settings.regions if region.sync != "never"} == {
        "shared": "continuous"
    }


def test_the_example_says_exactly_the_defaults() -> None:
    assert load_config(EXAMPLE, environ={"HOME": "/root"}, overrides={}) == load_config(
        None, environ={"HOME": "/root"}, overrides={}
    )


def test_the_examples_commented_keys_are_valid_too(tmp_path: Path) -> None:
    lines = EXAMPLE.read_text().splitlines()
    commented = [line[2:] for line in lines if line.startswith("# ") and ("= " in line or "[regions" in line)]
    top = [line for line in commented if line.split(" ")[0] in {"state", "store", "owner"}]
    region = [line for line in commented if line not in top and not line[0].isupper()]
    settings = load(tmp_path, "\n".join([*top, *region]))
    assert settings.owner == (1000, 1000)
    assert settings.regions[-1] == Region("scratch", Scope.EXECUTION, 2**30, 50_000)


def test_the_rules_that_the_docs_show_are_valid(tmp_path: Path) -> None:
    (shown,) = re.findall(r"```toml\n(.*?)```", (EXAMPLE.parent / "creators.md").read_text(), re.DOTALL)
    assert len(load(tmp_path, shown).creators) == 3


def test_flags_go_over_the_environment_and_that_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('store = "file:///file"\nstate = "/file"\nxattrs = true\n')
    environ = {"AGENTFUSE_CONFIG": str(path), "AGENTFUSE_STORE": "file:///env", "AGENTFUSE_STATE": "/env"}
    settings = load_config(None, environ=environ, overrides={"store": "file:///flag", "state": None})
    assert (settings.store, settings.state, settings.xattrs) == ("file:///flag", Path("/env"), True)


def test_the_default_store_follows_the_state_wherever_it_is(tmp_path: Path) -> None:
    settings = load(tmp_path, "", state="/srv/with space/ä%20?#")
    assert settings.store == "file:///srv/with%20space/%C3%A4%2520%3F%23/store"


def test_regions_are_adjusted_and_added(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        '[regions.shared]\nbytes = "1.5GiB"\nfiles = 7\n[regions.home]\nmode = "0750"\n'
        '[regions.big-data]\nscope = "execution"\nbytes = 1000\nnotify = true\n',
    )
    regions = {region.name: region for region in settings.regions}
    assert list(regions) == [*(region.name for region in DEFAULT_REGIONS), "big-data"]
    assert regions["shared"] == Region("shared", Scope.AGENT, 3 * 2**29, 7, sync=SyncPolicy.CONTINUOUS)
    assert regions["home"].mode == 0o750
    assert regions["big-data"] == Region("big-data", Scope.EXECUTION, 1000, 50_000, notify=True)


def test_a_region_says_whose_new_files_are(tmp_path: Path) -> None:
    settings = load(tmp_path, '[regions.uploads]\ncreator = "environment"\n')
    assert {r.name: r.creator for r in settings.regions if r.creator is not Creator.AGENT} == {
        "downloads": Creator.ENVIRONMENT,
        "uploads": Creator.ENVIRONMENT,
    }
    assert mistakes(tmp_path, '[regions.uploads]\ncreator = "browser"\n') == [
        '2: regions.uploads.creator: "browser" is not a creator; write one of '
        "user, agent, environment, system, in quotes"
    ]


def test_an_owner_may_be_given_by_name(tmp_path: Path) -> None:
    assert load(tmp_path, 'owner = "nobody:nogroup"').owner == (65534, 65534)


def test_all_mistakes_are_reported_together_with_line_key_and_fix(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        'stor = "file:///x"\nowner = 5\nxattrs = "yes"\nkeep_ended = "24 hours"\nmount_options = ["atime"]\n'
        '\n[regions.sharde]\nbytes = "50MiB"\n[regions.shared]\nbytes = "50 MiBs"\nfiles = true\nmod = "1"\n'
        'mode = 755\nscope = "x"\n[regions.own]\nscope = "agent"\n[regions."../x"]\nscope = "execution"\n',
    )
    expected = [
        ("1: stor:", "did you mean store?"),
        ("2: owner:", '"1000:1000"'),
        ("3: xattrs:", "without quotes"),
        ("4: keep_ended:", '"24h"'),
        ("5: mount_options:", "allowed are dev, suid, noexec"),
        ("7: regions.sharde:", "did you mean shared?"),
        ("10: regions.shared.bytes:", '"50MiB"'),
        ("11: regions.shared.files:", "plain number"),
        ("12: regions.shared.mod:", "did you mean mode?"),
        ("13: regions.shared.mode:", '"0755"'),
        ("14: regions.shared.scope:", "remove the line"),
        ("15: regions.own:", "add bytes"),
        ("16: regions.own.scope:", '"execution"'),
        ("17: regions.../x:", "1 to 64 letters"),
    ]
    assert len(found) == len(expected), found
    for problem, (start, fix) in zip(found, expected, strict=True):
        assert problem.startswith(start)
        assert fix in problem


def test_mistakes_of_file_environment_and_flags_come_together(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text("xattrs = 1\n")
    found = problems(path, {"AGENTFUSE_STATE": "relative"}, mount_options=["bogus"], store="/no/url")
    assert [problem.split(": ")[0] for problem in found] == [
        f"{path}:1",
        "AGENTFUSE_STATE",
        "--mount-option",
        "--store",
    ]


@pytest.mark.parametrize(
    "text",
    [
        b"a = [",
        b"xattrs = true\nxattrs = false\n",
        b"[regions.shared]\n[regions.shared]\n",
        b"\xff\xfe",
        b"keep = " + b"9" * 5000,
        b"a = " + b"[" * 100_000,
        b"# " + b"x" * (1024 * 1024),
        b"store = 'a\x00b'",
    ],
    ids=["torn", "twice", "table-twice", "utf16", "endless-number", "endless-nesting", "huge", "nul"],
)
def test_a_hostile_file_is_one_clear_mistake(tmp_path: Path, text: bytes) -> None:
    found = mistakes(tmp_path, text)
    assert len(found) == 1
    assert len(found[0]) < 300
    assert found[0].isprintable()


@pytest.mark.parametrize(
    "key",
    [
        "store",
        "state",
        "owner",
        "xattrs",
        "keep_ended",
        "mount_options",
        "sync_delay",
        "checkpoint_interval",
        "flush_timeout",
        "cache_size",
        "regions",
        "webhooks",
        "inbox",
    ],
)
@pytest.mark.parametrize("value", ["-1", "1.5", '""', '"\\u001b[2J"', "[1]", "{a = 1}", "1979-05-27", "nan"])
def test_no_wrong_type_gets_through(tmp_path: Path, key: str, value: str) -> None:
    found = mistakes(tmp_path, f"{key} = {value}\n")
    assert len(found) == 1
    assert found[0].startswith(f"1: {key}")
    assert found[0].isprintable()


def test_a_missing_or_unreadable_file_is_named(tmp_path: Path) -> None:
    assert problems(tmp_path / "no.toml") == [
        f"{tmp_path}/no.toml: cannot be read (No such file or directory); correct the path or its permissions"
    ]
    assert "Is a directory" in problems(tmp_path)[0]


def test_an_ordinary_user_has_a_state_of_his_own_and_gives_nothing_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1234)
    monkeypatch.setattr(os, "getegid", lambda: 1234)
    home, xdg = {"HOME": "/home/u"}, {"HOME": "/home/u", "XDG_STATE_HOME": "/x"}
    assert load_config(None, environ=home, overrides={}).state == Path("/home/u/.local/state/agentfuse")
    assert load_config(None, environ=xdg, overrides={}).state == Path("/x/agentfuse")
    assert "AGENTFUSE_STATE" in problems(None, {"LANG": "C"})[0]
    assert "only root" in problems(None, home, owner="0:0")[0]
    assert "for root only" in problems(None, home, mount_options=["suid"])[0]


@pytest.mark.parametrize(
    ("text", "size"),
    [
        (0, 0),
        ("50MiB", 50 * 2**20),
        ("500MB", 500 * 10**6),
        ("1.5GiB", 3 * 2**29),
        ("1 KiB", 1024),
        ("7", 7),
        ("7b", 7),
        ("1024PiB", 2**60),
    ],
)
def test_sizes_are_read(text: object, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "-1", "1e9", "5M", "1.MiB", "١MiB", "2048PiB", 2**61, -1, 1.5, True]
)
def test_what_is_no_size_is_refused(text: object) -> None:
    with pytest.raises(ValueError, match=r"write it like|must be between"):
        parse_size(text)


@given(st.integers(0, 2**60))
def test_a_formatted_size_reads_back_close_to_itself(size: int) -> None:
    text = format_size(size)
    assert len(text) <= 9
    assert abs(parse_size(text) - size) <= size * 0.006


@pytest.mark.parametrize(("text", "seconds"), [("24h", 86400), ("5s", 5), ("250ms", 0.25), ("1.5d", 129600)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["a", "A-1_b.c", "9", "x" * 128])
def test_good_ids_are_taken_as_they_are(text: str) -> None:
    assert parse_agent_id(text) == parse_execution_id(text) == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        ".",
        "..",
        "../x",
        "a/b",
        "a b",
        "-a",
        ".a",
        "_a",
        "x" * 129,
        "x" * 300,
        "a\n",
        "a\0",
        "ä",
        "\udcff",
    ],
)
def test_bad_ids_are_refused_with_the_rule(text: str) -> None:
    for parse, kind in ((parse_agent_id, "agent"), (parse_execution_id, "execution")):
        with pytest.raises(UsageError) as caught:
            parse(text)
        assert f"cannot be an {kind} id" in caught.value.message
        assert caught.value.message.isprintable()
        assert len(caught.value.message) < 120
        assert "1 to 128 letters, digits" in caught.value.hint


def test_a_region_of_the_execution_can_be_kept_but_memory_always_is_and_scratch_never(tmp_path: Path) -> None:
    settings = load(tmp_path, '[regions.workspace]\nsync = "at_end"\n')
    assert {r.name: r.sync for r in settings.regions}["workspace"] is SyncPolicy.AT_END
    with pytest.raises(ConfigError) as caught:
        load(
            tmp_path,
            '[regions.shared]\nsync = "never"\n[regions.home]\nsync = "at_end"\n'
            '[regions.debug]\nsync = "yes"\n',
        )
    problems = "\n".join(caught.value.problems)
    assert "regions.shared.sync: the agent's memory is always synced continuously" in problems
    assert "regions.home.sync: what lies loose in a home is scratch" in problems
    assert "regions.debug.sync" in problems
    assert '"never", "at_end" and "continuous"' in problems


def test_an_interval_that_would_never_let_the_store_rest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match='sync_delay: "1ms" is too short; write "100ms" or more'):
        load(tmp_path, 'sync_delay = "1ms"\n')


HOOK = '[[webhooks]]\nurl = "https://user.example/hook?token=s3cret"\nsecret_file = "/etc/secret"\n'


def test_webhooks_hear_of_all_that_notifies_unless_told_otherwise(tmp_path: Path) -> None:
    settings = load(
        tmp_path,
        f'{HOOK}{HOOK}name = "second"\nregions = ["big"]\nkinds = ["arrived"]\n'
        '[regions.big]\nscope = "execution"\nbytes = 1\nnotify = true\n',
    )
    first, second = settings.webhooks
    assert (first.name, first.regions) == ("user.example", ("downloads", "uploads", "big"))
    assert (second.name, second.regions, second.kinds) == ("second", ("big",), ("arrived",))
    assert "s3cret" not in repr(settings)


def test_rules_tell_creators_in_the_order_they_are_written(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("/usr/bin/env")
    settings = load(
        tmp_path,
        '[[creators]]\nuid = 1000\ncreator = "agent"\n'
        f'[[creators]]\nexe = "{tmp_path}/link"\ngid = "nogroup"\ncreator = "user"\n'
        '[[creators]]\nexe = "/opt/*/../x?"\ncgroup = "/a.slice/"\nuid = "nobody"\ncreator = "system"\n',
    )
    assert settings.creators == (
        CreatorRule(Creator.AGENT, uid=1000),
        CreatorRule(Creator.USER, gid=65534, exe=os.path.realpath("/usr/bin/env")),
        CreatorRule(Creator.SYSTEM, uid=65534, exe="/opt/x?", cgroup="/a.slice"),
    )


def test_mistakes_in_rules_have_their_lines_and_fixes(tmp_path: Path) -> None:
    script = tmp_path / "browser"
    script.write_text("#!/bin/sh\n")
    rule = '[[creators]]\ncreator = "user"\n'
    found = mistakes(
        tmp_path,
        f'{rule}[[creators]]\nuid = 1\n{rule}uid = -1\n{rule}uid = "1000"\n{rule}gid = true\n'
        f'{rule}exe = "chromium"\n{rule}exe = "{script}"\n{rule}exe = "/opt/**"\n{rule}cgroup = "a.slice"\n'
        f'[[creators]]\ncreator = "browser"\nuid = 1\n{rule}user = 1\n'
        f'{rule}uid = 7\n{rule}uid = 7\ncgroup = "/x"\n',
    )
    expected = [
        ("1: creators[0]:", "add uid, gid, exe or cgroup"),
        ("3: creators[1]:", 'add creator = "environment"'),
        ("7: creators[2].uid:", "write its number"),
        ("10: creators[3].uid:", "without quotes"),
        ("13: creators[4].gid:", "write its number"),
        ("16: creators[5].exe:", 'write it like "/usr/lib/chromium/chromium"'),
        ("19: creators[6].exe:", "write the program that it starts"),
        ("22: creators[7].exe:", 'write a "*"'),
        ("25: creators[8].cgroup:", "absolute path"),
        ("27: creators[9].creator:", "write one of user, agent"),
        ("31: creators[10].user:", "known are creator, uid, gid, exe, cgroup"),
        ("35: creators[12]:", "put it first"),
    ]
    assert len(found) == len(expected), found
    for problem, (start, fix) in zip(found, expected, strict=True):
        assert problem.startswith(start), problem
        assert fix in problem, problem
    assert "[[creators]]" in mistakes(tmp_path, "creators = 3\n")[0]


def test_plain_http_is_for_this_host_or_for_those_who_insist(tmp_path: Path) -> None:
    for url in ("http://localhost:1/", "http://127.0.0.9:1/", "http://[::1]:1/"):
        assert load(tmp_path, f'[[webhooks]]\nurl = "{url}"\nsecret_env = "S"\n').webhooks[0].is_local
    far = '[[webhooks]]\nurl = "http://far.example:1/"\nsecret_env = "S"\n'
    assert not load(tmp_path, far + "allow_http = true\n").webhooks[0].is_local
    assert "allow_http" in mistakes(tmp_path, far)[0]


def test_mistakes_in_webhooks_and_inboxes_have_their_lines_and_show_no_secret(tmp_path: Path) -> None:
    found = mistakes(
        tmp_path,
        '[[webhooks]]\nurl = "https://me:s3cret@x.example/"\nsecret = "s3cret"\n'
        '[[webhooks]]\nurl = "ftp://s3cret"\nsecret_env = "s3cret!"\n'
        '[[webhooks]]\nurl = "https://x.example/"\n'
        f'{HOOK}regions = ["shared"]\n{HOOK}{HOOK}kinds = ["came"]\n{HOOK}'
        '[[inbox]]\ndirectory = "in"\nregion = "downloads"\n[[inbox]]\nregion = "downloads"\n'
        '[[inbox]]\ndirectory = "/in"\nregion = "home"\n'
        '[[inbox]]\ndirectory = "/in"\nregion = "uploads"\n'
        '[[inbox]]\ndirectory = "/in/below"\nregion = "downloads"\ncreator = "me"\n'
        '[[inbox]]\ndirectory = "/in/below"\nregion = "downloads"\n',
    )
    expected = [
        ("2: webhooks[0].url:", "user or a password"),
        ("3: webhooks[0].secret:", "did you mean secret_"),
        ("5: webhooks[1].url:", "https://example.com"),
        ("6: webhooks[1].secret_env:", "never the secret"),
        ("7: webhooks[2]:", "add either secret_file"),
        ("9: webhooks[3]:", '"shared" does not notify; those that do: downloads, uploads'),
        ("19: webhooks[5].kinds:", "there are arrived"),
        ("20: webhooks[6]:", 'give this one a name = "..."'),
        ("24: inbox[0].directory:", "absolute path"),
        ("26: inbox[1]:", "directory is missing"),
        ("28: inbox[2]:", 'there is no "home"'),
        ("37: inbox[4].creator:", "one of user, agent"),
        ("38: inbox[5]:", "one in the other"),
    ]
    assert len(found) == len(expected), found
    for problem, (start, fix) in zip(found, expected, strict=True):
        assert problem.startswith(start)
        assert fix in problem
        assert "s3cret" not in problem


def test_an_inbox_may_be_one_for_each_run(tmp_path: Path) -> None:
    text = '[[inbox]]\ndirectory = "/srv/{agent}/{execution}"\nregion = "downloads"\n'
    (inbox,) = load(tmp_path, text).inboxes
    assert inbox.of(agent="a", execution="e1") == Path("/srv/a/e1")
    assert inbox.creator == "environment"


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('metrics = "9464"', 'metrics: "9464" is not an address; write it like "127.0.0.1:9464"'),
        ('metrics = "127.0.0.1:99999"', "is not an address"),
        ('metrics = "0.0.0.0:9464"', "could be reached from elsewhere"),
        ('metrics_file = "agentfuse.prom"', "is not an absolute path"),
        ('metrics_file = "/x/agentfuse-{execution}.txt"', 'end it with ".prom"'),
        ('metrics_file = "/x/agentfuse.prom"', "would be every mount's"),
        ('metrics_interval = "1ms"', "is too short"),
        ('log_format = "xml"', "write one of auto, text, journald, json"),
    ],
)
def test_a_mistake_about_metrics_or_logs_names_the_fix(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "config.toml"
    path.write_text(line)
    with pytest.raises(ConfigError) as raised:
        load_config(path, environ={"HOME": "/root"}, overrides={})
    assert said in str(raised.value)


def test_metrics_and_logs_can_be_configured(tmp_path: Path) -> None:
    path = tmp_path / "config.toml"
    path.write_text('metrics = "[::1]:0"\nmetrics_file = "/x/{execution}.prom"\nmetrics_interval = "1m"\n')
    config = load_config(path, environ={"HOME": "/root", "AGENTFUSE_LOG_FORMAT": "json"}, overrides={})
    assert config.metrics == ("::1", 0)
    assert str(config.metrics) == "[::1]:0"
    assert (config.metrics_file, config.metrics_interval_s) == (Path("/x/{execution}.prom"), 60)
    assert config.log_format == "json"

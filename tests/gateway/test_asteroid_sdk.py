"""Asteroid's executions and files with the real SDK, real mounts and clients written from the contract."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import asteroid_odyssey as sdk
import executing
import httpx
import pytest
from asteroid_odyssey.exceptions import ApiException
from executing import Host, until
from gateways import ACME, ORGANIZATION, OTHER

pytestmark = [
    pytest.mark.mount,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # the SDK's, of its own operations
]

PDF = b"%PDF-1.7\n" + bytes(range(256)) * 400
OLD = {"X-Asteroid-Agents-Api-Key": ACME}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    with executing.host(tmp_path_factory.mktemp("asteroid")) as host:
        yield host


class Sdk:
    """The real SDK: nothing but host and key is ours."""

    def __init__(self, url: str, key: str = ACME) -> None:
        configuration = sdk.Configuration(host=url, api_key={"ApiKeyAuth": key})
        client = sdk.ApiClient(configuration)
        self.agents = sdk.AgentsApi(client)
        self.workflows = sdk.WorkflowsApi(client)
        self.executions = sdk.ExecutionApi(client)
        self.files = sdk.FilesApi(client)
        self.context = sdk.ContextApi(client)

    def until(self, execution: str, status: str) -> sdk.AgentsExecutionListItem:
        """The execution, once it has a status."""

        def there() -> sdk.AgentsExecutionListItem | None:
            item = self.executions.execution_get(execution)
            return item if item.status.value == status else None

        return until(there)

    def ended(self, execution: str) -> Any:
        """The answer to who waits for the end, if it ended meanwhile."""
        answer = self.executions.execution_sync_get_with_http_info(execution)
        assert (answer.status_code == 200) == (answer.data.status.value in executing.TERMINAL)
        return answer if answer.status_code == 200 else None

    def run(self, agent: str = "ada", **body: Any) -> str:
        """Begin an execution; its id, once it runs."""
        begun = self.agents.agent_execute_post(agent, sdk.AgentsAgentExecuteAgentRequest(**body))
        self.until(begun.execution_id, "running")
        return str(begun.execution_id)


@pytest.fixture(scope="module")
def api(host: Host) -> Sdk:
    return Sdk(host.gateway.url)


def payloads(activities: list[sdk.AgentsExecutionActivity]) -> list[dict[str, Any]]:
    return [each.payload.actual_instance.to_dict() for each in activities]


def test_the_sdk_goes_all_the_way(host: Host, api: Sdk) -> None:
    staged = api.files.temp_files_stage(ORGANIZATION, [("report ü.pdf", PDF), ("empty", b"")]).temp_files
    body = sdk.AgentsAgentExecuteAgentRequest(
        temp_files=staged,
        inputs={"city": "Berlin"},
        metadata={"env": "a=b"},
        execution_options=sdk.AgentsAgentExecutionOptions(soft_timeout_mins=5),
    )
    begun = api.agents.agent_execute_post("ada", body)
    assert begun.status == sdk.AgentsExecutionStatus.STARTING
    execution = begun.execution_id
    item = api.until(execution, "running")
    assert (item.agent_id, item.workflow_id, item.organization_id) == ("ada", "ada", ORGANIZATION)
    assert (item.inputs, item.metadata) == ({"city": "Berlin"}, {"env": "a=b"})
    assert (item.started_at >= item.created_at, item.terminal_at, item.duration) == (True, None, None)

    home = host.home(execution)
    assert (home / "uploads/report ü.pdf").read_bytes() == PDF
    (home / "workspace/deep").mkdir()
    (home / "workspace/deep/a.py").write_text("print()")
    (home / "shared/known.md").write_text("# known")
    (home / "downloads/got.csv").write_text("a,b\n")
    assert api.files.execution_context_files_upload(execution, [("new.txt", b"new"), b"one", b"two"]) == (
        "Files uploaded."
    )
    _files_while_running(api, execution)
    _downloads(host, api, execution)
    _activities(api, execution)
    _statuses(api, execution)
    _after_the_end(host, api, execution)


def _files_while_running(api: Sdk, execution: str) -> None:
    answer = api.files.execution_files_get(execution)
    found = {
        file.file_path: (file.directory.value, file.created_by.value, file.file_size, file.mime_type)
        for files in answer.directories
        if files[1]
        for file in files[1]
    }
    assert found == {
        "uploads/report ü.pdf": ("uploads", "user", len(PDF), "application/pdf"),
        "uploads/empty": ("uploads", "user", 0, "application/octet-stream"),
        "uploads/new.txt": ("uploads", "user", 3, "text/plain"),
        "uploads/files": ("uploads", "user", 3, "application/octet-stream"),
        "uploads/files (1)": ("uploads", "user", 3, "application/octet-stream"),
        "downloads/got.csv": ("downloads", "environment", 4, "text/csv"),
        "workspace/deep/a.py": ("workspace", "agent", 7, "text/x-python"),
        "shared/known.md": ("shared", "agent", 7, "text/markdown"),
    }
    assert answer.directories.debug == []
    assert answer.last_updated == max(
        file.updated_at for _, files in answer.directories for file in files or ()
    )
    assert api.files.execution_agent_files_get(execution) == answer
    context = {file.file_name: file for file in api.files.execution_context_files_get(execution)}
    assert set(context) == {"report ü.pdf", "empty", "new.txt", "files", "files (1)", "got.csv"}
    pdf = context["report ü.pdf"]
    assert (pdf.file_ext, pdf.file_type, pdf.file_path) == ("pdf", "document", "uploads/report ü.pdf")
    assert (context["files (1)"].file_ext, context["files (1)"].file_type) == ("", "unknown")


def _downloads(host: Host, api: Sdk, execution: str) -> None:
    files = api.files.execution_files_get(execution).directories
    pdf = next(file for file in files.uploads if file.file_size == len(PDF))
    code = files.workspace[0]
    redirect = api.files.execution_file_download_redirect_without_preload_content
    assert redirect(execution, pdf.id).data == PDF  # the SDK follows
    assert (
        api.files.execution_context_file_download_redirect_without_preload_content(execution, pdf.id).data
        == PDF
    )
    assert (
        api.files.execution_agent_file_download_redirect_without_preload_content(execution, code.id).data
        == b"print()"
    )
    with pytest.raises(ApiException) as caught:
        api.files.execution_context_file_download_redirect(execution, code.id)
    assert (caught.value.status, caught.value.body) == (404, "File not found.")
    with pytest.raises(ApiException) as caught:
        api.files.execution_debug_file_download_redirect(execution, pdf.id)
    assert caught.value.status == 404
    for headers in (OLD, {"X-Api-Key": ACME}):
        answer = httpx.get(pdf.download_url, headers=headers, trust_env=False)
        assert (answer.status_code, answer.content) == (303, b"")
        target = httpx.get(answer.headers["location"], trust_env=False)
        assert (target.content, target.headers["content-length"]) == (PDF, str(len(PDF)))
        assert target.headers["content-type"] == "application/pdf"
        assert "content-encoding" not in target.headers
        part = httpx.get(answer.headers["location"], headers={"Range": "bytes=-9"}, trust_env=False)
        assert (part.status_code, part.content) == (206, PDF[-9:])
        etag = target.headers["etag"]
        same = httpx.get(answer.headers["location"], headers={"If-None-Match": etag}, trust_env=False)
        assert (same.status_code, same.content) == (304, b"")
    (host.home(execution) / "workspace/deep/a.py").write_text("longer than before")
    again = httpx.get(code.download_url, headers=OLD, follow_redirects=True, trust_env=False)
    assert again.text == "longer than before"


def _activities(api: Sdk, execution: str) -> None:
    message = sdk.AgentsExecutionUserMessagesAddTextBody(message="look: größer")
    assert api.executions.execution_user_messages_add(execution, message) == "Message added."

    def all_told() -> list[sdk.AgentsExecutionActivity] | None:
        found = api.executions.execution_activities_get(execution)
        return found if sum(each["activityType"] == "file_added" for each in payloads(found)) >= 6 else None

    found = until(all_told)
    assert found == sorted(found, key=lambda each: each.timestamp)
    shown = payloads(found)
    statuses = [each["status"] for each in shown if each["activityType"] == "status_changed"]
    assert statuses == ["starting", "running"]
    (told,) = (each for each in shown if each["activityType"] == "user_message_received")
    me = api.context.whoami_get().id
    assert (told["message"], told["userUUID"]) == ("look: größer", me)
    added = {each["fileName"]: each for each in shown if each["activityType"] == "file_added"}
    sources = {name: each["source"] for name, each in added.items()}
    uploaded = dict.fromkeys(["report ü.pdf", "empty", "new.txt", "files", "files (1)"], "upload")
    assert sources == uploaded | {"got.csv": "download"}
    ids = {file.file_name: file.id for file in api.files.execution_context_files_get(execution)}
    assert {name: each["fileId"] for name, each in added.items()} == ids
    for each in added.values():
        answer = httpx.get(each["presignedUrl"], trust_env=False)
        assert (answer.status_code, len(answer.content)) == (200, each["fileSize"])
    last = api.executions.execution_activities_get(execution, order="desc", limit=1)
    assert last == found[-1:]


def _statuses(api: Sdk, execution: str) -> None:
    executions = api.executions
    for _ in range(2):  # once more changes nothing
        assert executions.execution_pause(execution).status.value == "paused"
    assert executions.execution_get(execution).status.value == "paused"
    with pytest.raises(ApiException) as caught:
        executions.execution_delete(execution)
    assert (caught.value.status, json.loads(caught.value.body)["code"]) == (409, 409)
    assert executions.execution_resume(execution).status.value == "running"
    assert executions.execution_sync_get(execution, timeout_seconds=1).status.value == "running"
    assert executions.execution_cancel(execution).status.value == "cancelled"
    ended = until(lambda: api.ended(execution))
    assert (ended.status_code, ended.data.status.value, ended.data.execution_id) == (
        200,
        "cancelled",
        execution,
    )
    with pytest.raises(ApiException) as caught:
        executions.execution_resume(execution)
    assert caught.value.status == 409
    assert executions.execution_cancel(execution).status.value == "cancelled"


def _after_the_end(host: Host, api: Sdk, execution: str) -> None:
    item = api.executions.execution_get(execution)
    assert item.terminal_at is not None
    assert item.duration == pytest.approx((item.terminal_at - item.started_at).total_seconds(), abs=0.001)
    files = api.files.execution_files_get(execution).directories
    assert len(files.uploads) == 5
    (got,) = files.downloads
    assert (got.created_by.value, got.file_size) == ("environment", 4)
    answer = httpx.get(got.download_url, headers=OLD, follow_redirects=True, trust_env=False)
    assert answer.content == b"a,b\n"
    with pytest.raises(ApiException) as caught:
        api.files.execution_context_files_upload(execution, [b"late"])
    assert (caught.value.status, caught.value.headers["content-type"]) == (400, "text/plain; charset=utf-8")
    added = payloads(api.executions.execution_activities_get(execution, order="desc"))
    assert added[0] == {"activityType": "status_changed", "status": "cancelled"}
    assert sum(each["activityType"] == "file_added" for each in added) == 6

    again = api.executions.execution_rerun(
        execution, sdk.AgentsExecutionRerunExecutionRequest(inputs={"city": "Rom"})
    ).execution_id
    second = api.until(again, "running")
    assert (second.parent_execution_id, second.inputs, second.metadata) == (
        execution,
        {"city": "Rom"},
        {"env": "a=b"},
    )
    assert api.executions.execution_get(execution).has_been_rerun
    assert api.files.execution_files_get(again).directories.uploads == []
    assert (host.home(again) / "shared/known.md").read_text() == "# known"
    host.end(again)
    done = api.executions.execution_sync_get(again)
    assert (done.execution_result.outcome, done.execution_result.execution_id) == ("success", again)
    assert api.executions.execution_delete(execution) is None
    for gone in (api.executions.execution_get, api.files.execution_files_get):
        with pytest.raises(ApiException) as caught:
            gone(execution)
        assert caught.value.status == 404


def test_the_sdk_waits_for_the_end(host: Host, api: Sdk) -> None:
    request = sdk.AgentsAgentExecuteAgentSyncRequest(timeout_seconds=1)
    begun = api.agents.agent_execute_sync_post_with_http_info("waiter", request)
    assert begun.status_code == 202
    execution = begun.data.execution_id
    result = {"status": "failed", "reason": "no way", "result": {"tried": [1, 2]}}
    host.until(execution, "running")
    assert host.client.post(f"/agents/v2/executions/{execution}/status", json=result).status_code == 200
    ended = until(lambda: api.ended(execution))
    assert (ended.status_code, ended.data.status.value) == (200, "failed")
    outcome = ended.data.execution_result
    assert (outcome.outcome, outcome.reasoning, outcome.result) == ("failure", "no way", {"tried": [1, 2]})


def test_a_workflow_is_an_agent_and_lists_are_filtered(host: Host, api: Sdk) -> None:
    began = datetime.now(UTC)
    body = sdk.WorkflowsWorkflowExecuteRequest(dynamic_data={"n": 5}, metadata={"run": "1"})
    first = api.workflows.workflow_execute_post("lister", body).execution_id
    second = api.run("lister", metadata={"run": "2"}, profile_id="p-1")
    versions = {api.executions.execution_get(each).workflow_version_id for each in (first, second)}
    assert len(versions) == 1
    api.until(first, "running")
    api.executions.execution_pause(first)

    def listed(**filters: Any) -> list[str]:
        page = api.executions.executions_list(workflow_id="lister", **filters)
        assert page.total == len(page.items)
        return [item.id for item in page.items]

    assert listed() == [second, first]
    assert listed(sort="created_at:asc", organization_id=ORGANIZATION) == [first, second]
    field, ascending = sdk.AgentsExecutionSortField.STATUS, sdk.CommonSortDirection.ASC
    assert listed(sort_field=field, sort_direction=ascending) == [first, second]
    paused, running = sdk.AgentsExecutionStatus.PAUSED, sdk.AgentsExecutionStatus.RUNNING
    assert listed(status=[paused]) == [first]
    assert listed(status=[paused, running], phase=[sdk.AgentsExecutionPhase.ACTIVE]) == [second, first]
    assert listed(metadata=["run=1"], inputs_key="n", inputs_value="5") == [first]
    assert listed(profile_ids=["p-1", "p-2"]) == [second]
    assert listed(created_after=began, created_before=began + timedelta(hours=1)) == [second, first]
    assert listed(created_after=began + timedelta(hours=1)) == []
    assert listed(created_within="5m", has_script_failures=False, execution_id=first[:13]) == [first]
    page = api.executions.executions_list(agent_id="lister", page=2, page_size=1)
    assert ([item.id for item in page.items], page.page, page.page_size, page.total) == ([first], 2, 1, 2)
    for execution in (first, second):
        host.end(execution, "cancelled")


def test_who_asks_is_known(api: Sdk) -> None:
    context, me = api.context.context_get(), api.context.whoami_get()
    assert context.user_id == me.id
    assert [(each.id, each.name) for each in context.organizations] == [(ORGANIZATION, "acme")]
    assert (me.kind.value, me.credential.value, me.organization_id) == (
        "api_key",
        "org_api_key",
        ORGANIZATION,
    )
    with pytest.raises(ApiException) as caught:
        Sdk(api.context.api_client.configuration.host, "wrong").context.whoami_get()
    assert (caught.value.status, caught.value.body) == (401, '{"code":401,"message":"Unauthorized"}')


def test_a_client_of_sdk_1_6_keeps_an_agents_memory(host: Host) -> None:
    """The host ends in /agents/v2, and there are shared files."""
    with httpx.Client(base_url=f"{host.gateway.url}/agents/v2", headers=OLD, trust_env=False) as client:
        shared = "/agents/keeper/shared-files"
        unknown = client.get(shared)
        assert (unknown.status_code, unknown.text) == (404, "agent keeper does not exist")
        first = client.post("/agents/keeper/execute", json={}).json()["executionId"]
        host.until(first, "running")
        _memory_is_kept(client, shared)
        home = host.home(first)
        assert (home / "shared/a (1).txt").read_bytes() == b"2"
        (home / "shared/notes").mkdir()
        (home / "shared/notes/n.md").write_text("agent's")
        host.end(first)
        listed = client.get(shared).json()
        assert sorted(file["filePath"] for file in listed["files"]) == [
            "shared/a (1).txt",
            "shared/notes/n.md",
        ]
        assert listed["totalSize"] == 1 + len("agent's")
        assert all(len(file["checksum"]) == 64 and file["version"] >= 1 for file in listed["files"])
        for file in listed["files"]:
            assert client.delete(f"{shared}/{file['id']}").status_code == 204
        _memory_is_kept(client, shared)
        assert client.delete(f"{shared}/delete-all").status_code == 204
        assert client.get(shared).json() == {"files": [], "totalSize": 0}


def _memory_is_kept(client: httpx.Client, shared: str) -> None:
    """The same of a running and of an idle agent."""
    parts = [("files", ("a.txt", b"1")), ("files", ("a.txt", b"2"))]
    one, two = client.post(shared, files=parts).json()["files"]
    assert (one["fileName"], two["fileName"], two["filePath"]) == ("a.txt", "a (1).txt", "shared/a (1).txt")
    changed = client.put(f"{shared}/{one['id']}", files={"files": ("whatever", b"longer")}).json()
    assert (changed["id"], changed["fileName"], changed["fileSize"]) == (one["id"], "a.txt", 6)
    answer = client.get(one["downloadUrl"])
    assert (answer.status_code, httpx.get(answer.headers["location"]).content) == (303, b"longer")
    assert client.put(f"{shared}/{one['id']}", files=parts).status_code == 400
    assert client.delete(f"{shared}/{one['id']}").status_code == 204
    gone = client.delete(f"{shared}/{one['id']}")
    assert (gone.status_code, gone.text) == (404, "File not found.")


def test_a_frozen_file_survives_whatever_the_agent_does(host: Host) -> None:
    with httpx.Client(base_url=f"{host.gateway.url}/agents/v2", headers=OLD, trust_env=False) as client:
        shared = "/agents/frozen/shared-files"
        execution = host.run("frozen")
        home = host.home(execution) / "shared"
        (home / "deep").mkdir()
        for name in ("deep/law.md", "deep/other.md", "free.md"):
            (home / name).write_text("as it is")
        files = {file["filePath"]: file for file in client.get(shared).json()["files"]}
        law = files["shared/deep/law.md"]
        assert not law["isFrozen"]
        frozen = client.patch(f"{shared}/{law['id']}/freeze", json={"isFrozen": True}).json()
        assert (frozen["isFrozen"], frozen["id"]) == (True, law["id"])
        for change in (
            lambda: (home / "deep/law.md").write_text("mine"),
            (home / "deep/law.md").unlink,
            lambda: (home / "free.md").rename(home / "deep/law.md"),
            lambda: (home / "deep").rename(home / "gone"),
        ):
            with pytest.raises(PermissionError):
                change()
        for running in (True, False):
            _stays_frozen(client, shared, law["id"])
            if running:
                host.end(execution)
        answer = client.patch(f"{shared}/{law['id']}/freeze", json={"isFrozen": False})
        assert (answer.status_code, answer.json()["isFrozen"]) == (200, False)
        again = host.run("frozen")
        path = host.home(again) / "shared/deep/law.md"
        assert path.read_text() == "as it is"
        path.write_text("mine")
        host.end(again, "cancelled")


def _stays_frozen(client: httpx.Client, shared: str, law: str) -> None:
    """Whatever is asked for through the API."""
    for answer in (
        client.delete(f"{shared}/{law}"),
        client.put(f"{shared}/{law}", files={"files": ("law.md", b"mine")}),
    ):
        assert (answer.status_code, answer.headers["content-type"]) == (409, "text/plain; charset=utf-8")
    for wrong in ({}, {"isFrozen": "yes"}, {"isFrozen": None}):
        assert client.patch(f"{shared}/{law}/freeze", json=wrong).status_code == 400
    assert client.delete(f"{shared}/delete-all").status_code == 204
    (left,) = client.get(shared).json()["files"]
    assert (left["id"], left["isFrozen"], left["fileSize"]) == (law, True, 8)


FETCH = """
const [url, key, execution] = process.argv.slice(1);
const headers = {'X-Asteroid-Agents-Api-Key': key};
const base = `${url}/agents/v2/executions/${execution}`;
const form = new FormData();
form.append('files', new File([new Uint8Array(300000)], 'größe "1".bin', {type: 'application/x-thing'}));
form.append('files', new File(['text'], 'b.txt', {type: 'text/plain'}));
const sent = await fetch(`${base}/context-files`, {method: 'POST', headers, body: form});
if (sent.status !== 200) throw new Error(`upload: ${sent.status} ${await sent.text()}`);
const files = await (await fetch(`${base}/context-files`, {headers})).json();
for (const file of files) {
  for (const answer of [await fetch(file.signedUrl), await fetch(file.downloadUrl, {headers})]) {
    if (!answer.ok) throw new Error(`${file.fileName}: ${answer.status}`);
    const declared = Number(answer.headers.get('content-length'));
    const {byteLength} = await answer.arrayBuffer();
    if (declared !== file.fileSize || byteLength !== file.fileSize)
      throw new Error(`${file.fileName}: ${declared} and ${byteLength} bytes, not ${file.fileSize}`);
  }
}
console.log(JSON.stringify(files.map(file => file.fileName).sort()));
"""


def test_fetch_gets_exactly_the_bytes_that_a_list_promises(host: Host) -> None:
    execution = host.run("fetcher", tempFiles=host.stage(("empty", b""), ("staged.pdf", PDF)))
    (host.home(execution) / "downloads/d.bin").write_bytes(bytes(70_000))
    arguments = [host.gateway.url, ACME, execution]
    command = ["node", "--input-type=module", "--eval", FETCH, "--", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["b.txt", "d.bin", "empty", "größe %221%22.bin", "staged.pdf"]
    host.end(execution)


def test_names_that_are_not_utf8_break_no_list(host: Host, api: Sdk) -> None:
    execution = host.run("odd")
    home = Path(host.home(execution))
    for name in (b"uploads/\xff\xfe.txt", b"uploads/line\nbreak", b"workspace/\xc3\x28"):
        (home / os.fsdecode(name)).write_bytes(name)
    (home / "workspace/away").symlink_to("/etc/passwd")
    (home / "uploads/away.txt").symlink_to("../../../../etc/passwd")
    for _ in range(2):
        files = api.files.execution_files_get(execution).directories
        assert sorted(file.file_name for file in files.uploads) == ["line\nbreak", "\ufffd\ufffd.txt"]
        assert len(files.workspace) == 1
        for file in [*files.uploads, *files.workspace]:
            answer = httpx.get(file.download_url, headers=OLD, follow_redirects=True, trust_env=False)
            assert len(answer.content) == file.file_size
        assert len(api.files.execution_context_files_get(execution)) == 2
        assert api.executions.execution_activities_get(execution)
        if host.get(execution)["status"] == "running":
            host.end(execution)


def test_an_upload_is_taken_whole_or_not_at_all(host: Host, api: Sdk) -> None:
    execution = host.run("full")
    url = f"/agents/v2/executions/{execution}/context-files"
    quota = 200 * 2**20
    with (host.home(execution) / "uploads/sparse").open("wb") as file:
        file.truncate(quota - 10)
    answer = host.client.post(url, files=[("files", ("a", b"12345678")), ("files", ("b", b"123"))])
    assert (answer.status_code, answer.headers["content-type"]) == (507, "text/plain; charset=utf-8")
    assert [file.file_name for file in api.files.execution_context_files_get(execution)] == ["sparse"]
    answer = host.client.post(url, files=[("files", ("a", b"1234567")), ("files", ("b", b"123"))])
    assert (answer.status_code, answer.text) == (200, "Files uploaded.")
    host.end(execution, "cancelled")
    with host.gateway.client(OTHER) as stranger:
        answer = stranger.post(url, files={"files": ("a", b"1")})
        assert (answer.status_code, answer.text) == (404, "Execution not found.")

"""Ids of files."""

from __future__ import annotations

from uuid import UUID, uuid5

from agentfuse.gateway.ids import file_id, shared_file_id

EXECUTION = "3f0f9c1e-6f57-4a3e-8d5c-000000000001"


def test_the_id_of_a_file_is_made_of_its_execution_and_path() -> None:
    assert file_id(EXECUTION, "uploads", "ü/a.txt".encode()) == str(uuid5(UUID(EXECUTION), "uploads/ü/a.txt"))


def test_no_two_files_have_one_id() -> None:
    places = [
        ("uploads", b"a"),
        ("uploads", b"b"),
        ("shared", b"a"),
        ("uploads", b"\xff"),
        ("uploads", b"\xfe"),
    ]
    found = {file_id(EXECUTION, *place) for place in places}
    found |= {shared_file_id(agent, b"a") for agent in ("a", "b", EXECUTION)}
    assert len(found) == len(places) + 3
    assert all(UUID(each).version == 5 for each in found)

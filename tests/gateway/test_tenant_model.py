"""Random requests to the tenant's store beside a model that is a plain dictionary."""

from __future__ import annotations

import random

import httpx
from gateways import download, listing, upload

Model = dict[str, bytes | None]
"""By path: the content of a file, None for a directory. The root is not in it."""

NAMES = ("a", "b", "c.txt", "ü")


def test_random_requests_answer_and_leave_what_the_model_says(client: httpx.Client) -> None:
    dice = random.Random(20261122)
    model: Model = {}
    for number in range(250):
        operation = dice.choice([_upload, _upload, _delete, _move, _mkdir])
        said, expected = operation(client, model, dice)
        assert said == expected, f"request {number}"
        if number % 60 == 0:
            _compare(client, model)
    _compare(client, model)
    assert len(model) > 5


def _path(dice: random.Random) -> str:
    return "/".join(dice.choices(NAMES, k=dice.choice([1, 1, 2, 2, 3])))


def _parents(path: str) -> list[str]:
    names = path.split("/")
    return ["/".join(names[:depth]) for depth in range(1, len(names))]


def _is_blocked(model: Model, path: str) -> bool:
    """Whether a file is where a directory above the path should be."""
    return any(model.get(above) is not None for above in _parents(path))


def _make_parents(model: Model, path: str) -> None:
    for above in _parents(path):
        model.setdefault(above, None)


def _upload(client: httpx.Client, model: Model, dice: random.Random) -> tuple[int, int]:
    prefix = dice.choice([None, _path(dice)])
    sizes = dice.choices([0, 10, 3000], k=dice.choice([1, 2]))
    files = [(dice.choice(NAMES), dice.randbytes(size)) for size in sizes]
    paths = [name if prefix is None else f"{prefix}/{name}" for name, _ in files]
    said = upload(client, files, prefix).status_code
    if any(_is_blocked(model, path) or (path in model and model[path] is None) for path in paths):
        return said, 400
    for path, (_, content) in zip(paths, files, strict=True):
        _make_parents(model, path)
        model[path] = content
    return said, 200


def _delete(client: httpx.Client, model: Model, dice: random.Random) -> tuple[int, int]:
    path = _path(dice)
    said = client.delete("/api/v1/files", params={"path": path}).status_code
    if any(other.startswith(path + "/") for other in model):
        return said, 400
    model.pop(path, None)
    return said, 204


def _move(client: httpx.Client, model: Model, dice: random.Random) -> tuple[int, int]:
    source, target = dice.choice([_path(dice), *model]), _path(dice)
    said = client.post("/api/v1/files/move", json={"src_path": source, "dst_path": target}).status_code
    if source not in model:
        return said, 400
    if source == target:
        return said, 200
    if target.startswith(source + "/") or target in model or _is_blocked(model, target):
        return said, 400
    moved = {path: model[path] for path in model if path == source or path.startswith(source + "/")}
    for path in moved:
        del model[path]
    _make_parents(model, target)
    model |= {target + path[len(source) :]: content for path, content in moved.items()}
    return said, 200


def _mkdir(client: httpx.Client, model: Model, dice: random.Random) -> tuple[int, int]:
    path = _path(dice)
    said = client.post("/api/v1/files/mkdir", json={"path": path}).status_code
    if _is_blocked(model, path) or model.get(path) is not None:
        return said, 400
    _make_parents(model, path)
    model[path] = None
    return said, 200


def _compare(client: httpx.Client, model: Model) -> None:
    found: Model = {}
    pending = [""]
    while pending:
        for node in listing(client, pending.pop()):
            if node["is_dir"]:
                pending.append(node["path"])
                found[node["path"]] = None
            else:
                found[node["path"]] = download(client, node["path"]).content
                assert node["size"] == len(found[node["path"]] or b"")
    assert found == model

"""An S3 store at 127.0.0.1:9000 that takes as long for each request as the file says that it is given."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import boto3

BEHIND = ("127.0.0.1", 9001)
MINISTACK, DELAY = sys.argv[1], Path(sys.argv[2])


def carry(source: socket.socket, target: socket.socket, *, slowly: bool) -> None:
    with contextlib.suppress(OSError):  # one side has gone
        while data := source.recv(1 << 20):
            if slowly:
                with contextlib.suppress(FileNotFoundError):
                    time.sleep(float(DELAY.read_text()))
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def main() -> None:
    environ = {"BIND_HOST": BEHIND[0], "GATEWAY_PORT": str(BEHIND[1]), "SERVICES": "s3", "S3_PERSIST": "0"}
    subprocess.Popen(["setpriv", "--pdeathsig=KILL", MINISTACK], env={**os.environ, **environ}, cwd="/tmp")
    while socket.socket().connect_ex(BEHIND):
        time.sleep(0.05)
    s3 = boto3.client(
        "s3", endpoint_url=f"http://127.0.0.1:{BEHIND[1]}", region_name="us-east-1",
        aws_access_key_id="test", aws_secret_access_key="test",
    )  # fmt: skip
    s3.create_bucket(Bucket="memory")
    listening = socket.create_server(("127.0.0.1", 9000))
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        client, _ = listening.accept()
        server = socket.create_connection(BEHIND)
        threading.Thread(target=carry, args=(client, server), kwargs={"slowly": True}, daemon=True).start()
        threading.Thread(target=carry, args=(server, client), kwargs={"slowly": False}, daemon=True).start()


main()

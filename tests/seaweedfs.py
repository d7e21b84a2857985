"""A real S3 server (SeaweedFS) that can be killed and started again where it was."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from pyarrow import fs

from tests.conftest import free_port, wait_until_up


class SeaweedFS:
    """A server on ports and a folder of its own.

    Args:
        folder: keeps what it stores, its configuration and its log.
        environment: the AWS_* variables that clients reach it with.
    """

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.endpoint = environment["AWS_ENDPOINT_URL"]
        self._folder = folder
        keys = {
            "accessKey": environment["AWS_ACCESS_KEY_ID"],
            "secretKey": environment["AWS_SECRET_ACCESS_KEY"],
        }
        actions = ["Admin", "Read", "Write", "List", "Tagging"]
        identity = {"name": "ultra", "credentials": [keys], "actions": actions}
        (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
        parts = ("master", "volume", "filer")
        self._ports = {f"{p}.port{kind}": str(free_port()) for p in parts for kind in ("", ".grpc")}
        s3_port = self.endpoint.rsplit(":", 1)[1]
        self._ports |= {"s3.port": s3_port, "s3.port.grpc": str(free_port())}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Run the server; it answers on return, with all that was written before."""
        command = [
            str(Path(sys.executable).parent / "weed"),
            "server",
            "-s3",
            f"-dir={self._folder}",
            "-ip=127.0.0.1",
            "-ip.bind=127.0.0.1",
            *(f"-{name}={port}" for name, port in self._ports.items()),
            f"-s3.config={self._folder / 's3.json'}",
            "-volume.max=40",
            "-master.volumeSizeLimitMB=64",
            "-master.telemetry=false",
            "-master.electionTimeout=1s",  # after a kill it waits twice this long to lead again
            "-s3.port.iceberg=0",  # else on a fixed port, which only one server can have
            "-s3.port.lance=0",
        ]
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        wait_until_up(self.endpoint, self._process)

    def kill(self) -> None:
        """End the server without farewell (SIGKILL); its own takes 25 s."""
        assert self._process is not None, "it was never started"
        self._process.kill()
        self._process.wait(timeout=30)
        for port in self._ports.values():
            for socket_file in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):
                socket_file.unlink()

    def make_bucket(self, name: str) -> str:
        """Create a bucket, once the server takes writes, and return its address."""
        s3 = fs.S3FileSystem(
            endpoint_override=self.endpoint.removeprefix("http://"),
            scheme="http",
            allow_bucket_creation=True,
        )
        deadline = time.monotonic() + 60
        while True:
            try:
                s3.create_dir(name)
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.5)
            else:
                return f"s3://{name}"

"""Files on a local path or in an object store, behind one address.

An address is a local path, `s3://bucket/key`, or `package:NAME` for a file that ultra ships.
Credentials and the endpoint of an S3 server come from the usual AWS_* variables.
"""

from __future__ import annotations

import codecs
import glob
import hashlib
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO, cast

from pyarrow import fs

from ultra.config import InputError

PACKAGE = "package:"

PATIENCE = 11
"""Attempts of a request to an S3 server. The waits between them double from 25 ms to 25.6 s, so a
server may be away for 50 s before a job hears of it."""


class StorageError(InputError, OSError):
    """An address that cannot be read or written; the message names it."""


def join(uri: str, *parts: str) -> str:
    """Return the address of something under `uri`."""
    return "/".join([uri.rstrip("/"), *parts])


def resolve(uri: str) -> tuple[fs.FileSystem, str]:
    """Return the file system of an address and the path inside it.

    Raises:
        StorageError: for an address of another kind, or a bucket that does not exist.
    """
    if uri.startswith("s3://"):
        path = uri.removeprefix("s3://").rstrip("/")
        try:
            return _open_bucket(path.partition("/")[0], _settings()), path
        except OSError as error:
            raise StorageError(f"{uri}: {_first_line(error)}") from None
    if uri.startswith(PACKAGE):
        return fs.LocalFileSystem(), str(_packaged(uri))
    if "://" in uri:
        raise StorageError(f"{uri}: an address is a local path or s3://bucket/key")
    return fs.LocalFileSystem(), str(Path(uri).expanduser().absolute())


def address(filesystem: fs.FileSystem, path: str) -> str:
    """Return the address that `resolve` turns into this file system and path."""
    return f"s3://{path}" if filesystem.type_name == "s3" else path


class _S3(fs.S3FileSystem):  # type: ignore[misc]  # pyarrow has no types
    """pyarrow's own forgets how often to try again when it travels to another process."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _s3, ()


def _settings() -> tuple[tuple[str, str], ...]:
    return tuple(sorted((k, v) for k, v in os.environ.items() if k.startswith("AWS_")))


def _s3() -> fs.FileSystem:
    return _connect(_settings())


@lru_cache(maxsize=8)
def _open_bucket(bucket: str, settings: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    """Return the file system of a bucket; asked once, as long as it exists."""
    filesystem = _connect(settings)
    if filesystem.get_file_info(bucket).type == fs.FileType.NotFound:
        raise FileNotFoundError(f"bucket {bucket!r} does not exist")
    return filesystem


@lru_cache(maxsize=8)
def _connect(settings: tuple[tuple[str, str], ...]) -> fs.FileSystem:
    # pyarrow reads AWS_ENDPOINT_URL and the credentials itself, but takes the scheme from it only
    # in part: an explicit override works with every S3 server.
    variables = dict(settings)
    endpoint = variables.get("AWS_ENDPOINT_URL_S3") or variables.get("AWS_ENDPOINT_URL") or ""
    scheme, _, host = endpoint.partition("://")
    where = {"endpoint_override": host.rstrip("/"), "scheme": scheme} if endpoint else {}
    return _S3(
        # Not the standard strategy: pyarrow never refills its allowance of 100 retries a process.
        retry_strategy=fs.AwsDefaultS3RetryStrategy(max_attempts=PATIENCE),
        allow_delayed_open=True,  # a small file in one request instead of three
        connect_timeout=5,
        request_timeout=30,
        **where,
    )


def _packaged(uri: str) -> Path:
    return Path(str(resources.files("ultra") / "presets")) / uri.removeprefix(PACKAGE)


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def exists(uri: str) -> bool:
    """Return whether a file or a folder stands at the address."""
    filesystem, path = resolve(uri)
    return bool(filesystem.get_file_info(path).type != fs.FileType.NotFound)


def list_files(uri: str, suffix: str = "") -> list[str]:
    """Return the addresses of all files under a folder, sorted; none where it does not exist.

    A folder that links lead to twice is entered once, so links in a circle are no harm.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        files = _walk(path)
    else:
        selector = fs.FileSelector(path, recursive=True, allow_not_found=True)
        files = (info.path for info in filesystem.get_file_info(selector) if info.is_file)
    return sorted(join(uri, os.path.relpath(f, path)) for f in files if f.endswith(suffix))


def _walk(path: str) -> Iterator[str]:
    entered = {os.path.realpath(path)}
    for folder, names, files in os.walk(path, followlinks=True):
        inner = {name: os.path.realpath(os.path.join(folder, name)) for name in sorted(names)}
        names[:] = []
        for name, real in inner.items():
            if real not in entered:
                entered.add(real)
                names.append(name)
        found = (os.path.join(folder, file) for file in files)
        yield from (file for file in found if os.path.isfile(file))


def open_read(uri: str) -> BinaryIO:
    """Return a file opened for reading, seekable.

    Raises:
        StorageError: when there is no such file.
    """
    filesystem, path = resolve(uri)
    try:
        return cast(BinaryIO, filesystem.open_input_file(path))
    except OSError as error:
        raise StorageError(f"{uri}: {_first_line(error)}") from None


def read_bytes(uri: str, limit: int | None = None) -> bytes:
    """Return a file's bytes.

    Raises:
        StorageError: when there is no such file, or it is longer than `limit` bytes.
    """
    with open_read(uri) as file:
        data = file.read() if limit is None else file.read(limit + 1)
    if limit is not None and len(data) > limit:
        raise StorageError(f"{uri}: longer than {limit} bytes")
    return data


def read_lines(uri: str, limit: int, *, keep_ends: bool = False) -> Iterator[bytes]:
    """Yield a text file's lines, one at a time, without the byte order mark of UTF-8.

    Args:
        uri: the file.
        limit: bytes of a line; of a longer one the first `limit` + 1 are given.
        keep_ends: whether the line feeds stay.

    Raises:
        StorageError: when there is no such file.
    """
    with open_read(uri) as file:
        rest, first = b"", True
        while chunk := file.read(1 << 20):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                yield _line(line + b"\n" * keep_ends, limit, first)
                first = False
            rest = rest[: limit + 1]
        if rest:
            yield _line(rest, limit, first)


def _line(line: bytes, limit: int, first: bool) -> bytes:
    return (line.removeprefix(codecs.BOM_UTF8) if first else line)[: limit + 1]


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole: a reader sees the old one or the new one."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=target.parent, delete=False) as file:
            file.write(data)
        os.chmod(file.name, 0o644)
        os.replace(file.name, target)
        return
    with filesystem.open_output_stream(path) as stream:
        stream.write(data)


def write_file(uri: str, file: Path) -> None:
    """Copy a local file to an address; a reader sees the old one or the new one."""
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = target.with_name(f".{target.name}-{uuid.uuid4().hex}")
        shutil.copyfile(file, staged)
        os.replace(staged, target)
        return
    _upload(file, filesystem, path)


def _upload(file: Path, filesystem: fs.FileSystem, path: str) -> None:
    # In one call that nothing interrupts: a stream that is left half-way closes, and what it had
    # so far becomes the object.
    fs.copy_files(
        str(file),
        path,
        source_filesystem=fs.LocalFileSystem(),
        destination_filesystem=filesystem,
    )


def delete(uri: str) -> None:
    """Remove a file, or a folder and all that is in it; nothing happens where there is none."""
    filesystem, path = resolve(uri)
    kind = filesystem.get_file_info(path).type
    if kind == fs.FileType.Directory:
        filesystem.delete_dir(path)
    elif kind == fs.FileType.File:
        filesystem.delete_file(path)


def publish(folder: Path, uri: str, last: str) -> None:
    """Copy a local folder to an address so that it appears whole.

    On a local path the folder arrives by renaming. An object store cannot rename: there the file
    `last` is written after all others, and readers take a folder without it for unfinished.
    """
    filesystem, path = resolve(uri)
    if isinstance(filesystem, fs.LocalFileSystem):
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        for left in target.parent.glob(f".{glob.escape(target.name)}-*"):
            shutil.rmtree(left)  # of a process that was killed here before
        staged = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
        os.chmod(staged, 0o755)
        shutil.copytree(folder, staged, dirs_exist_ok=True)
        if target.exists():
            shutil.rmtree(target)
        os.replace(staged, target)
        return
    delete(uri)
    names = [p.relative_to(folder).as_posix() for p in sorted(folder.rglob("*")) if p.is_file()]
    for name in sorted(names, key=lambda n: n == last):
        _upload(folder / name, filesystem, f"{path}/{name}")


def fetch(uri: str) -> Path:
    """Return a local path with the content of an address; what is remote is copied once.

    Raises:
        StorageError: when nothing stands at the address.
    """
    filesystem, path = resolve(uri)
    info = filesystem.get_file_info(path)
    if info.type == fs.FileType.NotFound:
        raise StorageError(f"{uri}: no such file or folder")
    if isinstance(filesystem, fs.LocalFileSystem):
        return Path(path)
    files = (
        [info] if info.is_file else filesystem.get_file_info(fs.FileSelector(path, recursive=True))
    )
    files = sorted((f for f in files if f.is_file), key=lambda f: f.path)
    version = "".join(f"{f.path} {f.size} {f.mtime_ns}\n" for f in files)
    digest = hashlib.sha256(f"{uri}\n{version}".encode()).hexdigest()[:16]
    target = Path(tempfile.gettempdir()) / f"ultra-{os.getuid()}" / digest
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        staged = Path(tempfile.mkdtemp(dir=target.parent))
        for file in files:
            name = Path(file.path).name if info.is_file else os.path.relpath(file.path, path)
            local = staged / name
            local.parent.mkdir(parents=True, exist_ok=True)
            fs.copy_files(
                file.path,
                str(local),
                source_filesystem=filesystem,
                destination_filesystem=fs.LocalFileSystem(),
            )
        try:
            os.replace(staged, target)
        except OSError:  # another process was first, with the same content
            shutil.rmtree(staged)
    return target / Path(path).name if info.is_file else target

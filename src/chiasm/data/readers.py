"""Data sets in the formats that people have, as a sequence of `Sample`s: nothing is decoded before it is asked for."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate, chain
from pathlib import Path
from stat import S_ISREG
from typing import Any
from unicodedata import normalize

from chiasm.data import containers
from chiasm.data.base64_pictures import DATA_URL, decoded, picture_in
from chiasm.data.emoji_names import EmojiNames
from chiasm.data.emoji_scenes import EmojiScenes
from chiasm.data.merging import MergedQuestions
from chiasm.data.rows import half_character, id_of, sample_of
from chiasm.data.schema import MAX_PIXELS, ImageRef, Samples
from chiasm.data.splits import SPLITS, Subset, hold_out, ids_of, stable_fraction

EMOJI_SCENES = "emoji-scenes"
EMOJI_NAMES = "emoji-names"
UNDERSTOOD = (
    "a LLaVA JSON or JSONL file, a folder with metadata.jsonl, a Hugging Face dataset (in memory, saved to disk, "
    "parquet, or hf:owner/name), WebDataset .tar shards, a YAML mixture (a list of {path, weight}), "
    "emoji-scenes[:split[,size=N,...]], or emoji-names[:split[,language=ko]]"
)


def read(source: Any, split: str | None = None, **options: Any) -> Samples:
    """The samples of `source`, by index, each validated when it is taken.

    The format is told by the content. Data without splits of its own is divided by a stable hold-out when `split` is
    asked for: "train" is what remains, "validation" and "test" are what was held out.

    Args:
        source: a path, `hf:owner/name[:config]`, `emoji-scenes[:split]`, a `datasets.Dataset`, or samples.
        split: the split to read; None reads everything.
        image_root: folder of the pictures; else the folder of the file, then its `images` subfolder.
        max_pixels: a larger picture is an error when it is loaded.
        merge_questions: so many questions about one picture, at most, become one conversation.
        answered: False also takes conversations that end with a question.
        fraction, at_most, seed: of the hold-out (see `hold_out`).
        others: `emoji-scenes` takes the arguments of `EmojiScenes`.

    Raises:
        ValueError: a format that is not understood, an unknown option, or a split that the data does not have.
        SampleError (when a sample is taken): the sample is not usable.
    """
    if isinstance(source, str) and source.partition(":")[0] == EMOJI_NAMES:
        return _emoji_names(source, split, options)
    if isinstance(source, str) and source.partition(":")[0] == EMOJI_SCENES:
        return _emoji_scenes(source, split, options)
    _check_values(options)
    division: dict[str, Any] = {key: options.pop(key) for key in ("fraction", "at_most", "seed") if key in options}
    if isinstance(source, Sequence) and not isinstance(source, str):
        _refuse(options, ())
        return source if split is None else _divide(source, split, division)
    if isinstance(source, str | Path) and (entries := containers.mixture_entries(Path(source))) is not None:
        try:
            return Mixture.of(Path(source), entries, split, division | options)
        except RecursionError:
            raise ValueError(f"{source}: the mixture contains itself; remove that entry") from None
    rows, split = containers.open_source(source, split, UNDERSTOOD)
    at_most = options.pop("merge_questions", 1)
    _refuse(options, ("image_root", "max_pixels", "answered"))
    samples: Samples = RowSamples(rows, **options)
    samples = samples if split is None else _divide(samples, split, division)
    return samples if at_most == 1 else MergedQuestions(samples, at_most)


def read_split(source: Any, split: str) -> Samples:
    """All samples of a source; of one that comes in splits, this one."""
    try:
        return read(source)
    except containers.Unsplit:
        return read(source, split)


def read_train(source: Any) -> Samples:
    """What examples for `source` are drawn from: its train split, or all of it where it has no such split."""
    if isinstance(source, str) and source.partition(":")[0] == EMOJI_SCENES:
        settings = source.partition(":")[2].split(",")[1:]
        kept = [setting for setting in settings if setting.partition("=")[0] not in ("size", "shots")]
        return read(",".join([f"{EMOJI_SCENES}:train", *kept]))
    try:
        return read(source, split="train")
    except ValueError:
        return read(source)


class RowSamples(Samples):
    """Rows of a container, turned into validated samples one by one."""

    def __init__(
        self,
        rows: containers.Rows,
        image_root: str | Path | None = None,
        max_pixels: int = MAX_PIXELS,
        answered: bool = True,
    ) -> None:
        roots = [Path(image_root)] if image_root is not None else [rows.folder, rows.folder / "images"]
        self.rows, self.roots, self.max_pixels, self.answered = rows, roots, max_pixels, answered

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        index = range(len(self))[index]
        sample = sample_of(self.rows.row(index), self.default_id(index), self.find_image)
        return sample.validate(self.answered)

    def ids(self) -> Iterator[str]:
        """Every sample's id, without building the samples; an unreadable row has its default one."""
        for index in range(len(self)):
            try:
                yield id_of(self.rows.row(index), self.default_id(index))
            except ValueError:
                yield self.default_id(index)

    def default_id(self, index: int) -> str:
        return f"{self.rows.name}:{index}"

    def find_image(self, value: Any) -> ImageRef:
        """A value of `image` / `images`: a name under the image roots, bytes, base64, a data URL, a PIL picture, or
        {"bytes", "path"}. ValueError for what is no picture, nor can be the name of one."""
        if isinstance(value, ImageRef):
            return replace(value, max_pixels=self.max_pixels)
        if isinstance(value, Mapping):
            path, encoded = value.get("path"), value.get("bytes")
            if isinstance(encoded, bytes):
                return ImageRef.of(encoded, path or "in the data", self.max_pixels)
            return self.find_image(path if encoded is None else encoded)
        if not isinstance(value, str):
            return ImageRef.of(value, "in the data", self.max_pixels)
        if value.startswith(("http://", "https://")):
            raise ValueError(f"the picture {value:.60} is an address: download it and name the file")
        if value.startswith(DATA_URL):
            try:
                return ImageRef.of(decoded(value), "in the data", self.max_pixels)
            except ValueError as error:
                raise ValueError(f"the picture {value!r:.60} {error}") from None
        return self._find_file(value)

    def _find_file(self, value: str) -> ImageRef:
        spellings = dict.fromkeys([value, *(normalize(form, value) for form in ("NFC", "NFD"))])
        candidates, fault = [root / spelling for spelling in spellings for root in self.roots], half_character(value)
        for path in candidates:
            try:
                if S_ISREG(path.stat().st_mode):
                    return ImageRef.of(path, max_pixels=self.max_pixels)
            except (FileNotFoundError, NotADirectoryError):
                continue
            except (OSError, ValueError) as error:
                fault = getattr(error, "strerror", None) or str(error)
        if (encoded := picture_in(value)) is not None:
            return ImageRef.of(encoded, "in the data", self.max_pixels)
        if fault is not None:
            raise ValueError(f"the picture {value!r:.60} cannot be looked for: {fault}")
        return ImageRef.of(candidates[0], max_pixels=self.max_pixels)


class Mixture(Samples):
    """Several data sets one after the other, each taken `weight` times: 2 is every sample twice, 0.5 a stable half."""

    def __init__(self, sources: Sequence[Samples], weights: Sequence[int | float]) -> None:
        self.sources: list[Samples] = []
        for samples, weight in zip(sources, weights, strict=True):
            whole, rest = divmod(weight, 1)
            self.sources += [samples] * int(whole)
            if rest:
                self.sources.append(_thin(samples, rest))
        self.ends = list(accumulate(len(samples) for samples in self.sources))

    @classmethod
    def of(cls, file: Path, entries: list[dict], split: str | None, options: dict[str, Any]) -> "Mixture":
        """From the entries of a YAML file: `path` and `image_root` (relative to the file), `weight`, `split`, and other
        options of `read`."""
        sources, weights = [], []
        for entry in entries:
            entry = dict(entry)
            path, weight = str(entry.pop("path")), entry.pop("weight", 1)
            if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < float("inf"):
                raise ValueError(f"{file}: the weight of {path} is {weight!r}, expected a number above 0")
            if isinstance(entry.get("image_root"), str):
                entry["image_root"] = file.parent / entry["image_root"]
            named = path.startswith((EMOJI_SCENES, "hf:"))
            inherited = {} if path.startswith(EMOJI_SCENES) else options
            own_split = entry.pop("split", split)
            try:
                sources.append(read(path if named else file.parent / path, own_split, **(inherited | entry)))
            except containers.Unsplit as error:
                raise ValueError(f"{file}: {error}") from error
            weights.append(float(weight))
        return cls(sources, weights)

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Subset(self, range(len(self))[index])
        index = range(len(self))[index]
        number = next(n for n, end in enumerate(self.ends) if index < end)
        return self.sources[number][index - self.ends[number] + len(self.sources[number])]

    def ids(self) -> Iterator[str]:
        """Every sample's id, without building the samples where that is possible."""
        return chain.from_iterable(map(ids_of, self.sources))


def _thin(samples: Samples, share: int | float) -> Subset:
    return Subset(samples, [i for i in range(len(samples)) if stable_fraction(str(i), seed=0) < share])


def _divide(samples: Samples, split: str, division: dict[str, Any]) -> Samples:
    if split not in SPLITS:
        raise ValueError(f"the data has no splits of its own, so split is one of {', '.join(SPLITS)}, not {split!r}")
    kept, held = hold_out(samples, **division)
    return kept if split == "train" else held


def _emoji_names(source: str, split: str | None, options: dict[str, Any]) -> EmojiNames:
    named, settings = _settings(source, split)
    options = settings | options
    _refuse(options, EmojiNames.OPTIONS)
    for key in ("size", "seed", "views"):
        if type(options.get(key)) not in (int, type(None)):
            raise ValueError(f"{EMOJI_NAMES}: {key} is {options[key]!r}, expected a whole number")
    return EmojiNames(split or named or "all", **options)


def _emoji_scenes(source: str, split: str | None, options: dict[str, Any]) -> EmojiScenes:
    named, settings = _settings(source, split)
    options |= settings
    _refuse(options, EmojiScenes.OPTIONS)
    for key in ("size", "seed", "num_objects", "questions_per_scene", "shots"):
        needed = key in options and key in ("seed", "shots")
        if type(options.get(key)) not in ((int,) if needed else (int, type(None))):
            raise ValueError(f"{EMOJI_SCENES}: {key} is {options[key]!r}, expected a whole number")
    for key in ("exact", "places"):
        if type(options.get(key, False)) is not bool:
            raise ValueError(f"{EMOJI_SCENES}: {key} is {options[key]!r}, expected true or false")
    return EmojiScenes(split or named or "train", **options)


WORDS = {"true": True, "false": False}


def _settings(source: str, split: str | None) -> tuple[str, dict[str, Any]]:
    """The split that built-in data is named with, and its settings: `emoji-scenes:train,size=9`."""
    named, *settings = source.partition(":")[2].split(",")
    if named and split and named != split:
        raise ValueError(f"{source!r} names the split {named!r}, but {split!r} was asked for")
    options: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ValueError(f"{source!r}: {setting!r} is not of the form name=value")
        options[key] = int(value) if value.lstrip("-").isdigit() else WORDS.get(value, value)
    return named, options


VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "image_root": (lambda value: isinstance(value, str | Path | None), "a folder"),
    "max_pixels": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "answered": (lambda value: type(value) is bool, "true or false"),
    "fraction": (lambda value: type(value) is float and 0 < value < 1, "a number between 0 and 1"),
    "at_most": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
    "seed": (lambda value: type(value) is int, "a whole number"),
    "merge_questions": (lambda value: type(value) is int and value > 0, "a whole number above 0"),
}
"""What an option may be, and in words."""


def _check_values(options: dict[str, Any]) -> None:
    for name, value in options.items():
        if name in VALUES and not VALUES[name][0](value):
            raise ValueError(f"{name} is {value!r:.60}, expected {VALUES[name][1]}")


def _refuse(options: dict[str, Any], known: tuple[str, ...]) -> None:
    unknown = [key for key in options if key not in known]
    if unknown:
        raise ValueError(f"unknown option {unknown[0]!r}; this kind of data takes {', '.join(known) or 'no options'}")

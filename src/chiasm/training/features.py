"""A frozen encoder's features for training: every picture that a stage will meet is encoded before the first step."""

import json
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel, ProcessorMixin

from chiasm.data.feature_cache import DTYPES, FeatureCache, encoder_identity
from chiasm.data.schema import ImageError, ImageRef, Sample, SampleError, Samples
from chiasm.training.batches import WORKERS, prefetch
from chiasm.training.compiling import can_compile
from chiasm.training.reporter import Reporter
from chiasm.training.schema import Stage
from chiasm.training.stages import FreezePlan

ENCODE_BATCH = 32
SKIP = "--skip-bad (skip_bad: true) leaves them out"
WORTH_COMPILING = 2000
"""From so many samples on, a compiled encoder makes up for the time that compiling takes."""

Encode = Callable[[Float[Tensor, "images 3 height width"]], Float[Tensor, "images N D_v"]]
Missing = dict[str, tuple[int, int]]
"""Pictures that are not in the cache, by key: the first sample that shows each, and which of its pictures it is. The
pictures themselves may be more than memory holds."""


class Features:
    """Features by sample, out of a cache that is filled on demand.

    Args:
        encode: pixels to features, without gradients.
        compiled: makes a faster `encode`, for many pictures.
        cache: where they are kept.
        stage: whether bad samples are skipped, and whether the cache is a must.
    """

    def __init__(
        self,
        encode: Encode,
        compiled: Callable[[], Encode] | None,
        cache: FeatureCache,
        processor: ProcessorMixin,
        reporter: Reporter,
        stage: Stage,
    ) -> None:
        self.encode, self.compile, self.cache = encode, compiled, cache
        self.compiled: Encode | None = None
        self.processor, self.reporter, self.stage = processor, reporter, stage

    def fill(self, samples: Samples, indices: Sequence[int], together: int | None = None) -> "Rows | None":
        """Encodes what is missing of the samples' pictures; None where the disk has no room and the cache is no must.

        Args:
            together: samples of all processes that fill the cache at once. Their number chooses the encoder, and not
                what is missing: a run that was killed goes on to the same features, in their last bits too.

        Raises:
            SampleError: a picture cannot be read and bad samples are not skipped.
            ValueError: the disk has no room and the recipe demands a cache.
        """
        rows, missing = self._locate(samples, indices)
        if len(missing) > self.cache.room():
            gigabytes = len(missing) * self.cache.row_bytes / 1e9
            short = (
                f"{len(missing)} encoded pictures need {gigabytes:.1f} GB in {self.cache.folder}, which are not free"
            )
            if self.stage.cache_features is True:
                raise ValueError(f"{short}; make room, set CHIASM_CACHE, or write cache_features: false")
            self.reporter.note(f"{short}: encoding in every epoch instead")
            return None
        self._encode_missing(samples, missing, rows.faults, together or len(indices))
        return rows

    def _locate(self, samples: Samples, indices: Sequence[int]) -> tuple["Rows", Missing]:
        """Where the pictures of samples are in the cache, and those that are not there yet."""
        rows, missing = Rows(self.cache), Missing()
        with ThreadPoolExecutor(WORKERS) as pool, self.reporter.task("looking up pictures", len(indices)) as task:
            for index, keys in _in_order(pool, indices, lambda i: _keys_of(samples[i])):
                task.advance()
                if isinstance(keys, SampleError):
                    self._bad(keys)
                    rows.bad[index] = keys
                    continue
                rows.keys[index] = keys
                for place, key in enumerate(keys):
                    if self.cache.row(key) is None:
                        missing.setdefault(key, (index, place))
        return rows, missing

    def _bad(self, error: SampleError) -> None:
        if not self.stage.skip_bad:
            raise with_hint(error) from error

    def _encode_missing(self, samples: Samples, missing: Missing, faults: dict[str, ImageError], together: int) -> None:
        """Encodes pictures into the cache, and notes what is wrong with the others; decoding runs ahead in threads."""
        keys = list(missing)
        starts = range(0, len(keys), ENCODE_BATCH)
        encode = self._encoder(together) if keys else self.encode

        def load(key: str) -> Tensor | ImageError:
            index, place = missing[key]
            return self._pixels(samples[index].images[place])

        with ThreadPoolExecutor(WORKERS) as pool, self.reporter.task("encoding pictures", len(keys)) as task:

            def make(number: int) -> list[tuple[str, Tensor | ImageError]]:
                chosen = keys[starts[number] : starts[number] + ENCODE_BATCH]
                return list(zip(chosen, pool.map(load, chosen), strict=True))

            with closing(prefetch(make, 0, len(starts))) as batches:
                for loaded in batches:
                    for key, value in loaded:
                        if isinstance(value, ImageError):
                            self._bad(SampleError.of_picture(samples[missing[key][0]].id, value))
                            faults[key] = value
                    self._add([(key, value) for key, value in loaded if isinstance(value, Tensor)], encode)
                    task.advance(len(loaded))

    def _encoder(self, together: int) -> Encode:
        """A compiled one where so many samples are worth it."""
        if together < WORTH_COMPILING or self.compile is None:
            return self.encode
        self.compiled = self.compiled or self.compile()
        return self.compiled

    def of(self, sample: Sample) -> Float[Tensor, "images N D_v"]:
        """Features of one sample's pictures, encoded now if they never were.

        Raises:
            SampleError: a picture cannot be read.
        """
        keys = _keys_of(sample)
        if isinstance(keys, SampleError):
            raise keys
        for key, ref in zip(keys, sample.images, strict=True):
            if self.cache.row(key) is None:
                pixels = self._pixels(ref)
                if isinstance(pixels, ImageError):
                    raise SampleError.of_picture(sample.id, pixels)
                self._add([(key, pixels)], self.encode)
        return self.cache.read([row for key in keys if (row := self.cache.row(key)) is not None])

    def _pixels(self, ref: ImageRef) -> Tensor | ImageError:
        try:
            return torch.as_tensor(self.processor.image_processor([ref.load()], return_tensors="pt")["pixel_values"])
        except ImageError as error:
            return error

    def _add(self, pictures: list[tuple[str, Tensor]], encode: Encode) -> None:
        """Encodes pictures in a batch of always the same size, so that their company does not change the result."""
        if pictures:
            pixels = torch.cat([value for _, value in pictures])
            filled = torch.cat([pixels, pixels[:1].expand(ENCODE_BATCH - len(pixels), *pixels.shape[1:])])
            self.cache.add([key for key, _ in pictures], encode(filled)[: len(pixels)])


class Rows:
    """Keys of the pictures of samples by index. `bad`: what is wrong with samples whose pictures cannot be read;
    `faults`: with pictures that cannot be decoded, by key; several files may be the same bytes."""

    def __init__(self, cache: FeatureCache) -> None:
        self.cache = cache
        self.keys: dict[int, list[str]] = {}
        self.bad: dict[int, SampleError] = {}
        self.faults: dict[str, ImageError] = {}

    def read(self, index: int, sample: Sample) -> Float[Tensor, "images N D_v"] | None:
        """Features of a sample's pictures; None where it has none.

        Raises:
            SampleError: a picture could not be encoded.
        """
        if index in self.bad:
            raise self.bad[index]
        keys = self.keys[index]
        for key, ref in zip(keys, sample.images, strict=True):
            if self.cache.row(key) is None:
                fault = self.faults[key]
                raise SampleError.of_picture(sample.id, ImageError(fault.kind, ref.name, fault.reason))
        return self.cache.read([row for key in keys if (row := self.cache.row(key)) is not None]) if keys else None


def with_hint(error: SampleError | ImageError) -> ValueError:
    """The error that stops a run, with what to do about it."""
    for_model = isinstance(error, SampleError) and any(problem.kind == "too long" for problem in error.problems)
    check = "chiasm data check --model DIR" if for_model else "chiasm data check"
    return ValueError(f"{error}; {check} lists every such sample; {SKIP}")


def can_cache(model: PreTrainedModel, stage: Stage, plan: FreezePlan) -> bool:
    """Whether a stage has features to keep: those of a frozen encoder.

    Raises:
        ValueError: the recipe asks for a cache but the model has no encoder, or the stage tunes it.
    """
    if stage.cache_features is False or "vision" not in plan.states:
        return False
    reason = None
    if not hasattr(model.vision, "fast_encoder"):
        reason = f"stage {stage.name!r}: cache_features needs a vision encoder, this model has none"
    elif getattr(model.config, "tiles", None):
        reason = f"stage {stage.name!r}: cache_features keeps one picture's features, this model reads it in tiles"
    elif "vision" not in plan.frozen_parts():
        reason = f"stage {stage.name!r} tunes the vision part, so its features cannot be cached"
    if reason is not None and stage.cache_features is True:
        raise ValueError(reason)
    return reason is None


def stage_features(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    stage: Stage,
    plan: FreezePlan,
    dtype: torch.dtype,
    reporter: Reporter,
    root: Path | None,
) -> Features | None:
    """The cache for a stage, in bfloat16 where training is and the encoder bears it; None for a stage without one.

    Raises:
        ValueError: as `can_cache`.
    """
    if not can_cache(model, stage, plan):
        return None
    vision = model.vision
    encode = vision.fast_encoder(dtype=None if dtype == torch.bfloat16 else vision.model.dtype)
    name = next(name for name, known in DTYPES.items() if known == encode.dtype)
    read = {**vision.features.to_dict(), "config": json.loads(vision.model.config.to_json_string())}
    identity = encoder_identity(vision, read, processor.image_processor.to_dict(), name)
    cache = FeatureCache(identity, (vision.num_patches, vision.width), root)

    def compiled() -> Encode:
        return vision.fast_encoder(dtype=encode.dtype, compile=True, note=reporter.note)

    return Features(encode, compiled if can_compile(model.device) else None, cache, processor, reporter, stage)


def _keys_of(sample: Sample) -> list[str] | SampleError:
    try:
        return [ref.key() for ref in sample.images]
    except ImageError as error:
        return SampleError.of_picture(sample.id, error)


def _in_order(pool: ThreadPoolExecutor, indices: Sequence[int], work: Callable) -> Iterable[tuple]:
    """`(index, work(index))` in order, with a bounded number of results waiting."""
    window = 256
    for start in range(0, len(indices), window):
        chosen = indices[start : start + window]
        yield from zip(chosen, pool.map(work, chosen), strict=True)

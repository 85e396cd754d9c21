"""Turns raw values into ids and numbers: the spelling of an id, its hash, a standardised number.

`data_pipeline` and serving spell an id by the same function, and training and serving standardise a number by the same
one, so that a value means the same in a log and in a request. Needs numpy and pyarrow only.
"""

import dataclasses
import hashlib
import typing

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from gpsd_dist.schema import ID_BITS, NUM_RESERVED_ROWS, UNKNOWN_INDEX, Feature, Manifest

Values: typing.TypeAlias = np.ndarray | tuple[np.ndarray, np.ndarray]
"""A feature's values, one per token: [tokens]. If it is a bag: (values, offsets [tokens + 1])."""
# A numerical feature is standardised and cut here, so that an outlier does not outweigh the other features of a token.
_MAX_DEVIATIONS = 5.0  # untuned
_NO_TEXT = pa.scalar(None, pa.string())


@dataclasses.dataclass(frozen=True)
class Rules:
    """Holds what was done to the raw values of a data set beyond their type: `manifest.options["reading"]`."""

    null_words: tuple[str, ...] = ()
    """Texts that stand for a missing value."""
    whole: frozenset[str] = frozenset()
    """Features whose text was spelled 101 where the log had 101.0."""
    clip: typing.Mapping[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    """Numerical feature -> the values that it was cut off at."""

    @staticmethod
    def of(manifest: Manifest) -> "Rules":
        """Reads the rules of a data set. ValueError if the manifest holds something else in their place."""
        return Rules.of_options(manifest.options.get("reading", {}))

    @staticmethod
    def of_options(given: typing.Any) -> "Rules":
        """Reads `options["reading"]` of a manifest, as `of` does."""
        try:
            clip = {str(name): (float(low), float(high)) for name, (low, high) in given.get("clip", {}).items()}
            words, whole = given.get("null_words", ()), given.get("whole", ())
            if not all(isinstance(word, str) for word in (*words, *whole)):
                raise ValueError("words must be text")
            return Rules(tuple(words), frozenset(whole), clip)
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"options.reading of the manifest is {str(given)[:200]}: {error}; build it again"
            ) from error

    def missing(self, raw: pa.StringArray) -> pa.StringArray:
        """Replaces the words for missing values by null."""
        if not self.null_words:
            return raw
        return pc.if_else(pc.is_in(raw, pa.array(self.null_words, pa.string())), _NO_TEXT, raw)

    def spelled(self, feature: Feature, raw: pa.StringArray) -> pa.StringArray:
        """Spells the ids of a feature as the data set does."""
        return pc.replace_substring_regex(raw, r"\.0+$", "") if feature.name in self.whole else raw


def plain(array: pa.Array | pa.ChunkedArray) -> pa.Array:
    """Returns the array without a dictionary or an extension, and every text as pa.string()."""
    if isinstance(array, pa.StringArray):
        return array
    array = array.combine_chunks() if isinstance(array, pa.ChunkedArray) else array
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_dictionary(array.type):
        array = array.dictionary_decode()
    kind = array.type
    is_text = pa.types.is_large_string(kind) or pa.types.is_string_view(kind) or pa.types.is_decimal(kind)
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if pa.types.is_float16(kind):
        return array.cast(pa.float32())
    return array.cast(pa.string()) if is_text or is_bytes or pa.types.is_null(kind) else array


def spelled(array: pa.Array) -> tuple[pa.StringArray, np.ndarray]:
    """Spells every value of a `plain` array in one way: trimmed text, 101 for the float 101.0, true and false.

    Null, NaN and empty text become null. The mask (bool [N]) marks floats too large to be exact: they have lost digits.
    """
    if pa.types.is_floating(array.type):
        return _spelled_floats(array)
    nowhere = np.zeros(len(array), bool)
    if pa.types.is_boolean(array.type):
        return pc.if_else(array, "true", "false"), nowhere
    found = array.cast(pa.string())
    if not pa.types.is_integer(array.type):
        found = pc.utf8_trim_whitespace(found)
        if len(found) and not text_bytes(found).min():  # a null has no bytes either
            found = pc.if_else(pc.equal(found, ""), _NO_TEXT, found)
    return found, nowhere


def _spelled_floats(array: pa.Array) -> tuple[pa.StringArray, np.ndarray]:
    """Spells whole numbers without a point."""
    limit = 2.0**53 if array.type == pa.float64() else 2.0**24
    values = array.cast(pa.float64()).to_numpy(zero_copy_only=False)
    known = ~np.isnan(values)
    is_exact = np.abs(np.where(known, values, 0)) <= limit
    is_whole = known & is_exact & (np.floor(values) == values)
    whole = pa.array(np.where(is_whole, values, 0).astype(np.int64)).cast(pa.string())
    other = pa.array(values).cast(pa.string())
    found = pc.if_else(pa.array(is_whole), whole, pc.if_else(pa.array(known), other, _NO_TEXT))
    return found, known & ~is_exact


def raw_ids(values: pa.Array | pa.ChunkedArray) -> pa.StringArray:
    """Spells ids of any Arrow type as `data_pipeline` does: null where there is none. ValueError for what is no id."""
    try:
        array = plain(values)
        if pa.types.is_nested(array.type):
            raise ValueError(f"found {array.type}, expected text or numbers; write one id per value")
        found, is_bad = spelled(array)
    except pa.ArrowInvalid as error:
        raise ValueError(f"found bytes that are no UTF-8 text ({error}), expected ids; write them as text") from error
    if is_bad.any():
        first = array[int(np.argmax(is_bad))].as_py()
        raise ValueError(f"found {first!r}, expected a number that a float holds exactly; write long numbers as text")
    return found


def text_bytes(raw: pa.StringArray) -> np.ndarray:
    """Counts the bytes of each text: int32 [N]; that of a null means nothing."""
    return np.diff(np.frombuffer(raw.buffers()[1], np.int32, len(raw) + 1, 4 * raw.offset))


def id_of(raw: pa.Array) -> np.ndarray:
    """Hashes spelled ids (`raw_ids`) to int64 [N]: md5 cut to 60 bits, plus 2; 1 where null.

    Every engine of `data_pipeline` computes the same (`data_pipeline.hashing.id_of`).
    """
    encoded = raw.dictionary_encode()  # an item often stands in a request twice, and md5 costs more than this
    texts = encoded.dictionary.cast(pa.binary()).to_pylist()
    digests = b"".join([hashlib.md5(text, usedforsecurity=False).digest() for text in texts])
    id_of_text = (np.frombuffer(digests, ">u8")[::2] >> (64 - ID_BITS)).astype(np.int64) + NUM_RESERVED_ROWS
    place = pc.fill_null(encoded.indices, len(texts)).to_numpy()
    return np.append(id_of_text, UNKNOWN_INDEX)[place]


def logarithm(values: np.ndarray) -> np.ndarray:
    """Computes sign(x) log(1 + |x|), which keeps the order, and 0: float64 [N].

    In float32 the last digit depends on the CPU (NumPy has kernels of its own for AVX512), and edges of buckets lie on
    values. In float64 it does too, but is gone once the result is float32.
    """
    values = np.asarray(values, np.float64)
    return np.copysign(np.log1p(np.abs(values)), values)


def standardise(feature: Feature, values: np.ndarray) -> np.ndarray:
    """Standardises the finite numbers of a feature by the training split, and cuts outliers: float32 [N]."""
    if feature.log:
        values = logarithm(values)
    if feature.low is not None or feature.high is not None:
        values = np.clip(values, feature.low, feature.high)
    standard = (values - feature.mean) / feature.std
    return np.clip(standard, -_MAX_DEVIATIONS, _MAX_DEVIATIONS).astype(np.float32)

"""Defines hashes that every engine computes alike: md5 of a string, read as an integer by its hexadecimal digits."""

import functools
import operator

import ibis
import ibis.expr.types as ir

from gpsd_dist import schema

HEX_DIGITS = "0123456789abcdef"
USER_HASH_DIGITS = 15  # 60 bits: fits int64 on every engine
ID_DIGITS = schema.ID_BITS // 4


def digits_to_int(text: ir.StringValue, start: int, num_digits: int) -> ir.IntegerValue:
    """Reads `num_digits` (at most 15) hexadecimal digits from `start` as a non-negative int64."""
    alphabet = ibis.literal(HEX_DIGITS)
    terms = [
        # Spark's `find` is an int32, whose products overflow. Ibis believes it an int64 and would drop a cast to int64
        # alone, so the cast goes by int16.
        alphabet.find(text.substr(start + place, 1)).cast("int16").cast("int64")
        * ibis.literal(16 ** (num_digits - 1 - place), type="int64")
        for place in range(num_digits)
    ]
    return functools.reduce(operator.add, terms)


def bucket(user_id: ir.StringValue, num_buckets: int) -> ir.IntegerValue:
    """Assigns a user to a bucket, 0 ... num_buckets - 1 (int64, at most 4,096), by digits that `user_hash` leaves."""
    return (digits_to_int(user_id.hexdigest("md5"), USER_HASH_DIGITS, 3) % num_buckets).cast("int64")


def user_hash(user_id: ir.StringValue) -> ir.IntegerValue:
    """Hashes a user to 60 bits, equal in every data set and on every engine; it also serves to split by user."""
    return digits_to_int(user_id.hexdigest("md5"), 0, USER_HASH_DIGITS)


def id_of(raw_id: ir.StringValue) -> ir.IntegerValue:
    """Makes the id of a raw id without a vocabulary, 2 ... schema.MAX_ID: its md5, cut to 60 bits. Null becomes 1."""
    number = digits_to_int(raw_id.hexdigest("md5"), 0, ID_DIGITS) + ibis.literal(schema.NUM_RESERVED_ROWS, type="int64")
    return ibis.coalesce(number.cast("int64"), ibis.literal(schema.UNKNOWN_INDEX, type="int64"))

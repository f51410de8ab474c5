"""The targets of the additive recurrence on the CPU, and where they are found among the results."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from page.targets import Documents, Measured, Target, mebibytes, percent, times, worst

DTYPES = ("bfloat16", "float32")
LONG_LENGTHS = (4096, 65536, 1048576)
SHORTEST_BESIDE_SDPA, SDPA_LENGTH = 1024, 65536
FORMULA_MICROSECONDS = 40  # per token, on the machine that the targets were set with
ONE_HEAD = {
    "one head, causal": "causal forward",
    "one head, causal backward": "causal backward",
    "one head, unordered": "forward without order",
    "one head, unordered backward": "backward without order",
}
MOST_MEMORY = 64 * 2**20

Result = dict[str, Any]
Find = Callable[[Documents], Measured | None]


def timings(documents: Documents, measurement: str, **wanted: object) -> Iterator[Result]:
    """Results of a measurement that were not left out and have these values."""
    for result in documents.get("recurrence", {}).get("timings", ()):
        values = {"measurement": measurement, "error": None} | wanted
        if all(result.get(name) == value for name, value in values.items()):
            yield result


def ratio(measurement: str, dtype: str, name: str, at_most: bool = False) -> Find:
    """The worst ratio of the time of `name` to that of the first call beside it, over lengths."""

    def find(documents: Documents) -> Measured | None:
        results = timings(documents, measurement, dtype=dtype, implementation=name)
        return worst((Measured(result["ratio"], f"N = {result['length']:,}") for result in results), at_most)

    return find


def beside_formula(dtype: str) -> Find:
    """The smallest ratio to the chunked formula, and what that takes on this machine."""

    def measured(result: Result) -> Measured:
        microseconds = result["seconds"]["median"] / result["length"] * 1e6
        limit = ""
        if microseconds < FORMULA_MICROSECONDS:
            speed = times(FORMULA_MICROSECONDS / microseconds * result["ratio"])
            limit = f"{speed} the formula of the targets' machine, which takes {FORMULA_MICROSECONDS} us per token"
        where = f"N = {result['length']:,}; the formula takes {microseconds:.1f} us per token"
        return Measured(result["ratio"], where, limit)

    def find(documents: Documents) -> Measured | None:
        return worst(map(measured, timings(documents, "causal", dtype=dtype, implementation="formula")))

    return find


def beside_products(dtype: str) -> Find:
    """The largest time of the recurrence relative to its two matrix products."""

    def find(documents: Documents) -> Measured | None:
        results = timings(documents, "unordered", dtype=dtype, implementation="products")
        return worst((Measured(1 / result["ratio"], f"N = {result['length']:,}") for result in results), at_most=True)

    return find


def spread_of_lengths(dtype: str) -> Find:
    """The longest time per token relative to the shortest, from 4K to 1M tokens."""

    def find(documents: Documents) -> Measured | None:
        per_token = {
            result["length"]: result["seconds"]["median"] / result["length"]
            for result in timings(documents, "length", dtype=dtype, implementation="recurrence")
            if LONG_LENGTHS[0] <= result["length"] <= LONG_LENGTHS[-1]
        }
        if len(per_token) < 2:
            return None
        slow, fast = max(per_token, key=per_token.__getitem__), min(per_token, key=per_token.__getitem__)
        missing = [f"{length:,}" for length in LONG_LENGTHS if length not in per_token]
        where = f"N = {slow:,} beside {fast:,}, {per_token[fast] * 1e6:.2f} us per token"
        return Measured(
            per_token[slow] / per_token[fast], where, missing="N = " + ", ".join(missing) if missing else ""
        )

    return find


def beside_sdpa(dtype: str) -> Find:
    """The smallest ratio to torch SDPA over the lengths that the target speaks of, where both were measured."""

    def find(documents: Documents) -> Measured | None:
        return worst(
            Measured(result["ratio"], f"N = {result['length']:,}")
            for measurement in ("causal", "length")
            for result in timings(documents, measurement, dtype=dtype, implementation="sdpa")
            if result["length"] >= SHORTEST_BESIDE_SDPA
        )

    return find


def beside_sdpa_at(length: int, dtype: str) -> Find:
    """The ratio to torch SDPA at one length."""

    def find(documents: Documents) -> Measured | None:
        results = timings(documents, "length", dtype=dtype, implementation="sdpa", length=length)
        return worst(Measured(result["ratio"], f"SDPA takes {result['seconds']['median']:.1f} s") for result in results)

    return find


def peak_memory(dtype: str) -> Find:
    """Bytes beyond the output of one pass over a million tokens."""

    def find(documents: Documents) -> Measured | None:
        return worst(
            (
                Measured(found["beyond_output_bytes"], f"N = {found['length']:,}")
                for found in documents.get("recurrence", {}).get("memory", ())
                if found["dtype"] == dtype and found["length"] >= LONG_LENGTHS[-1] and not found.get("error")
            ),
            at_most=True,
        )

    return find


def decoding_share(dtype: str, batch: int, beyond_call: bool) -> Find:
    """The time of reading and writing the state as a share of the call's, or of what that takes beyond an empty call.

    An empty call has a state of one number: what is left is what depends on the state.
    """

    def find(documents: Documents) -> Measured | None:
        seconds = {
            result["implementation"]: result["seconds"]["median"]
            for result in timings(documents, "decoding", dtype=dtype, batch=batch)
        }
        if not seconds:
            return None
        memory, recurrence = seconds["memory"], seconds["recurrence"]
        where = f"{memory * 1e6:.1f} of {recurrence * 1e6:.1f} us"
        if beyond_call:
            memory -= seconds["memory call"]
            recurrence -= seconds["recurrence call"]
            where = f"{memory * 1e6:.1f} of {recurrence * 1e6:.1f} us; the empty call: "
            where += f"{seconds['recurrence call'] * 1e6:.1f} us"
        return Measured(memory / recurrence, where)

    return find


def layered_decoding_share(dtype: str, batch: int) -> Find:
    """The same where the states of a model's layers take turns, so that none stays in the caches."""

    def find(documents: Documents) -> Measured | None:
        results = timings(documents, "decoding in layers", dtype=dtype, batch=batch, implementation="memory")
        return worst(Measured(result["ratio"], f"{result['layers']} layers") for result in results)

    return find


def recurrence_targets() -> Iterator[Target]:
    """All of them, in the order of the table."""
    for dtype in DTYPES:
        yield Target(f"causal forward, {dtype}, speed of the chunked formula", 10.0, beside_formula(dtype), times)
    for dtype in DTYPES:
        text = f"causal forward, {dtype}, longest time per token from 4K to 1M relative to the shortest"
        yield Target(text, 1.1, spread_of_lengths(dtype), times, at_most=True)
    for dtype in DTYPES:
        text = f"causal forward, {dtype}, memory beyond the output at 1M"
        yield Target(text, MOST_MEMORY, peak_memory(dtype), mebibytes, at_most=True)
    for dtype in DTYPES:
        yield Target(f"causal forward, {dtype}, speed of torch SDPA from 1K on", 1.0, beside_sdpa(dtype), times)
    for dtype in DTYPES:
        found = beside_sdpa_at(SDPA_LENGTH, dtype)
        yield Target(f"causal forward, {dtype}, speed of torch SDPA at 64K", 150.0, found, times)
    for dtype in DTYPES:
        text = f"forward without order, {dtype}, time relative to its two matrix products"
        yield Target(text, 1.3, beside_products(dtype), times, at_most=True)
    for dtype in DTYPES:
        for batch in (1, 16):
            text = f"decoding, {dtype}, B = {batch}, share of the time in which its state is read and written"
            yield Target(text, 0.8, decoding_share(dtype, batch, beyond_call=False), percent)
            text += ", calls taken off"
            yield Target(text, 0.8, decoding_share(dtype, batch, beyond_call=True), percent)
            text = f"decoding in layers, {dtype}, B = {batch}, share of the time in which states are read and written"
            yield Target(text, 0.8, layered_decoding_share(dtype, batch), percent)
    for dtype in DTYPES:
        for measurement, text in ONE_HEAD.items():
            found = ratio(measurement, dtype, "one thread")
            yield Target(f"one head, {text}, {dtype}, two threads against one", 1.7, found, times)
    for dtype in DTYPES:
        for measurement, order in (("backward", "causal"), ("unordered backward", "without order")):
            found = ratio(measurement, dtype, "backward", at_most=True)
            yield Target(
                f"backward, {order}, {dtype}, time relative to the forward pass", 3.0, found, times, at_most=True
            )

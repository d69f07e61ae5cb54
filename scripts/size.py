"""How much KV a model moves: bytes per token, time of a handoff on each link, hits that pay for a store."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import sys
from collections.abc import Callable, Sequence

from rich.console import Console
from rich.table import Table

from python_backends.core.errors import BatonError, ConfigError
from scripts.sizing import GIB, LINKS, SHAPES, Handoff, KVShape, Store, Work, handoff, link_rate, shape_of, store
from scripts.terminal import print_error


def _positive(kind: type[int] | type[float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a number") from None
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is not above 0")
        return value

    return parse


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    names = ", ".join(shape.name for shape in SHAPES)
    parser = argparse.ArgumentParser(
        prog="scripts/size", description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("model", metavar="MODEL", help=f"a model directory, a config.json, or one of: {names}")
    parser.add_argument("--kv-dtype", default="", metavar="DTYPE", help="of the KV cache; empty: the model's own")
    parser.add_argument("--prompt", type=_positive(int), default=2000, metavar="TOKENS", help="length of the prompt")
    parser.add_argument("--chunk", type=_positive(int), default=256, metavar="TOKENS", help="engine.step_tokens")
    parser.add_argument(
        "--prefill-rate",
        type=_positive(float),
        default=10_000.0,
        metavar="TOKENS/S",
        help="of one prefill worker; scripts/doctor estimates yours, scripts/loadtest measures it",
    )
    parser.add_argument(
        "--link", action="append", default=[], metavar="NAME=GBIT/S", help="only these; may be given several times"
    )
    parser.add_argument(
        "--reached", type=_positive(float), default=0.8, metavar="SHARE", help="share of a link's rate that is reached"
    )
    parser.add_argument(
        "--store-read", type=_positive(float), default=1.0, metavar="GIB/S", help="at which a worker reads from the store"
    )
    parser.add_argument(
        "--store-write", type=_positive(float), default=0.2, metavar="GIB/S", help="at which it writes; Redis is slower there"
    )
    parser.add_argument("--json", action="store_true", help="for programs; bytes, seconds and tokens")
    return parser.parse_args(arguments)


def parse_links(given: Sequence[str]) -> dict[str, float]:
    """`NAME=GBIT/S` -> Gbit/s by name; the usual ones when none is given. Raises ConfigError."""
    links = {}
    for text in given:
        name, _, rate = text.rpartition("=")
        try:
            links[name] = float(rate)
        except ValueError:
            links[name] = 0.0
        if not name or not 0 < links[name] < math.inf:
            raise ConfigError(f"--link: {text!r} is not NAME=GBIT/S, such as mine=40")
    return links or dict(LINKS)


def _print(console: Console, shape: KVShape, dtype: str, work: Work, handoffs: Sequence[Handoff], kept: Store) -> None:
    def say(text: str) -> None:
        console.print(text, highlight=False, markup=False)

    say(
        f"{shape.name}: {work.token_bytes / 1024:,.1f} KiB of KV per token ({dtype}); {work.prompt:,} tokens are "
        f"{work.prompt_bytes / 2**20:,.1f} MiB, computed in {_time(work.prefill_s)} at {work.prefill_rate:,.0f} tokens/s."
    )
    say(f"Moving KV beats computing it above {work.break_even * 8 / 1e9:,.2f} Gbit/s.\n")
    table = Table("link", box=None, pad_edge=False)
    for title in ("Gbit/s reached", "handoff", "of TTFT", "overlapped", "of TTFT", "prompts/s"):
        table.add_column(title, justify="right")
    for each in handoffs:
        table.add_row(
            each.link,
            f"{each.bytes_s * 8 / 1e9:,.1f}",
            _time(each.whole_s),
            f"{each.whole_share:.1%}",
            _time(each.overlapped_s),
            f"{each.overlapped_share:.1%}",
            f"{each.prompts_s:,.1f}",
        )
    console.print(table)
    say(
        "\nhandoff: all after prefill; overlapped: chunks leave while later ones are computed; of TTFT: against the time of "
        "prefill.\nThe first token does not wait for either; the second does."
    )
    say(
        f"\nA store read at {kept.read_bytes_s / GIB:.2g} and written at {kept.write_bytes_s / GIB:.2g} GiB/s: the prompt is "
        f"read in {_time(kept.read_s)} and written in {_time(kept.write_s)}; a GiB holds {kept.tokens_per_gib:,} tokens."
    )
    if math.isinf(kept.hits):
        say("Reading takes longer than computing: this store never pays.")
    else:
        say(f"A hit saves {_time(kept.saved_s)}; {math.ceil(kept.hits)} pay for the write ({kept.hits:.2f} to be exact).")


def _time(seconds: float) -> str:
    for unit, factor in (("s", 1), ("ms", 1e3)):
        if seconds * factor >= 1:
            return f"{seconds * factor:,.1f} {unit}"
    return f"{seconds * 1e6:,.0f} us"


def main(arguments: list[str] | None = None) -> int:
    options = parse_options(arguments)
    console = Console(soft_wrap=True)
    try:
        shape = shape_of(options.model)
        dtype = options.kv_dtype or shape.dtype
        work = Work(options.prompt, options.chunk, options.prefill_rate, shape.token_bytes(dtype))
        links = parse_links(options.link)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    handoffs = [handoff(work, name, link_rate(gbit, options.reached)) for name, gbit in links.items()]
    kept = store(work, options.store_read * GIB, options.store_write * GIB)
    if options.json:
        print(json.dumps(_as_json(shape, dtype, work, handoffs, kept), indent=2))
    else:
        _print(console, shape, dtype, work, handoffs, kept)
    return 0


def _as_json(shape: KVShape, dtype: str, work: Work, handoffs: Sequence[Handoff], kept: Store) -> dict[str, object]:
    """Infinity is no JSON: `hits` is null when a store never pays."""
    return {
        "model": dataclasses.asdict(shape) | {"kv_dtype": dtype},
        "work": dataclasses.asdict(work)
        | {"prompt_bytes": work.prompt_bytes, "prefill_s": work.prefill_s, "break_even_bytes_s": work.break_even},
        "handoffs": [dataclasses.asdict(each) for each in handoffs],
        "store": dataclasses.asdict(kept) | {"hits": None if math.isinf(kept.hits) else kept.hits},
    }


if __name__ == "__main__":
    sys.exit(main())

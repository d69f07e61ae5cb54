"""The mixed load on Baton and whatever it is compared with, in turns: steady streams, and a long prompt every few seconds.

    scripts/bench mixed --period 6 --rounds 5 --against aggregated,vllm,vllm-default
    scripts/bench mixed --model DIR --scenario trace.jsonl --shape ramp --against aggregated,vllm
    scripts/bench mixed --config configs/1p1d.yaml --against always-remote,always-local,aggregated

Baton is --config. Against it: `aggregated` (configs/aggregated.yaml), a mode of the router (--config in that mode), NAME=FILE
(a deployment file), and rivals by name (scripts/rivals). All serve --model. What is not listed below goes to scripts/compare,
whose --help lists it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from rich.console import Console

from python_backends.core.config import load_deployment
from python_backends.core.errors import BatonError, ConfigError
from python_backends.core.paths import repository_root, resolve_model
from scripts import compare
from scripts.loadtest import new_directory
from scripts.rivalry.servers import find_rival
from scripts.terminal import print_error

_AGGREGATED = "aggregated"
_MODES = ("adaptive", "always-remote", "always-local")  # router.mode


def deployment_with(config: Path, target: Path, model: Path | None, mode: str = "") -> Path:
    """The same deployment with another model, or another router.mode, as the file `target`. Raises ConfigError."""
    load_deployment(config)
    if model is None and not mode:
        return config
    deployment = yaml.safe_load(config.read_text())
    if model is not None:
        deployment["model"] = {**deployment.get("model", {}), "path": str(model)}
    if mode:
        deployment["router"] = {**deployment.get("router", {}), "mode": mode}
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(f"# {config.name}, changed by scripts/bench\n{yaml.safe_dump(deployment, sort_keys=False)}")
    return target


def sides(config: Path, model: Path | None, against: Sequence[str], out: Path) -> list[str]:
    """As scripts/compare takes them. Deployment files with another model are written to `out`. Raises ConfigError."""
    found = [f"baton={deployment_with(config, out / 'baton.yaml', model)}"]
    for text in against:
        name, _, where = text.partition("=")
        if find_rival(where or name):
            found.append(text)
            continue
        mode = "" if where or name not in _MODES else name
        if not where and not mode and name != _AGGREGATED:
            known = ", ".join((_AGGREGATED, *_MODES))
            raise ConfigError(f"--against: {text!r} is neither {known} nor NAME=FILE nor a rival of scripts/rivals")
        file = Path(where) if where else config if mode else repository_root() / "configs" / "aggregated.yaml"
        found.append(f"{name}={deployment_with(file, out / f'{name}.yaml', model, mode)}")
    return found


def _parse(argv: Sequence[str] | None) -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(
        prog="scripts/bench mixed",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    default = repository_root() / "configs" / "default.yaml"
    parser.add_argument("--config", type=Path, default=default, help="deployment file (default: configs/default.yaml)")
    parser.add_argument("--model", default="", help="as model.path in a deployment file; default: what --config has")
    parser.add_argument("--against", default=_AGGREGATED, help=f"comma-separated (default: {_AGGREGATED})")
    parser.add_argument("--out", type=Path, help="directory of the results (default: a new one under build/loadtest)")
    return parser.parse_known_args(argv)


def main(argv: Sequence[str] | None = None) -> int:
    parsed, rest = _parse(argv)
    try:
        out = (parsed.out or new_directory("mixed")).absolute()
        model = resolve_model(parsed.model).absolute() if parsed.model else None
        given = sides(parsed.config, model, parsed.against.split(","), out)
    except BatonError as error:
        print_error(Console(stderr=True), error)
        return 1
    return compare.main([*given, "--out", str(out), *rest])


if __name__ == "__main__":
    sys.exit(main())

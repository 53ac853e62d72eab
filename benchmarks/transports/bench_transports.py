"""Transports against the bare library under them, in the same processes.

Prints a table and writes JSON (--json FILE; default build/bench-transports.json). Believe the ratios: the absolute
figures are this machine's, at this moment.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

from edm.config.options import build_options
from edm.registry import Registry

HERE = Path(__file__).parent


def run(transport, options):
    spec = Registry().transport(transport)
    built = build_options(spec.options, options, dict.fromkeys(options, "bench"), transport)
    with tempfile.TemporaryDirectory(prefix="edm-bench-") as directory:
        (Path(directory) / "bench.json").write_text(json.dumps({"transport": transport, "options": options}))
        compile_ready(Path(directory))
        peer = (sys.executable, str(HERE / "peer.py"))
        plan = spec.plan(built, (*peer, "dms", directory), (*peer, "dm-handler", directory))
        environment = {**os.environ, **plan.environment}
        processes = [subprocess.Popen(command, env=environment) for command in plan.commands]
        for process in processes:
            if process.wait(120):
                sys.exit(f"{transport}: a process ended with status {process.returncode}")
        return json.loads((Path(directory) / "results.json").read_text())


def compile_ready(directory):
    source, made = HERE / "ready.c", directory / "ready.so"
    native = HERE.parents[1] / "native"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", f"-I{native}", "-o", made, source], check=True)


def table(results):
    yield (
        f"{'':8}{'4 KiB p50':>11}{'bare':>8}{'ratio':>7}{'256 KiB p50':>13}{'bare':>8}{'ratio':>7}"
        f"{'1 channel':>13}{'2':>13}{'4 requests/s':>14}{'idle CPU':>10}"
    )
    for name, result in results.items():
        cells = []
        for pages, width in (("1", 11), ("64", 13)):
            bare = result["bare"].get(pages, {}).get("p50_us")
            cells.append(f"{result['fetch'][pages]['p50_us']:{width - 3}.1f} µs")
            cells.append(f"{bare:8.1f}{result['ratio'][pages]:7.2f}" if bare else f"{'–':>8}{'–':>7}")
        rates = result["requests_per_s"]
        requests = f"{rates['1']:13,.0f}{rates['2']:13,.0f}{rates['4']:14,.0f}"
        yield f"{name:8}{''.join(cells)}{requests}{result['idle_cpu']:10.1%}"


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", type=Path, default=HERE.parents[1] / "build" / "bench-transports.json")
    parser.add_argument("transports", nargs="*", default=["inproc", "mpi", "zmq"])
    arguments = parser.parse_args()
    results = {name: run(name, {}) for name in arguments.transports}
    print("\n".join(table(results)))
    document = {"when": datetime.now(UTC).isoformat(), "cpus": os.cpu_count(), "results": results}
    arguments.json.parent.mkdir(exist_ok=True)
    arguments.json.write_text(json.dumps(document, indent=2))


if __name__ == "__main__":
    main()

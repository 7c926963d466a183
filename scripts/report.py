"""The report of a run, as files or as a page that is live while the run goes on.

python scripts/report.py --config=configs/demo.py     # writes report.md and report.html to
                                                      # $NANOCHAT_BASE_DIR/runs/<run>/report/
python scripts/report.py --serve                      # all runs, at http://127.0.0.1:8001/report

--port=N     0: any that is free (8001)
--host=NAME  listen beyond this machine, like 0.0.0.0: everybody who reaches the port can look
--until=PID  serve until this process has ended
"""

import argparse
import sys

from nanochat_jax.common import UserError, log, run_dir, run_main
from nanochat_jax.config import load, parse_argv
from nanochat_jax.report.page import make_report


def arguments(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--until", type=int)
    try:
        args, unknown = parser.parse_known_args(argv)
        if unknown:
            raise argparse.ArgumentError(None, f"unknown argument {unknown[0]!r}")
    except argparse.ArgumentError as error:
        raise UserError(f"{error}; --help shows what there is") from None
    return args


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args, config = arguments(rest), load(path, overrides)
    if args.serve:
        from nanochat_jax.report.live import serve

        names_run = path.name != "default.py" or "run.name" in overrides
        serve(args.host, args.port, args.until, config.run.name if names_run else None)
        return
    for file in make_report(run_dir(config.run.name)):
        log(f"wrote {file}")


if __name__ == "__main__":
    run_main(main)

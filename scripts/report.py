"""The report of a run, as files or as a page that is live while the run goes on.

python scripts/report.py --config=configs/demo.py     # writes report.md and report.html to
                                                      # $NANOCHAT_BASE_DIR/runs/<run>/report/
python scripts/report.py --serve                      # all runs, at http://127.0.0.1:8001/report

--port=N     0: any that is free (8001)
--host=NAME  listen beyond this machine, like 0.0.0.0: everybody who reaches the port can look
--until=PID  serve until this process has ended
"""

import argparse
import os
import socket
import sys
import threading
import time
from urllib.parse import quote

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


def serve(host: str, port: int, until: int | None, path: str) -> None:
    import psutil
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import RedirectResponse
    from starlette.routing import Route

    from nanochat_jax.report.live import ROUTES
    from nanochat_jax.serve.guard import Guard

    here = ("127.0.0.1", "localhost", "[::1]")  # what Host may say
    home = Route("/", lambda _: RedirectResponse("/report"))
    app = Guard(
        Starlette(routes=[home, *ROUTES]),
        key="",
        hosts=here if host in (*here, "::1") else (),
        max_body_bytes=0,
        open_paths=(),
        on_end=lambda *_: None,
    )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        sock = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        what = "try another --port (0 is any that is free)"
        raise UserError(f"{host}:{port} cannot be listened at ({error}); {what}") from None
    os.nice(10)  # training goes first
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))

    def end_with_it() -> None:
        while psutil.pid_exists(until or 0):
            time.sleep(1)
        server.should_exit = True

    if until:
        threading.Thread(target=end_with_it, daemon=True).start()
    shown = f"[{host}]" if ":" in host else host
    log(f"watch it: http://{shown}:{sock.getsockname()[1]}{path}")
    server.run(sockets=[sock])


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args, config = arguments(rest), load(path, overrides)
    if args.serve:
        names_run = path.name != "default.py" or "run.name" in overrides
        page = f"/report/{quote(config.run.name)}" if names_run else "/report"
        return serve(args.host, args.port, args.until, page)
    for file in make_report(run_dir(config.run.name)):
        log(f"wrote {file}")


if __name__ == "__main__":
    run_main(main)

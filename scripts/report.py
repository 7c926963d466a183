"""The report of a run, as files or as a page that is live while the run goes on.

python scripts/report.py --config=configs/demo.py     # writes report.md and report.html to
                                                      # $NANOCHAT_BASE_DIR/runs/<run>/report/
python scripts/report.py --serve                      # all runs, at http://127.0.0.1:8001/report

--port=N     0: any that is free (8001)
--host=NAME  listen beyond this machine, like 0.0.0.0: everybody who reaches the port can look
--until=PID  serve until this process has ended
"""

import os
import sys
import threading
import time
from urllib.parse import quote

from nanochat_jax.common import log, run_dir, run_main
from nanochat_jax.config import load, parse_argv, parse_options
from nanochat_jax.report.page import make_report


def serve(host: str, port: int, until: int, path: str) -> None:
    import psutil
    import uvicorn
    from starlette.applications import Starlette
    from starlette.responses import RedirectResponse
    from starlette.routing import Route

    from nanochat_jax.report.live import ROUTES
    from nanochat_jax.serve.guard import Guard, access_of, address, open_socket

    hosts = access_of(host, "", True).hosts
    no_one = {"key": "", "max_body_bytes": 0, "open_paths": (), "on_end": lambda *_: None}
    routes = [Route("/", lambda _: RedirectResponse("/report")), *ROUTES]
    app, sock = Guard(Starlette(routes=routes), hosts=hosts, **no_one), open_socket(host, port)
    os.nice(10)  # training goes first
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=1))

    def end_with_it() -> None:
        while psutil.pid_exists(until):
            time.sleep(1)
        server.should_exit = True

    if until:
        threading.Thread(target=end_with_it, daemon=True).start()
    sock.listen()  # before others are told
    log(f"watch it: {address(sock)}{path}")
    server.run(sockets=[sock])


def main() -> None:
    path, overrides, rest = parse_argv(sys.argv[1:], __doc__)
    args = parse_options(rest, flags=["serve"], port=8001, host="127.0.0.1", until=0)
    config = load(path, overrides)
    if args.serve:
        names_run = path.name != "default.py" or "run.name" in overrides
        page = f"/report/{quote(config.run.name)}" if names_run else "/report"
        return serve(args.host, args.port, args.until, page)
    for file in make_report(run_dir(config.run.name)):
        log(f"wrote {file}")


if __name__ == "__main__":
    run_main(main)

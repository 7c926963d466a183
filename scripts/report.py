"""Write the report of a run, from what it has left so far: report.md and report.html.

  python scripts/report.py --config=configs/demo.py

They go to $NANOCHAT_BASE_DIR/runs/<config.run.name>/report/.
"""

from nanochat_jax.common import log, run_dir, run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.report import make_report


def main() -> None:
    config = load_from_argv(__doc__)
    for path in make_report(run_dir(config.run.name)):
        log(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)

"""Write report.md and report.html of a run to $NANOCHAT_BASE_DIR/runs/<config.run.name>/report/.

python scripts/report.py --config=configs/demo.py
"""

from nanochat_jax.common import log, run_dir, run_main
from nanochat_jax.config import load_from_argv
from nanochat_jax.report.page import make_report


def main() -> None:
    config = load_from_argv(__doc__)
    for path in make_report(run_dir(config.run.name)):
        log(f"wrote {path}")


if __name__ == "__main__":
    run_main(main)

"""What the sandbox for generated programs enforces on this machine: python scripts/sandbox.py"""

from nanochat_jax.common import log, run_main
from nanochat_jax.tools.sandbox import statement


def main() -> None:
    log("\n".join(statement()))


if __name__ == "__main__":
    run_main(main)

"""Parity of a whole folder of reference numbers, and the table that tells how it went.

Every file is compared, listed as belonging to what does not exist yet, or a miss. Layout and
tolerances are those of tests/goldens/README.md.
"""

from pathlib import Path

import jax

from nanochat_jax.common import UserError, aligned
from nanochat_jax.parity.core import compare_core
from nanochat_jax.parity.model import compare_model
from nanochat_jax.parity.reference import Row, collect, miss, read
from nanochat_jax.parity.scaling import compare_scaling
from nanochat_jax.parity.text import compare_text

# The files read together, and the function (folder, *files, ...) that compares them.
COMPARISONS = {
    ("tokenizer.json", "text.json"): compare_text,
    ("classic.npz", "classic.json"): compare_model,
    ("modern.npz", "modern.json"): compare_model,
    ("classic_scaling.json",): compare_scaling,
    ("modern_scaling.json",): compare_scaling,
    ("core_model.npz", "core.json"): compare_core,
}
DESCRIPTION = "README.md"
NOT_COVERED = {
    "hf_nanochat": "export to Hugging Face",
    "upstream_classic": "import of upstream checkpoints",
    "upstream_modern": "import of upstream checkpoints",
    "upstream_tokenizer.pkl": "import of upstream checkpoints",
}
HEADER = ("file", "what", "compared", "largest difference", "tolerance", "result", "")


def compare_folder(folder: Path, core_data: Path | None) -> tuple[list[Row], list[str]]:
    """(everything compared, the entries that are not covered yet).

    core_data: folder of CORE's tasks; without it only those that need no data are compared.
    """
    if not folder.is_dir():
        raise UserError(f"got {folder}, expected a folder of reference numbers like tests/goldens")
    known = [file for files in COMPARISONS for file in files]
    rows = [row for files in COMPARISONS for row in compare_files(folder, files, core_data)]
    rows.sort(key=lambda row: known.index(row.file))
    entries = sorted(path.name for path in folder.iterdir())
    unknown = set(entries) - {*known, *NOT_COVERED, DESCRIPTION}
    rows += [miss(name, "all", "no comparison reads it") for name in sorted(unknown)]
    return rows, [name for name in entries if name in NOT_COVERED]


def compare_files(folder: Path, files: tuple[str, ...], core_data: Path | None = None) -> list[Row]:
    """Everything in files that are read together; a key that no comparison reads is a miss."""
    references = []
    for file in files:
        try:
            references.append(read(folder / file))
        except UserError as error:
            return [miss(file, "all", str(error))]
    more = {"data": core_data} if "core.json" in files else {}
    # Full float32 on one device, whatever the process is set to.
    highest, one = jax.default_matmul_precision("highest"), jax.default_device(jax.devices()[0])
    with highest, one, jax.enable_x64(False):
        rows = list(collect(files[0], "all", COMPARISONS[files](folder, *references, **more)))
    if not any(row.what == "all" for row in rows):
        rows += [row for reference in references for row in reference.unread()]
    return rows


def table(rows: list[Row], not_covered: list[str]) -> str:
    """Aligned columns, one line a row, notes behind it; then the entries not covered, a summary."""
    cells: list[tuple[str, ...]] = [HEADER]
    for row in rows:
        tolerance = f"{row.tolerance:g}" if row.tolerance else "exact"
        result = ("ok" if row.compared else "-") if row.ok else "MISS"
        numbers = (f"{row.compared:,}", f"{row.difference:.2g}", tolerance)
        cells.append((row.file, row.what, *numbers, result, row.note))
    for name in not_covered:
        cells.append((name, NOT_COVERED[name], "", "", "", "not covered yet", ""))
    misses = [row.file for row in rows if not row.ok]
    counted = sum(row.compared for row in rows)
    told = f"{len(rows) - len(misses)} of {len(rows)} rows ok ({counted:,} values compared)"
    told += f", {len(not_covered)} entries not covered yet" if not_covered else ""
    told = f"NO parity: {told}, {len(misses)} misses in " if misses else f"parity: {told}"
    told += ", ".join(sorted(set(misses)))
    return "\n".join([*aligned(cells, left=(0, 1, 5, 6)), "", told])

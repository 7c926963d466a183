"""Parity of a whole folder of reference numbers, and the table that tells how it went.

Every file is compared, listed as belonging to a stage that does not exist yet, or a miss. Layout
and tolerances are those of tests/goldens/README.md.
"""

from functools import partial
from pathlib import Path

from nanochat_jax.common import UserError
from nanochat_jax.parity.arrays import compare_model
from nanochat_jax.parity.core import FILES as CORE_FILES
from nanochat_jax.parity.core import compare_core
from nanochat_jax.parity.rows import Row, not_comparable
from nanochat_jax.parity.scaling import compare_scaling
from nanochat_jax.parity.text import TEXT_FILE, TOKENIZER_FILE, compare_text

COMPARISONS = (
    ((TOKENIZER_FILE, TEXT_FILE), compare_text),
    (("classic.npz", "classic.json"), partial(compare_model, generation="classic")),
    (("modern.npz", "modern.json"), partial(compare_model, generation="modern")),
    (("classic_scaling.json",), partial(compare_scaling, generation="classic")),
    (("modern_scaling.json",), partial(compare_scaling, generation="modern")),
)
DESCRIPTION = "README.md"
NOT_COVERED = {
    "hf_nanochat": "export to Hugging Face",
    "upstream_classic": "import of upstream checkpoints",
    "upstream_modern": "import of upstream checkpoints",
    "upstream_tokenizer.pkl": "import of upstream checkpoints",
}
HEADER = ("file", "what", "compared", "largest difference", "tolerance", "result")


def compare_folder(folder: Path, core_data: Path | None = None) -> tuple[list[Row], list[str]]:
    """(a row for everything compared, the entries that are not covered yet).

    core_data: folder of CORE's tasks; without it only those that need no data are compared.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"got {folder}, expected a folder of reference numbers like tests/goldens")
    comparisons = (*COMPARISONS, (CORE_FILES, partial(compare_core, data=core_data)))
    rows = [row for _, compare in comparisons for row in compare(folder)]
    files = [file for files, _ in comparisons for file in files]
    rows.sort(key=lambda row: files.index(row.file))
    entries = sorted(path.name for path in folder.iterdir())
    known = {*files, *NOT_COVERED, DESCRIPTION}
    unknown = [name for name in entries if name not in known]
    rows += [not_comparable(name, "all", "no comparison reads it") for name in unknown]
    return rows, [name for name in entries if name in NOT_COVERED]


def table(rows: list[Row], not_covered: list[str]) -> str:
    """Aligned columns, one line a row, notes behind it; then the entries not covered, a summary."""
    cells = [
        (
            row.file,
            row.what,
            f"{row.compared:,}",
            f"{row.difference:.2g}",
            f"{row.tolerance:g}" if row.tolerance else "exact",
            ("ok" if row.compared else "-") if row.ok else "MISS",
        )
        for row in rows
    ]
    cells += [(name, NOT_COVERED[name], "", "", "", "not covered yet") for name in not_covered]
    widths = [max(len(line[i]) for line in [HEADER, *cells]) for i in range(len(HEADER))]
    notes = [""] + [row.note for row in rows] + [""] * len(not_covered)
    lines = []
    for line, note in zip([HEADER, *cells], notes, strict=True):
        columns = [
            cell.rjust(width) if i in (2, 3, 4) else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        lines.append(("  ".join(columns) + f"  {note}").rstrip())
    return "\n".join([*lines, "", summary(rows, not_covered)])


def summary(rows: list[Row], not_covered: list[str]) -> str:
    misses = [row for row in rows if not row.ok]
    values = sum(row.compared for row in rows)
    told = f"{len(rows) - len(misses)} of {len(rows)} rows ok ({values:,} values compared)"
    told += f", {len(not_covered)} entries not covered yet" if not_covered else ""
    if not misses:
        return f"parity: {told}"
    files = ", ".join(sorted({row.file for row in misses}))
    return f"NO parity: {told}, {len(misses)} misses in {files}"

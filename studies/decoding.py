"""What decoding a share of the masked patches saves and costs: `python -m studies.decoding`.

The demo's images, store and student, as `studies.rils` has them, by MILAN's objective and by
pixels; three seeds. Whatever is done is skipped, so the same line goes on after a stop.
"""

from __future__ import annotations

from functools import partial

from studies.rils import METHODS, Runs
from studies.steps import Figures, flags, markdown

SHARES = (1.0, 0.5, 0.25)
MEASURES = ("k-NN", "linear")


def main() -> None:
    """All runs and their figures, seed by seed, then the table."""
    parser = flags("decoding", __doc__)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--objectives", nargs="+", default=["MILAN", "pixels"])
    given = parser.parse_args()
    runs, figures = Runs(given.work, given.epochs), Figures(given.out)
    runs.extract()
    methods = {
        f"{name}, {share:.0%} decoded": METHODS[name] | {"decode_fraction": share}
        for name in given.objectives
        for share in SHARES
    }
    for seed in range(given.seeds):
        for method, settings in methods.items():
            name = method.replace(", ", "-").replace("%", "")
            pretrain = partial(runs.train, name, seed, **settings)
            figures.measure(method, seed, "CPU s", pretrain)
            for measure in MEASURES:
                figures.measure(method, seed, measure, partial(runs.probe, name, seed, measure))
    measures = (*MEASURES, "CPU s")
    rows = [[method, *(figures.cell(method, m) for m in measures)] for method in methods]
    print("\n" + markdown([["", *measures], *rows]))


if __name__ == "__main__":
    main()

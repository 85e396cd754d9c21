"""Draws epochs_strategies.svg, the picture of the README, from finished runs: AUC on valid over epochs, by strategy.

    python docs/figures/epochs_strategies.py RUNS > docs/figures/epochs_strategies.svg

RUNS holds s0/nt, s0/st, ... s2/ft_sf, as docs/results.md trains them. A line is the mean over seeds, its band their
range. The colours follow the reader's light or dark mode.
"""

import json
import pathlib
import sys

LOOKS = {  # strategy -> (class, label, what it is)
    "ft_sf": ("e", "FT&amp;SF", "both pretrained, table frozen"),
    "st_sf": ("d", "ST&amp;SF", "table pretrained and frozen"),
    "ft": ("c", "FT", "table and tower pretrained"),
    "st": ("b", "ST", "table pretrained"),
    "nt": ("a", "NT", "from scratch"),
}
STYLE = """text{font:14px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1c2333}.s{font-size:12.5px;fill:#4a5468}
.m{text-anchor:middle}.r{text-anchor:end}.bg{fill:#fbfcfe;stroke:#d5dbe8}.g{stroke:#d9dfea}
.l{fill:none;stroke-width:2.6}.f{opacity:.16}
.a{stroke:#555d6e}.b{stroke:#c77a1f}.c{stroke:#b8338a}.d{stroke:#1f5fa8}.e{stroke:#20804a}
.fa{fill:#555d6e}.fb{fill:#c77a1f}.fc{fill:#b8338a}.fd{fill:#1f5fa8}.fe{fill:#20804a}
@media (prefers-color-scheme:dark){text{fill:#e6e9f2}.s{fill:#aeb8cc}.bg{fill:#1b1f2a;stroke:#39415a}.g{stroke:#313850}
.a{stroke:#b3bccd}.b{stroke:#e0a050}.c{stroke:#e07cc6}.d{stroke:#7fb0f0}.e{stroke:#5fc98a}
.fa{fill:#b3bccd}.fb{fill:#e0a050}.fc{fill:#e07cc6}.fd{fill:#7fb0f0}.fe{fill:#5fc98a}}"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 860, 400, 56, 610, 46, 350
LOW, HIGH, EPOCHS = 0.50, 0.84, 12


def curve(folder):
    """(epoch, AUC) of every validation."""
    entries = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {entry["epoch"]: entry["valid/click/auc"] for entry in entries if "valid/click/auc" in entry}


def place(epoch, auc):
    x = LEFT + (RIGHT - LEFT) * epoch / EPOCHS
    y = BOTTOM - (BOTTOM - TOP) * (auc - LOW) / (HIGH - LOW)
    return f"{x:.1f} {y:.1f}"


def grid():
    for step in range(7):
        auc = 0.50 + 0.05 * step
        if auc <= HIGH:
            y = place(0, auc).split()[1]
            yield f'<path class="g" d="M{LEFT} {y}H{RIGHT}"/>'
            yield f'<text class="s r" x="{LEFT - 8}" y="{float(y) + 4}">{auc:.2f}</text>'
    for epoch in range(0, EPOCHS + 1, 2):
        x = place(epoch, LOW).split()[0]
        yield f'<text class="s m" x="{x}" y="{BOTTOM + 20}">{epoch}</text>'
    yield f'<text class="s m" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}">epochs</text>'
    title = "Click AUC on valid, Amazon Grocery"
    yield f'<text x="{LEFT - 32}" y="28">{title}</text>'


def lines(runs):
    ends = []
    for strategy, (look, label, meaning) in LOOKS.items():
        curves = [curve(folder / strategy) for folder in sorted(runs.glob("s*")) if (folder / strategy).is_dir()]
        epochs = sorted(set.intersection(*({*each} for each in curves)))
        high = [place(epoch, max(each[epoch] for each in curves)) for epoch in epochs]
        low = [place(epoch, min(each[epoch] for each in curves)) for epoch in epochs]
        mean = [place(epoch, sum(each[epoch] for each in curves) / len(curves)) for epoch in epochs]
        yield f'<path class="f f{look}" d="M{" L".join(high + low[::-1])}Z"/>'
        yield f'<path class="l {look}" d="M{" L".join(mean)}"/>'
        ends.append((float(mean[-1].split()[1]), look, label, meaning))
    below = 0.0
    for y, look, label, meaning in sorted(ends):
        below = max(y, below + 36)
        yield f'<text class="f{look}" x="{RIGHT + 12}" y="{below}" font-weight="600">{label}</text>'
        yield f'<text class="s" x="{RIGHT + 12}" y="{below + 16}">{meaning}</text>'


def main(runs):
    title = "Five strategies on Amazon Grocery over 12 epochs"
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">\n<title>{title}</title>')
    print(f'<style>{STYLE}</style><rect class="bg" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>')
    print(*grid(), *lines(runs), "</svg>", sep="\n")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))

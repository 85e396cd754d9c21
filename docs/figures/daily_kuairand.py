"""Draws daily_kuairand.svg, the picture of docs/daily.md, from daily.json of several seeds: AUC by day scored.

    python docs/figures/daily_kuairand.py RUN/daily.json ... > docs/figures/daily_kuairand.svg

A point is the mean over seeds, its thin line the 95 % interval over users, its band the range over seeds. The colours
follow the reader's light or dark mode.
"""

import json
import pathlib
import sys

LOOKS = {"from scratch": "a", "warm start": "b", "boosted trees": "e", "smoothed rates": "d", "popularity": "c"}
STYLE = """text{font:14px system-ui,-apple-system,"Segoe UI",sans-serif;fill:#1c2333}.s{font-size:12.5px;fill:#4a5468}
.m{text-anchor:middle}.r{text-anchor:end}.bg{fill:#fbfcfe;stroke:#d5dbe8}.g{stroke:#d9dfea}.l{fill:none;stroke-width:2}
.w{stroke-width:1.3}.n{stroke-width:7;opacity:.35}
.a{stroke:#1668c7}.b{stroke:#c75300}.c{stroke:#0b8457}.d{stroke:#8440c9}.e{stroke:#c81e45}
.fa{fill:#1668c7}.fb{fill:#c75300}.fc{fill:#0b8457}.fd{fill:#8440c9}.fe{fill:#c81e45}
@media (prefers-color-scheme:dark){text{fill:#e6e9f2}.s{fill:#aeb8cc}.bg{fill:#1b1f2a;stroke:#39415a}.g{stroke:#313850}
.a{stroke:#6cb2ff}.b{stroke:#ffa357}.c{stroke:#5bd49b}.d{stroke:#c8a0ff}.e{stroke:#ff7c92}
.fa{fill:#6cb2ff}.fb{fill:#ffa357}.fc{fill:#5bd49b}.fd{fill:#c8a0ff}.fe{fill:#ff7c92}}"""
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM, LOW, HIGH = 860, 400, 56, 690, 46, 350, 0.50, 0.80


def y_of(auc):
    return round(BOTTOM - (BOTTOM - TOP) * (auc - LOW) / (HIGH - LOW), 1)


def grid(names, step):
    for auc in (0.50, 0.55, 0.60, 0.65, 0.70, 0.75, 0.80):
        yield f'<path class="g" d="M{LEFT} {y_of(auc)}H{RIGHT}"/>'
        yield f'<text class="s r" x="{LEFT - 8}" y="{y_of(auc) + 4}">{auc:.2f}</text>'
    for at, name in enumerate(names):
        yield f'<text class="s m" x="{LEFT + step * (at + 0.5)}" y="{BOTTOM + 20}">{name}</text>'
    words = "day scored (UTC), by models of the day before"
    yield f'<text class="s m" x="{(LEFT + RIGHT) / 2}" y="{BOTTOM + 40}">{words}</text>'
    yield f'<text x="{LEFT - 32}" y="28">Click AUC by day, KuaiRand</text>'


def points(days, names, label, index, step):
    """Yields (x, mean, half width, least, largest) of each day on which the model was scored."""
    for at, name in enumerate(names):
        lines = [seed[name, label] for seed in days if (name, label) in seed]
        if lines:
            aucs = [line["auc"] for line in lines]
            half_width = sum(line["auc_half_width"] for line in lines) / len(lines)
            x = round(LEFT + step * (at + 0.5 + 0.08 * (index - 2)), 1)
            yield x, sum(aucs) / len(aucs), half_width, min(aucs), max(aucs)


def main(paths):
    found = [json.loads(pathlib.Path(path).read_text())["lines"]["click"] for path in paths]
    days = [{(line["day"], line["label"]): line for line in lines if line["of"] == "day"} for lines in found]
    names = sorted({day for seed in days for day, _ in seed})
    step, title = (
        (RIGHT - LEFT) / len(names),
        "Click AUC by day on KuaiRand: from scratch, warm start, and without a model",
    )
    size = f'viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}"'
    print(f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img" aria-label="{title}">\n<title>{title}</title>')
    print(f'<style>{STYLE}</style><rect class="bg" x=".5" y=".5" width="{WIDTH - 1}" height="{HEIGHT - 1}" rx="10"/>')
    print(*grid(names, step), sep="\n")
    for index, (label, look) in enumerate(LOOKS.items()):
        drawn = list(points(days, names, label, index, step))
        print(f'<path class="l {look}" d="M{" L".join(f"{x} {y_of(auc)}" for x, auc, *_ in drawn)}"/>')
        for x, auc, half_width, least, largest in drawn:
            print(f'<path class="n {look}" d="M{x} {y_of(least)}V{y_of(largest)}"/>')
            print(f'<path class="w {look}" d="M{x} {y_of(auc - half_width)}V{y_of(auc + half_width)}"/>')
            print(f'<circle class="f{look}" cx="{x}" cy="{y_of(auc)}" r="3.4"/>')
        # Lines that end within a line of text of each other keep their labels apart.
        y = y_of(drawn[-1][1]) + {"from scratch": -10, "warm start": 2}.get(label, 8)
        print(f'<text class="f{look}" x="{RIGHT + 8}" y="{y}" font-weight="600">{label}</text>')
    print("</svg>")


if __name__ == "__main__":
    main(sys.argv[1:])

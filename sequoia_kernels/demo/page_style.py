"""The style of the demo's page: colours for light and dark screens, computed where they follow a scale, and its CSS."""

from __future__ import annotations

__all__ = ["DARK", "LIGHT", "MAX_TINT", "NUM_SHADES", "STAGE_COLOURS", "contrast", "stylesheet"]

NUM_SHADES = 12  # of the scale on which nodes are coloured
MAX_TINT = 6  # steps of this many tokens and more look alike

# Text on page and card, and text on tints, has a contrast of at least 4.5 in both; python_tests/demo holds them to it.
LIGHT = {
    "page": "#f6f7f5",
    "card": "#ffffff",
    "ink": "#1b2430",
    "faint": "#566270",
    "rule": "#dfe3e2",
    "band": "#f1f4f4",
    "accent": "#1d628f",
    "plain": "#7d8792",
    "tint-1": "#f3f4f2",
    "tint-2": "#e0eff2",
    "tint-3": "#c6e3e8",
    "tint-4": "#a9d5dd",
    "tint-5": "#8cc7d2",
    "tint-6": "#70b9c7",
}
DARK = {
    "page": "#11161b",
    "card": "#181f26",
    "ink": "#e6ebf0",
    "faint": "#a0acb8",
    "rule": "#2c3640",
    "band": "#1e262e",
    "accent": "#6cc3dc",
    "plain": "#8793a0",
    "tint-1": "#222a32",
    "tint-2": "#1c343f",
    "tint-3": "#1d4250",
    "tint-4": "#1f5062",
    "tint-5": "#205e74",
    "tint-6": "#226c86",
}
_SHADES = {
    "light": ("#e3f0f2", "#9cd0d6", "#3d9bb3", "#1d628f", "#172f5b"),
    "dark": ("#22333c", "#285a6c", "#3788a2", "#62b9d2", "#c3eaf3"),
}
STAGE_COLOURS = {  # stage -> (light, dark)
    "target": ("#1d628f", "#4c9fc4"),
    "draft": ("#c98f35", "#d9a754"),
    "sample": ("#5e9c86", "#6fb59d"),
    "verify": ("#9b6a9e", "#b98abc"),
    "commit": ("#b3655c", "#cf867d"),
    "host": ("#8a93a0", "#929dab"),
    "other": ("#c3c9cf", "#56616d"),
}


def contrast(first: str, second: str) -> float:
    """Give the contrast of two "#rrggbb" colours as WCAG 2 defines it, from 1 to 21."""
    light, dark = sorted((_luminance(first), _luminance(second)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def stylesheet() -> str:
    """Give the CSS of the page."""
    light, dark = (_variables(LIGHT, "light"), _variables(DARK, "dark"))
    return f":root{{color-scheme:light dark;{light}}}\n@media (prefers-color-scheme:dark){{:root{{{dark}}}}}\n{_LAYOUT}"


def _luminance(colour: str) -> float:
    channels = (int(colour[place : place + 2], 16) / 255 for place in (1, 3, 5))
    linear = (value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels)
    return sum(weight * value for weight, value in zip((0.2126, 0.7152, 0.0722), linear))


def _mixed(colours: tuple[str, ...], place: float) -> str:
    """The colour at a place in [0, 1] of a scale."""
    lower = min(int(place * (len(colours) - 1)), len(colours) - 2)
    share = place * (len(colours) - 1) - lower
    channels = (
        round((1 - share) * int(colours[lower][i : i + 2], 16) + share * int(colours[lower + 1][i : i + 2], 16))
        for i in (1, 3, 5)
    )
    return "#" + "".join(f"{channel:02x}" for channel in channels)


def _variables(colours: dict[str, str], theme: str) -> str:
    values = dict(colours)
    for index in range(NUM_SHADES):
        shade = _mixed(_SHADES[theme], index / (NUM_SHADES - 1))
        values[f"shade-{index}"] = shade
        values[f"on-{index}"] = max("#ffffff", "#101820", key=lambda ink: contrast(ink, shade))
    for stage, pair in STAGE_COLOURS.items():
        values[f"stage-{stage}"] = pair[theme == "dark"]
    return "".join(f"--{name}:{value};" for name, value in values.items())


_LAYOUT = """\
*{box-sizing:border-box}
html{-webkit-text-size-adjust:100%;text-size-adjust:100%}
body{margin:0;background:var(--page);color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1180px;margin:0 auto;padding:clamp(20px,4vw,48px) clamp(16px,4vw,40px) 40px}
h1,h2,h3,p,dl,dd,ol,figure,pre,table{margin:0;padding:0}
h1{font-size:clamp(30px,5.2vw,52px);line-height:1.08;letter-spacing:-.022em;font-weight:680;text-wrap:balance}
h1 em{font-style:normal;color:var(--accent);font-variant-numeric:tabular-nums}
h2{font-size:23px;line-height:1.25;letter-spacing:-.012em;font-weight:650}
h3{font-size:15px;line-height:1.35;font-weight:650}
p{max-width:68ch;text-wrap:pretty}
.name{font-size:14px;font-weight:600;color:var(--faint);margin-bottom:14px}
.lead{font-size:18px;line-height:1.5;color:var(--faint);margin-top:16px}
.faint,figcaption,.meta{color:var(--faint);font-size:14px;line-height:1.5}
.meta{display:flex;flex-wrap:wrap;gap:4px 28px;margin-top:22px}
.meta div{display:flex;gap:8px;min-width:0}
.meta dd{color:var(--ink);overflow-wrap:anywhere;min-width:0}
section{margin-top:52px}
.card{background:var(--card);border:1px solid var(--rule);border-radius:12px;padding:clamp(16px,2.4vw,26px);min-width:0}
.card>h3{margin-bottom:4px}
.card>h3~.faint{margin-bottom:14px}
.columns{display:grid;grid-template-columns:minmax(0,1fr);gap:20px;margin-top:20px}
.tiles{display:grid;grid-template-columns:repeat(2,minmax(0,1fr));gap:26px 20px;align-content:center}
.tiles dt{color:var(--faint);font-size:14px;line-height:1.35}
.tiles dd.figure{font-size:clamp(28px,4vw,42px);line-height:1.1;font-weight:640;letter-spacing:-.02em;
font-variant-numeric:tabular-nums}
.tiles dd.note{color:var(--faint);font-size:14px;line-height:1.4;font-variant-numeric:tabular-nums}
.tiles .main dd.figure{color:var(--accent)}
.scroll{overflow-x:auto;max-width:100%}
.scroll:focus-visible,summary:focus-visible{outline:2px solid var(--accent);outline-offset:3px}
table{border-collapse:collapse;width:100%;font-size:15px;font-variant-numeric:tabular-nums}
caption{text-align:left;color:var(--faint);font-size:14px;padding-bottom:8px}
th,td{padding:7px 0 7px 20px;text-align:right;font-weight:400;border-top:1px solid var(--rule);white-space:nowrap}
thead th,thead td{border-top:0;line-height:1.3;white-space:normal;color:var(--faint);font-size:14px;
vertical-align:bottom}
tbody th{font-weight:inherit;white-space:normal}
th:first-child,td:first-child{padding-left:0}
.left{text-align:left}
tr.first>*{padding-bottom:1px;color:var(--faint)}
tr.inner>*{border-top:0;padding-top:0}
tr.total>*{font-weight:640}
pre.text{font:14px/1.85 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;white-space:pre-wrap;
overflow-wrap:anywhere;tab-size:4}
.prompt{color:var(--faint)}
.step{border-radius:3px;padding:2px 0 2px 4px;margin-right:1px;box-shadow:inset 2px 0 0 var(--accent)}
.step:hover{outline:1px solid var(--accent)}
.drafted{border-bottom:2px solid var(--accent)}
.break::before{content:"\\21B5";opacity:.62;font-size:.85em}
.n1{background:var(--tint-1)}.n2{background:var(--tint-2)}.n3{background:var(--tint-3)}
.n4{background:var(--tint-4)}.n5{background:var(--tint-5)}.n6{background:var(--tint-6)}
.key{font:13px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace}
.legend{display:flex;flex-wrap:wrap;gap:6px 22px;list-style:none;margin:0 0 16px;padding:0;font-size:14px;
color:var(--faint)}
.legend .key{color:var(--ink)}
.counts{display:grid;grid-template-columns:max-content minmax(0,1fr) max-content;gap:6px 12px;align-items:center;
margin-top:20px;padding-top:16px;border-top:1px solid var(--rule);font-size:14px;font-variant-numeric:tabular-nums}
.counts .wide{grid-column:1/-1;color:var(--faint)}
.counts .bar{height:12px;border-radius:2px;box-shadow:inset 2px 0 0 var(--accent)}
.counts .share{text-align:right;color:var(--faint)}
.tree svg,.chart svg{display:block;height:auto}
.tree svg{margin:0 auto}
.chart svg{width:100%;max-width:480px;margin:0 auto}
svg text{font-family:system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif;
font-variant-numeric:tabular-nums}
.bars{margin:6px 0 18px;font-size:14px;font-variant-numeric:tabular-nums}
.bars strong{font-weight:640}
.bars .length{display:flex;height:28px;border-radius:3px;overflow:hidden;margin:5px 0 18px}
.bars .length i{display:block;height:100%;min-width:2px;border-right:1px solid var(--card)}
.bars .length i:last-child{border-right:0}
.swatch{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:9px}
details{margin-top:14px;font-size:14px}
summary{cursor:pointer;color:var(--accent)}
details .scroll{margin-top:10px;max-height:340px;overflow-y:auto}
footer{margin-top:52px;padding-top:18px;border-top:1px solid var(--rule)}
code{font:.94em ui-monospace,SFMono-Regular,Menlo,Consolas,"Liberation Mono",monospace;overflow-wrap:anywhere}
@media (min-width:900px){
.columns.two{grid-template-columns:minmax(0,1fr) minmax(0,1fr)}
.columns.text{grid-template-columns:minmax(0,1.35fr) minmax(0,1fr)}
.columns .across{grid-column:1/-1}
.split{display:grid;grid-template-columns:minmax(0,1.2fr) minmax(0,1fr);gap:36px;align-items:center}
}
@media (max-width:520px){.roomy{display:none}
th,td{padding-left:5px}table,thead th{font-size:13px}caption{font-size:13px}}
@media print{.card{break-inside:avoid}body{background:#fff}}
"""

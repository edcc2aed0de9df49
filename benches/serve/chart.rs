//! Draws ratios as horizontal bars: an SVG that is readable on light and on dark pages.

use super::report::{Bar, Better};
use std::fmt::Write;

/// Dimensions of the chart, in pixels.
const WIDTH: f64 = 1010.0;
const LINE: f64 = 22.0;
const PLOT: f64 = 520.0;
const PLOT_END: f64 = 910.0;
/// Largest ratio on the scale. Bars beyond end here; the text beside them has the true ratio.
const MAX_RATIO: f64 = 8.0;

const STYLE: &str = "
text { font: 12px system-ui, sans-serif; fill: #1f2328 }
.title { font-size: 16px; font-weight: 600 } .group { font-weight: 600 } .soft { fill: #59636e } .end { text-anchor: end }
.middle { text-anchor: middle } .page { fill: #ffffff } .ahead { fill: #1a7f37 } .behind { fill: #bc4c00 }
.line { stroke: #d1d9e0 } .one { stroke: #59636e; stroke-width: 1.5 } .goal { stroke: #0969da; stroke-width: 3 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .soft { fill: #9198a1 } .page { fill: #0d1117 } .ahead { fill: #3fb950 } .behind { fill: #db6d28 }
.line { stroke: #3d444d } .one { stroke: #9198a1 } .goal { stroke: #58a6ff } }
";

const LEGEND: &str = r#"<rect class="ahead" x="520" y="18" width="14" height="14"/><text x="540" y="29">ahead of the rival</text>
<rect class="behind" x="660" y="18" width="14" height="14"/><text x="680" y="29">behind it</text>
<line class="goal" x1="760" x2="760" y1="16" y2="34"/><text x="768" y="29">goal</text>"#;

/// Returns the whole SVG file.
pub fn draw(bars: &[Bar], machine: &str) -> String {
    let groups = [
        (Better::More, "Rates: to the right is better"),
        (Better::Less, "Times and costs: to the left is better"),
    ];
    let (mut body, mut y) = (String::new(), 60.0);
    for (better, heading) in groups {
        let bars: Vec<&Bar> = bars.iter().filter(|bar| bar.better == better).collect();
        if !bars.is_empty() {
            group(&mut body, &mut y, heading, &bars);
        }
    }
    let machine = escape(machine);
    format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" viewBox=\"0 0 {WIDTH} {height}\" width=\"{WIDTH}\" height=\"{height}\" \
         role=\"img\" aria-labelledby=\"title desc\">\n<title id=\"title\">peerix beside others: ratios</title>\n\
         <desc id=\"desc\">{machine} Each bar is the ratio of the medians, peerix to the rival named, on a logarithmic \
         scale.</desc>\n<style>{STYLE}</style>\n<rect class=\"page\" width=\"100%\" height=\"100%\"/>\n\
         <text class=\"title\" x=\"16\" y=\"28\">peerix ÷ rival, logarithmic</text>\n\
         {LEGEND}\n{body}<text class=\"soft\" x=\"16\" y=\"{y}\">{short}</text>\n</svg>\n",
        height = y + 16.0,
        short = machine.split(". ").next().unwrap_or_default(),
    )
}

fn group(body: &mut String, y: &mut f64, heading: &str, bars: &[&Bar]) {
    let (top, bottom) = (*y + 10.0, *y + 10.0 + LINE * bars.len() as f64);
    let mut add = |line: String| writeln!(body, "{line}").expect("a string takes everything");
    add(format!("<text class=\"group\" x=\"16\" y=\"{y}\">{heading}</text>"));
    for tick in [0.125, 0.25, 0.5, 1.0, 2.0, 4.0, 8.0] {
        let (x, class) = (place(tick), if tick == 1.0 { "one" } else { "line" });
        add(format!(
            "<line class=\"{class}\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{top}\" y2=\"{bottom}\"/>"
        ));
        add(format!("<text class=\"soft middle\" x=\"{x:.1}\" y=\"{y}\">{tick}</text>"));
    }
    for (bar, n) in bars.iter().zip(0u32..) {
        let top = top + LINE * f64::from(n);
        let (one, end, text) = (place(1.0), place(bar.ratio), top + 15.0);
        let ahead =
            if (bar.ratio >= 1.0) == (bar.better == Better::More) { "ahead" } else { "behind" };
        add(format!(
            "<text class=\"end\" x=\"{:.1}\" y=\"{text}\">{} <tspan class=\"soft\">÷ {}</tspan></text>",
            PLOT - 12.0,
            escape(&bar.what),
            escape(&bar.rival)
        ));
        add(format!(
            "<rect class=\"{ahead}\" x=\"{:.1}\" y=\"{}\" width=\"{:.1}\" height=\"{}\"/>",
            one.min(end),
            top + 4.0,
            (end - one).abs().max(1.0),
            LINE - 8.0
        ));
        if let Some(goal) = bar.goal {
            let x = place(goal);
            add(format!(
                "<line class=\"goal\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{}\" y2=\"{}\"/>",
                top + 1.0,
                top + LINE - 1.0
            ));
        }
        let mark = bar.goal.map_or("", |_| if bar.reached() { " ✓" } else { " ✗" });
        add(format!("<text x=\"{}\" y=\"{text}\">{:.2}{mark}</text>", PLOT_END + 12.0, bar.ratio));
    }
    *y = bottom + 36.0;
}

/// Horizontal position of a ratio, in pixels; the scale is logarithmic.
fn place(ratio: f64) -> f64 {
    let share = (ratio.clamp(1.0 / MAX_RATIO, MAX_RATIO).log2() / MAX_RATIO.log2() + 1.0) / 2.0;
    PLOT + share * (PLOT_END - PLOT)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;")
}

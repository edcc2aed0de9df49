//! Series of measurements, and the table they end up in.

use std::fmt::Write;

/// What one contender reached in each round.
#[derive(Default, Clone)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a round.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The value that so many of 100 measurements do not exceed.
    pub fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
    }

    /// The one in the middle.
    pub fn median(&self) -> f64 {
        self.percentile(50)
    }

    fn show(&self) -> String {
        format!(
            "{} ({}–{})",
            short(self.median()),
            short(self.percentile(0)),
            short(self.percentile(100))
        )
    }
}

/// Three significant digits, or all that stand before the point.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A Markdown table that grows row by row, and is shown as it does.
pub struct Table {
    text: String,
}

impl Table {
    /// With its header.
    pub fn new() -> Table {
        let mut table = Table { text: String::new() };
        table.line("| what | peerix | compared with | | ratio | goal |");
        table.line("|---|---|---|---|---|---|");
        table
    }

    /// A figure that stands alone.
    pub fn alone(&mut self, what: &str, own: &Series, goal: &str) {
        self.line(&format!("| {what} | {} | | | | {goal} |", own.show()));
    }

    /// A figure beside that of `other`, and how many times it peerix needs or reaches.
    pub fn beside(&mut self, what: &str, own: &Series, other: &str, its: &Series, goal: &str) {
        let ratio = own.median() / its.median();
        self.line(&format!(
            "| {what} | {} | {other} | {} | {ratio:.2} | {goal} |",
            own.show(),
            its.show()
        ));
    }

    fn line(&mut self, line: &str) {
        println!("{line}");
        writeln!(self.text, "{line}").expect("a string takes everything");
    }

    /// All of it.
    pub fn text(&self) -> &str {
        &self.text
    }
}

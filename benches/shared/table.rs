//! Series of measurements, and the Markdown table of results.

use std::fmt::Write;

/// Measurements of one contender, one per round.
#[derive(Default, Clone)]
pub struct Series(Vec<f64>);

impl Series {
    /// Adds a measurement.
    pub fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    /// The measurement at index `len * percent / 100` in ascending order, or the last one if that
    /// is smaller. Panics if the series is empty.
    pub fn percentile(&self, percent: usize) -> f64 {
        let mut sorted = self.0.clone();
        sorted.sort_by(f64::total_cmp);
        sorted[(sorted.len() * percent / 100).min(sorted.len() - 1)]
    }

    /// The middle measurement; the upper one of the two if their number is even.
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

/// Formats with three significant digits, or with all digits before the decimal point. Values
/// below 1 get three decimals.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 100.0 => format!("{value:.0}"),
        v if v >= 10.0 => format!("{value:.1}"),
        v if v >= 1.0 => format!("{value:.2}"),
        _ => format!("{value:.3}"),
    }
}

/// A Markdown table that prints each row when it is added.
pub struct Table {
    text: String,
}

impl Table {
    /// A table with its header only, which it prints.
    pub fn new() -> Table {
        let mut table = Table { text: String::new() };
        table.line("| what | peerix | compared with | | ratio | goal |");
        table.line("|---|---|---|---|---|---|");
        table
    }

    /// Adds a row for a figure without a rival.
    pub fn alone(&mut self, what: &str, own: &Series, goal: &str) {
        self.line(&format!("| {what} | {} | | | | {goal} |", own.show()));
    }

    /// Adds a row with the figures of peerix and of `other`, and the ratio of their medians.
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

    /// The whole table.
    pub fn text(&self) -> &str {
        &self.text
    }
}

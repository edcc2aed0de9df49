//! The results: a table row for each figure and rival, and the bars of the chart.

use crate::shared::table::{Series, Table};

/// Direction in which a figure of peerix is better than that of a rival.
#[derive(Clone, Copy, PartialEq)]
pub enum Better {
    /// More is better: rates.
    More,
    /// Less is better: times and costs.
    Less,
}

/// A contender's name, and the function that measures its figures of one round; NaN if it has none.
pub type Contender<'a, const N: usize> = (String, Box<dyn Fn() -> [f64; N] + 'a>);

/// Index of a figure, index of a contender, and the ratio of peerix to that contender to reach.
pub type Goal = (usize, usize, f64);

/// One bar of the chart.
pub struct Bar {
    pub what: String,
    pub rival: String,
    pub ratio: f64,
    pub better: Better,
    pub goal: Option<f64>,
}

impl Bar {
    /// Returns true if the ratio reaches the goal, or if there is none.
    pub fn reached(&self) -> bool {
        self.goal.is_none_or(|goal| match self.better {
            Better::More => self.ratio >= goal,
            Better::Less => self.ratio <= goal,
        })
    }
}

/// All results so far.
pub struct Report {
    rounds: usize,
    table: Table,
    bars: Vec<Bar>,
}

impl Report {
    /// An empty report for benchmarks of `rounds` rounds.
    pub fn new(rounds: usize) -> Report {
        Report { rounds, table: Table::new(), bars: Vec::new() }
    }

    /// Runs all contenders in turn in every round, and adds rows. The first contender is peerix.
    /// Figures that are NaN get no row.
    pub fn compare<const N: usize>(
        &mut self,
        what: &str,
        figures: [(&str, Better); N],
        contenders: &[Contender<N>],
        goals: &[Goal],
    ) {
        let mut series: Vec<[Series; N]> =
            contenders.iter().map(|_| std::array::from_fn(|_| Series::default())).collect();
        for _ in 0..self.rounds {
            for ((_, run), series) in contenders.iter().zip(&mut series) {
                series.iter_mut().zip(run()).for_each(|(series, figure)| series.push(figure));
            }
        }
        for (at, (figure, better)) in figures.into_iter().enumerate() {
            let what = format!("{what}, {figure}");
            for rival in 1..contenders.len() {
                let goal =
                    goals.iter().find(|goal| (goal.0, goal.1) == (at, rival)).map(|goal| goal.2);
                let (own, its, rival_name) =
                    (&series[0][at], &series[rival][at], contenders[rival].0.clone());
                let ratio = own.median() / its.median();
                let bar = Bar { what: what.clone(), rival: rival_name, ratio, better, goal };
                // A bar for every figure would make the chart unreadable. Of several figures it
                // shows rates, and figures with a goal.
                if ratio.is_finite() {
                    self.row(bar, own, its, rival == 1 && (better == Better::More || N == 1));
                }
            }
        }
    }

    fn row(&mut self, bar: Bar, own: &Series, its: &Series, drawn: bool) {
        let (arrow, sign) =
            if bar.better == Better::More { ("↑", "≥") } else { ("↓", "≤") };
        let mark = if bar.reached() { "✓" } else { "✗" };
        let goal = bar.goal.map(|goal| format!("{sign} {goal} {mark}")).unwrap_or_default();
        self.table.beside(
            &format!("{} {arrow}", bar.what),
            own,
            &bar.rival.replace('|', "\\|"),
            its,
            &goal,
        );
        if bar.goal.is_some() || drawn {
            self.bars.push(bar);
        }
    }

    /// The table as Markdown.
    pub fn text(&self) -> &str {
        self.table.text()
    }

    /// The bars of the chart.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }
}

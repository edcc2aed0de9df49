//! The results: a row for each figure and rival, and what the chart shows of them.

use crate::shared::table::{Series, Table};

/// Which ratio of peerix to a rival is the better one.
#[derive(Clone, Copy, PartialEq)]
pub enum Better {
    /// Rates.
    More,
    /// Times and costs.
    Less,
}

/// A contender and how it is asked for its figures of a round; one that it has not is not a number.
pub type Contender<'a, const N: usize> = (String, Box<dyn Fn() -> [f64; N] + 'a>);

/// The ratio to reach: of the figure with that number, to the contender with that number.
pub type Goal = (usize, usize, f64);

/// A bar of the chart.
pub struct Bar {
    pub what: String,
    pub rival: String,
    pub ratio: f64,
    pub better: Better,
    pub goal: Option<f64>,
}

impl Bar {
    /// Whether the goal is reached; true if there is none.
    pub fn reached(&self) -> bool {
        self.goal.is_none_or(|goal| match self.better {
            Better::More => self.ratio >= goal,
            Better::Less => self.ratio <= goal,
        })
    }
}

/// Everything found so far.
pub struct Report {
    rounds: usize,
    table: Table,
    bars: Vec<Bar>,
}

impl Report {
    /// An empty one.
    pub fn new(rounds: usize) -> Report {
        Report { rounds, table: Table::new(), bars: Vec::new() }
    }

    /// Has all contenders, the first of which is peerix, do something in turn, round after round,
    /// and adds rows.
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
                // All figures would make a chart that nobody reads: of several the rates are drawn,
                // and what has a goal.
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

    /// The table.
    pub fn text(&self) -> &str {
        self.table.text()
    }

    /// What a chart shows.
    pub fn bars(&self) -> &[Bar] {
        &self.bars
    }
}

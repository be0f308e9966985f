//! What the lab prints: checks line by line, and tables of figures.

use std::error::Error;
use std::fmt::Display;
use std::io::{self, Write};

/// Checks as they come, one line each, and how many failed.
#[derive(Debug)]
pub struct Report<W> {
    out: W,
    failed: usize,
}

impl<W: Write> Report<W> {
    /// An empty report that goes to `out`.
    pub fn new(out: W) -> Report<W> {
        Report { out, failed: 0 }
    }

    /// Begins a part.
    ///
    /// # Errors
    /// When `out` takes no more.
    pub fn heading(&mut self, text: impl Display) -> io::Result<()> {
        writeln!(self.out, "\n{text}")?;
        self.out.flush()
    }

    /// Adds a line that is neither right nor wrong.
    ///
    /// # Errors
    /// When `out` takes no more.
    pub fn line(&mut self, text: impl Display) -> io::Result<()> {
        writeln!(self.out, "        {text}")?;
        self.out.flush()
    }

    /// Adds a check.
    ///
    /// # Errors
    /// When `out` takes no more.
    pub fn check(&mut self, is_right: bool, text: impl Display) -> io::Result<()> {
        let verdict = if is_right { "ok  " } else { "FAIL" };
        self.failed += usize::from(!is_right);
        writeln!(self.out, "  {verdict}  {text}")?;
        self.out.flush()
    }

    /// Adds a check that has a reason or an explanation: `what` and either of them.
    ///
    /// # Errors
    /// When `out` takes no more.
    pub fn outcome<E: Error>(
        &mut self,
        what: impl Display,
        outcome: Result<impl Display, E>,
    ) -> io::Result<()> {
        match outcome {
            Ok(detail) => self.check(true, format_args!("{what}: {detail}")),
            Err(error) => {
                let mut reasons = error.to_string();
                let mut source = error.source();
                while let Some(reason) = source {
                    reasons += &format!(": {reason}");
                    source = reason.source();
                }
                self.check(false, format_args!("{what}: {reasons}"))
            }
        }
    }

    /// How many checks have failed.
    pub fn failed(&self) -> usize {
        self.failed
    }
}

/// Lays out rows in columns: the first one to the left, the others to the right.
#[must_use]
pub fn table(rows: &[Vec<String>]) -> String {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |column: usize| {
        rows.iter()
            .filter_map(|row| row.get(column))
            .map(|cell| cell.chars().count())
            .max()
    };
    let widths: Vec<usize> = (0..columns)
        .map(|column| width(column).unwrap_or(0))
        .collect();
    let mut text = String::new();
    for row in rows {
        let mut line = String::new();
        for (column, cell) in row.iter().enumerate() {
            let width = widths[column];
            line += &if column == 0 {
                format!("{cell:<width$}")
            } else {
                format!("  {cell:>width$}")
            };
        }
        text += line.trim_end();
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_failed_check_is_shown_and_counted() {
        let mut out = Vec::new();
        let mut report = Report::new(&mut out);
        report.check(true, "water is wet").expect("a vector");
        report.check(false, "fire is cold").expect("a vector");
        assert_eq!(report.failed(), 1);
        assert_eq!(
            String::from_utf8_lossy(&out),
            "  ok    water is wet\n  FAIL  fire is cold\n"
        );
    }

    #[test]
    fn columns_line_up() {
        let rows = [
            vec!["".into(), "Mbit/s".into()],
            vec!["direct".into(), "17".into()],
        ];
        assert_eq!(table(&rows), "        Mbit/s\ndirect      17\n");
    }
}
